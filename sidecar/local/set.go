// SPDX-License-Identifier: Apache-2.0

package local

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

// Gateway is where one session leads.
type Gateway struct {
	Name     string
	Address  string
	ID       spiffeid.ID
	Draining bool
}

// Notice is a gateway's word about inner connections through one of its sessions.
type Notice struct {
	Session *Session
	// Peer limits the notice to connections to one trust domain; zero means all through this gateway.
	Peer spiffeid.TrustDomain
	// Connections are preface counters; empty means all that Peer names.
	Connections []uint64
	// Withdrawn says that the connections must end now; otherwise they are retired: no new work, the rest may finish.
	Withdrawn bool
	Reason    string
	Deadline  time.Time // when the gateway cuts what is left; zero: not said
}

// Tunnel is what gateways say about the way to one peer.
type Tunnel struct {
	Up, Suspect bool
	RTT         time.Duration
	Loss        float64
	Transport   string
}

// Config is a Set's.
type Config struct {
	Source *trust.Source
	// Enter registers a session for withdrawal; nil: sessions are not registered.
	Enter func(s withdrawal.Subject, peer *trust.Peer, end func(reason string)) (remove func())
	// Hello is asked for the first message of each session.
	Hello func() *controlpb.LocalHello
	// Changed is called after a session came or went, or a peer's status changed. It must not block.
	Changed func()
	// Notice is called, in order for each session, from that session's goroutine. It must not block.
	Notice func(Notice)
	// Ping is the interval of pings. Default 1 s. Dead is the silence that ends a session, default 3 pings: raising it
	// delays the notice of a gateway's silent death.
	Ping, Dead time.Duration
	// Dial opens the TCP connection. Default: net.Dialer with keep-alives.
	Dial   func(ctx context.Context, address string) (net.Conn, error)
	Now    func() time.Time
	Logger *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.Hello == nil {
		c.Hello = func() *controlpb.LocalHello { return &controlpb.LocalHello{} }
	}
	if c.Changed == nil {
		c.Changed = func() {}
	}
	if c.Notice == nil {
		c.Notice = func(Notice) {}
	}
	if c.Ping <= 0 {
		c.Ping = time.Second
	}
	if c.Dead <= 0 {
		c.Dead = 3 * c.Ping
	}
	if c.Dial == nil {
		d := &net.Dialer{Timeout: 3 * time.Second}
		c.Dial = func(ctx context.Context, address string) (net.Conn, error) { return d.DialContext(ctx, "tcp", address) }
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Set is the sessions to all gateways. See the package comment.
type Set struct {
	cfg  Config
	wake chan struct{}

	mu      sync.Mutex
	wanted  map[string]Gateway
	live    map[string]*Session // by gateway name; welcomed, not retiring
	all     map[*Session]struct{}
	health  *controlpb.LocalHealth
	lost    time.Time     // since when no session is live; zero while one is
	arrived chan struct{} // closed while a session is live
}

// New returns a Set that leads nowhere yet.
func New(cfg Config) *Set {
	return &Set{
		cfg: cfg.withDefaults(), wake: make(chan struct{}, 1), wanted: map[string]Gateway{},
		live: map[string]*Session{}, all: map[*Session]struct{}{}, lost: time.Now(),
		arrived: make(chan struct{}),
	}
}

// SetGateways replaces the list of gateways.
func (s *Set) SetGateways(list []Gateway) {
	s.mu.Lock()
	s.wanted = make(map[string]Gateway, len(list))
	for _, g := range list {
		s.wanted[g.Name] = g
	}
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
	s.cfg.Changed()
}

// SetHealth gives the full list of what is said to every gateway, now and at the start of each later session.
func (s *Set) SetHealth(list []*controlpb.ServiceHealth) {
	s.mu.Lock()
	h := &controlpb.LocalHealth{Services: list}
	if proto.Equal(h, s.health) {
		s.mu.Unlock()
		return
	}
	s.health = h
	sessions := slices.Collect(maps.Keys(s.all))
	s.mu.Unlock()
	for _, session := range sessions {
		session.kick()
	}
}

func (s *Set) currentHealth() *controlpb.LocalHealth {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.health
}

// Run keeps the sessions until ctx ends.
func (s *Set) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	type keeper struct {
		gateway Gateway
		stop    context.CancelFunc
	}
	running := map[string]keeper{}
	for {
		select {
		case <-ctx.Done():
			cancel()
			return nil
		case <-s.wake:
		}
		s.mu.Lock()
		wanted := maps.Clone(s.wanted)
		s.mu.Unlock()
		for name, k := range running {
			w, ok := wanted[name]
			if !ok || w.Address != k.gateway.Address || w.ID != k.gateway.ID {
				k.stop()
				delete(running, name)
			}
		}
		for name, g := range wanted {
			if _, ok := running[name]; ok {
				continue
			}
			kctx, stop := context.WithCancel(ctx)
			running[name] = keeper{gateway: g, stop: stop}
			wg.Go(func() { s.keep(kctx, g) })
		}
	}
}

// keep holds one session to g, with backoff from 100 ms to 5 s ±20 %.
func (s *Set) keep(ctx context.Context, g Gateway) {
	var wg sync.WaitGroup
	defer wg.Wait()
	backoff := 100 * time.Millisecond
	warned := false
	for ctx.Err() == nil {
		session, err := s.open(ctx, g)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			level := slog.LevelDebug
			if !warned {
				warned, level = true, slog.LevelWarn
			}
			s.cfg.Logger.Log(ctx, level, "local session not open", "gateway", g.Name, "error", err)
			s.pause(ctx, backoff)
			backoff = min(2*backoff, 5*time.Second)
			continue
		}
		warned = false
		s.enter(session)
		s.cfg.Logger.Info("local session open", "gateway", g.Name)
		wg.Go(func() { s.serve(ctx, session) })
		select {
		case <-ctx.Done():
			session.end("stopped")
			return
		case <-session.done:
			s.cfg.Logger.Info("local session ended", "gateway", g.Name, "reason", session.Reason())
			s.pause(ctx, backoff)
			backoff = min(2*backoff, 5*time.Second)
		case <-session.rotate:
			// the next one replaces it in enter; this one stays for what runs through it, until its certificate ends
		case <-session.stable:
			backoff = 100 * time.Millisecond
			select {
			case <-ctx.Done():
				session.end("stopped")
				return
			case <-session.done:
				s.cfg.Logger.Info("local session ended", "gateway", g.Name, "reason", session.Reason())
				s.pause(ctx, backoff)
			case <-session.rotate:
			}
		}
	}
}

func (s *Set) pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(time.Duration(float64(d) * (0.8 + 0.4*rand.Float64())))
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// Replace has every session made anew now; the present ones stay for what runs through them.
func (s *Set) Replace() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, session := range s.live {
		select {
		case session.replace <- struct{}{}:
		default:
		}
	}
}

func (s *Set) enter(session *Session) {
	s.mu.Lock()
	old := s.live[session.gateway.Name]
	s.live[session.gateway.Name] = session
	if !s.lost.IsZero() {
		s.lost = time.Time{}
		close(s.arrived)
	}
	s.all[session] = struct{}{}
	s.mu.Unlock()
	s.cfg.Changed()
	if old != nil {
		s.cfg.Notice(Notice{Session: old, Reason: "session renewed"})
	}
}

func (s *Set) leave(session *Session) {
	s.mu.Lock()
	if s.live[session.gateway.Name] == session {
		delete(s.live, session.gateway.Name)
		if len(s.live) == 0 {
			s.lost, s.arrived = time.Now(), make(chan struct{})
		}
	}
	delete(s.all, session)
	s.mu.Unlock()
	s.cfg.Notice(Notice{Session: session, Reason: "session ended"})
	s.cfg.Changed()
}

// Sessions returns the live sessions by name, those last whose gateway drains.
func (s *Set) Sessions() []*Session {
	good, draining := s.sessions()
	return append(good, draining...)
}

func (s *Set) sessions() (good, draining []*Session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, session := range s.live {
		if s.drainsLocked(session) {
			draining = append(draining, session)
		} else {
			good = append(good, session)
		}
	}
	for _, list := range [][]*Session{good, draining} {
		slices.SortFunc(list, func(a, b *Session) int { return cmp.Compare(a.gateway.Name, b.gateway.Name) })
	}
	return good, draining
}

// drainsLocked reports whether a session's gateway goes away.
func (s *Set) drainsLocked(session *Session) bool {
	return s.wanted[session.gateway.Name].Draining || session.draining.Load()
}

// Draining reports whether a session's gateway goes away: it takes connections for a moment, for those who know no other.
func (s *Set) Draining(session *Session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.drainsLocked(session)
}

// Await waits until a session is live, for as long as ctx allows. Without any gateway to wait for it returns at once.
func (s *Set) Await(ctx context.Context) {
	s.mu.Lock()
	arrived, none := s.arrived, len(s.wanted) == 0
	s.mu.Unlock()
	if none {
		return
	}
	select {
	case <-arrived:
	case <-ctx.Done():
	}
}

// Grace is how long the absence of every session is taken for a restart of gateways and changes nothing.
const Grace = 3 * time.Second

// Known says whether what Tunnels leaves out is unreachable: some gateway has told about its peers, or there was no session to
// any for longer than Grace.
func (s *Set) Known() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.lost.IsZero() {
		return time.Since(s.lost) > Grace
	}
	for _, session := range s.live {
		if session.peers.Load() != nil {
			return true
		}
	}
	return false
}

// Tunnels merges what live sessions say: a peer is as reachable as its best way. What draining gateways say counts for peers that no
// other gateway reaches.
func (s *Set) Tunnels() map[spiffeid.TrustDomain]Tunnel {
	good, draining := s.sessions()
	merged := merge(good)
	for td, t := range merge(draining) {
		if have, ok := merged[td]; !ok || !have.Up && better(t, have) {
			merged[td] = t
		}
	}
	return merged
}

func merge(sessions []*Session) map[spiffeid.TrustDomain]Tunnel {
	merged := map[spiffeid.TrustDomain]Tunnel{}
	for _, session := range sessions {
		peers := session.peers.Load()
		if peers == nil {
			continue
		}
		for td, t := range *peers {
			have, ok := merged[td]
			if !ok || better(t, have) {
				merged[td] = t
			}
		}
	}
	return merged
}

func better(a, b Tunnel) bool {
	rank := func(t Tunnel) int {
		switch {
		case t.Up:
			return 2
		case t.Suspect:
			return 1
		}
		return 0
	}
	if rank(a) != rank(b) {
		return rank(a) > rank(b)
	}
	return a.RTT < b.RTT
}
