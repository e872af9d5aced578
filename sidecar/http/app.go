// SPDX-License-Identifier: Apache-2.0

package http

import (
	"context"
	"errors"
	"fmt"
	"net"
	nethttp "net/http"
	"slices"
	"sync"

	"golang.org/x/net/http2"
)

// errDial marks an instance that could not be connected to.
var errDial = errors.New("application does not accept connections")

// dialer knows its open connections, so that Close leaves none.
type dialer struct {
	dial func(context.Context, string) (net.Conn, error)

	mu     sync.Mutex
	closed bool
	open   map[*appConn]struct{}
}

type appConn struct {
	net.Conn
	from *dialer
}

func (c *appConn) Close() error {
	c.from.mu.Lock()
	delete(c.from.open, c)
	c.from.mu.Unlock()
	return c.Conn.Close()
}

// NetConn returns the connection below.
func (c *appConn) NetConn() net.Conn { return c.Conn }

func (d *dialer) to(ctx context.Context, address string) (net.Conn, error) {
	raw, err := d.dial(ctx, address)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errDial, err)
	}
	c := &appConn{raw, d}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		raw.Close()
		return nil, fmt.Errorf("%w: %w", errDial, net.ErrClosed)
	}
	d.open[c] = struct{}{}
	return c, nil
}

func (d *dialer) close() {
	d.mu.Lock()
	d.closed = true
	open := make([]*appConn, 0, len(d.open))
	for c := range d.open {
		open = append(open, c)
	}
	d.mu.Unlock()
	for _, c := range open {
		c.Close()
	}
}

// appPool holds the HTTP/2 connections to applications. It gives one connection to each try: the transport would wait
// between further ones, and the caller may have somewhere better to go.
type appPool struct {
	transport *http2.Transport
	dial      func(context.Context, string) (net.Conn, error)

	mu     sync.Mutex
	places map[string]*place
}

// place is one address; its dialling slot is taken by whoever connects, so that a burst makes one connection.
type place struct {
	dialling chan struct{}
	conns    []*http2.ClientConn // newest last; guarded by appPool.mu
}

func (p *appPool) GetClientConn(r *nethttp.Request, address string) (*http2.ClientConn, error) {
	if mark, ok := r.Context().Value(markKey{}).(*sentMark); ok && !mark.again(1) {
		return nil, errUnsent
	}
	p.mu.Lock()
	at := p.places[address]
	if at == nil {
		at = &place{dialling: make(chan struct{}, 1)}
		p.places[address] = at
	}
	p.mu.Unlock()
	if cc := p.reserve(at); cc != nil {
		return cc, nil
	}
	select {
	case at.dialling <- struct{}{}:
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	defer func() { <-at.dialling }()
	if cc := p.reserve(at); cc != nil {
		return cc, nil
	}
	c, err := p.dial(r.Context(), address)
	if err != nil {
		return nil, err
	}
	cc, err := p.transport.NewClientConn(c)
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("%w: %w", errDial, err)
	}
	cc.ReserveNewRequest()
	p.mu.Lock()
	defer p.mu.Unlock()
	at.conns = append(at.conns, cc)
	return cc, nil
}

func (p *appPool) reserve(at *place) *http2.ClientConn {
	p.mu.Lock()
	defer p.mu.Unlock()
	at.conns = slices.DeleteFunc(at.conns, func(cc *http2.ClientConn) bool { return cc.State().Closed })
	for _, cc := range slices.Backward(at.conns) {
		if cc.ReserveNewRequest() {
			return cc
		}
	}
	return nil
}

// MarkDead forgets a connection that has ended.
func (p *appPool) MarkDead(cc *http2.ClientConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for address, at := range p.places {
		if i := slices.Index(at.conns, cc); i >= 0 {
			at.conns = slices.Delete(at.conns, i, i+1)
			if len(at.conns) == 0 && len(at.dialling) == 0 {
				delete(p.places, address)
			}
			return
		}
	}
}

// close cuts all connections.
func (p *appPool) close() {
	p.mu.Lock()
	var all []*http2.ClientConn
	for _, at := range p.places {
		all = append(all, at.conns...)
	}
	p.mu.Unlock()
	for _, cc := range all {
		cc.Close()
	}
}
