// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/time/rate"

	"github.com/strait-mesh/strait/internal/crowd"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Config says what one endpoint is. The handlers run on goroutines of the endpoint; each must return when its context
// ends or its stream is reset.
type Config struct {
	Name       string // of this gateway, for people
	Cluster    string
	Listen     string // UDP and TCP; ":0" picks a port; empty = dial only, on an ephemeral port
	Source     *trust.Source
	Logger     *slog.Logger     // nil = discard
	Now        func() time.Time // wall clock, for certificates; nil = time.Now
	Features   uint64
	DisableUDP bool          // neither listens nor dials QUIC
	HeadStart  time.Duration // of QUIC over TCP, 400 ms. Raising it delays the fallback, lowering it makes TCP win on long paths
	Dialable   bool          // peers know an address of this gateway; else it never waits to be dialled

	// Stream handles one interactive stream whose header was read. The stream is reset when it returns, unless it was
	// closed before.
	Stream func(ctx context.Context, s *Session, st Stream, h Header)
	// Catalog and Query handle control streams behind their kind byte.
	Catalog func(ctx context.Context, s *Session, st Stream)
	Query   func(ctx context.Context, s *Session, st Stream)
	// Gossip and Packet receive what gossip sends; neither may block for long.
	Gossip func(from string, c net.Conn)
	Packet func(from string, b []byte)
	// Marker receives trace markers, Draining the far end's drain notice.
	Marker   func(s *Session, m Marker)
	Draining func(s *Session, deadline time.Duration)
	// Join handles one incoming join conversation.
	Join func(ctx context.Context, c *JoinConn)
	// Changed is called after the set of sessions or the state of one has changed. It must not block.
	Changed func()
	// Failed is called for each handshake that failed, with a word that says why. It must not block.
	Failed func(peer spiffeid.TrustDomain, transport, reason string)
}

// Peer is one other cluster with which sessions may exist.
type Peer struct {
	TrustDomain spiffeid.TrustDomain
	Cluster     string
	Ready       bool // else joining: sessions may exist, gossip does not flow
	Gateways    []Gateway
}

// Gateway is where a peer's gateway may be dialled.
type Gateway struct {
	Name      string
	Addresses []string
}

func (p Peer) equal(q Peer) bool {
	return p.TrustDomain == q.TrustDomain && p.Cluster == q.Cluster && p.Ready == q.Ready &&
		slices.EqualFunc(p.Gateways, q.Gateways, func(a, b Gateway) bool {
			return a.Name == b.Name && slices.Equal(a.Addresses, b.Addresses)
		})
}

const (
	// maxGateways bounds how many gateways of one peer are dialled.
	maxGateways = 16
	// maxLinks bounds the links that one peer may have opened here: two for a session of each gateway, and as many again for
	// those that replace them, twice over. maxPending bounds the sessions of one peer whose second link has not come.
	maxLinks   = 8 * maxGateways
	maxPending = 2 * maxGateways
	// maxHandshakes bounds TCP connections that have not finished their handshake; the oldest gives way. Raising it costs about
	// 20 KiB each.
	maxHandshakes = 256
)

// Endpoint is one gateway's side of all its tunnels.
type Endpoint struct {
	cfg Config
	log *slog.Logger

	udp    *net.UDPConn
	quic   *quic.Transport
	qln    *quic.Listener
	tcp    net.Listener
	hand   *crowd.Crowd // TCP handshakes in progress
	joinRL joinLimiter  // of new join conversations

	mu       sync.Mutex
	peers    map[spiffeid.TrustDomain]Peer
	sessions map[*Session]struct{}
	pending  map[[16]byte]*pendingSession // by nonce: first lane there, second awaited
	accepted map[spiffeid.TrustDomain]int // links that each peer has opened
	dialers  map[dialKey]*dialer
	bump     chan struct{} // closed and replaced on each change
	runCtx   context.Context
	stopped  bool
	draining bool
	lastErr  map[spiffeid.TrustDomain]string
	joins    map[*netip.Prefix]struct{} // conversations, by the address they come from
	wg       sync.WaitGroup
}

type pendingSession struct {
	s    *Session
	lane chan link
	gone chan struct{} // closed when nobody waits for the lane any more
}

type dialKey struct {
	td      spiffeid.TrustDomain
	gateway string
}

// Listen binds the sockets. Run serves them; an Endpoint that is never run must be closed by Close.
func Listen(cfg Config) (*Endpoint, error) {
	if cfg.Source == nil {
		return nil, errors.New("tunnel: Source is required")
	}
	e := &Endpoint{
		cfg: cfg, log: cfg.Logger, hand: crowd.New(maxHandshakes, nil),
		peers:    make(map[spiffeid.TrustDomain]Peer),
		sessions: make(map[*Session]struct{}), pending: make(map[[16]byte]*pendingSession),
		dialers: make(map[dialKey]*dialer), bump: make(chan struct{}), lastErr: make(map[spiffeid.TrustDomain]string),
		joins: make(map[*netip.Prefix]struct{}), accepted: make(map[spiffeid.TrustDomain]int),
	}
	if e.cfg.HeadStart <= 0 {
		e.cfg.HeadStart = tcpHeadStart
	}
	if e.cfg.Now == nil {
		e.cfg.Now = time.Now
	}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	if err := e.bind(); err != nil {
		return nil, fmt.Errorf("listen for tunnels: %w", err)
	}
	return e, nil
}

// bind takes one port number for UDP and TCP.
func (e *Endpoint) bind() error {
	listen := e.cfg.Listen
	if listen == "" {
		return e.bindUDP(":0")
	}
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return err
	}
	for attempt := 0; ; attempt++ {
		if e.tcp, err = net.Listen("tcp", listen); err != nil {
			return err
		}
		bound := e.tcp.Addr().(*net.TCPAddr).Port
		if err = e.bindUDP(net.JoinHostPort(host, strconv.Itoa(bound))); err == nil {
			break
		}
		e.tcp.Close()
		if port != "0" || attempt == 20 {
			return err
		}
	}
	if e.quic == nil {
		return nil
	}
	e.qln, err = e.quic.Listen(e.serverTLS(ALPNQUIC), quicConfig(maxInteractive))
	if err != nil {
		e.Close()
	}
	return err
}

func (e *Endpoint) bindUDP(address string) error {
	if e.cfg.DisableUDP {
		return nil
	}
	addr, err := net.ResolveUDPAddr("udp", address)
	if err != nil {
		return err
	}
	if e.udp, err = net.ListenUDP("udp", addr); err != nil {
		return err
	}
	_ = e.udp.SetReadBuffer(4 << 20) // as much as the system allows
	_ = e.udp.SetWriteBuffer(4 << 20)
	unvalidated := rate.NewLimiter(100, 200)
	e.quic = &quic.Transport{Conn: e.udp, VerifySourceAddress: func(net.Addr) bool { return !unvalidated.Allow() }}
	return nil
}

// Addr is the bound address, the same port for UDP and TCP.
func (e *Endpoint) Addr() net.Addr { return e.addr() }

func (e *Endpoint) addr() net.Addr {
	if e.tcp != nil {
		return e.tcp.Addr()
	}
	if e.udp != nil {
		return e.udp.LocalAddr()
	}
	return &net.TCPAddr{}
}

// Close releases the sockets of an Endpoint that is not running.
func (e *Endpoint) Close() error {
	if e.tcp != nil {
		e.tcp.Close()
	}
	if e.quic != nil {
		e.quic.Close()
		e.udp.Close()
	}
	return nil
}

// Run serves until ctx ends; it returns after everything it started has ended.
func (e *Endpoint) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	e.mu.Lock()
	e.runCtx = ctx
	e.syncDialersLocked()
	e.mu.Unlock()
	if e.qln != nil {
		e.wg.Go(func() { e.acceptQUIC(ctx) })
	}
	if e.tcp != nil {
		e.wg.Go(func() { e.acceptTCP(ctx) })
	}
	<-ctx.Done()
	e.mu.Lock()
	e.stopped = true
	sessions := slices.Collect(maps.Keys(e.sessions))
	e.mu.Unlock()
	if e.tcp != nil {
		e.tcp.Close()
	}
	for _, s := range sessions {
		s.fail(errShutdown)
	}
	e.wg.Wait()
	return e.Close()
}

// goLocked starts f unless the endpoint is stopping. The caller holds mu, or runs on a goroutine that wg counts.
func (e *Endpoint) goLocked(f func()) bool {
	if e.stopped || e.runCtx == nil {
		return false
	}
	e.wg.Go(f)
	return true
}

// SetPeers replaces the set of peers. Sessions with a trust domain that is no longer in it end at once, and so do those that its
// present bundle does not verify any more; gateways whose record changed are dialled without waiting for their backoff.
func (e *Endpoint) SetPeers(peers []Peer) {
	next := make(map[spiffeid.TrustDomain]Peer, len(peers))
	for _, p := range peers {
		next[p.TrustDomain] = p
	}
	e.mu.Lock()
	for td, p := range next {
		if old, ok := e.peers[td]; !ok || !old.equal(p) {
			for key, d := range e.dialers {
				if key.td == td {
					d.kick()
				}
			}
		}
	}
	e.peers = next
	e.syncDialersLocked()
	e.mu.Unlock()
	e.Judge()
}

// Judge looks at every session again, after something has changed that Source.Verify answers from: sessions with a trust domain
// that is no peer, and those whose far gateway does not verify any more, end at once; those that have only lost their root are
// replaced and end after trust.RootGrace. Those that are being made are looked at when they are complete.
func (e *Endpoint) Judge() {
	var gone, rootless []*Session
	e.mu.Lock()
	for s := range e.sessions {
		err := e.judgeLocked(s)
		switch lost := e.lostRootLocked(s, err); {
		case err != nil && !lost:
			gone = append(gone, s)
		case lost && !s.ending.Swap(true):
			if !e.goLocked(func() { e.endRootless(s) }) {
				gone = append(gone, s)
			}
			rootless = append(rootless, s)
		case lost || e.lostOwnRootLocked(s):
			rootless = append(rootless, s)
		}
	}
	e.mu.Unlock()
	for _, s := range gone {
		s.fail(ErrWithdrawn)
	}
	for _, s := range rootless {
		s.rootless.Store(true)
		s.leaveRootless()
	}
	e.changed()
}

// lostRootLocked says whether err, of judging a session, is that its root has left the peer's bundle; without an error that bundle is
// the one that the next answer is compared with.
func (e *Endpoint) lostRootLocked(s *Session, err error) bool {
	bundles := e.cfg.Source.Bundles()
	if err == nil {
		s.verified = bundles.Get(s.Peer())
	}
	return bundles.LostRoot(s.verified, err)
}

// lostOwnRootLocked says whether what we have proved in a session is not verified by our bundle any more: the far end will not, either.
func (e *Endpoint) lostOwnRootLocked(s *Session) bool {
	if s.own == nil {
		return false
	}
	bundles := e.cfg.Source.Bundles()
	_, err := e.cfg.Source.Verify(s.own.Chain)
	if err == nil {
		s.ownVerified = bundles.Get(s.own.ID.TrustDomain())
	}
	return bundles.LostRoot(s.ownVerified, err)
}

// endRootless ends a session once its grace has passed, unless its root is back.
func (e *Endpoint) endRootless(s *Session) {
	t := time.NewTimer(trust.RootGrace)
	defer t.Stop()
	select {
	case <-s.Done():
		return
	case <-t.C:
	}
	e.mu.Lock()
	err := e.judgeLocked(s)
	e.mu.Unlock()
	s.ending.Store(false)
	if err != nil {
		s.fail(ErrWithdrawn)
	}
}

func (e *Endpoint) judgeLocked(s *Session) error {
	if _, known := e.peers[s.Peer()]; !known {
		return ErrWithdrawn
	}
	if _, err := e.cfg.Source.Verify(s.control.state().PeerCertificates); err != nil {
		return fmt.Errorf("%w: %w", ErrWithdrawn, err)
	}
	return nil
}

func (e *Endpoint) peer(td spiffeid.TrustDomain) (Peer, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	p, ok := e.peers[td]
	return p, ok
}

func (e *Endpoint) ready(td spiffeid.TrustDomain) bool {
	p, ok := e.peer(td)
	return ok && p.Ready
}

// nameOf is "<gateway>.<cluster>", or empty for a peer that is not known (any more).
func (e *Endpoint) nameOf(s *Session) string {
	p, ok := e.peer(s.Peer())
	if !ok || p.Cluster == "" {
		return ""
	}
	return s.gateway + "." + p.Cluster
}

func (e *Endpoint) byName(name string) *Session {
	var best *Session
	for _, s := range e.Sessions() {
		if s.usable() && e.nameOf(s) == name && e.ready(s.Peer()) && (best == nil || better(s, best)) {
			best = s
		}
	}
	return best
}

// Sessions returns the sessions that are established, in no order.
func (e *Endpoint) Sessions() []*Session {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Collect(maps.Keys(e.sessions))
}

// Pick returns the best session to td for a new stream, other than those in not: up before suspect, QUIC before TCP,
// then the least loaded. One whose far gateway drains is the last resort: it still takes streams for a moment.
func (e *Endpoint) Pick(td spiffeid.TrustDomain, not ...*Session) *Session {
	e.mu.Lock()
	defer e.mu.Unlock()
	var best, last *Session
	for s := range e.sessions {
		switch {
		case s.Peer() != td || slices.Contains(not, s):
		case s.usable():
			if best == nil || better(s, best) {
				best = s
			}
		case s.draining.Load() && s.retiring.Load() == 0 && State(s.state.Load()) == StateUp:
			last = s
		}
	}
	if best == nil {
		best = last
	}
	return best
}

func better(a, b *Session) bool {
	if x, y := a.state.Load(), b.state.Load(); x != y {
		return x < y
	}
	if a.transport != b.transport {
		return a.transport == QUIC
	}
	if x, y := a.streams.Load(), b.streams.Load(); x != y {
		return x < y
	}
	return a.since.After(b.since)
}

// Changed returns a channel that is closed at the next change of sessions or their states.
func (e *Endpoint) Changed() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.bump
}

func (e *Endpoint) changed() {
	e.mu.Lock()
	close(e.bump)
	e.bump = make(chan struct{})
	e.mu.Unlock()
	if e.cfg.Changed != nil {
		e.cfg.Changed()
	}
}

// Drain tells every far gateway that this one is going away, takes no new streams and dials no more. Streams that are
// open go on until Run's context ends.
func (e *Endpoint) Drain(deadline time.Duration) {
	e.mu.Lock()
	e.draining = true
	for _, d := range e.dialers {
		d.stop()
	}
	e.dialers = map[dialKey]*dialer{}
	sessions := slices.Collect(maps.Keys(e.sessions))
	e.mu.Unlock()
	for _, s := range sessions {
		s.notify(notice{Kind: noticeDrain, Deadline: deadline})
	}
}

// Draining reports whether Drain was called.
func (e *Endpoint) Draining() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.draining
}

// add enters an established session and serves it on a goroutine of its own.
func (e *Endpoint) add(s *Session) error {
	e.mu.Lock()
	if err := e.judgeLocked(s); err != nil {
		e.mu.Unlock()
		return err
	}
	ctx := e.runCtx
	if !e.goLocked(func() { e.runSession(ctx, s) }) {
		e.mu.Unlock()
		return errShutdown
	}
	for old := range e.sessions {
		// A new session from a gateway that had one often means that it restarted: the old one has to answer first.
		if old.Peer() == s.Peer() && old.gateway == s.gateway && old.transport == s.transport && !old.dialled && !s.dialled {
			old.state.CompareAndSwap(int32(StateUp), int32(StateSuspect))
		}
	}
	e.sessions[s] = struct{}{}
	delete(e.lastErr, s.Peer())
	retire := e.superfluousLocked(s)
	e.mu.Unlock()
	e.log.Info("tunnel up", "peer", s.Peer().String(), "gateway", s.gateway, "transport", s.transport, "tunnel", s.id,
		"dialled", s.dialled, "address", s.address)
	if retire != nil {
		retire.retire()
	}
	e.changed()
	return nil
}

// superfluousLocked returns the session that the dialling rule gives up now that s exists: where both ends dialled, the
// one dialled by the end with the greater trust domain, which is the end that retires it.
func (e *Endpoint) superfluousLocked(s *Session) *Session {
	if e.self().String() < s.Peer().String() {
		return nil
	}
	for o := range e.sessions {
		if o == s || o.Peer() != s.Peer() || o.gateway != s.gateway || o.dialled == s.dialled || !o.usable() ||
			o.transport != s.transport {
			continue
		}
		if s.dialled {
			return s
		}
		return o
	}
	return nil
}

func (e *Endpoint) runSession(ctx context.Context, s *Session) {
	err := s.run(ctx)
	e.mu.Lock()
	delete(e.sessions, s)
	e.lastErr[s.Peer()] = err.Error()
	e.mu.Unlock()
	e.log.Info("tunnel ended", "peer", s.Peer().String(), "gateway", s.gateway, "transport", s.transport, "tunnel", s.id,
		"error", err.Error())
	e.changed()
}

func (e *Endpoint) self() spiffeid.TrustDomain {
	if id := e.cfg.Source.Identity(); id != nil {
		return id.ID.TrustDomain()
	}
	return spiffeid.TrustDomain{}
}

// earliestEnd is when the first of both ends' leaf certificates ends.
func (e *Endpoint) earliestEnd(cs tls.ConnectionState) time.Time {
	end := cs.PeerCertificates[0].NotAfter
	if id := e.cfg.Source.Identity(); id != nil && id.NotAfter.Before(end) {
		end = id.NotAfter
	}
	return end
}

// LastError is why the last session with td ended or the last attempt failed; empty while one is fine.
func (e *Endpoint) LastError(td spiffeid.TrustDomain) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.lastErr[td]
}

func (e *Endpoint) failed(td spiffeid.TrustDomain, transport string, err error) {
	e.mu.Lock()
	e.lastErr[td] = err.Error()
	e.mu.Unlock()
	if e.cfg.Failed != nil {
		e.cfg.Failed(td, transport, failureReason(err))
	}
}
