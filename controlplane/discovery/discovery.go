// SPDX-License-Identifier: Apache-2.0

package discovery

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Wildcard is the name that stands for all resources of a type.
const Wildcard = "*"

// Config says who may see what.
type Config struct {
	// Peer says who calls; required. identity.PeerFromContext knows.
	Peer func(context.Context) (spiffeid.ID, error)
	// Authorize judges one resource for one peer, each time it would be sent; name Wildcard asks whether all may be subscribed at
	// once. What it refuses looks as if it did not exist. Required. See RoleAuthorize.
	Authorize func(ctx context.Context, peer spiffeid.ID, node, typeURL, name string) error
	// VerifyNode judges the node of a stream's first request; an error ends the stream. nil: any.
	VerifyNode func(ctx context.Context, peer spiffeid.ID, node *controlpb.Node) error
	// MaxNames bounds the names that one stream may subscribe (20,000). Raising it costs about 200 bytes a name.
	MaxNames int
	// MaxResponse bounds the bodies in one incremental response, in bytes (1 MiB); more is split. State-of-the-world
	// responses cannot be split.
	MaxResponse int
	Now         func() time.Time
	Logger      *slog.Logger
}

// Server is the index and its subscribers.
type Server struct {
	cfg Config
	log *slog.Logger

	mu      sync.Mutex
	open    bool // every type is answered
	types   map[string]*typeIndex
	streams map[*stream]struct{}
	acked   chan struct{} // closed at the next change of acknowledgements; nil: nobody waits
}

// New returns an empty Server.
func New(cfg Config) (*Server, error) {
	if cfg.Authorize == nil || cfg.Peer == nil {
		return nil, fmt.Errorf("discovery: Peer and Authorize are required")
	}
	if cfg.MaxNames <= 0 {
		cfg.MaxNames = 20_000
	}
	if cfg.MaxResponse <= 0 {
		cfg.MaxResponse = 1 << 20
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: cfg, log: cfg.Logger, types: map[string]*typeIndex{}, streams: map[*stream]struct{}{}}, nil
}

// Register serves on r under Envoy's service name.
func (s *Server) Register(r grpc.ServiceRegistrar) { controlpb.RegisterADSServer(r, s) }

// Open answers subscriptions of every type from now on, also of types without resources.
func (s *Server) Open() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open {
		return
	}
	s.open = true
	for _, t := range s.types {
		s.openTypeLocked(t)
	}
}

// Set publishes one resource. Nothing is pushed if its bytes are those already published.
func (s *Server) Set(typeURL, name string, msg proto.Message) error {
	r, err := newResource(typeURL, name, msg)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.putLocked(s.typeLocked(typeURL), name, r)
	return nil
}

// Delete withdraws one resource.
func (s *Server) Delete(typeURL, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.putLocked(s.typeLocked(typeURL), name, nil)
}

// Replace publishes exactly the given resources of a type, and begins to answer that type. If one cannot be marshalled,
// nothing changes.
func (s *Server) Replace(typeURL string, all map[string]proto.Message) error {
	next := make(map[string]*resource, len(all))
	for name, msg := range all {
		r, err := newResource(typeURL, name, msg)
		if err != nil {
			return err
		}
		next[name] = r
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.typeLocked(typeURL)
	for name, r := range next {
		s.putLocked(t, name, r)
	}
	for name, e := range t.entries {
		if _, keep := next[name]; !keep && e.resource != nil {
			s.putLocked(t, name, nil)
		}
	}
	s.openTypeLocked(t)
	return nil
}

// Judge asks Authorize again about everything that is subscribed, after what it answers from has changed.
func (s *Server) Judge() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for url, t := range s.types {
		for name, e := range t.entries {
			for st := range e.subscribers {
				st.types[url].dirty[name] = struct{}{}
				st.kick()
			}
		}
	}
}

// Nack is one subscriber's refusal of the version published now.
type Nack struct {
	Peer    spiffeid.ID
	Node    string
	Version string
	Message string
	At      time.Time
}

// Acked says how many of the streams that are subscribed to a resource have acknowledged what is published now, its absence
// included, and which refused it.
func (s *Server) Acked(typeURL, name string) (acked, subscribed int, nacks []Nack) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.types[typeURL]
	if t == nil || t.entries[name] == nil {
		return 0, 0, nil
	}
	e := t.entries[name]
	version := e.version()
	for _, sub := range e.subscribers {
		if sub.hidden {
			continue
		}
		subscribed++
		switch {
		case sub.refused != nil && sub.refused.Version == version:
			nacks = append(nacks, *sub.refused)
		case sub.acked && sub.sent == version:
			acked++
		}
	}
	return acked, subscribed, nacks
}

// Version returns the version published of a resource; "" if there is none.
func (s *Server) Version(typeURL, name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.types[typeURL]; t != nil && t.entries[name] != nil {
		return t.entries[name].version()
	}
	return ""
}

// Changed is closed at the next acknowledgement, refusal, subscription or end of one.
func (s *Server) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.acked == nil {
		s.acked = make(chan struct{})
	}
	return s.acked
}

func (s *Server) ackedLocked() {
	if s.acked != nil {
		close(s.acked)
		s.acked = nil
	}
}

// Subscriber is one open stream.
type Subscriber struct {
	Peer    spiffeid.ID
	Node    string
	Since   time.Time
	Delta   bool
	Names   int  // subscribed
	Current bool // everything published for it was acknowledged
}

// Subscribers lists the open streams, in no order.
func (s *Server) Subscribers() []Subscriber {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Subscriber, 0, len(s.streams))
	for st := range s.streams {
		one := Subscriber{Peer: st.peer, Node: st.node, Since: st.since, Delta: st.delta, Current: true}
		for _, ts := range st.types {
			one.Names += len(ts.names)
			if len(ts.dirty) > 0 || len(ts.unanswered) > 0 {
				one.Current = false
			}
		}
		all = append(all, one)
	}
	return all
}
