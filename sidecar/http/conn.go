// SPDX-License-Identifier: Apache-2.0

package http

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	nethttp "net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
)

// Protocols of a connection between sidecars, as ALPN names them.
const (
	ProtoH2    = "h2"
	ProtoHTTP1 = "http/1.1"
)

// errUnsent is in the chain of an error whose request cannot have reached the application: it was never written, or the
// other side said that it did not look at it (REFUSED_STREAM, GOAWAY above the last id).
var errUnsent = errors.New("request not sent")

// ConnConfig configures a connection to a callee's sidecar.
type ConnConfig struct {
	// Protocol is "h2" or "http/1.1". Empty takes what TLS negotiated, and h2 on a connection without TLS.
	Protocol string
	// PingEvery is how long nothing may be received before a liveness ping is sent (h2), PingTimeout how long its answer may
	// take before the connection counts as dead. Together they bound how long a vanished peer goes unnoticed; lower values
	// cost a frame per idle connection and interval. Defaults 5 s and 4 s.
	PingEvery   time.Duration
	PingTimeout time.Duration
	// SuspectAfter is how long nothing may be received, though a ping was sent, before Ready says no (h2): what is in flight
	// may still be answered, and new requests go elsewhere. Default PingEvery and half of PingTimeout.
	SuspectAfter time.Duration
	// HeaderBytes limits a response's head; default 64 KiB.
	HeaderBytes int
}

func (cfg ConnConfig) withDefaults(c net.Conn) ConnConfig {
	if cfg.Protocol == "" {
		cfg.Protocol = ProtoH2
		if p := negotiated(c); p != "" {
			cfg.Protocol = p
		}
	}
	if cfg.PingEvery <= 0 {
		cfg.PingEvery = 5 * time.Second
	}
	if cfg.PingTimeout <= 0 {
		cfg.PingTimeout = 4 * time.Second
	}
	if cfg.SuspectAfter <= 0 {
		cfg.SuspectAfter = cfg.PingEvery + cfg.PingTimeout/2
	}
	if cfg.HeaderBytes <= 0 {
		cfg.HeaderBytes = 64 << 10
	}
	return cfg
}

// negotiated returns what ALPN chose on c, "" without TLS or ALPN.
func negotiated(c net.Conn) string {
	if t, ok := c.(interface{ ConnectionState() tls.ConnectionState }); ok {
		return t.ConnectionState().NegotiatedProtocol
	}
	return ""
}

const (
	windowStream  = 4 << 20  // of a response: 20 MB/s at 200 ms
	windowConn    = 64 << 20 // all streams of a connection together
	continueAfter = time.Second
	writeStall    = 30 * time.Second // of a whole connection
)

// Conn is a client connection of this engine. Safe for concurrent use.
type Conn struct {
	watched *watchedConn
	send    nethttp.RoundTripper
	h2      *http2.ClientConn // nil on http/1.1
	active  atomic.Int64
	retired atomic.Bool
	suspect time.Duration // silence after which it takes nothing new

	cancel context.CancelFunc // of Retire's wait
	ctx    context.Context
	wait   sync.WaitGroup
}

// NewClientConn takes ownership of an established connection to a callee's sidecar; on an error it is closed. A
// connection that speaks http/1.1 carries one request at a time.
func NewClientConn(c net.Conn, cfg ConnConfig) (*Conn, error) {
	cfg = cfg.withDefaults(c)
	conn := &Conn{watched: &watchedConn{Conn: c, closed: make(chan struct{}), born: time.Now()}, suspect: cfg.SuspectAfter}
	conn.ctx, conn.cancel = context.WithCancel(context.Background())
	t1 := &nethttp.Transport{
		DisableCompression: true, ExpectContinueTimeout: continueAfter, MaxResponseHeaderBytes: int64(cfg.HeaderBytes),
		MaxConnsPerHost: 1, TLSNextProto: map[string]func(string, *tls.Conn) nethttp.RoundTripper{},
		HTTP2: &nethttp.HTTP2Config{MaxReceiveBufferPerStream: windowStream, MaxReceiveBufferPerConnection: windowConn},
	}
	switch cfg.Protocol {
	case ProtoHTTP1:
		t1.DialContext = (&once{conn: conn.watched}).dial
		conn.send = t1
		return conn, nil
	case ProtoH2:
	default:
		c.Close()
		return nil, fmt.Errorf("http client connection: protocol %q", cfg.Protocol)
	}
	t2, err := http2.ConfigureTransports(t1)
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("http client connection: %w", err)
	}
	t2.AllowHTTP, t2.ConnPool = true, onlyConn{conn}
	t2.MaxHeaderListSize = uint32(cfg.HeaderBytes)
	t2.ReadIdleTimeout, t2.PingTimeout, t2.WriteByteTimeout = cfg.PingEvery, cfg.PingTimeout, writeStall
	if conn.h2, err = t2.NewClientConn(conn.watched); err != nil {
		c.Close()
		return nil, fmt.Errorf("http client connection: %w", err)
	}
	conn.send = t2
	return conn, nil
}

// RoundTrip sends one request. Its host decides nothing: the connection is what it is.
func (c *Conn) RoundTrip(r *nethttp.Request) (*nethttp.Response, error) {
	if c.retired.Load() {
		return nil, fmt.Errorf("connection retired: %w", errUnsent)
	}
	c.active.Add(1)
	mark := &sentMark{}
	r = mark.attach(r)
	if r.Host == "" {
		r.Host = r.URL.Host
	}
	u := *r.URL
	u.Scheme, u.Host = "http", "callee.invalid" // one key for net/http's pool of one; never resolved, never sent
	r.URL = &u
	resp, err := c.send.RoundTrip(r)
	if err != nil {
		c.finished()
		return nil, mark.classify(err)
	}
	resp.Body = c.counted(resp.Body)
	return resp, nil
}

// counted makes the end of a response's body the end of its request. What a 101 response switched to stays writable.
func (c *Conn) counted(body io.ReadCloser) io.ReadCloser {
	done := sync.OnceFunc(c.finished)
	if rw, ok := body.(io.ReadWriteCloser); ok {
		return &switchedBody{ReadWriteCloser: rw, conn: c.watched, done: done}
	}
	return &countedBody{body, done}
}

// finished ends one request; an HTTP/1.1 connection that is retired has no other.
func (c *Conn) finished() {
	if c.active.Add(-1) == 0 && c.h2 == nil && c.retired.Load() {
		c.watched.Close()
	}
}

type countedBody struct {
	io.ReadCloser
	done func()
}

func (b *countedBody) Close() error {
	defer b.done()
	return b.ReadCloser.Close()
}

// Ready reports whether another request can be sent now.
func (c *Conn) Ready() bool {
	select {
	case <-c.watched.closed:
		return false
	default:
	}
	if c.retired.Load() {
		return false
	}
	if c.h2 != nil {
		return c.watched.silence() < c.suspect && c.h2.CanTakeNewRequest()
	}
	return c.active.Load() == 0
}

// Active is the number of requests in progress.
func (c *Conn) Active() int { return int(c.active.Load()) }

// Retire takes no more requests, lets those in progress end, and then closes. It does not wait.
func (c *Conn) Retire() {
	if c.retired.Swap(true) {
		return
	}
	if c.h2 == nil {
		if c.active.Load() == 0 {
			c.watched.Close()
		}
		return
	}
	c.h2.SetDoNotReuse()
	c.wait.Add(1)
	go c.shutdown()
}

// shutdown waits for the last stream; Close ends the wait.
func (c *Conn) shutdown() {
	defer c.wait.Done()
	_ = c.h2.Shutdown(c.ctx) // its only error is that ctx ended
	c.watched.Close()
}

// Closed is closed when the connection has ended, whatever ended it.
func (c *Conn) Closed() <-chan struct{} { return c.watched.closed }

// Close cuts the connection and what is on it.
func (c *Conn) Close() error {
	c.retired.Store(true)
	c.cancel()
	if c.h2 != nil {
		c.h2.Close()
	}
	err := c.watched.Close()
	c.wait.Wait()
	if t, ok := c.send.(*nethttp.Transport); ok {
		t.CloseIdleConnections()
	}
	return err
}

// watchedConn tells when it was closed.
type watchedConn struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
	err    error
	born   time.Time
	heard  atomic.Int64 // when something was last received, since born
}

func (w *watchedConn) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if n > 0 {
		w.heard.Store(int64(time.Since(w.born)))
	}
	return n, err
}

// silence is how long nothing has been received.
func (w *watchedConn) silence() time.Duration {
	return time.Since(w.born) - time.Duration(w.heard.Load())
}

func (w *watchedConn) Close() error {
	w.once.Do(func() {
		w.err = w.Conn.Close()
		close(w.closed)
	})
	return w.err
}

// NetConn returns the connection below.
func (w *watchedConn) NetConn() net.Conn { return w.Conn }

// once hands out its connection to the first dial only: what net/http would send again on a second one is refused with
// errUnsent, which says nothing by itself; sentMark knows whether the first was written.
type once struct {
	conn net.Conn
	used atomic.Bool
}

func (o *once) dial(context.Context, string, string) (net.Conn, error) {
	if o.used.Swap(true) {
		return nil, errSpent
	}
	return o.conn, nil
}

var errSpent = errors.New("connection has ended")

// onlyConn is the pool of one HTTP/2 connection. The transport asks a second time for the same request exactly when the
// first try was provably not looked at by the other side; that is how we learn it without reading error texts.
type onlyConn struct{ conn *Conn }

func (p onlyConn) GetClientConn(r *nethttp.Request, _ string) (*http2.ClientConn, error) {
	if mark, ok := r.Context().Value(markKey{}).(*sentMark); ok && !mark.again(1) {
		return nil, errUnsent
	}
	return p.conn.h2, nil
}

func (onlyConn) MarkDead(*http2.ClientConn) {}

// quiet drops what net/http would print: each event there is also an error that we return and count.
var quiet = log.New(io.Discard, "", 0)
