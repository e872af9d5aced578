// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/strait-mesh/strait/federation"
)

// Conn is a connection that carries several pieces of work at a time.
type Conn interface {
	// Usable says whether it takes another piece of work now.
	Usable() bool
	// Retire ends it when its last piece of work has ended.
	Retire()
	// Close ends it at once.
	Close() error
	// Done is closed when it has ended.
	Done() <-chan struct{}
}

// Endpoint is a sidecar of the own cluster.
type Endpoint struct {
	Key      string
	Weight   int // routable instances behind it; 0: none
	Draining bool
	Near     bool // in the caller's zone: preferred while every near endpoint is fit
}

// Want says where a dial should lead.
type Want struct {
	Key   string   // endpoint, own cluster only
	Avoid []string // keys not to be led to, remote only
}

// Failure is why a dial failed, as far as it concerns the books.
type Failure struct {
	// Key of the instance that failed; empty if it is not known which.
	Key string
	// Cluster says that the answer speaks for the whole cluster (a typed reply).
	Cluster bool
	// Neutral says that neither is to blame (this side's gateway went away, a limit was met).
	Neutral bool
	Reason  federation.Reason
	Err     error
}

// Error returns the cause's message.
func (f *Failure) Error() string { return fmt.Sprintf("%s: %v", f.Reason, f.Err) }

// Unwrap returns the cause.
func (f *Failure) Unwrap() error { return f.Err }

// ErrNone says that every endpoint is avoided, ejected or absent.
var ErrNone = errors.New("pool: no endpoint left")

// errClosed says that the group was closed.
var errClosed = errors.New("pool: closed")

// Config is a Group's.
type Config struct {
	Figures
	// Remote groups have handles instead of endpoints.
	Remote bool
	// Dial makes a connection and says which endpoint it leads to. Errors should be *Failure.
	Dial func(ctx context.Context, w Want) (c Conn, key string, err error)
	// DialTimeout bounds one dial. Default 2 s: longer survives slower paths, and delays the move to another endpoint.
	DialTimeout time.Duration
	// Busy is how much work in flight makes another connection to the same endpoint worth its handshake. Default 64.
	Busy int
	// Changed is called, without locks, when evidence may have changed. It must not block.
	Changed func()
	// Ejected is called when an endpoint was ejected.
	Ejected func(reason federation.Reason)
	Now     func() time.Time
}

func (c Config) withDefaults() Config {
	c.Figures = c.Figures.withDefaults()
	if c.DialTimeout <= 0 {
		c.DialTimeout = 2 * time.Second
	}
	if c.Busy <= 0 {
		c.Busy = 64
	}
	if c.Changed == nil {
		c.Changed = func() {}
	}
	if c.Ejected == nil {
		c.Ejected = func(federation.Reason) {}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

// renewed is how far ahead evidence of what is probed reaches; each failed probe renews it.
const renewed = 15 * time.Second

// whole is the key of the book on the whole remote cluster.
const whole = ""

// maxConnsPerEndpoint bounds the connections to one endpoint of the own cluster.
const maxConnsPerEndpoint = 4

// Group is the ways to one port in one cluster. See the package comment.
type Group struct {
	cfg    Config
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu        sync.Mutex
	closed    bool
	endpoints []Endpoint // own cluster
	target    int        // remote: connections wanted
	growAfter time.Time  // remote: no other instance was found, look again then
	books     map[string]*book
	conns     map[string][]*pooled
	all       map[*pooled]struct{} // retired ones too
	dials     map[string]*dial
	probes    map[string]bool
	used      time.Time
}

type pooled struct {
	Conn
	key      string
	inFlight int
	retired  bool
	broke    bool // it ended under a lease, which was entered in the books
}

type dial struct {
	done chan struct{}
	err  error
}

// New returns a Group without endpoints.
func New(cfg Config) *Group {
	g := &Group{
		cfg: cfg.withDefaults(), books: map[string]*book{}, conns: map[string][]*pooled{},
		all: map[*pooled]struct{}{}, dials: map[string]*dial{}, probes: map[string]bool{}, target: 1,
	}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	return g
}

// SetEndpoints replaces the endpoints of an own-cluster group. Connections to absent ones are retired; a draining one ends
// its own when it wants to.
func (g *Group) SetEndpoints(list []Endpoint) {
	g.mu.Lock()
	g.endpoints = slices.Clone(list)
	keep := map[string]bool{}
	for _, e := range list {
		keep[e.Key] = true
	}
	var retire []*pooled
	for key, conns := range g.conns {
		if !keep[key] {
			retire = append(retire, conns...)
			for _, c := range conns {
				c.retired = true
			}
			delete(g.conns, key)
		}
	}
	for key, b := range g.books {
		if !keep[key] && b.inFlight == 0 {
			delete(g.books, key)
		}
	}
	g.mu.Unlock()
	for _, c := range retire {
		c.Retire()
	}
}

// SetHealthy tells a remote group how many instances its cluster has: it keeps min(4, healthy) connections.
func (g *Group) SetHealthy(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if t := max(1, min(4, n)); t != g.target {
		g.target, g.growAfter = t, time.Time{}
	}
}

// Lease is one use of a way. Done must be called once.
type Lease struct {
	Key  string
	Conn Conn // nil for a Choose
	// Latency, set before Done, is what the books take; zero: the time since the lease began.
	Latency time.Duration
	g       *Group
	c       *pooled
	start   time.Time
	once    sync.Once
}

// Done ends the lease. err may carry why.
func (l *Lease) Done(o Outcome, err error) {
	l.once.Do(func() { l.g.done(l, o, err) })
}

// Get returns a pooled connection, dialling when there is none. avoid names keys to leave out. With force, ejected endpoints
// are used when nothing else is left.
func (g *Group) Get(ctx context.Context, avoid func(key string) bool, force bool) (*Lease, error) {
	for range 4 {
		l, d, err := g.tryGet(avoid, force)
		if l != nil || err != nil {
			return l, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-d.done:
			if d.err != nil {
				return nil, d.err
			}
		}
	}
	return nil, ErrNone
}

// tryGet returns a lease, or a dial to wait for.
func (g *Group) tryGet(avoid func(string) bool, force bool) (*Lease, *dial, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, nil, errClosed
	}
	now := g.cfg.Now()
	g.used = now
	if g.cfg.Remote {
		return g.tryRemoteLocked(now, avoid, force)
	}
	e, ok := g.chooseLocked(now, avoid, force)
	if !ok {
		return nil, nil, ErrNone
	}
	c := g.leastLocked(g.conns[e.Key])
	if c != nil {
		if c.inFlight >= g.cfg.Busy && len(g.conns[e.Key]) < maxConnsPerEndpoint {
			g.dialLocked(e.Key, false)
		}
		return g.leaseLocked(now, c), nil, nil
	}
	d := g.dialLocked(e.Key, false)
	// A dial may take as long as its timeout; whoever can be served by another endpoint's connection does not wait for it.
	other, ok := g.chooseLocked(now, func(key string) bool {
		return avoid != nil && avoid(key) || g.leastLocked(g.conns[key]) == nil
	}, false)
	if ok {
		return g.leaseLocked(now, g.leastLocked(g.conns[other.Key])), nil, nil
	}
	return nil, d, nil
}

func (g *Group) tryRemoteLocked(now time.Time, avoid func(string) bool, force bool) (*Lease, *dial, error) {
	if b := g.books[whole]; b != nil && b.isEjected(now) && !force {
		return nil, nil, &Failure{Cluster: true, Reason: b.reason, Err: errors.New(b.why)}
	}
	var good, ejected []*pooled
	n := 0
	for key, conns := range g.conns {
		n += len(conns)
		if avoid != nil && avoid(key) {
			continue
		}
		c := g.leastLocked(conns)
		switch {
		case c == nil:
		case g.bookLocked(key).isEjected(now):
			ejected = append(ejected, c)
		default:
			good = append(good, c)
		}
	}
	if n < g.target && len(good) > 0 && !now.Before(g.growAfter) {
		g.dialLocked(whole, true)
	}
	if len(good) == 0 && force {
		if good = ejected; len(good) == 0 {
			return nil, g.dialLocked(whole, false), nil
		}
	}
	if len(good) == 0 {
		if n == 0 || !now.Before(g.growAfter) {
			return nil, g.dialLocked(whole, true), nil
		}
		return nil, nil, ErrNone // what is there is not wanted, and there was nothing else a moment ago
	}
	a := good[rand.IntN(len(good))]
	if len(good) > 1 {
		b := good[rand.IntN(len(good))]
		if g.bookLocked(b.key).load(1) < g.bookLocked(a.key).load(1) {
			a = b
		}
	}
	return g.leaseLocked(now, a), nil, nil
}

// Choose picks an endpoint of an own-cluster group for a connection that the caller dials itself; for a remote group it returns
// a lease without a key, and the keys to avoid are those of Avoid.
func (g *Group) Choose(avoid func(key string) bool, force bool) (*Lease, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.cfg.Now()
	g.used = now
	if g.closed {
		return nil, errClosed
	}
	if g.cfg.Remote {
		if b := g.books[whole]; b != nil && b.isEjected(now) && !force {
			return nil, &Failure{Cluster: true, Reason: b.reason, Err: errors.New(b.why)}
		}
		return &Lease{g: g, start: now}, nil
	}
	e, ok := g.chooseLocked(now, avoid, force)
	if !ok {
		return nil, ErrNone
	}
	g.bookLocked(e.Key).inFlight++
	return &Lease{Key: e.Key, g: g, start: now}, nil
}

// Reached tells a lease from Choose that its dial succeeded, and on a remote group where it led. Call it at most once.
func (l *Lease) Reached(key string) {
	l.g.mu.Lock()
	changed := l.g.reachedLocked(whole)
	if l.Key == "" {
		l.Key = key
		b := l.g.bookLocked(key)
		b.inFlight++
		b.fails = 0
	} else {
		changed = l.g.reachedLocked(l.Key) || changed
	}
	l.g.mu.Unlock()
	if changed {
		l.g.cfg.Changed()
	}
}

// Avoid returns the ejected keys, at most n, for dials.
func (g *Group) Avoid(n int) []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.cfg.Now()
	var keys []string
	for key, b := range g.books {
		if key != whole && b.isEjected(now) && len(keys) < n {
			keys = append(keys, key)
		}
	}
	return keys
}

func (g *Group) chooseLocked(now time.Time, avoid func(string) bool, force bool) (Endpoint, bool) {
	var good, near, spare []Endpoint
	nearFit := true
	for _, e := range g.endpoints {
		switch {
		case avoid != nil && avoid(e.Key):
			nearFit = nearFit && !e.Near
		case e.Draining, e.Weight == 0, g.bookLocked(e.Key).isEjected(now):
			nearFit = nearFit && !e.Near
			spare = append(spare, e)
		default:
			good = append(good, e)
			if e.Near {
				near = append(near, e)
			}
		}
	}
	if nearFit && len(near) > 0 {
		good = near
	}
	if len(good) == 0 && force {
		good = spare
	}
	if len(good) == 0 {
		return Endpoint{}, false
	}
	a := good[rand.IntN(len(good))]
	if len(good) > 1 {
		b := good[rand.IntN(len(good))]
		if g.bookLocked(b.Key).load(b.Weight) < g.bookLocked(a.Key).load(a.Weight) {
			a = b
		}
	}
	return a, true
}

func (g *Group) bookLocked(key string) *book {
	b := g.books[key]
	if b == nil {
		b = &book{}
		g.books[key] = b
	}
	b.seen = g.cfg.Now()
	return b
}

func (g *Group) leastLocked(conns []*pooled) *pooled {
	var best *pooled
	for _, c := range conns {
		if !c.retired && c.Usable() && (best == nil || c.inFlight < best.inFlight) {
			best = c
		}
	}
	return best
}

func (g *Group) leaseLocked(now time.Time, c *pooled) *Lease {
	c.inFlight++
	g.bookLocked(c.key).inFlight++
	return &Lease{Key: c.key, Conn: c.Conn, g: g, c: c, start: now}
}

// RetireIf retires the pooled connections for which f is true.
func (g *Group) RetireIf(f func(Conn) bool) {
	g.mu.Lock()
	var retire []*pooled
	for key, conns := range g.conns {
		g.conns[key] = slices.DeleteFunc(conns, func(c *pooled) bool {
			if c.retired || !f(c.Conn) {
				return false
			}
			c.retired = true
			retire = append(retire, c)
			return true
		})
		if len(g.conns[key]) == 0 {
			delete(g.conns, key)
		}
	}
	g.growAfter = time.Time{}
	g.mu.Unlock()
	for _, c := range retire {
		c.Retire()
	}
}

// Len is the number of pooled connections and of different endpoints among them.
func (g *Group) Len() (conns, keys int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.conns {
		conns += len(c)
	}
	return conns, len(g.conns)
}

// Busy says whether work is in flight.
func (g *Group) Busy() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, b := range g.books {
		if b.inFlight > 0 {
			return true
		}
	}
	return false
}

// Close ends everything and waits.
func (g *Group) Close() {
	g.mu.Lock()
	g.closed = true
	all := slices.Collect(maps.Keys(g.all))
	g.mu.Unlock()
	g.cancel()
	for _, c := range all {
		c.Close()
	}
	g.wg.Wait()
}
