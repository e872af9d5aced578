// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Kinds of control streams: their first byte.
const (
	kindHello   = 'h'
	kindPing    = 'p'
	kindGossip  = 'g'
	kindPackets = 'd'
	kindCatalog = 'c'
	kindQuery   = 'q'
	kindNotices = 'n'
	kindMarkers = 'm'
)

const (
	firstByteTimeout = 5 * time.Second
	packetQueue      = 64
	maxPacket        = 64<<10 - 1
	retireLinger     = time.Second
)

// Errors with which a session ends.
var (
	ErrWithdrawn = errors.New("peer withdrawn")
	errSilent    = errors.New("no answer to pings")
	errRetired   = errors.New("session retired")
	errShutdown  = errors.New("gateway is stopping")
	errExpired   = errors.New("a certificate of the session has expired")
)

// Session is an authenticated tunnel to one gateway of another cluster.
type Session struct {
	e         *Endpoint
	id        string
	nonce     [16]byte
	peerID    spiffeid.ID
	gateway   string
	transport string
	dialled   bool
	target    string // record name that was dialled, when dialled
	address   string
	since     time.Time
	notAfter  time.Time       // of the earlier ending certificate
	own       *trust.Identity // ours when the session was made
	// what the two ends' chains held by when last looked at; guarded by e.mu once the session is added
	verified, ownVerified *trust.Bundle
	control               link
	pulse                 *pulse
	width                 width
	udpOK                 bool
	tcpOK                 bool

	state    atomic.Int32
	retiring atomic.Int64 // unix nano since when, 0 = not
	draining atomic.Bool
	streams  atomic.Int64
	controls atomic.Int64 // control streams that the other end has open
	tag      atomic.Uint64
	narrowed atomic.Bool // full packets vanish: a new session is wanted
	rootless atomic.Bool // what one of the ends has proved is of a root that has left its bundle: a new session is wanted
	ending   atomic.Bool // and it ends soon
	left     atomic.Bool // and those whose streams run on it were told
	probes   chan struct{}
	packets  chan []byte
	notices  chan []byte
	markers  chan []byte
	inbound  *rate.Limiter

	mu     sync.Mutex
	lanes  []link
	err    error
	cancel context.CancelFunc
	ended  chan struct{}
	wg     sync.WaitGroup
}

func newSession(e *Endpoint, control link, peerID spiffeid.ID, transport string, dialled bool, nonce [16]byte) *Session {
	gw, _ := peerID.Gateway()
	s := &Session{
		e: e, nonce: nonce, id: hex.EncodeToString(nonce[:4]), peerID: peerID, gateway: gw, transport: transport,
		dialled: dialled, address: control.remoteAddr().String(), since: time.Now(), control: control,
		pulse: newPulse(time.Now()), probes: make(chan struct{}, 1), packets: make(chan []byte, packetQueue), notices: make(chan []byte, 8),
		markers: make(chan []byte, 256), inbound: rate.NewLimiter(2000, 4000), ended: make(chan struct{}),
		udpOK: transport == QUIC, tcpOK: transport == TCP,
	}
	s.notAfter, s.own = e.earliestEnd(control.state()), e.cfg.Source.Identity()
	s.verified = e.cfg.Source.Bundles().Get(peerID.TrustDomain())
	if s.own != nil {
		s.ownVerified = e.cfg.Source.Bundles().Get(s.own.ID.TrustDomain())
	}
	s.state.Store(int32(StateUp))
	return s
}

// Peer is the trust domain at the other end.
func (s *Session) Peer() spiffeid.TrustDomain { return s.peerID.TrustDomain() }

// PeerID is the identity that the other end proved.
func (s *Session) PeerID() spiffeid.ID { return s.peerID }

// Gateway is the name in that identity.
func (s *Session) Gateway() string { return s.gateway }

// ID names the session in reports and spans; both ends use the same.
func (s *Session) ID() string { return s.id }

// State is how usable the session is as this end judges it.
func (s *Session) State() State { return State(s.state.Load()) }

// Address is the other end, as dialled or as seen; Dialled says which.
func (s *Session) Address() (address string, dialled bool) { return s.address, s.dialled }

// Since is when the session was established.
func (s *Session) Since() time.Time { return s.since }

// Probed says which transports are known to have worked when the session was made.
func (s *Session) Probed() (udp, tcp bool) { return s.udpOK, s.tcpOK }

// Bytes are the running totals of both links.
func (s *Session) Bytes() (in, out uint64) {
	for _, l := range s.links() {
		st := l.stats()
		in, out = in+st.bytesIn, out+st.bytesOut
	}
	return in, out
}

// Window is the congestion window of the interactive lane, in bytes; 0 when unknown.
func (s *Session) Window() uint64 {
	if l := s.links(); len(l) > 1 {
		return l[0].stats().congestionWnd
	}
	return 0
}

func (s *Session) links() []link {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append(append([]link(nil), s.lanes...), s.control)
}

// Transport is QUIC or TCP.
func (s *Session) Transport() string { return s.transport }

// RTT is the smoothed round-trip time, zero before the first answer. TCP's own figure is no substitute: it ends at the next proxy
// or load balancer.
func (s *Session) RTT() time.Duration {
	if rtt, _ := s.pulse.figures(); rtt > 0 || s.transport == TCP {
		return rtt
	}
	return s.control.stats().rtt
}

// Loss is the smoothed share of packets lost.
func (s *Session) Loss() float64 { _, loss := s.pulse.figures(); return loss }

// NotAfter is when the earlier of both ends' certificates ends.
func (s *Session) NotAfter() time.Time { return s.notAfter }

// Streams is how many interactive streams are open.
func (s *Session) Streams() int { return int(s.streams.Load()) }

// Draining reports whether the far gateway is going away.
func (s *Session) Draining() bool { return s.draining.Load() }

// Done is closed when the session has ended and everything it ran has returned.
func (s *Session) Done() <-chan struct{} { return s.ended }

// usable reports whether new streams may be opened.
func (s *Session) usable() bool {
	return s.retiring.Load() == 0 && !s.draining.Load() && State(s.state.Load()) != StateDown
}

func (s *Session) setState(n State) {
	for {
		old := State(s.state.Load())
		if old == n || old == StateDown {
			return
		}
		if s.state.CompareAndSwap(int32(old), int32(n)) {
			s.e.log.Info("tunnel state", "peer", s.Peer().String(), "gateway", s.gateway, "transport", s.transport,
				"tunnel", s.id, "state", n.String())
			s.e.changed()
			return
		}
	}
}

// fail ends the session for err; the first one counts.
func (s *Session) fail(err error) {
	s.mu.Lock()
	if s.err == nil {
		s.err = err
	}
	cancel := s.cancel
	s.mu.Unlock()
	s.setState(StateDown)
	if cancel != nil {
		cancel()
	}
}

// End ends the session at once, for a reason that the other end is told in one word.
func (s *Session) End(err error) { s.fail(err) }

func (s *Session) attach(l link) {
	s.mu.Lock()
	s.lanes = append(s.lanes, l)
	s.mu.Unlock()
}

// run serves the session until it ends. The links are complete.
func (s *Session) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.mu.Lock()
	s.cancel = cancel
	early := s.err
	lanes := append([]link(nil), s.lanes...)
	s.mu.Unlock()
	if early != nil {
		cancel()
	}
	s.wg.Go(func() { s.acceptControl(ctx) })
	for _, l := range lanes {
		s.wg.Go(func() { s.acceptLane(ctx, l) })
		s.wg.Go(func() { s.watch(ctx, l) })
		s.wg.Go(func() { s.receiveProbes(ctx, l) })
	}
	if len(lanes) > 0 {
		s.wg.Go(func() { s.sendProbes(ctx, lanes[0]) })
	}
	s.wg.Go(func() { s.watch(ctx, s.control) })
	s.wg.Go(func() { s.pinger(ctx) })
	s.wg.Go(func() { s.receivePackets(ctx) })
	s.wg.Go(func() { s.sendPackets(ctx) })
	s.wg.Go(func() { s.sendRecords(ctx, kindNotices, s.notices) })
	s.wg.Go(func() { s.sendRecords(ctx, kindMarkers, s.markers) })
	<-ctx.Done()
	s.fail(errShutdown)
	s.mu.Lock()
	err := s.err
	s.mu.Unlock()
	for _, l := range append(lanes, s.control) {
		l.close(codeOf(err), err.Error())
	}
	s.wg.Wait()
	close(s.ended)
	return err
}

func codeOf(err error) closeCode {
	switch {
	case errors.Is(err, errRetired), errors.Is(err, errNarrow):
		return closeNormal
	case errors.Is(err, ErrWithdrawn):
		return closeWithdrawn
	case errors.Is(err, errSilent):
		return closeSilent
	case errors.Is(err, ErrMalformed):
		return closeProtocol
	}
	return closeShutdown
}

// watch ends the session when one of its links does.
func (s *Session) watch(ctx context.Context, l link) {
	select {
	case <-ctx.Done():
	case <-l.done():
		s.fail(errors.New("connection to the far gateway ended"))
	}
}

func (s *Session) acceptControl(ctx context.Context) {
	for {
		st, err := s.control.accept(ctx)
		if err != nil {
			s.fail(fmt.Errorf("control lane: %w", err))
			return
		}
		if s.controls.Add(1) > maxControl {
			s.controls.Add(-1)
			st.Reset()
			continue
		}
		s.wg.Go(func() {
			defer s.controls.Add(-1)
			s.guard(st, func() { s.serveControl(ctx, st) })
		})
	}
}

func (s *Session) acceptLane(ctx context.Context, l link) {
	for {
		st, err := l.accept(ctx)
		if err != nil {
			s.fail(fmt.Errorf("interactive lane: %w", err))
			return
		}
		s.streams.Add(1)
		st.onEnd(func() { s.streams.Add(-1) })
		s.wg.Go(func() { s.guard(st, func() { s.serveStream(ctx, st) }) })
	}
}

// guard keeps a panic in one stream from ending the process, and a stream from outliving its handler.
func (s *Session) guard(st Stream, f func()) {
	defer func() {
		if r := recover(); r != nil {
			s.e.log.Error("panic in a stream", "peer", s.Peer().String(), "error", fmt.Sprint(r), "stack", string(debug.Stack()))
		}
		st.Reset()
	}()
	f()
}

func (s *Session) serveStream(ctx context.Context, st Stream) {
	_ = st.SetReadDeadline(time.Now().Add(firstByteTimeout))
	h, err := ReadHeader(st)
	if err != nil {
		s.e.log.Debug("stream refused", "peer", s.Peer().String(), "error", err.Error())
		if errors.Is(err, ErrMalformed) {
			s.Reply(st, preface.Status{Code: preface.CodeBadRequest, Reason: "header"})
		}
		return
	}
	if s.e.cfg.Stream != nil {
		s.e.cfg.Stream(ctx, s, st, h)
	}
}

// Reply answers a stream's header; a refusal also ends the stream so that the answer arrives.
func (s *Session) Reply(st Stream, status preface.Status) error {
	_ = st.SetWriteDeadline(time.Now().Add(firstByteTimeout))
	_, err := st.Write(preface.AppendStatus(nil, status))
	_ = st.SetWriteDeadline(time.Time{})
	if err == nil && status.Code != preface.CodeOK {
		err = st.Close()
	}
	return err
}

func (s *Session) serveControl(ctx context.Context, st Stream) {
	_ = st.SetReadDeadline(time.Now().Add(firstByteTimeout))
	var kind [1]byte
	if _, err := io.ReadFull(st, kind[:]); err != nil {
		return
	}
	_ = st.SetReadDeadline(time.Time{})
	cfg := &s.e.cfg
	switch kind[0] {
	case kindPing:
		echo(st)
	case kindPackets:
		s.readPackets(st)
	case kindNotices:
		s.readNotices(st)
	case kindMarkers:
		s.readMarkers(st)
	case kindGossip:
		if cfg.Gossip != nil && s.e.ready(s.Peer()) {
			end := streamEnd(ctx, st) // the library owns it until it closes it
			cfg.Gossip(s.e.nameOf(s), netStream{st, s.e.addr(), s.control.remoteAddr()})
			<-end
		}
	case kindCatalog:
		if cfg.Catalog != nil {
			cfg.Catalog(ctx, s, st)
		}
	case kindQuery:
		if cfg.Query != nil {
			cfg.Query(ctx, s, st)
		}
	}
}

// streamEnd is closed when st has been closed at this end, or ctx ends.
func streamEnd(ctx context.Context, st Stream) <-chan struct{} {
	if c, ok := st.(counted); ok {
		done := make(chan struct{})
		stop := context.AfterFunc(ctx, func() { st.Reset() })
		c.onEnd(func() { stop(); close(done) })
		return done
	}
	return ctx.Done()
}

// openControl opens a control stream of kind.
func (s *Session) openControl(ctx context.Context, kind byte) (Stream, error) {
	st, err := s.control.open(ctx)
	if err != nil {
		return nil, fmt.Errorf("open control stream: %w", err)
	}
	if _, err := st.Write([]byte{kind}); err != nil {
		st.Reset()
		return nil, fmt.Errorf("open control stream: %w", err)
	}
	return st, nil
}

// OpenCatalog opens a catalog subscription; the caller speaks on it.
func (s *Session) OpenCatalog(ctx context.Context) (Stream, error) {
	return s.openControl(ctx, kindCatalog)
}

// OpenQuery opens a stream for one query and its answer.
func (s *Session) OpenQuery(ctx context.Context) (Stream, error) {
	return s.openControl(ctx, kindQuery)
}

// OpenRaw opens an interactive stream without writing anything: for tests that speak the protocol themselves.
func (s *Session) OpenRaw(ctx context.Context) (Stream, error) {
	s.mu.Lock()
	var lane link
	if len(s.lanes) > 0 {
		lane = s.lanes[int(s.tag.Load())%len(s.lanes)]
	}
	s.mu.Unlock()
	if lane == nil {
		return nil, errors.New("session has no interactive lane")
	}
	st, err := lane.open(ctx)
	if err != nil {
		return nil, err
	}
	s.streams.Add(1)
	st.onEnd(func() { s.streams.Add(-1) })
	return st, nil
}

// Outgoing is a stream whose header was answered.
type Outgoing struct {
	Stream
	Session *Session
	Status  preface.Status
	Tag     uint64
	Waited  time.Duration // from opening to the answer
}

// Open opens a stream: header and first (the inner ClientHello) in one flight, then the answer, which is the caller's
// to judge. It waits until ctx ends.
func (s *Session) Open(ctx context.Context, h Header, first []byte) (*Outgoing, error) {
	start := time.Now()
	h.Tag = s.tag.Add(1)
	b, err := h.Append(make([]byte, 0, MaxHeader+len(first)))
	if err != nil {
		return nil, err
	}
	st, err := s.OpenRaw(ctx)
	if err != nil {
		return nil, fmt.Errorf("open stream: %w", err)
	}
	stop := context.AfterFunc(ctx, st.Reset)
	_, err = st.Write(append(b, first...))
	var status preface.Status
	if err == nil {
		status, err = preface.ReadStatus(st)
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		st.Reset()
		return nil, fmt.Errorf("open stream: %w", err)
	}
	return &Outgoing{Stream: st, Session: s, Status: status, Tag: h.Tag, Waited: time.Since(start)}, nil
}

// ReadPooled keeps the relay's way of waiting without a buffer.
func (o *Outgoing) ReadPooled(take func() []byte, give func()) (int, error) {
	if p, ok := o.Stream.(interface {
		ReadPooled(func() []byte, func()) (int, error)
	}); ok {
		return p.ReadPooled(take, give)
	}
	return o.Stream.Read(take())
}

// retire lets open streams finish, opens no new ones, and ends the session after the last.
func (s *Session) retire() {
	if s.retiring.CompareAndSwap(0, time.Now().UnixNano()) {
		s.notify(notice{Kind: noticeRetire})
		s.leaveRootless()
		s.e.changed()
	}
}

// leaveRootless says, once another session has taken its place, that what runs on a session without a root has to be made anew: it ends
// with the session.
func (s *Session) leaveRootless() {
	if s.rootless.Load() && s.retiring.Load() != 0 && s.e.cfg.Draining != nil && s.left.CompareAndSwap(false, true) {
		s.e.cfg.Draining(s, trust.RootGrace)
	}
}

// tooNarrow asks for another session in place of one on whose path full packets vanish: the end that dialled makes it.
func (s *Session) tooNarrow(told bool) {
	if !s.narrowed.CompareAndSwap(false, true) {
		return
	}
	s.e.log.Info("full packets do not pass any more", "peer", s.Peer().String(), "gateway", s.gateway, "tunnel", s.id, "far_end_says_so", told)
	if !told {
		s.notify(notice{Kind: noticeNarrow})
	}
	s.e.changed()
}

// retired reports whether a retiring session has nothing left to do.
func (s *Session) retired(now time.Time) bool {
	at := s.retiring.Load()
	return at != 0 && s.streams.Load() == 0 && now.Sub(time.Unix(0, at)) > retireLinger
}

func newNonce() (n [16]byte) {
	_, _ = rand.Read(n[:]) // never fails (crypto/rand, Go 1.24)
	return n
}
