// SPDX-License-Identifier: Apache-2.0

package gossip

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/hashicorp/go-msgpack/v2/codec"
	"github.com/hashicorp/memberlist"
)

// guarded is a push/pull stream whose one incoming message passes the filter before it is read.
type guarded struct {
	net.Conn
	t       *transport
	from    string
	inbound bool // opened by the peer: a label comes first
	buf     *bytes.Reader
	err     error
}

// guardLocked takes ownership of c.
func (t *transport) guardLocked(from string, c net.Conn, inbound bool) *guarded {
	g := &guarded{Conn: c, t: t, from: from, inbound: inbound}
	t.conns[g] = true
	return g
}

// Close closes the stream.
func (g *guarded) Close() error {
	g.t.mu.Lock()
	delete(g.t.conns, g)
	g.t.mu.Unlock()
	return g.Conn.Close()
}

// Read reads the whole message first. It is called by one goroutine.
func (g *guarded) Read(b []byte) (int, error) {
	if g.buf == nil && g.err == nil {
		var msg []byte
		if msg, g.err = g.message(); g.err == nil {
			g.buf = bytes.NewReader(msg)
		}
	}
	if g.err != nil {
		return 0, g.err
	}
	return g.buf.Read(b)
}

// RemoteAddr names the peer.
func (g *guarded) RemoteAddr() net.Addr { return peerAddr(g.from) }

func (g *guarded) message() ([]byte, error) {
	c := g.Conn
	if g.inbound {
		labelled, label, err := memberlist.RemoveLabelHeaderFromStream(g.Conn)
		if err != nil {
			return nil, err
		}
		if label != g.t.label {
			return nil, fmt.Errorf("gossip stream from %s: label %.40q", g.from, label)
		}
		c = labelled
	}
	r := bufio.NewReader(io.LimitReader(c, maxPushPull))
	kind, err := r.ReadByte()
	if err != nil {
		return nil, err
	}
	dec := codec.NewDecoder(r, handle())
	switch kind {
	case pushPullType:
		p, err := readPushPull(r, dec)
		if err != nil {
			return nil, fmt.Errorf("gossip stream from %s: %w", g.from, err)
		}
		g.t.filter.pushPull(g.from, p, time.Now())
		return p.marshal()
	case pingType:
		var m ping
		if err := dec.Decode(&m); err != nil {
			return nil, err
		}
		m.SourceNode, m.SourceAddr, m.SourcePort = g.from, syntheticIP(g.from), syntheticPort
		return encode(nil, kind, &m)
	case ackType:
		var m ack
		if err := dec.Decode(&m); err != nil {
			return nil, err
		}
		m.Payload = nil
		return encode(nil, kind, &m)
	case errType:
		var m errorReply
		if err := dec.Decode(&m); err != nil {
			return nil, err
		}
		m.Error = m.Error[:min(len(m.Error), 200)]
		return encode(nil, kind, &m)
	}
	return nil, fmt.Errorf("gossip stream from %s: type %d: %w", g.from, kind, errRefused)
}
