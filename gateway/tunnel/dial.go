// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	backoffMin    = 100 * time.Millisecond
	backoffMax    = 2 * time.Second        // a healed path is used again within a few seconds
	deferDial     = time.Second            // how long the greater trust domain waits to be dialled
	tcpHeadStart  = 400 * time.Millisecond // of QUIC over TCP
	nextAddress   = 200 * time.Millisecond // between the addresses of one gateway
	dialTimeout   = 4500 * time.Millisecond
	dialAgain     = 1500 * time.Millisecond // to the same address over QUIC, beside what has no answer yet
	returnToQUIC  = 60 * time.Second
	maxReturn     = 10 * time.Minute
	replaceJitter = 10 * time.Minute
	rootlessRetry = 200 * time.Millisecond // until it ends there is time for a few attempts
	rescueEvery   = 10 * time.Second       // at most, dialling beside a session that is suspect
)

// dialer keeps one session to one gateway of a peer.
type dialer struct {
	e      *Endpoint
	key    dialKey
	addr   []string
	kicked chan struct{}
	cancel context.CancelFunc

	rescued time.Time // when a suspect session was last dialled around
	trial   trial
}

// trial says how long a peer is served over TCP before QUIC is tried again: a path that drops UDP now and then must not cost a move a
// minute. Each relapse within ten minutes of a return doubles the wait.
type trial struct {
	wait     time.Duration // 0: returnToQUIC
	returned time.Time     // to QUIC, zero when the present session is none
}

// fell is called when a session runs on TCP; it returns how long that one is to stay.
func (t *trial) fell(now time.Time) time.Duration {
	switch {
	case t.wait == 0:
		t.wait = returnToQUIC
	case t.returned.IsZero():
	case now.Sub(t.returned) < maxReturn:
		t.wait = min(2*t.wait, maxReturn)
	default:
		t.wait = returnToQUIC
	}
	t.returned = time.Time{}
	return t.wait
}

func (t *trial) back(now time.Time) { t.returned = now }

// kick makes the dialer try again now.
func (d *dialer) kick() {
	select {
	case d.kicked <- struct{}{}:
	default:
	}
}

func (d *dialer) stop() { d.cancel() }

// syncDialersLocked starts and stops dialers so that there is one per known address record.
func (e *Endpoint) syncDialersLocked() {
	if e.runCtx == nil || e.stopped || e.draining {
		return
	}
	want := make(map[dialKey][]string)
	for td, p := range e.peers {
		for i, g := range p.Gateways {
			if len(g.Addresses) > 0 && i < maxGateways {
				want[dialKey{td, g.Name}] = g.Addresses
			}
		}
	}
	for key, d := range e.dialers {
		if addr, ok := want[key]; !ok || !equalStrings(addr, d.addr) {
			d.stop()
			delete(e.dialers, key)
		}
	}
	for key, addr := range want {
		if _, ok := e.dialers[key]; ok {
			continue
		}
		ctx, cancel := context.WithCancel(e.runCtx)
		d := &dialer{e: e, key: key, addr: addr, kicked: make(chan struct{}, 1), cancel: cancel}
		e.dialers[key] = d
		e.goLocked(func() { d.run(ctx) })
	}
}

func equalStrings(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// run dials whenever there is no session to the gateway, until ctx ends.
func (d *dialer) run(ctx context.Context) {
	backoff := backoffMin
	mine := false // whether our own dialling made the last session
	for ctx.Err() == nil {
		changed := d.e.Changed()
		if s := d.session(); s != nil {
			mine, backoff = s.dialled, backoffMin
			d.tend(ctx, s, changed)
			continue
		}
		if !mine && d.e.cfg.Dialable && d.e.self().String() > d.key.td.String() {
			d.sleep(ctx, jitter(deferDial), changed)
			if d.session() != nil || ctx.Err() != nil {
				continue
			}
		}
		mine = true
		s, err := d.e.race(ctx, d.key.td, d.addr)
		if err == nil {
			s.target = d.key.gateway
			if err = d.e.add(s); err == nil {
				continue
			}
			s.discard()
		}
		if ctx.Err() != nil {
			return
		}
		d.e.log.Debug("tunnel dial failed", "peer", d.key.td.String(), "gateway", d.key.gateway, "error", err.Error())
		d.e.failed(d.key.td, "", err)
		if d.sleep(ctx, jitter(backoff), nil) {
			backoff = backoffMin
		} else {
			backoff = min(2*backoff, backoffMax)
		}
	}
}

// session is the live session that makes dialling unnecessary.
func (d *dialer) session() *Session {
	var best *Session
	for _, s := range d.e.Sessions() {
		if s.Peer() == d.key.td && s.retiring.Load() == 0 && State(s.state.Load()) != StateDown &&
			(s.gateway == d.key.gateway || s.target == d.key.gateway) && (best == nil || better(s, best)) {
			best = s
		}
	}
	return best
}

// tend waits until something about the session changes. A session of ours is replaced when it runs on TCP and QUIC passes
// again, when half of the remaining life of its certificates has passed, when one of them has lost its root, and when it is suspect:
// then the new one may be up before the old one is down.
func (d *dialer) tend(ctx context.Context, s *Session, changed <-chan struct{}) {
	if !s.dialled {
		select {
		case <-ctx.Done():
		case <-changed:
		case <-d.kicked:
		}
		return
	}
	wait := time.Until(s.since.Add(s.notAfter.Sub(s.since)/2)) - rand.N(replaceJitter)
	if s.transport == TCP && !d.e.cfg.DisableUDP {
		wait = min(wait, jitter(d.trial.fell(time.Now())))
	}
	t := time.NewTimer(max(wait, backoffMax))
	defer t.Stop()
	for {
		if s.rootless.Load() {
			if !d.replace(ctx, s, d.e.race) {
				d.sleep(ctx, jitter(rootlessRetry), nil)
			}
			return
		}
		if s.narrowed.Load() {
			if d.replace(ctx, s, d.e.race) {
				s.fail(errNarrow) // what is stuck on it would never end
			} else {
				d.sleep(ctx, jitter(time.Second), nil)
			}
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-s.Done():
			return
		case <-changed:
			if d.session() != s {
				return
			}
			changed = d.e.Changed()
			if s.State() == StateSuspect && time.Since(d.rescued) > rescueEvery {
				d.rescued = time.Now()
				d.replace(ctx, s, d.e.race)
				return
			}
		case <-t.C:
			dial := d.e.race
			if s.transport == TCP && time.Until(s.notAfter) > s.notAfter.Sub(s.since)/2 {
				dial = d.e.raceQUIC // nothing else would be an improvement
			}
			if d.replace(ctx, s, dial) && s.transport == TCP {
				d.trial.back(time.Now())
			}
			return
		}
	}
}

// replace dials anew and retires s on success.
func (d *dialer) replace(ctx context.Context, s *Session, dial dialFunc) bool {
	n, err := dial(ctx, d.key.td, d.addr)
	if err != nil {
		return false
	}
	n.target = d.key.gateway
	if err := d.e.add(n); err != nil {
		n.discard()
		return false
	}
	s.retire()
	return true
}

type dialFunc func(ctx context.Context, td spiffeid.TrustDomain, addresses []string) (*Session, error)

// sleep waits for d, for a change or for a kick, which it reports.
func (d *dialer) sleep(ctx context.Context, wait time.Duration, changed <-chan struct{}) (kicked bool) {
	t := time.NewTimer(wait)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
			return false
		case <-d.kicked:
			return true
		case <-changed:
			if d.session() != nil {
				return false
			}
			changed = d.e.Changed()
		}
	}
}

func jitter(d time.Duration) time.Duration { return d - d/5 + rand.N(2*d/5+1) }

// attempt is one transport to one address, starting after a delay or when everything before it has failed.
type attempt struct {
	transport string
	address   string
	after     time.Duration
	again     bool // only while one before it is still without an answer
}

func attempts(addresses []string, udp, tcp bool, headStart time.Duration) []attempt {
	var out []attempt
	for i, a := range addresses {
		if i == 4 {
			break
		}
		at := time.Duration(i) * nextAddress
		if udp {
			out = append(out, attempt{transport: QUIC, address: a, after: at})
		}
		if tcp {
			if udp {
				at += headStart
			}
			out = append(out, attempt{transport: TCP, address: a, after: at})
		}
	}
	return out
}

// race dials every address over both transports, QUIC with a head start; the first session that is complete wins.
func (e *Endpoint) race(ctx context.Context, td spiffeid.TrustDomain, addresses []string) (*Session, error) {
	list := attempts(addresses, e.quic != nil, true, e.cfg.HeadStart)
	if e.quic != nil && len(addresses) > 0 {
		// A handshake whose packets were lost repeats them ever more slowly; a new one finds a path that has just healed sooner.
		for after := dialAgain; after < dialTimeout-dialAgain/2; after += dialAgain {
			list = append(list, attempt{transport: QUIC, address: addresses[0], after: after, again: true})
		}
	}
	return e.dialAny(ctx, td, list)
}

func (e *Endpoint) raceQUIC(ctx context.Context, td spiffeid.TrustDomain, addresses []string) (*Session, error) {
	return e.dialAny(ctx, td, attempts(addresses, e.quic != nil, false, 0))
}

func (e *Endpoint) dialAny(ctx context.Context, td spiffeid.TrustDomain, list []attempt) (*Session, error) {
	return raceAttempts(ctx, list, func(ctx context.Context, a attempt) (*Session, error) {
		return e.connect(ctx, td, a)
	}, (*Session).discard)
}

// raceAttempts runs list; the first success wins and the others are cancelled, or given to discard when too late. An
// attempt starts early when all that started before it have failed. It returns after every attempt has ended.
func raceAttempts[T any](ctx context.Context, list []attempt, try func(context.Context, attempt) (T, error), discard func(T),
) (T, error) {
	var zero T
	if len(list) == 0 {
		return zero, errors.New("no address to dial")
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var (
		mu      sync.Mutex
		wg      sync.WaitGroup
		won     bool
		winner  T
		errs    []error
		results = make(chan struct{}, len(list))
	)
	start := func(a attempt) {
		defer func() { results <- struct{}{} }()
		v, err := try(ctx, a)
		mu.Lock()
		defer mu.Unlock()
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s %s: %w", a.transport, a.address, err))
		case won:
			discard(v)
		default:
			won, winner = true, v
			cancel()
		}
	}
	begin, running := time.Now(), 0
	for i := 0; i < len(list) || running > 0; {
		if i < len(list) && list[i].again && running == 0 {
			i++ // what was tried has failed: it has an answer
			continue
		}
		if i < len(list) && ctx.Err() == nil && (running == 0 || time.Since(begin) >= list[i].after) {
			a := list[i]
			i, running = i+1, running+1
			wg.Go(func() { start(a) })
			continue
		}
		if i < len(list) && ctx.Err() != nil {
			break
		}
		var due <-chan time.Time
		if i < len(list) {
			due = time.After(list[i].after - time.Since(begin))
		}
		select {
		case <-results:
			running--
		case <-due:
		}
	}
	wg.Wait()
	if won {
		return winner, nil
	}
	if err := ctx.Err(); len(errs) == 0 && err != nil {
		return zero, err
	}
	return zero, errors.Join(errs...)
}

// discard closes the links of a session that never ran.
func (s *Session) discard() {
	for _, l := range append(s.lanes, s.control) {
		l.close(closeNormal, "not needed")
	}
	close(s.ended)
}

// connect makes a complete session: both links, each with its hello answered.
func (e *Endpoint) connect(ctx context.Context, td spiffeid.TrustDomain, a attempt) (s *Session, err error) {
	nonce := newNonce()
	authorize := func(id spiffeid.ID) error {
		if _, ok := id.Gateway(); !ok || id.TrustDomain() != td {
			return fmt.Errorf("%s is not a gateway of %s", id, td)
		}
		return nil
	}
	control, err := e.dialLink(ctx, a, authorize, maxControl)
	if err != nil {
		e.reportFailure(ctx, td, a.transport, err)
		return nil, err
	}
	defer func() {
		if err != nil {
			control.close(closeRefused, "not established")
			e.reportFailure(ctx, td, a.transport, err)
		}
	}()
	if err = e.introduce(ctx, control, laneControl, nonce); err != nil {
		return nil, err
	}
	peer, err := trust.PeerFromState(control.state())
	if err != nil {
		return nil, err
	}
	same := func(id spiffeid.ID) error {
		if id != peer.ID {
			return fmt.Errorf("second link reached %s instead of %s", id, peer.ID)
		}
		return nil
	}
	// The resolved address of the first link, so that a name with several addresses leads to the same gateway again.
	lane, err := e.dialLink(ctx, attempt{transport: a.transport, address: control.remoteAddr().String()}, same, maxInteractive)
	if err != nil {
		return nil, err
	}
	if err = e.introduce(ctx, lane, laneInteractive, nonce); err != nil {
		lane.close(closeRefused, "not established")
		return nil, err
	}
	s = newSession(e, control, peer.ID, a.transport, true, nonce)
	s.address = a.address
	s.attach(lane)
	return s, nil
}

func (e *Endpoint) reportFailure(ctx context.Context, td spiffeid.TrustDomain, transport string, err error) {
	if ctx.Err() == nil && e.cfg.Failed != nil {
		e.cfg.Failed(td, transport, failureReason(err))
	}
}

func (e *Endpoint) dialLink(ctx context.Context, a attempt, authorize trust.Authorize, streams int) (link, error) {
	if a.transport == QUIC {
		c, err := e.dialQUIC(ctx, a.address, e.cfg.Source.ClientTLS(trust.TLSOptions{Authorize: authorize, ALPN: []string{ALPNQUIC}}),
			int64(streams))
		if err != nil {
			return nil, err
		}
		return &quicLink{c}, nil
	}
	c, err := e.dialTLS(ctx, a.address, e.cfg.Source.ClientTLS(trust.TLSOptions{Authorize: authorize, ALPN: []string{ALPNTCP}}))
	if err != nil {
		return nil, err
	}
	l, err := newTCPLink(c, true, streams)
	if err != nil {
		c.Close()
		return nil, err
	}
	return l, nil
}

// dialTLS dials from the listening address, on a port of its own.
func (e *Endpoint) dialTLS(ctx context.Context, address string, config *tls.Config) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	d := net.Dialer{KeepAlive: 3 * time.Second}
	if local, ok := e.addr().(*net.TCPAddr); ok && len(local.IP) > 0 && !local.IP.IsUnspecified() {
		d.LocalAddr = &net.TCPAddr{IP: local.IP, Zone: local.Zone}
	}
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	tc := tls.Client(c, config)
	if err := tc.HandshakeContext(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return tc, nil
}
