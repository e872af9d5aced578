// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/sidecar/pool"
)

// maxServices bounds the services that an application can make a sidecar subscribe to by asking for hosts.
const maxServices = 4096

var (
	errTooManyServices = errors.New("too many services in use")
	errNoService       = errors.New("no such service")
	errNotYet          = errors.New("the service is not known yet")
)

// services is what this sidecar calls: each has a loop that decides.
type services struct {
	client  Client
	idle    time.Duration
	now     func() time.Time
	newLoop func(*service) // starts the service's loop

	subs   sync.Mutex // held over a change of all together with its (un)subscription; above mu
	mu     sync.Mutex
	all    map[federation.ServiceName]*service
	closed bool
}

// resource is a Service as last told.
type resource struct {
	svc     *controlpb.Service // nil: told to be absent
	version uint64
}

// route is one published decision with what it was made of.
type route struct {
	resource
	inputs   federation.Inputs
	state    federation.State
	decision federation.Decision
	at       time.Time
}

// service is one service that is called.
type service struct {
	name     federation.ServiceName
	explicit bool // an explicit upstream: never forgotten; guarded by services.mu
	ctx      context.Context
	cancel   context.CancelFunc
	wake     chan struct{} // cap 1

	res     atomic.Pointer[resource]
	route   atomic.Pointer[route]
	decided chan struct{} // closed with the first decision, or absence
	once    sync.Once
	used    atomic.Int64 // Unix nanoseconds

	mu     sync.Mutex
	dealer *federation.Dealer
	groups map[groupKey]*pool.Group
	gone   bool
}

// groupKey names the ways to one port in one cluster; http groups pool, tcp ones do not.
type groupKey struct {
	port    string
	cluster federation.ClusterName
	http    bool
}

func newServices(client Client, idle time.Duration, now func() time.Time) *services {
	return &services{client: client, idle: idle, now: now, all: map[federation.ServiceName]*service{}}
}

// get returns a service, subscribing to it when it is new. An explicit one is never forgotten.
func (s *services) get(name federation.ServiceName, explicit bool) (*service, error) {
	s.mu.Lock()
	svc := s.all[name]
	s.mu.Unlock()
	if svc == nil {
		var err error
		if svc, err = s.add(name); err != nil {
			return nil, err
		}
	}
	if explicit {
		s.mu.Lock()
		svc.explicit = true
		s.mu.Unlock()
	}
	svc.used.Store(s.now().UnixNano())
	return svc, nil
}

func (s *services) add(name federation.ServiceName) (*service, error) {
	s.subs.Lock()
	defer s.subs.Unlock()
	s.mu.Lock()
	if svc := s.all[name]; svc != nil {
		s.mu.Unlock()
		return svc, nil
	}
	if s.closed || len(s.all) >= maxServices {
		defer s.mu.Unlock()
		if s.closed {
			return nil, errNoService
		}
		return nil, errTooManyServices
	}
	svc := &service{
		name: name, wake: make(chan struct{}, 1), decided: make(chan struct{}),
		dealer: federation.NewDealer(), groups: map[groupKey]*pool.Group{},
	}
	svc.ctx, svc.cancel = context.WithCancel(context.Background())
	svc.used.Store(s.now().UnixNano())
	s.all[name] = svc
	s.newLoop(svc)
	s.mu.Unlock()
	s.client.Subscribe(controlpb.TypeService, name.String())
	return svc, nil
}

// await waits until the service was decided on once.
func (s *service) await(ctx context.Context) (*route, error) {
	select {
	case <-s.decided:
	default:
		select {
		case <-s.decided:
		case <-s.ctx.Done():
			return nil, errNoService
		case <-ctx.Done():
			return nil, errNotYet
		}
	}
	r := s.route.Load()
	if r == nil || r.svc == nil {
		return nil, errNoService
	}
	return r, nil
}

// told takes a change of a Service resource.
func (s *services) told(name federation.ServiceName, m *controlpb.Service) {
	s.mu.Lock()
	svc := s.all[name]
	s.mu.Unlock()
	if svc == nil {
		return
	}
	var version uint64
	if old := svc.res.Load(); old != nil {
		version = old.version
	}
	svc.res.Store(&resource{svc: m, version: version + 1})
	svc.kick()
}

// known returns the resource of a service that is in use.
func (s *services) known(name federation.ServiceName) (svc *controlpb.Service, inUse bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	service := s.all[name]
	if service == nil {
		return nil, false
	}
	if r := service.res.Load(); r != nil {
		return r.svc, true
	}
	return nil, true
}

// list returns the services in use.
func (s *services) list() []*service {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*service, 0, len(s.all))
	for _, svc := range s.all {
		all = append(all, svc)
	}
	return all
}

// kickAll wakes every loop.
func (s *services) kickAll() {
	for _, svc := range s.list() {
		svc.kick()
	}
}

// forgetIdle ends services that nothing has called for a while.
func (s *services) forgetIdle() {
	limit := s.now().Add(-s.idle).UnixNano()
	s.subs.Lock()
	defer s.subs.Unlock()
	s.mu.Lock()
	var gone []*service
	for name, svc := range s.all {
		if svc.explicit || svc.used.Load() > limit || svc.busy() {
			continue
		}
		delete(s.all, name)
		gone = append(gone, svc)
	}
	s.mu.Unlock()
	for _, svc := range gone {
		s.client.Unsubscribe(controlpb.TypeService, svc.name.String())
		svc.cancel()
	}
}

// close ends every service; their loops close what they own.
func (s *services) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	for _, svc := range s.list() {
		svc.cancel()
	}
}

func (s *service) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *service) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range s.groups {
		if g.Busy() {
			return true
		}
	}
	return false
}

// deal gives the next call's cluster among those with a share.
func (s *service) deal(avoid func(federation.ClusterName) bool) (federation.ClusterName, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dealer.Next(avoid)
}

// evidence merges the experience of all groups: a cluster counts as down when every group that was used agrees.
func (s *service) evidence() map[federation.ClusterName]pool.Evidence {
	s.mu.Lock()
	defer s.mu.Unlock()
	merged := map[federation.ClusterName]pool.Evidence{}
	for key, g := range s.groups {
		e := g.Evidence()
		if !e.Active {
			continue
		}
		have, ok := merged[key.cluster]
		switch {
		case !ok:
			merged[key.cluster] = e
		case have.Down && !e.Down:
			e.Ejections = append(e.Ejections, have.Ejections...)
			merged[key.cluster] = e
		default:
			have.Ejected = max(have.Ejected, e.Ejected)
			have.Ejections = append(have.Ejections, e.Ejections...)
			merged[key.cluster] = have
		}
	}
	return merged
}

// closeGroups ends every connection of the service and waits.
func (s *service) closeGroups() {
	s.mu.Lock()
	s.gone = true
	groups := s.groups
	s.groups = map[groupKey]*pool.Group{}
	s.mu.Unlock()
	for _, g := range groups {
		g.Close()
	}
}
