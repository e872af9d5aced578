// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/controlplane/sessions"
	"github.com/strait-mesh/strait/controlplane/traces"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// ServiceList implements controlpb.OperatorServer.
func (o *operator) ServiceList(_ context.Context, req *controlpb.ServiceListRequest) (*controlpb.ServiceListResponse, error) {
	return &controlpb.ServiceListResponse{Services: o.services(req.Name)}, nil
}

// services summarizes the services of the last snapshot; name is "ns/name", "name" or empty.
func (o *operator) services(name string) []*controlpb.ServiceSummary {
	out := o.c.compiled.Load()
	if out == nil {
		return nil
	}
	view, sess := o.c.federate.View(), o.c.sessions.View()
	var list []*controlpb.ServiceSummary
	for key, m := range out.Resources[controlpb.TypeService] {
		svc := m.(*controlpb.Service)
		if name != "" && name != key && name != svc.Name {
			continue
		}
		ref := federation.ServiceName{Namespace: svc.Namespace, Name: svc.Name}
		s := &controlpb.ServiceSummary{
			Service: wire.ServiceToProto(ref), Ports: svc.Ports, Providers: o.providers(svc, view), Policy: svc.Policy.GetName(),
		}
		for _, c := range out.Exports[ref] {
			s.ExportedTo = append(s.ExportedTo, c.String())
		}
		callers := sess.Callers(ref)
		s.Callers = slices.Sorted(maps.Keys(callers))
		s.Active, s.Reason = summarizeDecisions(callers)
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b *controlpb.ServiceSummary) int {
		return cmp.Or(cmp.Compare(a.Service.Namespace, b.Service.Namespace), cmp.Compare(a.Service.Name, b.Service.Name))
	})
	return list
}

func (o *operator) providers(svc *controlpb.Service, view *federate.View) []*controlpb.ServiceProvider {
	var list []*controlpb.ServiceProvider
	if len(svc.Local) > 0 {
		p := &controlpb.ServiceProvider{Cluster: o.c.facts.Cluster, Local: true, Same: true, Health: &controlpb.HealthCounts{}, Endpoints: svc.Local, State: "ok"}
		for _, e := range svc.Local {
			addCounts(p.Health, e.Health)
		}
		if svc.OwnLimits.GetDrained() {
			p.State, p.Reason = "drained", svc.OwnLimits.GetDrainReason()
		}
		list = append(list, p)
	}
	for _, r := range svc.Remote {
		p := &controlpb.ServiceProvider{Cluster: r.Cluster, Same: r.Same, Health: &controlpb.HealthCounts{}, State: "ok", RttSeconds: r.RttSeconds}
		for _, h := range r.Zones {
			addCounts(p.Health, h)
		}
		name, _ := federation.ParseClusterName(r.Cluster)
		switch peer := view.ByCluster(name); {
		case r.Limits.GetDrained():
			p.State, p.Reason = "drained", r.Limits.GetDrainReason()
		case r.Freshness == controlpb.Freshness_FRESHNESS_WITHDRAWN:
			p.State, p.Reason = "withdrawn", "no fresh catalog"
		case peer == nil || !peer.TunnelUp:
			p.State, p.Reason = "unreachable", string(federation.PeerUnreachable)
		case r.Freshness == controlpb.Freshness_FRESHNESS_STALE:
			p.State, p.Reason = "stale", string(federation.CatalogStaleHold)
		case !r.Same:
			p.Reason = string(federation.NotGranted)
		}
		list = append(list, p)
	}
	return list
}

func addCounts(sum, h *controlpb.HealthCounts) {
	sum.Healthy += h.GetHealthy()
	sum.Unhealthy += h.GetUnhealthy()
	sum.Unknown += h.GetUnknown()
}

// sharesOf is "eu-west 80%, us-west 20%".
func sharesOf(d *controlpb.DecisionReport) string {
	var parts []string
	for _, t := range d.GetTiers() {
		for _, m := range t.Members {
			if m.Share > 0 {
				parts = append(parts, fmt.Sprintf("%s %.0f%%", m.Cluster, m.Share*100))
			}
		}
	}
	if len(parts) == 0 {
		return "nowhere"
	}
	return strings.Join(parts, ", ")
}

// summarizeDecisions is what most callers do, and how many do something else.
func summarizeDecisions(callers map[string]*sessions.Decision) (active, reason string) {
	groups := groupDecisions(callers)
	if len(groups) == 0 {
		return "-", "no caller here"
	}
	active, reason = sharesOf(groups[0].Decision), groups[0].Decision.Reason
	if others := len(callers) - len(groups[0].Callers); others > 0 {
		active += fmt.Sprintf(" (%d of %d callers)", len(groups[0].Callers), len(callers))
	}
	return active, reason
}

// groupDecisions groups callers that decided alike, the largest group first.
func groupDecisions(callers map[string]*sessions.Decision) []*controlpb.WhyGroup {
	byText := map[string]*controlpb.WhyGroup{}
	for _, proxy := range slices.Sorted(maps.Keys(callers)) {
		d := callers[proxy].Report
		key := d.Reason + "|" + decisionKey(d)
		g := byText[key]
		if g == nil {
			g = &controlpb.WhyGroup{Decision: d}
			byText[key] = g
		}
		g.Callers = append(g.Callers, proxy)
		if d.AtMs > g.Decision.AtMs {
			g.Decision = d
		}
	}
	groups := slices.Collect(maps.Values(byText))
	slices.SortFunc(groups, func(a, b *controlpb.WhyGroup) int {
		return cmp.Or(cmp.Compare(len(b.Callers), len(a.Callers)), cmp.Compare(a.Callers[0], b.Callers[0]))
	})
	return groups
}

func decisionKey(d *controlpb.DecisionReport) string {
	var b strings.Builder
	for _, t := range d.Tiers {
		for _, m := range t.Members {
			fmt.Fprintf(&b, "%d %s %.2f %s %s;", t.Tier, m.Cluster, m.Share, m.State, m.Reason)
		}
	}
	return b.String()
}

// Why implements controlpb.OperatorServer: what was reported, and whether computing it again gives the same.
func (o *operator) Why(ctx context.Context, req *controlpb.WhyRequest) (*controlpb.WhyResponse, error) {
	c := o.c
	name, err := federation.ParseServiceName(req.Service)
	if err != nil {
		return nil, wire.ToStatus(problem.New(problem.Usage, "%v", err))
	}
	cluster, from, pinned := strings.Cut(req.From, "/")
	if req.From != "" && pinned && cluster != c.facts.Cluster {
		return o.whyElsewhere(ctx, cluster, &controlpb.WhyRequest{Service: req.Service, From: from})
	}
	if !pinned {
		from = req.From
	}
	out := c.compiled.Load()
	var svc *controlpb.Service
	if out != nil {
		svc, _ = out.Resources[controlpb.TypeService][name.String()].(*controlpb.Service)
	}
	if svc == nil {
		return nil, wire.ToStatus(problem.New(problem.UnknownService, "no service is called %s", name))
	}
	acked, subscribed, _ := c.discovery.Acked(controlpb.TypeService, name.String())
	r := &controlpb.WhyResponse{
		Service: wire.ServiceToProto(name), Cluster: c.facts.Cluster, Policy: svc.Policy.GetName(),
		PolicyGeneration: svc.Policy.GetGeneration(), Acked: uint32(acked), Subscribed: uint32(subscribed),
	}
	view := c.sessions.View()
	callers := map[string]*sessions.Decision{}
	for proxy, d := range view.Callers(name) {
		if from != "" && from != "*" && proxy != from && !strings.HasSuffix(proxy, "/"+from) {
			continue
		}
		callers[proxy] = d
		if s := view.Get(proxy); s != nil && s.Silent {
			r.Silent = append(r.Silent, fmt.Sprintf("%s: not reported since %s", proxy, s.LastReport().UTC().Format(time.TimeOnly)))
		}
	}
	slices.Sort(r.Silent)
	if len(callers) == 0 {
		what := "no caller in " + c.facts.Cluster + " has reported a decision for " + name.String()
		if from != "" {
			what = from + " has reported no decision for " + name.String()
		}
		return nil, wire.ToStatus(problem.New(problem.NotFound, "%s", what).
			WithWhy("only sidecars that call the service decide, and they report within a second of their first call").
			WithFix("strait service describe %s", name))
	}
	r.Groups = groupDecisions(callers)
	for _, g := range r.Groups {
		g.Recomputed = recompute(g.Decision)
	}
	r.Notes = whyNotes(r.Groups)
	return r, nil
}

// recompute runs the one decision function over the inputs and the state that were reported.
func recompute(d *controlpb.DecisionReport) string {
	in, st, reported, err := wire.DecisionFromProto(d)
	if err != nil {
		return "it cannot be computed again: " + err.Error()
	}
	_, again := federation.Step(time.UnixMilli(d.AtMs), st, in)
	if again.Reason == reported.Reason && sameShares(again.Shares(), reported.Shares()) {
		return "agrees"
	}
	return fmt.Sprintf("%v, reason %s", again.Shares(), again.Reason)
}

func sameShares(a, b map[federation.ClusterName]float64) bool {
	for _, k := range slices.Concat(slices.Collect(maps.Keys(a)), slices.Collect(maps.Keys(b))) {
		if d := a[k] - b[k]; d > 0.005 || d < -0.005 {
			return false
		}
	}
	return true
}

// whyElsewhere asks the cluster where the caller runs.
func (o *operator) whyElsewhere(ctx context.Context, cluster string, req *controlpb.WhyRequest) (*controlpb.WhyResponse, error) {
	name, err := federation.ParseClusterName(cluster)
	if err != nil {
		return nil, wire.ToStatus(problem.New(problem.Usage, "--from %s: %v", cluster, err))
	}
	peer := o.c.federate.View().ByCluster(name)
	if peer == nil {
		return nil, wire.ToStatus(problem.New(problem.NotFound, "no member is called %s", name).WithFix("strait member list"))
	}
	return nil, wire.ToStatus(problem.New(problem.Usage, "the decisions of %s are known in %s", cluster, cluster).
		WithWhy("sidecars report to their own control plane, and no other cluster may read it").
		WithFix("there: strait why %s --from %s", req.Service, req.From))
}

// traceQuery is the body of the peer query "trace"; the answer is a controlpb.Trace.
const traceQuery = "trace"

// handleTrace answers a peer's question for the spans of one trace: those of calls that it was an end of.
func (c *ControlPlane) handleTrace(_ context.Context, from spiffeid.TrustDomain, body []byte) ([]byte, error) {
	peer := c.federate.View().Peer(from)
	if peer == nil {
		return nil, problem.New(problem.TrustRefused, "%s is no member", from)
	}
	var q struct {
		ID string `json:"id"`
	}
	if err := json.Unmarshal(body, &q); err != nil {
		return nil, problem.New(problem.Usage, "malformed query")
	}
	return proto.Marshal(&controlpb.Trace{Id: q.ID, Spans: c.traces.SpansFor(q.ID, peer.Cluster)})
}

// Trace implements controlpb.OperatorServer: own traces, completed by the spans that members keep.
func (o *operator) Trace(ctx context.Context, req *controlpb.TraceRequest) (*controlpb.TraceResponse, error) {
	limit := int(req.Limit)
	if limit <= 0 || limit > 200 {
		limit = 10
	}
	r := &controlpb.TraceResponse{Traces: o.c.traces.Query(traces.Query{ID: req.Id, Filter: req.Filter, Limit: limit})}
	if req.LocalOnly {
		return r, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	unreachable := map[string]bool{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for _, t := range r.Traces {
		from, to := extent(t)
		for _, peer := range o.c.federate.View().Peers {
			if !peer.Ready() || !concerns(t, peer.Cluster) {
				continue
			}
			wg.Go(func() {
				slots <- struct{}{}
				defer func() { <-slots }()
				spans, err := o.spansOf(ctx, peer, t.Id)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					unreachable[peer.Cluster.String()] = true
					return
				}
				t.Spans = append(t.Spans, believable(spans, from, to)...)
			})
		}
	}
	wg.Wait()
	for _, t := range r.Traces {
		slices.SortStableFunc(t.Spans, func(a, b *controlpb.Span) int { return cmp.Compare(a.StartUnixNano, b.StartUnixNano) })
	}
	r.Unreachable = slices.Sorted(maps.Keys(unreachable))
	return r, nil
}

// concerns reports whether a trace has a span that names the cluster as an end: nobody else is asked.
func concerns(t *controlpb.Trace, cluster federation.ClusterName) bool {
	for _, s := range t.Spans {
		if s.Attributes["strait.dst.cluster"] == cluster.String() || s.Attributes["strait.src.cluster"] == cluster.String() {
			return true
		}
	}
	return false
}

// extent is when a trace was, as far as our own spans know.
func extent(t *controlpb.Trace) (from, to int64) {
	for i, s := range t.Spans {
		if i == 0 || s.StartUnixNano < from {
			from = s.StartUnixNano
		}
		to = max(to, s.EndUnixNano)
	}
	return from, to
}

const (
	maxForeignSpans = 500              // of one member in one trace
	spanSkew        = 10 * time.Minute // by which another cluster's clock may differ from ours
)

// believable leaves out of a member's spans what cannot be of a trace that was between from and to, and of their text what does not
// belong on a terminal.
func believable(spans []*controlpb.Span, from, to int64) []*controlpb.Span {
	var out []*controlpb.Span
	for _, s := range spans {
		if s.StartUnixNano < from-int64(spanSkew) || s.EndUnixNano > to+int64(spanSkew) || s.EndUnixNano < s.StartUnixNano ||
			len(out) == maxForeignSpans {
			continue
		}
		for _, text := range []*string{&s.SpanId, &s.ParentId, &s.Name, &s.Kind, &s.Service, &s.Status, &s.StatusMessage} {
			*text = printable(*text)
		}
		for k, v := range s.Attributes {
			s.Attributes[k] = printable(v)
		}
		for _, e := range s.Events {
			e.Name = printable(e.Name)
		}
		out = append(out, s)
	}
	return out
}

func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
}

func (o *operator) spansOf(ctx context.Context, peer *federate.Peer, id string) ([]*controlpb.Span, error) {
	body, err := json.Marshal(map[string]string{"id": id})
	if err != nil {
		return nil, err
	}
	reply, err := o.c.federate.Ask(ctx, peer.TrustDomain, traceQuery, body)
	if err != nil {
		return nil, err
	}
	var t controlpb.Trace
	if err := proto.Unmarshal(reply.Body, &t); err != nil {
		return nil, err
	}
	if t.Id != id {
		return nil, errors.New("another trace than was asked for")
	}
	for _, s := range t.Spans {
		s.Cluster = peer.Cluster.String() // whatever it says: these are its spans
	}
	return t.Spans, nil
}
