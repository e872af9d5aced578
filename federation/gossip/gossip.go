// SPDX-License-Identifier: Apache-2.0

package gossip

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/serf/serf"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	// hintPrefix begins the name of the only user event there is.
	hintPrefix = "cat/"
	// hintInterval is the least time between two hints for one origin, out and in.
	hintInterval = time.Second
	// joinInterval is how often sessions without a living member are joined again.
	joinInterval = 10 * time.Second
	// eventBuffer is how many clock ticks of events are remembered and exchanged.
	eventBuffer = 64
	// serfProtocol is the default of serf v0.11.
	serfProtocol = 4
)

// Config makes a Gossip.
type Config struct {
	Name       string                    // of this gateway, "<gateway>.<cluster>"
	Federation federation.FederationName // label on every packet: other federations' are dropped
	Link       Link
	// KnownCluster says whether a cluster is a member that we know; members that claim to be in others are dropped. nil: only
	// the own cluster and those with live sessions.
	KnownCluster func(federation.ClusterName) bool
	Logger       *slog.Logger // nil discards
}

func (c *Config) defaults() error {
	if _, _, err := ParseName(c.Name); err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	if c.Federation.IsZero() || c.Link == nil {
		return errors.New("gossip: Federation and Link are required")
	}
	if c.KnownCluster == nil {
		c.KnownCluster = func(federation.ClusterName) bool { return false }
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	return nil
}

// Name returns a gateway's name in gossip.
func Name(gateway string, c federation.ClusterName) string { return gateway + "." + c.String() }

// ParseName reads "<gateway>.<cluster>".
func ParseName(name string) (gateway string, c federation.ClusterName, err error) {
	gateway, cluster, ok := strings.Cut(name, ".")
	if !ok {
		return "", "", fmt.Errorf("member name %.80q: want <gateway>.<cluster>", name)
	}
	if _, err := federation.ParsePortName(gateway); err != nil { // a gateway's name is a label too
		return "", "", fmt.Errorf("member name %.80q: %w", name, err)
	}
	if c, err = federation.ParseClusterName(cluster); err != nil {
		return "", "", fmt.Errorf("member name %.80q: %w", name, err)
	}
	return gateway, c, nil
}

// Member is one gateway that gossip has heard of. A hint for whom to dial, nothing else.
type Member struct {
	Name    string // "<gateway>.<cluster>"
	Gateway string
	Cluster federation.ClusterName
	Status  string // alive, leaving, left, failed; heard: somebody spoke of it and we have no session with it
}

// Gossip is this gateway's part in the federation's gossip. Its methods may be called concurrently, and before and after Run,
// when they do nothing.
type Gossip struct {
	cfg   Config
	tr    *transport
	label string // of our goroutines

	out, in *coalescer
	hints   chan spiffeid.TrustDomain
	joins   chan struct{}
	serf    atomic.Pointer[serf.Serf]

	mu      sync.Mutex
	joining map[string]bool // asked for and not tried yet
}

var instances atomic.Uint64

// New starts nothing.
func New(cfg Config) (*Gossip, error) {
	if err := cfg.defaults(); err != nil {
		return nil, err
	}
	return &Gossip{
		cfg: cfg, tr: newTransport(cfg), label: cfg.Name + "#" + strconv.FormatUint(instances.Add(1), 10),
		out: newCoalescer(), in: newCoalescer(), hints: make(chan spiffeid.TrustDomain, 16),
		joins: make(chan struct{}, 1), joining: map[string]bool{},
	}, nil
}

// Run gossips until ctx ends, and returns after every goroutine has ended. It may be called once.
func (g *Gossip) Run(ctx context.Context) (err error) {
	pprof.Do(ctx, pprof.Labels(goroutineLabel, g.label), func(ctx context.Context) { err = g.run(ctx) })
	// Only now is this goroutine without the label that all the others inherited.
	return errors.Join(err, waitForGoroutines(g.label))
}

func (g *Gossip) run(ctx context.Context) error {
	events := make(chan serf.Event, 64)
	s, err := serf.Create(g.serfConfig(events))
	if err != nil {
		g.tr.Shutdown()
		return fmt.Errorf("gossip: %w", err)
	}
	g.serf.Store(s)
	loops, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { g.tr.clearIdle(loops) })
	wg.Go(func() { g.joinLoop(loops, s) })
	wg.Go(func() { g.out.run(loops, func(td spiffeid.TrustDomain) { g.send(s, td) }) })
	wg.Go(func() { g.in.run(loops, func(td spiffeid.TrustDomain) { g.report(loops, td) }) })

	drained := make(chan struct{})
	wg.Go(func() { g.readEvents(events, drained) })
	<-ctx.Done()
	stop()
	g.serf.Store(nil)
	g.tr.settle()
	err = s.Shutdown()
	close(drained)
	wg.Wait()
	if err != nil {
		return fmt.Errorf("gossip: stop: %w", err)
	}
	return nil
}

func (g *Gossip) serfConfig(events chan<- serf.Event) *serf.Config {
	logger := log.New(logWriter{g.cfg.Logger}, "", 0)
	m := memberlist.DefaultWANConfig()
	m.Transport = g.tr
	m.Label = string(g.cfg.Federation)
	m.SkipInboundLabelCheck = true // the transport has checked and removed it
	m.EnableCompression = false
	m.UDPBufferSize = udpBufferSize
	m.RequireNodeNames = true
	m.AdvertisePort = syntheticPort
	m.BindPort = syntheticPort
	m.LogOutput, m.Logger = nil, logger

	c := serf.DefaultConfig() // not kept: Create writes into it
	c.NodeName = g.cfg.Name
	c.ProtocolVersion = serfProtocol
	c.MemberlistConfig = m
	c.EventCh = events
	c.EventBuffer, c.QueryBuffer = eventBuffer, eventBuffer
	c.EnableNameConflictResolution = false
	c.DisableCoordinates = true
	c.LogOutput, c.Logger = nil, logger
	return c
}

// readEvents takes hints out of Serf's events, and goes on taking events while Serf stops, so that it never waits for us.
func (g *Gossip) readEvents(events <-chan serf.Event, drained <-chan struct{}) {
	for {
		select {
		case e := <-events:
			u, ok := e.(serf.UserEvent)
			if !ok {
				continue
			}
			if td, ok := parseHint(u.Name, u.Payload); ok {
				g.in.add(td)
			}
		case <-drained:
			return
		}
	}
}

func parseHint(name string, payload []byte) (spiffeid.TrustDomain, bool) {
	text, ok := strings.CutPrefix(name, hintPrefix)
	if !ok || len(payload) > 0 {
		return spiffeid.TrustDomain{}, false
	}
	td, err := spiffeid.ParseTrustDomain(text)
	return td, err == nil
}

func (g *Gossip) send(s *serf.Serf, td spiffeid.TrustDomain) {
	if err := s.UserEvent(hintPrefix+td.String(), nil, false); err != nil {
		g.cfg.Logger.Debug("catalog hint not sent", "trust_domain", td.String(), "error", err)
	}
}

func (g *Gossip) report(ctx context.Context, td spiffeid.TrustDomain) {
	select {
	case g.hints <- td:
	case <-ctx.Done():
	}
}

// Hint tells every member that the catalogs of origin changed: at once, and then at most one event a second for each origin.
func (g *Gossip) Hint(origin spiffeid.TrustDomain) { g.out.add(origin) }

// Hints says whose catalogs changed somewhere, our own hints included. While nobody reads, hints for one origin become one.
func (g *Gossip) Hints() <-chan spiffeid.TrustDomain { return g.hints }

// Members lists whom gossip has heard of, sorted by name. Before and after Run it is empty.
func (g *Gossip) Members() []Member {
	s := g.serf.Load()
	if s == nil {
		return nil
	}
	var out []Member
	seen := map[string]bool{}
	add := func(name, status string) {
		if gw, c, err := ParseName(name); err == nil && !seen[name] {
			seen[name] = true
			out = append(out, Member{Name: name, Gateway: gw, Cluster: c, Status: status})
		}
	}
	for _, m := range s.Members() {
		add(m.Name, m.Status.String())
	}
	for _, name := range g.tr.filter.heard() {
		add(name, "heard")
	}
	slices.SortFunc(out, func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Join makes contact with a peer that the link has a session with, soon. Call it when a session came up.
func (g *Gossip) Join(peer string) {
	g.mu.Lock()
	g.joining[peer] = true
	g.mu.Unlock()
	select {
	case g.joins <- struct{}{}:
	default:
	}
}

// joinLoop joins who was asked for, and regularly whoever has a session and is not known to be alive.
func (g *Gossip) joinLoop(ctx context.Context, s *serf.Serf) {
	tick := time.NewTicker(joinInterval)
	defer tick.Stop()
	for {
		g.mu.Lock()
		want := g.joining
		g.joining = map[string]bool{}
		g.mu.Unlock()
		alive := map[string]bool{g.cfg.Name: true}
		for _, m := range s.Members() {
			alive[m.Name] = alive[m.Name] || m.Status == serf.StatusAlive
		}
		for _, p := range g.cfg.Link.Peers() {
			if ctx.Err() != nil {
				return
			}
			if !want[p] && alive[p] || p == g.cfg.Name {
				continue
			}
			if _, err := s.Join([]string{p + "/" + syntheticAddress(p)}, false); err != nil {
				g.cfg.Logger.Debug("gossip join failed", "peer", p, "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-g.joins:
		}
	}
}

// Deliver takes one packet that came from a peer. It never blocks and keeps b.
func (g *Gossip) Deliver(from string, b []byte) { g.tr.deliver(from, b) }

// DeliverStream takes a stream that a peer opened for a push/pull exchange, and closes it in the end. It never blocks.
func (g *Gossip) DeliverStream(from string, c net.Conn) { g.tr.deliverStream(from, c) }

// goroutineLabel is the profiler label that all goroutines of one Gossip inherit.
const goroutineLabel = "strait_gossip"

// stopTimeout is how long Run waits for goroutines that the libraries left running; transport.settle has ended what they wait for.
const stopTimeout = 5 * time.Second

// waitForGoroutines waits until no goroutine has the label. Serf and memberlist return from Shutdown before their goroutines
// have ended and give no way to wait for them.
func waitForGoroutines(label string) error {
	mark := []byte(strconv.Quote(goroutineLabel) + ":" + strconv.Quote(label))
	var buf bytes.Buffer
	for start := time.Now(); ; {
		buf.Reset()
		if err := pprof.Lookup("goroutine").WriteTo(&buf, 1); err != nil || !bytes.Contains(buf.Bytes(), mark) {
			return err
		}
		if time.Since(start) > stopTimeout {
			return fmt.Errorf("gossip: goroutines still run %v after stop", stopTimeout)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// logWriter turns the libraries' lines into debug records: what they complain of is for those who look into gossip.
type logWriter struct{ l *slog.Logger }

func (w logWriter) Write(b []byte) (int, error) {
	if w.l.Enabled(context.Background(), slog.LevelDebug) {
		w.l.Debug("gossip library", "line", strings.TrimSpace(string(b)))
	}
	return len(b), nil
}
