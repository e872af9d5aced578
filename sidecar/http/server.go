// SPDX-License-Identifier: Apache-2.0

package http

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	nethttp "net/http"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// server serves connections one by one and waits for each.
type server struct {
	limits  Limits
	handler func(*served, nethttp.ResponseWriter, *nethttp.Request)
	opened  func(proto string) func(reason string)

	mu     sync.Mutex
	closed bool
	conns  map[*served]struct{}
	wait   sync.WaitGroup
}

func newServer(limits Limits, handler func(*served, nethttp.ResponseWriter, *nethttp.Request)) *server {
	return &server{limits: limits, handler: handler, conns: map[*served]struct{}{}}
}

// served is one connection being served.
type served struct {
	net.Conn // what the HTTP server reads and writes
	raw      net.Conn
	server   *server
	peer     spiffeid.ID // inbound only
	proto    string      // of this connection
	over     chan struct{}
	once     sync.Once
	outer    context.Context // its end asks for a graceful end
	base     context.Context
	cancel   context.CancelFunc

	mu       sync.Mutex
	ended    bool
	handlers sync.WaitGroup
}

// Close closes the connection; net/http calls it when it is done with it.
func (c *served) Close() error {
	err := net.ErrClosed
	c.once.Do(func() {
		err = c.Conn.Close()
		close(c.over)
	})
	return err
}

// NetConn returns the connection below.
func (c *served) NetConn() net.Conn { return c.raw }

// draining reports whether the connection is to end after what is in progress.
func (c *served) draining() bool { return c.outer.Err() != nil }

// ServeHTTP runs the handler so that serve can wait for it.
func (c *served) ServeHTTP(w nethttp.ResponseWriter, r *nethttp.Request) {
	c.mu.Lock()
	if c.ended {
		c.mu.Unlock()
		panic(nethttp.ErrAbortHandler) // the documented way to end a handler without a response
	}
	c.handlers.Add(1)
	c.mu.Unlock()
	defer c.handlers.Done()
	c.server.handler(c, w, r)
}

// serve owns raw until it returns. proto is what ALPN chose; "" looks at the first bytes.
func (s *server) serve(ctx context.Context, raw net.Conn, proto string, peer spiffeid.ID) {
	c := &served{Conn: raw, raw: raw, server: s, peer: peer, proto: proto, over: make(chan struct{}), outer: ctx}
	c.base, c.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer c.cancel()
	if !s.add(c) {
		c.Close()
		return
	}
	defer s.remove(c)
	defer c.Close()
	if c.proto == "" && !c.peek(ctx) {
		return
	}
	closeReason := "end"
	if s.opened != nil {
		done := s.opened(c.proto)
		defer func() { done(closeReason) }()
	}
	h := c.httpServer()
	drained := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(drained)
		c.drain(h)
	})
	if c.proto == ProtoH2 {
		c.serveH2(h)
	} else {
		_ = h.Serve(&oneListener{conn: c, closed: make(chan struct{})}) // its error is that there is nothing more to accept
		<-c.over
	}
	c.Close()
	c.cancel()
	c.mu.Lock()
	c.ended = true
	c.mu.Unlock()
	c.handlers.Wait()
	if !stop() {
		closeReason = "drain"
		<-drained
	}
}

func (s *server) add(c *served) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.conns[c] = struct{}{}
	s.wait.Add(1)
	return true
}

func (s *server) remove(c *served) {
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	s.wait.Done()
}

// close cuts every connection and waits until nothing of them runs.
func (s *server) close() {
	s.mu.Lock()
	s.closed = true
	for c := range s.conns {
		c.cancel()
		c.cut()
	}
	s.mu.Unlock()
	s.wait.Wait()
}

// cut ends the connection so that the other side does not take it for a clean end: without close_notify, with a reset.
func (c *served) cut() {
	reset(c.raw)
	c.Close()
}

// reset makes the coming close of c a reset, at whatever depth the socket is.
func reset(c net.Conn) {
	for range 8 {
		switch t := c.(type) {
		case *net.TCPConn:
			_ = t.SetLinger(0)
			_ = t.Close()
			return
		case interface{ NetConn() net.Conn }:
			c = t.NetConn()
		default:
			_ = c.Close()
			return
		}
	}
}

// peek decides between HTTP/1.1 and HTTP/2 by the first bytes. It reports false when there is nothing to serve.
func (c *served) peek(ctx context.Context) bool {
	_ = c.raw.SetReadDeadline(time.Now().Add(c.server.limits.HeaderTimeout))
	stop := context.AfterFunc(ctx, func() { _ = c.raw.SetReadDeadline(time.Unix(1, 0)) })
	var head [len(http2.ClientPreface)]byte
	n := 0
	for n < len(head) && string(head[:n]) == http2.ClientPreface[:n] {
		m, err := c.raw.Read(head[n:])
		if n += m; err != nil {
			stop()
			return false
		}
	}
	if !stop() {
		return false
	}
	c.proto = ProtoHTTP1
	if n == len(head) && string(head[:]) == http2.ClientPreface {
		c.proto = ProtoH2
	}
	_ = c.raw.SetReadDeadline(time.Time{})
	c.Conn = &prefixConn{Conn: c.raw, prefix: bytes.Clone(head[:n])}
	return true
}

// prefixConn gives back what was peeked. Reads are not concurrent.
type prefixConn struct {
	net.Conn
	prefix []byte
}

func (p *prefixConn) Read(b []byte) (int, error) {
	if len(p.prefix) == 0 {
		return p.Conn.Read(b)
	}
	n := copy(b, p.prefix)
	if p.prefix = p.prefix[n:]; len(p.prefix) == 0 {
		p.prefix = nil
	}
	return n, nil
}

func (c *served) httpServer() *nethttp.Server {
	l := c.server.limits
	return &nethttp.Server{
		Handler: c, ErrorLog: quiet, MaxHeaderBytes: l.HeaderBytes, ReadHeaderTimeout: l.HeaderTimeout, IdleTimeout: l.Idle,
		BaseContext:  func(net.Listener) context.Context { return c.base },
		TLSNextProto: map[string]func(*nethttp.Server, *tls.Conn, nethttp.Handler){}, // no second HTTP/2 inside
	}
}

const (
	uploadStream = 1 << 20
	uploadConn   = 4 << 20
)

func (c *served) serveH2(h *nethttp.Server) {
	l := c.server.limits
	h2 := &http2.Server{
		MaxConcurrentStreams: l.Streams, IdleTimeout: l.Idle, MaxReadFrameSize: 64 << 10, WriteByteTimeout: writeStall,
		MaxUploadBufferPerStream: uploadStream, MaxUploadBufferPerConnection: uploadConn,
		ReadIdleTimeout: 30 * time.Second, PingTimeout: 10 * time.Second,
	}
	if err := http2.ConfigureServer(h, h2); err != nil {
		return
	}
	h2.ServeConn(c, &http2.ServeConnOpts{Context: c.base, BaseConfig: h, Handler: c})
}

// drain ends the connection gracefully: no new requests, those in progress get the grace period.
func (c *served) drain(h *nethttp.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), c.server.limits.Grace)
	defer cancel()
	// For HTTP/1.1 this waits for the connection; for HTTP/2, which the server does not count, it sends GOAWAY.
	_ = h.Shutdown(ctx)
	select {
	case <-c.over:
	case <-ctx.Done():
		c.cancel()
		c.cut()
	}
}

// oneListener accepts its one connection and then waits for its end, or for the server to stop accepting.
type oneListener struct {
	conn   *served
	got    bool
	once   sync.Once
	closed chan struct{}
}

func (l *oneListener) Accept() (net.Conn, error) {
	if !l.got {
		l.got = true
		return l.conn, nil
	}
	select {
	case <-l.conn.over:
	case <-l.closed:
	}
	return nil, net.ErrClosed
}

func (l *oneListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *oneListener) Addr() net.Addr { return l.conn.LocalAddr() }

// drainBody reads a little of a body that nobody wants, so that its connection can be used again, and closes it.
func drainBody(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, 4<<10) // more than that is cheaper to reset
	_ = body.Close()
}
