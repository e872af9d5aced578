// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/sidecar/health"
)

// decisionEvery is the least time between two reports of one service's decision.
const decisionEvery = time.Second

// reporter keeps a stream to the control plane and says on it what this sidecar is, sees and decided: everything at the start of
// each stream, then instances on change and every interval, decisions on change and at most one a second for each service.
type reporter struct {
	s     *Sidecar
	conn  grpc.ClientConnInterface
	every time.Duration
	wake  chan struct{} // cap 1

	mu        sync.Mutex
	latest    map[federation.ServiceName]*decisionState
	instances bool // a verdict changed
	// drained is called when the control plane asks this sidecar to end.
	drain func()
}

type decisionState struct {
	report *controlpb.DecisionReport
	dirty  bool
	sent   time.Time
}

func newReporter(s *Sidecar, conn grpc.ClientConnInterface, every time.Duration, drain func()) *reporter {
	return &reporter{
		s: s, conn: conn, every: every, wake: make(chan struct{}, 1), drain: drain,
		latest: map[federation.ServiceName]*decisionState{},
	}
}

func (r *reporter) kick() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// changed says that a verdict, or draining, changed.
func (r *reporter) changed() {
	r.mu.Lock()
	r.instances = true
	r.mu.Unlock()
	r.kick()
}

// decided keeps the newest decision of a service for the next report.
func (r *reporter) decided(name federation.ServiceName, d *controlpb.DecisionReport) {
	r.mu.Lock()
	st := r.latest[name]
	if st == nil {
		st = &decisionState{}
		r.latest[name] = st
	}
	st.report, st.dirty = d, true
	r.mu.Unlock()
	r.kick()
}

func (r *reporter) forget(name federation.ServiceName) {
	r.mu.Lock()
	delete(r.latest, name)
	r.mu.Unlock()
}

// run keeps the stream until ctx ends. Without a control plane there is nothing to do.
func (r *reporter) run(ctx context.Context) {
	if r.conn == nil {
		return
	}
	backoff := 200 * time.Millisecond
	warned := false
	for ctx.Err() == nil {
		began := time.Now()
		err := r.stream(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > 5*time.Second {
			backoff, warned = 200*time.Millisecond, false
		}
		if !warned {
			warned = true
			r.s.log.Warn("session with the control plane is not open", "error", err)
		}
		t := time.NewTimer(time.Duration(float64(backoff) * (0.8 + 0.4*rand.Float64())))
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
		backoff = min(2*backoff, 5*time.Second)
	}
}

// stream is one stream's life.
func (r *reporter) stream(ctx context.Context) error {
	p, err := r.s.awaitPlace(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := controlpb.NewSessionsClient(r.conn).Report(ctx, grpc.WaitForReady(true)) // back as soon as the connection is
	if err != nil {
		cancel()
		return fmt.Errorf("open session: %w", err)
	}
	ended := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() { ended <- r.receive(stream) })
	defer wg.Wait()
	defer cancel()

	hello := &controlpb.SessionReport{
		Hello: &controlpb.SessionHello{
			Proxy: r.s.cfg.Proxy, InboundAddress: r.s.advertise, Version: r.s.cfg.Version, IntervalMs: r.every.Milliseconds(),
			Locality: &controlpb.Locality{Region: p.locality.Region, Zone: p.locality.Zone},
		},
		Instances: r.s.instances(), InstancesPresent: true, Draining: r.s.draining.Load(),
	}
	if err := stream.Send(hello); err != nil {
		return streamError(err, ended)
	}
	r.mu.Lock()
	for _, st := range r.latest {
		st.dirty, st.sent = true, time.Time{}
	}
	r.instances = false
	r.mu.Unlock()
	r.kick()

	tick := time.NewTicker(r.every)
	defer tick.Stop()
	later := time.NewTimer(time.Hour)
	defer later.Stop()
	for {
		full := false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-ended:
			return err
		case <-tick.C:
			full = true
		case <-r.wake:
		case <-later.C:
		}
		m, wait := r.next(full)
		if wait > 0 {
			later.Reset(wait)
		}
		if m == nil {
			continue
		}
		if err := stream.Send(m); err != nil {
			return streamError(err, ended)
		}
	}
}

// streamError prefers the status that the stream ended with to the EOF that Send returns.
func streamError(err error, ended <-chan error) error {
	select {
	case why := <-ended:
		return why
	case <-time.After(time.Second):
		return err
	}
}

func (r *reporter) receive(stream grpc.BidiStreamingClient[controlpb.SessionReport, controlpb.SessionNotice]) error {
	for {
		n, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("session: %w", err)
		}
		if n.GetNotice() == "drain" {
			r.drain()
		}
	}
}

// next builds the message that is due, or nil, and how long until a held-back decision is.
func (r *reporter) next(full bool) (m *controlpb.SessionReport, wait time.Duration) {
	now := time.Now()
	r.mu.Lock()
	var due []*controlpb.DecisionReport
	names := slices.SortedFunc(maps.Keys(r.latest), federation.ServiceName.Compare)
	for _, name := range names {
		st := r.latest[name]
		if !st.dirty {
			continue
		}
		if left := decisionEvery - now.Sub(st.sent); left > 0 {
			if wait == 0 || left < wait {
				wait = left
			}
			continue
		}
		st.dirty, st.sent = false, now
		due = append(due, st.report)
	}
	full = full || r.instances
	r.instances = false
	r.mu.Unlock()
	if !full && len(due) == 0 {
		return nil, wait
	}
	m = &controlpb.SessionReport{Decisions: due, Draining: r.s.draining.Load()}
	if full {
		m.Instances, m.InstancesPresent = r.s.instances(), true
	}
	return m, wait
}

// instances is the full list of verdicts as reported.
func (s *Sidecar) instances() []*controlpb.InstanceHealth {
	ports := *s.in.ports.Load()
	var list []*controlpb.InstanceHealth
	for _, st := range s.health.Snapshot() {
		h := &controlpb.InstanceHealth{Workload: st.Workload, Reason: st.Reason}
		if p := ports[st.Port]; p != nil {
			h.PortName = p.name
		}
		switch st.State {
		case health.Healthy:
			h.Health = controlpb.Health_HEALTH_HEALTHY
		case health.Unhealthy, health.Ejected:
			h.Health = controlpb.Health_HEALTH_UNHEALTHY
		}
		list = append(list, h)
	}
	return list
}

// localHealth is the full list of counts for gateways.
func (s *Sidecar) localHealth() []*controlpb.ServiceHealth {
	ports := *s.in.ports.Load()
	var list []*controlpb.ServiceHealth
	for _, sni := range slices.Sorted(maps.Keys(ports)) {
		p, c := ports[sni], s.health.Counts(sni)
		list = append(list, &controlpb.ServiceHealth{
			Service:  &controlpb.ServiceRef{Namespace: p.service.Namespace, Name: p.service.Name},
			PortName: p.name,
			Health:   &controlpb.HealthCounts{Healthy: uint32(c.Healthy), Unhealthy: uint32(c.Unhealthy), Unknown: uint32(c.Unknown)},
		})
	}
	return list
}
