// SPDX-License-Identifier: Apache-2.0

package configapi

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/strait-mesh/strait/internal/crowd"
)

const (
	// maxUnproven bounds connections that have not sent a request yet: handshakes and heads. The oldest gives way to a new one, so
	// that they never take all of maxConnections.
	maxUnproven = maxConnections / 2
	// judgeEvery is how often connections are judged without being asked to: certificates end, and so do roles.
	judgeEvery = time.Second
)

// connections are those of the listener, with who is at their other end. A watch is one request that lasts for hours: what a request
// is judged by at its beginning has to be asked again while it lasts.
type connections struct {
	allow func(*x509.Certificate) error
	now   func() time.Time
	crowd *crowd.Crowd

	mu   sync.Mutex
	open map[net.Conn]*openConn
}

type openConn struct {
	done   func() // ends its time as an unproven one
	proven bool   // has sent a request, and so has ended its handshake
}

func newConnections(allow func(*x509.Certificate) error, now func() time.Time) *connections {
	return &connections{allow: allow, now: now, crowd: crowd.New(maxUnproven, nil), open: map[net.Conn]*openConn{}}
}

// state is http.Server's ConnState: a connection is active from its first request on.
func (c *connections) state(conn net.Conn, s http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch s {
	case http.StateNew:
		c.open[conn] = &openConn{done: c.crowd.Add(conn.RemoteAddr(), func() { cut(conn) })}
	case http.StateActive:
		if o := c.open[conn]; o != nil {
			o.proven = true
			o.done()
		}
	case http.StateHijacked, http.StateClosed:
		if o := c.open[conn]; o != nil {
			o.done()
			delete(c.open, conn)
		}
	}
}

// cut ends a connection without waiting for the other end to take an alert.
func cut(conn net.Conn) {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	_ = conn.Close()
}

// judge ends the connections whose certificate would not be accepted any more, watches with them. It returns how many.
func (c *connections) judge() int {
	c.mu.Lock()
	all := make([]*tls.Conn, 0, len(c.open))
	for conn, o := range c.open { // to ask one in its handshake would be to wait for it
		if t, ok := conn.(*tls.Conn); ok && o.proven {
			all = append(all, t)
		}
	}
	c.mu.Unlock()
	n := 0
	for _, conn := range all {
		if acceptable(conn.ConnectionState().VerifiedChains, c.allow, c.now()) != nil {
			cut(conn)
			n++
		}
	}
	return n
}

func (c *connections) run(ctx context.Context) {
	t := time.NewTicker(judgeEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			c.judge()
		}
	}
}
