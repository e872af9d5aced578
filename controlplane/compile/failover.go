// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
)

// targets says that ref names the service of the policy's namespace, directly or by its federated face.
func targets(refs []api.TargetRef, name string) bool {
	return slices.ContainsFunc(refs, func(t api.TargetRef) bool { return known(t) && t.Name == name })
}

func known(t api.TargetRef) bool {
	return t.Kind == api.KindService && t.Group == "" || t.Kind == api.KindServiceImport && t.Group == api.GroupMCS
}

func checkRefs(refs []api.TargetRef) error {
	if len(refs) == 0 {
		return fmt.Errorf("spec.targetRefs names nothing")
	}
	for _, t := range refs {
		if !known(t) || t.Name == "" {
			return fmt.Errorf("spec.targetRefs: %q of group %q is no Service and no ServiceImport", t.Kind, t.Group)
		}
	}
	return nil
}

// failover gives each name that a FailoverPolicy is for the policy in force: the oldest of those that name it.
func (r *run) failover() {
	policies := slices.Clone(r.in.Objects.FailoverPolicies)
	r.failoverOf = map[federation.ServiceName]*failoverPolicy{}
	unreadable := map[string]bool{}
	for _, u := range r.in.Objects.Unreadable {
		if u.Ref.Kind == api.KindFailoverPolicy {
			key := u.Ref.Namespace + "/" + u.Ref.Name
			unreadable[key] = true
			if good := r.in.LastGood.Failover[key]; good != nil {
				policies = append(policies, good)
			}
		}
	}
	slices.SortFunc(policies, func(a, b *api.FailoverPolicy) int { return older(&a.ObjectMeta, &b.ObjectMeta) })
	for _, p := range policies {
		generation := p.Generation
		key := p.Namespace + "/" + p.Name
		ref := api.Ref{Kind: api.KindFailoverPolicy, Namespace: p.Namespace, Name: p.Name}
		compiled, err := compileFailover(p)
		if err != nil {
			message := err.Error()
			if good := r.in.LastGood.Failover[key]; good != nil {
				if c, err := compileFailover(good); err == nil {
					compiled, p = c, good
					message += fmt.Sprintf("; generation %d stays in force", good.Generation)
				}
			}
			r.condition(ref, generation, "Accepted", false, "Invalid", message)
			if compiled == nil {
				continue
			}
		} else if !unreadable[key] {
			r.condition(ref, p.Generation, "Accepted", true, "Valid", r.failoverNotes(p))
		}
		if r.out.LastGood.Failover == nil {
			r.out.LastGood.Failover = map[string]*api.FailoverPolicy{}
		}
		r.out.LastGood.Failover[key] = p
		r.attachFailover(ref, p, compiled)
	}
}

// failoverPolicy is one that was understood.
type failoverPolicy struct {
	obj   *api.FailoverPolicy
	proto *controlpb.FailoverPolicy
}

func (r *run) attachFailover(ref api.Ref, p *api.FailoverPolicy, compiled *controlpb.FailoverPolicy) {
	var conflicts []string
	for _, t := range p.Spec.TargetRefs {
		name := federation.ServiceName{Namespace: p.Namespace, Name: t.Name}
		if have := r.failoverOf[name]; have != nil {
			if have.obj != p {
				conflicts = append(conflicts, fmt.Sprintf("%s has the older policy %s", t.Name, have.obj.Name))
			}
			continue
		}
		r.failoverOf[name] = &failoverPolicy{p, compiled}
	}
	if len(conflicts) > 0 {
		r.condition(ref, p.Generation, "Conflict", true, "Conflict", strings.Join(conflicts, "; "))
	} else {
		r.condition(ref, p.Generation, "Conflict", false, "None", "")
	}
}

// older orders by age, then by name.
func older(a, b *metav1.ObjectMeta) int {
	return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// failoverNotes says what of a sound policy has no effect now.
func (r *run) failoverNotes(p *api.FailoverPolicy) string {
	var notes []string
	if p.Spec.Spill != nil && p.Spec.Spill.MaxInflightPerEndpoint != nil {
		notes = append(notes, "spill.maxInflightPerEndpoint is not enforced by this version")
	}
	var unknown []string
	for _, t := range p.Spec.Priorities {
		for _, c := range t.Clusters {
			if c != string(federation.OwnCluster) && c != string(r.in.Self.Cluster) && r.byCluster[federation.ClusterName(c)] == nil {
				unknown = append(unknown, c)
			}
		}
	}
	if len(unknown) > 0 {
		slices.Sort(unknown)
		notes = append(notes, "no members, and left out until they join: "+strings.Join(slices.Compact(unknown), ", "))
	}
	return strings.Join(notes, "; ")
}

// compileFailover turns a policy into the message, defaults filled in, and judges it as a whole.
func compileFailover(p *api.FailoverPolicy) (*controlpb.FailoverPolicy, error) {
	if err := checkRefs(p.Spec.TargetRefs); err != nil {
		return nil, err
	}
	fp := federation.Policy{Name: p.Namespace + "/" + p.Name, Generation: p.Generation}
	if t := p.Spec.Trip; t != nil {
		fp.TripPercent, fp.SpillBelowPercent = percent(t.MinHealthyPercent), percent(t.SpillBelowHealthyPercent)
		if t.MinEndpoints != nil {
			fp.MinEndpoints = uint32(max(0, *t.MinEndpoints))
		}
		if t.TunnelLossPercent != nil {
			fp.TunnelLossPercent = *t.TunnelLossPercent
		}
	}
	if t := p.Spec.Return; t != nil {
		fp.ReturnPercent = percent(t.MinHealthyPercent)
		fp.ReturnAfter, fp.Ramp = span(t.After), span(t.Ramp)
	}
	if h := p.Spec.Health; h != nil {
		if h.Passive != nil {
			if h.Passive.Consecutive5xx != nil {
				fp.Passive.Consecutive5xx = uint32(max(0, *h.Passive.Consecutive5xx))
			}
			fp.Passive.EjectFor = max(0, span(h.Passive.EjectFor))
		}
		if h.Active != nil {
			fp.Active.Disabled = h.Active.TCP != nil && !*h.Active.TCP
			fp.Active.Every = max(0, span(h.Active.Every))
		}
	}
	for _, t := range p.Spec.Priorities {
		tier := federation.Tier{Any: t.AnyOf != nil}
		for _, c := range t.Clusters {
			name, err := clusterOrOwn(c)
			if err != nil {
				return nil, err
			}
			tier.Clusters = append(tier.Clusters, name)
		}
		for c, w := range t.Weights {
			if w < 1 {
				return nil, fmt.Errorf("the weight of %s is not positive", c)
			}
			if tier.Weights == nil {
				tier.Weights = map[federation.ClusterName]uint32{}
			}
			tier.Weights[federation.ClusterName(c)] = uint32(w)
		}
		if t.AnyOf != nil {
			for _, c := range t.AnyOf.Except {
				name, err := clusterOrOwn(c)
				if err != nil {
					return nil, err
				}
				tier.Except = append(tier.Except, name)
			}
		}
		fp.Tiers = append(fp.Tiers, tier)
	}
	fp = fp.WithDefaults()
	if err := fp.Validate(); err != nil {
		return nil, err
	}
	return policyProto(fp), nil
}

func clusterOrOwn(s string) (federation.ClusterName, error) {
	if s == string(federation.OwnCluster) {
		return federation.OwnCluster, nil
	}
	return federation.ParseClusterName(s)
}

func percent(p *int32) float64 {
	if p == nil {
		return 0
	}
	return float64(*p)
}

// span is d, where an explicit zero is "none" (negative) and absent is zero.
func span(d *metav1.Duration) time.Duration {
	switch {
	case d == nil:
		return 0
	case d.Duration <= 0:
		return -time.Millisecond
	}
	return d.Duration
}

func policyProto(p federation.Policy) *controlpb.FailoverPolicy {
	m := &controlpb.FailoverPolicy{
		Name: p.Name, Generation: p.Generation,
		TripPercent: p.TripPercent, SpillBelowPercent: p.SpillBelowPercent, MinEndpoints: p.MinEndpoints,
		TunnelLossPercent: p.TunnelLossPercent, ReturnPercent: p.ReturnPercent,
		ReturnAfterMs: p.ReturnAfter.Milliseconds(), RampMs: p.Ramp.Milliseconds(),
		Passive: &controlpb.PassiveHealth{Consecutive_5Xx: p.Passive.Consecutive5xx, EjectForMs: p.Passive.EjectFor.Milliseconds()},
		Active:  &controlpb.ActiveHealth{Disabled: p.Active.Disabled, EveryMs: p.Active.Every.Milliseconds()},
	}
	for _, t := range p.Tiers {
		tier := &controlpb.Tier{Any: t.Any}
		for _, c := range t.Clusters {
			tier.Clusters = append(tier.Clusters, string(c))
		}
		for c, w := range t.Weights {
			if tier.Weights == nil {
				tier.Weights = map[string]uint32{}
			}
			tier.Weights[string(c)] = w
		}
		for _, c := range t.Except {
			tier.Except = append(tier.Except, string(c))
		}
		m.Tiers = append(m.Tiers, tier)
	}
	return m
}

// drains are the drains in force for a service: those of its policy, then those of the Federation.
func (r *run) drains(name federation.ServiceName) []api.Drain {
	var list []api.Drain
	if p := r.failoverOf[name]; p != nil {
		list = append(list, p.obj.Spec.Drain...)
	}
	for _, f := range r.in.Objects.Federations {
		if f.Name == string(r.in.Self.Federation) {
			list = append(list, f.Spec.Drain...)
		}
	}
	return list
}

// policyFor returns the policy of a service with its local drains, and the own cluster's drain.
func (r *run) policyFor(name federation.ServiceName) (*controlpb.FailoverPolicy, *api.Drain) {
	var m *controlpb.FailoverPolicy
	if p := r.failoverOf[name]; p != nil {
		m = proto.CloneOf(p.proto)
	} else {
		m = policyProto(federation.DefaultPolicy())
	}
	var own *api.Drain
	for _, d := range r.drains(name) {
		if d.Cluster == string(r.in.Self.Cluster) {
			if own == nil {
				own = &d
			}
			continue
		}
		m.LocallyDrained = append(m.LocallyDrained, d.Cluster)
	}
	slices.Sort(m.LocallyDrained)
	m.LocallyDrained = slices.Compact(m.LocallyDrained)
	return m, own
}

// limits are the owner's facts about a service, nil where there are none.
func limits(own *api.Drain) *controlpb.OwnerLimits {
	if own == nil {
		return nil
	}
	return &controlpb.OwnerLimits{Drained: true, DrainReason: own.Reason}
}
