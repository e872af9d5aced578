// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// RefusedError is the answer of a gateway that does not want a session.
type RefusedError struct{ Word string }

// Error says the word.
func (e *RefusedError) Error() string { return "far gateway refused the session: " + e.Word }

// serverTLS is the acceptor's configuration: mutual for alpn, server-authenticated for joins.
func (e *Endpoint) serverTLS(alpn string) *tls.Config {
	mutual := e.cfg.Source.ServerTLS(trust.TLSOptions{Authorize: e.authorize, ALPN: []string{alpn}})
	join := e.joinServerTLS()
	outer := mutual.Clone()
	outer.GetConfigForClient = func(chi *tls.ClientHelloInfo) (*tls.Config, error) {
		if join != nil && slices.Contains(chi.SupportedProtos, ALPNJoin) {
			return join, nil
		}
		if mutual.GetConfigForClient != nil {
			return mutual.GetConfigForClient(chi)
		}
		return nil, nil
	}
	outer.NextProtos = []string{alpn, ALPNJoin}
	return outer
}

// authorize admits gateways of known peers only.
func (e *Endpoint) authorize(id spiffeid.ID) error {
	if _, ok := id.Gateway(); !ok {
		return fmt.Errorf("%s is not a gateway", id)
	}
	if _, ok := e.peer(id.TrustDomain()); !ok {
		return fmt.Errorf("no peer %s", id.TrustDomain())
	}
	return nil
}

func (e *Endpoint) acceptQUIC(ctx context.Context) {
	for {
		c, err := e.qln.Accept(ctx)
		if err != nil {
			return
		}
		e.wg.Go(func() { e.serveQUIC(ctx, c) })
	}
}

func (e *Endpoint) serveQUIC(ctx context.Context, c *quic.Conn) {
	l := &quicLink{c}
	switch c.ConnectionState().TLS.NegotiatedProtocol {
	case ALPNQUIC:
		e.serveLink(ctx, l, QUIC)
	case ALPNJoin:
		e.serveJoinQUIC(ctx, c)
	default:
		l.close(closeRefused, "alpn")
	}
}

func (e *Endpoint) acceptTCP(ctx context.Context) {
	config := e.serverTLS(ALPNTCP)
	for {
		c, err := e.tcp.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			select { // out of descriptors, most likely
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		done := e.hand.Add(c.RemoteAddr(), func() { c.Close() })
		e.wg.Go(func() { e.serveTCP(ctx, c, config, done) })
	}
}

func (e *Endpoint) serveTCP(ctx context.Context, c net.Conn, config *tls.Config, done func()) {
	tc := tls.Server(c, config)
	hctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	err := tc.HandshakeContext(hctx)
	cancel()
	done()
	if err != nil {
		c.Close()
		e.log.Debug("tunnel handshake failed", "address", c.RemoteAddr().String(), "error", err.Error())
		return
	}
	switch tc.ConnectionState().NegotiatedProtocol {
	case ALPNTCP:
		l, err := newTCPLink(tc, false, maxInteractive)
		if err != nil {
			c.Close()
			return
		}
		e.serveLink(ctx, l, TCP)
	case ALPNJoin:
		e.serveJoinTCP(ctx, tc)
	default:
		c.Close()
	}
}

// serveLink answers the hello of an accepted link, and makes a session of it or gives it to the one it names. It returns when
// the link has ended.
func (e *Endpoint) serveLink(ctx context.Context, l link, transport string) {
	peer, err := trust.PeerFromState(l.state())
	if err == nil {
		err = e.authorize(peer.ID) // the peer may have gone since the handshake
	}
	if err == nil && !e.countLink(peer.ID.TrustDomain(), 1) {
		err = errors.New("the peer has too many links")
	}
	if err != nil {
		e.log.Debug("tunnel refused", "address", l.remoteAddr().String(), "error", err.Error())
		l.close(closeRefused, "refused")
		return
	}
	defer e.countLink(peer.ID.TrustDomain(), -1)
	if err := e.greet(ctx, l, peer.ID, transport); err != nil {
		e.log.Debug("tunnel refused", "address", l.remoteAddr().String(), "error", err.Error())
		l.close(closeRefused, "refused")
	}
	<-l.done()
}

// countLink counts a link that a peer opened, or that has ended; it reports false when there are too many.
func (e *Endpoint) countLink(td spiffeid.TrustDomain, n int) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if n > 0 && e.accepted[td] >= maxLinks {
		return false
	}
	if e.accepted[td] += n; e.accepted[td] == 0 {
		delete(e.accepted, td)
	}
	return true
}

func (e *Endpoint) greet(ctx context.Context, l link, id spiffeid.ID, transport string) error {
	hctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	st, err := l.accept(hctx)
	if err != nil {
		return fmt.Errorf("accept hello: %w", err)
	}
	_ = st.SetDeadline(time.Now().Add(handshakeTimeout))
	h, err := readHello(st, true)
	if err != nil {
		st.Reset()
		return err
	}
	answer := hello{Version: WireVersion, Features: e.cfg.Features, Name: e.cfg.Name, Cluster: e.cfg.Cluster, Lane: h.Lane,
		Nonce: h.Nonce}
	switch {
	case h.Version != WireVersion:
		answer.Refusal = "version"
	case h.Nonce == [16]byte{}, h.Lane > laneInteractive:
		answer.Refusal = "hello"
	case e.Draining():
		answer.Refusal = "draining"
	}
	if answer.Refusal != "" {
		return e.answer(st, answer)
	}
	if h.Lane == laneInteractive {
		return e.joinLane(l, st, answer, id)
	}
	return e.awaitLane(ctx, l, st, answer, id, transport)
}

func (e *Endpoint) answer(st Stream, a hello) error {
	b, err := a.append()
	if err == nil {
		_, err = st.Write(b)
	}
	if err != nil {
		st.Reset()
		return fmt.Errorf("answer hello: %w", err)
	}
	_ = st.CloseWrite() // fails when the dialler, having read the answer, was quicker
	if a.Refusal != "" {
		_, _ = io.Copy(io.Discard, st) // until the dialler has read it and gone, at most the deadline
		st.Reset()
		return &RefusedError{a.Refusal}
	}
	// The dialler ends the stream when it has the answer.
	_, _ = io.Copy(io.Discard, io.LimitReader(st, 1))
	_ = st.Close()
	return nil
}

// awaitLane holds a session with its control link until its second link has come.
func (e *Endpoint) awaitLane(ctx context.Context, l link, st Stream, a hello, id spiffeid.ID, transport string) error {
	p := &pendingSession{s: newSession(e, l, id, transport, false, a.Nonce), lane: make(chan link), gone: make(chan struct{})}
	e.mu.Lock()
	if _, dup := e.pending[a.Nonce]; dup || e.pendingLocked(id.TrustDomain()) >= maxPending {
		e.mu.Unlock()
		return errors.New("too many sessions in the making, or a doubled nonce")
	}
	e.pending[a.Nonce] = p
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		delete(e.pending, a.Nonce)
		e.mu.Unlock()
		close(p.gone)
	}()
	if err := e.answer(st, a); err != nil {
		return err
	}
	t := time.NewTimer(handshakeTimeout)
	defer t.Stop()
	select {
	case lane := <-p.lane:
		p.s.attach(lane)
		if err := e.add(p.s); err != nil {
			lane.close(closeRefused, "refused")
			return err
		}
		return nil
	case <-t.C:
		return errors.New("second link did not come")
	case <-l.done():
		return errors.New("control link ended before the second link came")
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (e *Endpoint) pendingLocked(td spiffeid.TrustDomain) (n int) {
	for _, p := range e.pending {
		if p.s.Peer() == td {
			n++
		}
	}
	return n
}

// joinLane gives an interactive link to the session that waits for it.
func (e *Endpoint) joinLane(l link, st Stream, a hello, id spiffeid.ID) error {
	e.mu.Lock()
	p := e.pending[a.Nonce]
	if p != nil && p.s.peerID == id {
		delete(e.pending, a.Nonce)
	}
	e.mu.Unlock()
	if p == nil || p.s.peerID != id {
		a.Refusal = "session"
		return e.answer(st, a)
	}
	if err := e.answer(st, a); err != nil {
		return err
	}
	select {
	case p.lane <- l:
		return nil
	case <-p.gone:
		return errors.New("session ended before its second link came")
	}
}

func readHello(st Stream, kind bool) (hello, error) {
	if kind {
		var k [1]byte
		if _, err := io.ReadFull(st, k[:]); err != nil {
			return hello{}, fmt.Errorf("read hello: %w", err)
		}
		if k[0] != kindHello {
			return hello{}, fmt.Errorf("%w: first stream is of kind %#x", ErrMalformed, k[0])
		}
	}
	b, err := readRecord(st, MaxHello)
	if err != nil {
		return hello{}, fmt.Errorf("read hello: %w", err)
	}
	return parseHello(b)
}

// introduce says hello on a dialled link and waits for the answer; only then is the link usable.
func (e *Endpoint) introduce(ctx context.Context, l link, lane byte, nonce [16]byte) error {
	st, err := l.open(ctx)
	if err != nil {
		return fmt.Errorf("open hello: %w", err)
	}
	stop := context.AfterFunc(ctx, st.Reset)
	defer stop()
	_ = st.SetDeadline(time.Now().Add(handshakeTimeout))
	b, err := hello{Version: WireVersion, Features: e.cfg.Features, Name: e.cfg.Name, Cluster: e.cfg.Cluster, Lane: lane,
		Nonce: nonce}.append()
	if err != nil {
		return err
	}
	if _, err := st.Write(append([]byte{kindHello}, b...)); err != nil {
		return fmt.Errorf("write hello: %w", err)
	}
	h, err := readHello(st, false)
	if err != nil {
		return err
	}
	st.Close()
	switch {
	case h.Refusal != "":
		return &RefusedError{h.Refusal}
	case h.Version != WireVersion:
		return &RefusedError{"version"}
	case h.Nonce != nonce:
		return fmt.Errorf("%w: hello answers something else", ErrMalformed)
	}
	return nil
}

// failureReason is a word for the metrics.
func failureReason(err error) string {
	var verify *trust.VerifyError
	var refused *RefusedError
	var idle *quic.IdleTimeoutError
	var hs *quic.HandshakeTimeoutError
	var op *net.OpError
	switch {
	case errors.As(err, &verify):
		return verify.Reason
	case errors.As(err, &refused):
		return "refused_" + refused.Word
	case errors.As(err, &idle), errors.As(err, &hs), errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	case errors.As(err, &op):
		return "unreachable"
	case errors.Is(err, ErrMalformed):
		return "malformed"
	}
	return "other"
}
