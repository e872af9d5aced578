// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/span"
	"github.com/strait-mesh/strait/sidecar/inner"
	"github.com/strait-mesh/strait/sidecar/pool"

	sidecarhttp "github.com/strait-mesh/strait/sidecar/http"
)

const (
	// A vanished peer goes unnoticed by a pooled connection for at most the sum. New requests stay away sooner: the retry
	// budget cannot carry three seconds of calls that all break at once.
	pingEvery    = time.Second
	pingTimeout  = 2 * time.Second
	suspectAfter = 1700 * time.Millisecond
	// firstWait is how long a call waits for a service that was never asked for before.
	firstWait = 5 * time.Second
	// pickWait bounds all dials of one pick.
	pickWait = 10 * time.Second
	// triesPerCluster: after as many failed attempts a retry avoids the whole cluster.
	triesPerCluster = 2
)

// picker implements sidecarhttp.Picker.
type picker struct{ s *Sidecar }

var _ sidecarhttp.Picker = picker{}

// call is one search for a way: where it was already, and what is left.
type call struct {
	s      *Sidecar
	svc    *service
	route  *route
	port   *controlpb.ServicePort
	pinned federation.ClusterName
	http   bool
	tried  []sidecarhttp.Tried
	out    map[federation.ClusterName]error // clusters without a way, and why
	last   error
}

// newCall finds service and port.
func (s *Sidecar) newCall(ctx context.Context, name federation.ServiceName, port string, pinned federation.ClusterName, http bool,
) (*call, error) {
	svc, err := s.services.get(name, false)
	if err != nil {
		return nil, refusal(name, err)
	}
	wait, cancel := context.WithTimeout(ctx, firstWait)
	defer cancel()
	r, err := svc.await(wait)
	if err != nil {
		return nil, refusal(name, err)
	}
	p, err := choosePort(r.svc, port, pinned, http)
	if err != nil {
		return nil, &sidecarhttp.Refusal{Reason: federation.ConfigMissing, Code: problem.UnknownService, Message: err.Error(), Err: err}
	}
	return &call{s: s, svc: svc, route: r, port: p, pinned: pinned, http: http, out: map[federation.ClusterName]error{}}, nil
}

func refusal(name federation.ServiceName, err error) *sidecarhttp.Refusal {
	r := &sidecarhttp.Refusal{Reason: federation.ConfigMissing, Code: problem.UnknownService, Message: name.String() + ": " + err.Error(), Err: err}
	if errors.Is(err, errNotYet) || errors.Is(err, errTooManyServices) {
		r.Code, r.Status = problem.NoEndpoints, 503
	}
	return r
}

// choosePort finds a port by name or number; an empty one is the only port, or the first. For a request of HTTP only ports that
// speak it count, and 80, which is what a URL without a port says, means the first of them where there is no port 80. A port that
// only a peer offers counts too.
func choosePort(svc *controlpb.Service, port string, pinned federation.ClusterName, http bool) (*controlpb.ServicePort, error) {
	var all []*controlpb.ServicePort
	all = append(all, svc.GetPorts()...)
	for _, r := range svc.GetRemote() {
		if pinned == "" || string(pinned) == r.GetCluster() {
			all = append(all, r.GetPorts()...)
		}
	}
	number, _ := strconv.ParseUint(port, 10, 16) // 0 when it is a name
	var first *controlpb.ServicePort
	for _, p := range all {
		if http && !isHTTP(p.GetProtocol()) {
			continue
		}
		if first == nil {
			first = p
		}
		if port == "" || p.GetName() == port || number != 0 && uint64(p.GetNumber()) == number {
			return p, nil
		}
	}
	switch {
	case first != nil && http && number == 80:
		return first, nil
	case port == "" && http:
		return nil, errors.New("it has no port that speaks HTTP")
	case port == "":
		return nil, errors.New("it has no port")
	}
	return nil, fmt.Errorf("it has no such port %q", port)
}

// Pick implements sidecarhttp.Picker. Ways that cannot be dialled are skipped here: nothing was sent on them.
func (p picker) Pick(ctx context.Context, m sidecarhttp.Meta, tried []sidecarhttp.Tried) (*sidecarhttp.Leg, error) {
	c, err := p.s.newCall(ctx, m.Service, m.Port.String(), m.Pinned, true)
	if err != nil {
		return nil, err
	}
	c.tried = tried
	ctx, cancel := context.WithTimeout(ctx, pickWait)
	defer cancel()
	for {
		cluster, force, ok := c.next()
		if !ok {
			return nil, c.refuse()
		}
		var leg *sidecarhttp.Leg
		if m.Upgrade != "" {
			leg, err = c.dialUpgrade(ctx, cluster, force, m)
		} else {
			leg, err = c.getPooled(ctx, cluster, force, m)
		}
		if err == nil {
			return leg, nil
		}
		c.failed(cluster, force, err)
		if ctx.Err() != nil {
			return nil, c.refuse()
		}
	}
}

// next says where to look: the dealer's choice, then the other fit members in tier order, then, with force, whatever has a
// share although it was ejected or tried. Each cluster is asked once without and once with force.
func (c *call) next() (cluster federation.ClusterName, force, ok bool) {
	if c.pinned != "" {
		_, failedOnce := c.out[c.pinned]
		_, failedTwice := c.out[forced(c.pinned)]
		return c.pinned, failedOnce, !failedTwice && c.exists(c.pinned)
	}
	avoid := func(cl federation.ClusterName) bool {
		if _, failed := c.out[cl]; failed {
			return true
		}
		return c.exhausted(cl)
	}
	if cl, ok := c.svc.deal(avoid); ok {
		return cl, false, true
	}
	if m, _, ok := c.route.decision.Fallback(avoid); ok {
		return m.Cluster, false, true
	}
	for _, t := range c.route.decision.Tiers {
		for _, m := range t.Members {
			_, done := c.out[forced(m.Cluster)]
			if !done && (m.Share > 0 || m.State == federation.StateStandby) {
				return m.Cluster, true, true
			}
		}
	}
	return "", false, false
}

// forced is the key under which a second, forced failure is kept; no cluster has such a name.
func forced(c federation.ClusterName) federation.ClusterName { return c + "!" }

func (c *call) exists(cluster federation.ClusterName) bool {
	p := c.s.place.Load()
	return p != nil && cluster == p.cluster && len(c.route.svc.GetLocal()) > 0 || findRemote(c.route.svc, cluster) != nil
}

// exhausted says that earlier attempts of the same request have used the cluster up.
func (c *call) exhausted(cluster federation.ClusterName) bool {
	n := 0
	for _, t := range c.tried {
		if t.Cluster == cluster {
			if t.Instance == "" {
				return true
			}
			n++
		}
	}
	return n >= triesPerCluster
}

func (c *call) failed(cluster federation.ClusterName, force bool, err error) {
	if force {
		cluster = forced(cluster)
	}
	c.out[cluster] = err
	if c.last == nil || !errors.Is(err, pool.ErrNone) {
		c.last = err
	}
}

// avoid names the instances that were tried.
func (c *call) avoid(cluster federation.ClusterName, force bool) func(string) bool {
	if force {
		return nil
	}
	return func(key string) bool {
		return slices.ContainsFunc(c.tried, func(t sidecarhttp.Tried) bool {
			return t.Cluster == cluster && sameInstance(t.Instance, key)
		})
	}
}

func (c *call) getPooled(ctx context.Context, cluster federation.ClusterName, force bool, m sidecarhttp.Meta) (*sidecarhttp.Leg, error) {
	g := c.s.group(c.svc, c.route, groupKey{port: c.port.GetName(), cluster: cluster, http: true})
	if g == nil {
		return nil, pool.ErrNone
	}
	for {
		lease, err := g.Get(ctx, c.avoid(cluster, force), force)
		if err == nil {
			pc := lease.Conn.(*pooledConn)
			return c.leg(cluster, lease, pc, nil), nil
		}
		// a single endpoint that failed is ejected or remembered by now: ask for another until there is none
		var f *pool.Failure
		if !errors.As(err, &f) || f.Cluster || f.Neutral || f.Key == "" || ctx.Err() != nil {
			return nil, err
		}
		c.tried = append(slices.Clip(c.tried), sidecarhttp.Tried{Cluster: cluster, Instance: f.Key})
		if force {
			return nil, err
		}
	}
}

// dialUpgrade makes an http/1.1 connection for one request.
func (c *call) dialUpgrade(ctx context.Context, cluster federation.ClusterName, force bool, m sidecarhttp.Meta) (*sidecarhttp.Leg, error) {
	ic, lease, err := c.open(ctx, cluster, force, []string{"http/1.1"}, m.Trace)
	if err != nil {
		return nil, err
	}
	pc, err := c.s.clientConn(ic, "http/1.1")
	if err != nil {
		ic.Close()
		lease.Done(pool.Reset, err)
		return nil, err
	}
	return c.leg(cluster, lease, pc, func() { pc.Close() }), nil
}

// open makes a connection of its own in cluster, trying one endpoint after the other.
func (c *call) open(ctx context.Context, cluster federation.ClusterName, force bool, alpn []string, trace span.Context,
) (*inner.Conn, *pool.Lease, error) {
	key := groupKey{port: c.port.GetName(), cluster: cluster, http: c.http}
	g := c.s.group(c.svc, c.route, key)
	if g == nil {
		return nil, nil, pool.ErrNone
	}
	var last error
	for range 8 {
		lease, err := g.Choose(c.avoid(cluster, force), force)
		if err != nil {
			if last == nil {
				last = err
			}
			return nil, nil, last
		}
		want := pool.Want{Key: lease.Key}
		if !force {
			want.Avoid = c.avoidKeys(g, cluster)
		}
		ic, instance, err := c.s.dialInner(ctx, c.svc, key, want, alpn, trace.Traceparent())
		if err == nil {
			lease.Reached(instance)
			return ic, lease, nil
		}
		lease.Done(pool.Unreachable, err)
		last = err
		var f *pool.Failure
		if !errors.As(err, &f) || f.Cluster || f.Neutral || force || ctx.Err() != nil {
			return nil, nil, err
		}
		if f.Key == "" {
			return nil, nil, err
		}
		c.tried = append(slices.Clip(c.tried), sidecarhttp.Tried{Cluster: cluster, Instance: f.Key})
	}
	return nil, nil, last
}

// avoidKeys names the instances that a dial should not lead to: those tried for this call first, then ejected ones.
func (c *call) avoidKeys(g *pool.Group, cluster federation.ClusterName) []string {
	var keys []string
	for _, t := range c.tried {
		if t.Cluster == cluster && t.Instance != "" {
			keys = append(keys, t.Instance)
		}
	}
	return append(keys, g.Avoid(preface.MaxAvoid)...)
}

// leg fills in what spans, metrics and the engine want to know.
func (c *call) leg(cluster federation.ClusterName, lease *pool.Lease, pc *pooledConn, after func()) *sidecarhttp.Leg {
	d := c.route.decision
	m, tier, _ := d.Member(cluster)
	p := c.s.place.Load()
	leg := &sidecarhttp.Leg{
		Cluster: cluster, Instance: lease.Key, PeerID: pc.inner.Peer.ID, Tier: tier, Reason: m.Reason,
		Policy: c.route.inputs.Policy.Name, Revision: c.route.svc.GetRevision(), Candidates: d.Candidates(),
		Scope: c.scope(p, cluster, lease.Key), Remote: pc.inner.Via != nil, Conn: pc.Conn,
		Address: pc.inner.RemoteAddr().String(),
	}
	if c.pinned != "" {
		leg.Reason = federation.HeaderOverride
	}
	var trace string
	if via := pc.inner.Via; via != nil {
		leg.Begin = func(sc span.Context) {
			trace = sc.Traceparent()
			if trace != "" {
				via.Mark(&controlpb.TraceMarker{Connection: pc.inner.Counter, Offset: pc.inner.Offset(), Traceparent: trace})
			}
		}
	}
	leg.Done = func(o sidecarhttp.Outcome) {
		lease.Latency = o.FirstByte
		met := outcome(o)
		if met == pool.Reset && wayBroke(pc.inner) {
			met = pool.Neutral
		}
		lease.Done(met, o.Err)
		if trace != "" {
			pc.inner.Via.Mark(&controlpb.TraceMarker{
				Connection: pc.inner.Counter, Offset: pc.inner.Offset(), Traceparent: trace, End: true,
			})
		}
		if after != nil {
			after()
		}
	}
	return leg
}

// scope classifies how far a call goes.
func (c *call) scope(p *place, cluster federation.ClusterName, instance string) string {
	if cluster == p.cluster {
		for _, e := range c.route.svc.GetLocal() {
			if z := e.GetLocality().GetZone(); e.GetProxy() == instance && z != "" && z != p.locality.Zone {
				return "cross_zone"
			}
		}
		return "local"
	}
	if r := findRemote(c.route.svc, cluster); r != nil && r.GetRegion() == p.locality.Region && r.GetRegion() != "" {
		return "cross_cluster"
	}
	return "cross_region"
}

// outcome translates what the engine met into the pool's words.
func outcome(o sidecarhttp.Outcome) pool.Outcome {
	const grpcUnavailable = 14
	switch o.Result {
	case sidecarhttp.Answered:
		if o.Status >= 500 || o.GRPC == grpcUnavailable {
			return pool.ServerError
		}
		return pool.OK
	case sidecarhttp.Refused:
		if o.Reason == federation.NoEndpoints {
			return pool.NoInstance
		}
		return pool.Neutral
	case sidecarhttp.Broken:
		return pool.Reset
	case sidecarhttp.TimedOut:
		return pool.ServerError
	}
	return pool.Neutral // Unsent, too: the connection was on its way out, and making another one tells more
}

// refuse says why nothing is left.
func (c *call) refuse() *sidecarhttp.Refusal {
	d := c.route.decision
	r := &sidecarhttp.Refusal{Reason: d.Reason, Code: problem.NoEndpoints, Err: c.last}
	var healthy, total uint32
	members := 0
	for _, t := range d.Tiers {
		for _, m := range t.Members {
			healthy, total, members = healthy+m.Healthy, total+m.Total, members+1
		}
	}
	r.Message = fmt.Sprintf("%s: %d/%d healthy in %d clusters", c.svc.name, healthy, total, members)
	if c.pinned != "" {
		r.Message = fmt.Sprintf("%s: no way to %s", c.svc.name, c.pinned)
	}
	var f *pool.Failure
	if errors.As(c.last, &f) {
		r.Reason = f.Reason
	} else if members == 0 && len(d.Exclusions) > 0 {
		r.Reason = d.Exclusions[0].Reason
	}
	switch r.Reason {
	case federation.IdentityExpired:
		r.Code, r.Message = problem.IdentityExpired, c.svc.name.String()+": this sidecar's own identity has expired"
	case "", federation.LocalOK, federation.PriorityOK, federation.Standby:
		r.Reason = federation.NoEndpoints
	}
	return r
}
