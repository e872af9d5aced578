// SPDX-License-Identifier: Apache-2.0

package discovery

import (
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Holder is one stream that is subscribed to a resource.
type Holder struct {
	Peer  spiffeid.ID
	Node  string
	Since time.Time // of the stream
	Acked bool      // it has put what is published now in force
}

// Holders names the streams that are subscribed to a resource, in no order, and returns the body published; nil if there is none.
// Streams that may not see it are left out. Do not modify body.
func (s *Server) Holders(typeURL, name string) (body []byte, list []Holder) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.types[typeURL]
	if t == nil || t.entries[name] == nil {
		return nil, nil
	}
	e := t.entries[name]
	if e.resource != nil {
		body = e.resource.wire.GetResource().GetValue()
	}
	for st, sub := range e.subscribers {
		if !sub.hidden {
			list = append(list, Holder{Peer: st.peer, Node: st.node, Since: st.since, Acked: sub.acked && sub.sent == e.version()})
		}
	}
	return body, list
}
