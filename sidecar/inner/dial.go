// SPDX-License-Identifier: Apache-2.0

package inner

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/internal/relay"
	"github.com/strait-mesh/strait/sidecar/local"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

// Target is where a connection leads and who may answer.
type Target struct {
	SNI  string
	ALPN []string // nil for TCP ports
	// IDs that the callee may prove; never empty.
	IDs []spiffeid.ID
	// Address of the callee's sidecar; ignored with Via.
	Address string
	// Via is the local session of the gateway to go through; nil inside the cluster.
	Via *local.Session
	// Avoid names instances that the far gateway should not choose.
	Avoid       []preface.Handle
	Class       string
	Traceparent string
	// Export names the port in the withdrawal registry: "<ns>/<svc>:<port>@<cluster>".
	Export string
}

// Kind says what made a dial fail.
type Kind int

// The kinds. With each of them no byte of the application was sent.
const (
	Unreachable Kind = iota // no connection, or it broke in the handshake
	Gateway                 // this cluster's gateway was not reached
	Refused                 // a gateway answered with a refusal: Code
	Untrusted               // the callee did not prove an expected identity
	NoIdentity              // we have none to prove
)

// Error is why a dial failed.
type Error struct {
	Kind   Kind
	Code   preface.Code   // of Refused
	Handle preface.Handle // of the instance that failed, if a gateway said so
	Err    error
}

// Error returns the cause's message.
func (e *Error) Error() string { return "inner connection: " + e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Dialer makes connections.
type Dialer struct {
	Source *trust.Source
	// Enter registers a connection for withdrawal; nil: connections are not registered.
	Enter func(s withdrawal.Subject, peer *trust.Peer, end func(reason string)) (remove func())
	// Timeout bounds one dial in addition to its context. Default 3 s.
	Timeout time.Duration
	Net     func(ctx context.Context, address string) (net.Conn, error) // nil: TCP with keep-alives
}

// Conn is an established inner connection.
type Conn struct {
	*tls.Conn
	Peer    *trust.Peer
	Via     *local.Session // nil inside the cluster
	Handle  preface.Handle
	Counter uint64
	Made    time.Time
	Until   time.Time // when either end's certificate ends

	counted *countConn
	remove  func()
	closed  sync.Once
	reason  atomic.Pointer[string]
	onClose func()
}

// keepAlive finds a dead host below the application's patience; live but stuck processes are found by what runs above.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 3 * time.Second, Interval: time.Second, Count: 3}

// Dial makes one connection.
func (d *Dialer) Dial(ctx context.Context, t Target) (*Conn, error) {
	if len(t.IDs) == 0 {
		return nil, &Error{Kind: Untrusted, Err: errors.New("no identity is listed for it")}
	}
	own := d.Source.Identity()
	if own == nil {
		return nil, &Error{Kind: NoIdentity, Err: errors.New("own identity is not here yet")}
	}
	if !d.Source.Now().Before(own.NotAfter) {
		return nil, &Error{Kind: NoIdentity, Err: fmt.Errorf("own identity ended at %s", own.NotAfter.UTC().Format(time.RFC3339))}
	}
	timeout := d.Timeout
	if timeout <= 0 {
		timeout = 3 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	address := t.Address
	if t.Via != nil {
		address = t.Via.Gateway().Address
	}
	raw, err := d.dialNet(ctx, address)
	if err != nil {
		kind := Unreachable
		if t.Via != nil {
			kind = Gateway
		}
		return nil, &Error{Kind: kind, Err: err}
	}
	under, pc := raw, (*preface.Conn)(nil)
	if t.Via != nil {
		p := preface.Preface{
			Session: t.Via.ID(), Counter: t.Via.NextCounter(), Authority: t.SNI, Class: t.Class,
			Traceparent: t.Traceparent, Avoid: t.Avoid, Deadline: remaining(ctx),
		}
		pc = preface.NewConn(raw, p, t.Via.Key())
		under = pc
	}
	counted := &countConn{Conn: under}
	conn := tls.Client(relay.WatchEnd(counted), d.Source.ClientTLS(trust.TLSOptions{
		Authorize: trust.AuthorizeID(t.IDs...), ALPN: t.ALPN, ServerName: t.SNI,
	}))
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, classify(err, pc, t)
	}
	return d.finish(conn, counted, pc, t, own)
}

func remaining(ctx context.Context) time.Duration {
	if at, ok := ctx.Deadline(); ok {
		return max(time.Until(at), time.Millisecond)
	}
	return 0
}

func (d *Dialer) dialNet(ctx context.Context, address string) (net.Conn, error) {
	if d.Net != nil {
		return d.Net(ctx, address)
	}
	nd := net.Dialer{KeepAliveConfig: keepAlive}
	return nd.DialContext(ctx, "tcp", address)
}

func classify(err error, pc *preface.Conn, t Target) *Error {
	e := &Error{Kind: Unreachable, Err: err}
	var refused *preface.Refused
	var verify *trust.VerifyError
	switch {
	case errors.As(err, &refused):
		e.Kind, e.Code, e.Handle = Refused, refused.Code, refused.Handle
	case errors.As(err, &verify), isIdentityError(err):
		e.Kind = Untrusted
	case pc != nil && pc.Handle().IsZero():
		e.Kind = Gateway // it ended before the gateway's answer
	}
	if pc != nil && e.Handle.IsZero() {
		e.Handle = pc.Handle()
	}
	return e
}

// isIdentityError says that our own judgement of the callee failed the handshake: an alert that was received, or an end of the
// connection, is another matter.
func isIdentityError(err error) bool {
	var certErr *tls.CertificateVerificationError
	return errors.As(err, &certErr)
}

func (d *Dialer) finish(conn *tls.Conn, counted *countConn, pc *preface.Conn, t Target, own *trust.Identity) (*Conn, error) {
	state := conn.ConnectionState()
	peer, err := trust.PeerFromState(state)
	if err != nil {
		conn.NetConn().Close()
		return nil, &Error{Kind: Untrusted, Err: err}
	}
	if len(t.ALPN) > 0 && state.NegotiatedProtocol == "" {
		conn.NetConn().Close()
		return nil, &Error{Kind: Unreachable, Err: fmt.Errorf("callee speaks none of %v", t.ALPN)}
	}
	c := &Conn{Conn: conn, Peer: peer, Via: t.Via, Made: time.Now(), Until: peer.NotAfter, counted: counted, remove: func() {}}
	if own.NotAfter.Before(c.Until) {
		c.Until = own.NotAfter
	}
	if pc != nil {
		c.Handle, c.Counter = pc.Handle(), pc.Counter()
	}
	if d.Enter != nil {
		c.remove = d.Enter(withdrawal.Subject{
			Peer: peer.ID.TrustDomain(), Identity: peer.ID, Export: t.Export, Class: withdrawal.Outbound, Issued: peer.Issued(), NotAfter: c.Until,
		}, peer, c.Withdraw)
	}
	return c, nil
}

// Stream returns the connection as one end of a relay, with half-close and reset.
func (c *Conn) Stream() relay.Stream { return &stream{Stream: relay.TLS(c.Conn), c: c} }

type stream struct {
	relay.Stream
	c *Conn
}

func (s *stream) Close() error { return s.c.Close() }

// Withdraw cuts the connection: trust in it has ended.
func (c *Conn) Withdraw(reason string) {
	c.reason.CompareAndSwap(nil, &reason)
	relay.Abort(c.Conn.NetConn())
}

// Reason says why it was withdrawn, or is empty.
func (c *Conn) Reason() string {
	if r := c.reason.Load(); r != nil {
		return *r
	}
	return ""
}

// OnClose sets what Close calls once. Set it before the connection is used.
func (c *Conn) OnClose(f func()) { c.onClose = f }

// Close ends the connection and leaves the registry. It never waits for the far end.
func (c *Conn) Close() error {
	var err error
	c.closed.Do(func() {
		c.remove()
		if c.onClose != nil {
			c.onClose()
		}
		c.Conn.SetDeadline(time.Now().Add(time.Second)) // bounds the close_notify
		err = c.Conn.Close()
	})
	return err
}

// Offset is how many bytes of the TLS stream were written so far, for trace markers.
func (c *Conn) Offset() uint64 { return c.counted.written.Load() }

// countConn counts what TLS writes.
type countConn struct {
	net.Conn
	written atomic.Uint64
}

func (c *countConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.written.Add(uint64(n))
	return n, err
}

// NetConn returns the connection beneath.
func (c *countConn) NetConn() net.Conn { return c.Conn }

// CloseWrite half-closes the connection beneath.
func (c *countConn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}
