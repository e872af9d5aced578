// SPDX-License-Identifier: Apache-2.0

package health

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// Key names one instance of one inbound port.
type Key struct {
	Port     string // SNI of the inbound port
	Workload string
}

// Target is an instance to watch.
type Target struct {
	Key
	Address  string
	Path     string // HTTP check where set
	Zone     string
	Draining bool
}

// Status is one instance as it stands.
type Status struct {
	Target
	State        State
	Reason       string
	EjectedUntil time.Time
	InFlight     int
}

// Counts are instances of one port by verdict; a draining instance counts nowhere.
type Counts struct{ Healthy, Unhealthy, Unknown int }

// Config is a Tracker's. The zero value works.
type Config struct {
	Rules
	// Every is the interval of checks. Default 1 s. Raising it delays the notice of a silent death by as much.
	Every time.Duration
	// Timeout of one check. Default: the interval, at most 1 s.
	Timeout time.Duration
	// Check performs one check. Default Probe.
	Check func(ctx context.Context, t Target) error
	// Changed is called, without locks held, after any verdict or the list changed. It must not block.
	Changed func()
	// Ejected is called when an instance was ejected.
	Ejected func(Key)
	Now     func() time.Time
}

func (c Config) withDefaults() Config {
	c.Rules = c.Rules.withDefaults()
	if c.Every <= 0 {
		c.Every = time.Second
	}
	if c.Timeout <= 0 {
		c.Timeout = min(c.Every, time.Second)
	}
	if c.Check == nil {
		c.Check = Probe
	}
	if c.Changed == nil {
		c.Changed = func() {}
	}
	if c.Ejected == nil {
		c.Ejected = func(Key) {}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

// ErrNone says that a port has no instance that may be picked.
var ErrNone = errors.New("health: no routable instance")

// Tracker holds the verdicts. See the package comment.
type Tracker struct {
	cfg  Config
	wake chan struct{} // cap 1: the list changed, Run looks

	mu    sync.Mutex
	all   map[Key]*instance
	ports map[string][]*instance
}

type instance struct {
	target   Target
	verdict  verdict
	inFlight int
}

// New returns a Tracker that watches nothing yet.
func New(cfg Config) *Tracker {
	return &Tracker{
		cfg: cfg.withDefaults(), wake: make(chan struct{}, 1),
		all: map[Key]*instance{}, ports: map[string][]*instance{},
	}
}

// Set replaces the list. An instance whose address and path stay keeps its verdict.
func (t *Tracker) Set(targets []Target) {
	t.mu.Lock()
	all := make(map[Key]*instance, len(targets))
	ports := map[string][]*instance{}
	for _, target := range targets {
		if all[target.Key] != nil {
			continue
		}
		in := t.all[target.Key]
		if in == nil || in.target.Address != target.Address || in.target.Path != target.Path {
			in = &instance{}
		}
		in.target = target
		all[target.Key] = in
		ports[target.Port] = append(ports[target.Port], in)
	}
	t.all, t.ports = all, ports
	t.mu.Unlock()
	select {
	case t.wake <- struct{}{}:
	default:
	}
	t.cfg.Changed()
}

// Run checks until ctx ends.
func (t *Tracker) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	running := map[*instance]context.CancelFunc{}
	for {
		select {
		case <-ctx.Done():
			cancel()
			return nil
		case <-t.wake:
		}
		t.mu.Lock()
		current := make(map[*instance]bool, len(t.all))
		for _, in := range t.all {
			current[in] = true
		}
		t.mu.Unlock()
		for in, stop := range running {
			if !current[in] {
				stop()
				delete(running, in)
			}
		}
		for in := range current {
			if running[in] == nil {
				ictx, stop := context.WithCancel(ctx)
				running[in] = stop
				wg.Go(func() { t.checkLoop(ictx, in) })
			}
		}
	}
}

func (t *Tracker) checkLoop(ctx context.Context, in *instance) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		t.mu.Lock()
		target := in.target
		t.mu.Unlock()
		cctx, cancel := context.WithTimeout(ctx, t.cfg.Timeout)
		err := t.cfg.Check(cctx, target)
		cancel()
		if ctx.Err() != nil {
			return
		}
		t.mu.Lock()
		changed := in.verdict.check(t.cfg.Now(), t.cfg.Rules, err)
		t.mu.Unlock()
		if changed {
			t.cfg.Changed()
		}
		// ±10 %, so that the checks of many instances do not march in step
		timer.Reset(time.Duration(float64(t.cfg.Every) * (0.9 + 0.2*rand.Float64())))
	}
}

// Lease is one use of an instance. Exactly one of its methods that end it, Done, must be called.
type Lease struct {
	Workload string
	Address  string
	Zone     string
	t        *Tracker
	in       *instance
	once     sync.Once
}

// Outcome is what one use met.
type Outcome int

// The outcomes of a Lease.
const (
	Succeeded   Outcome = iota
	NotReached          // the connection could not be opened: err says why
	ServerError         // an answer of 5xx, or a reset in the middle of one
	Abandoned           // says nothing about the instance (the caller went away)
)

// Pick chooses an instance of port, the less busy of two random routable ones, and skips workloads for which avoid
// (nil: none) is true. Unknown instances have a tenth of the weight of healthy ones.
func (t *Tracker) Pick(port string, avoid func(workload string) bool) (*Lease, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var good, draining []*instance
	for _, in := range t.ports[port] {
		if avoid != nil && avoid(in.target.Workload) {
			continue
		}
		if in.verdict.state != Healthy && in.verdict.state != Unknown {
			continue
		}
		if in.target.Draining {
			draining = append(draining, in)
			continue
		}
		good = append(good, in)
	}
	if len(good) == 0 {
		good = draining // better than nothing: it is still there
	}
	if len(good) == 0 {
		return nil, ErrNone
	}
	a := good[rand.IntN(len(good))]
	if len(good) > 1 {
		b := good[rand.IntN(len(good)-1)]
		if b == a {
			b = good[len(good)-1]
		}
		if b.load() < a.load() {
			a = b
		}
	}
	a.inFlight++
	return &Lease{Workload: a.target.Workload, Address: a.target.Address, Zone: a.target.Zone, t: t, in: a}, nil
}

func (in *instance) load() int {
	l := in.inFlight + 1
	if in.verdict.state == Unknown {
		l *= 10
	}
	return l
}

// Done ends the lease.
func (l *Lease) Done(o Outcome, err error) {
	l.once.Do(func() { l.t.done(l.in, o, err) })
}

func (t *Tracker) done(in *instance, o Outcome, err error) {
	t.mu.Lock()
	in.inFlight--
	changed, ejected := false, false
	switch o {
	case NotReached:
		if err == nil {
			err = errors.New("not reached")
		}
		changed = in.verdict.connect(err)
	case Succeeded:
		in.verdict.answer(false, t.cfg.Rules)
	case ServerError:
		if in.verdict.answer(true, t.cfg.Rules) && t.othersLocked(in) {
			in.verdict.eject(t.cfg.Now(), t.cfg.Rules)
			changed, ejected = true, true
		}
	}
	key := in.target.Key
	t.mu.Unlock()
	if ejected {
		t.cfg.Ejected(key)
	}
	if changed {
		t.cfg.Changed()
	}
}

// othersLocked says whether the port keeps a routable instance without in.
func (t *Tracker) othersLocked(in *instance) bool {
	for _, o := range t.ports[in.target.Port] {
		if o != in && !o.target.Draining && (o.verdict.state == Healthy || o.verdict.state == Unknown) {
			return true
		}
	}
	return false
}

// Counts returns the verdicts of port.
func (t *Tracker) Counts(port string) Counts {
	t.mu.Lock()
	defer t.mu.Unlock()
	var c Counts
	for _, in := range t.ports[port] {
		if in.target.Draining {
			continue
		}
		switch in.verdict.state {
		case Healthy:
			c.Healthy++
		case Unknown:
			c.Unknown++
		default:
			c.Unhealthy++
		}
	}
	return c
}

// Routable says whether Pick would find an instance of port.
func (t *Tracker) Routable(port string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, in := range t.ports[port] {
		if in.verdict.state == Healthy || in.verdict.state == Unknown {
			return true
		}
	}
	return false
}

// Snapshot returns all instances, sorted by port and workload.
func (t *Tracker) Snapshot() []Status {
	t.mu.Lock()
	all := make([]Status, 0, len(t.all))
	for _, in := range t.all {
		s := Status{Target: in.target, State: in.verdict.state, Reason: in.verdict.reason, InFlight: in.inFlight}
		if s.State == Ejected {
			s.EjectedUntil = in.verdict.ejectedUntil
		}
		all = append(all, s)
	}
	t.mu.Unlock()
	slices.SortFunc(all, func(a, b Status) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Workload, b.Workload))
	})
	return all
}
