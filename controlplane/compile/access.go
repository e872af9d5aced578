// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// accessPolicy is one that was understood.
type accessPolicy struct {
	obj   *api.AccessPolicy
	audit bool
}

// access attaches the policies to their services. One that is not fully understood is replaced by its last good version; without
// one its targets are locked: nobody may call until it is corrected.
func (r *run) access() {
	for _, p := range r.in.Objects.AccessPolicies {
		ref := api.Ref{Kind: api.KindAccessPolicy, Namespace: p.Namespace, Name: p.Name}
		err := r.checkAccess(p)
		if err == nil {
			r.condition(ref, p.Generation, "Accepted", true, "Valid", r.accessNotes(p))
			r.attachAccess(p)
			continue
		}
		r.condition(ref, p.Generation, "Accepted", false, "Invalid", err.Error()+r.fallBack(ref, p.Spec.TargetRefs, p.Spec.Mode))
	}
	for i := range r.in.Objects.Unreadable {
		u := &r.in.Objects.Unreadable[i]
		if u.Ref.Kind == api.KindAccessPolicy {
			r.fallBack(u.Ref, u.Targets, "")
		}
	}
}

// fallBack applies the last good version of a policy, or locks its targets, and says which.
func (r *run) fallBack(ref api.Ref, refs []api.TargetRef, mode string) string {
	if good := r.in.LastGood.Access[ref.Namespace+"/"+ref.Name]; good != nil && r.checkAccess(good) == nil {
		r.attachAccess(good)
		return fmt.Sprintf("; generation %d stays in force", good.Generation)
	}
	if mode == api.ModeAudit {
		return "; it is in audit mode and has no effect"
	}
	for _, t := range refs {
		if s := r.services[federation.ServiceName{Namespace: ref.Namespace, Name: t.Name}]; s != nil {
			s.locked = true
		}
	}
	return "; no earlier version was understood, so nobody may call its targets"
}

func (r *run) attachAccess(p *api.AccessPolicy) {
	if r.out.LastGood.Access == nil {
		r.out.LastGood.Access = map[string]*api.AccessPolicy{}
	}
	r.out.LastGood.Access[p.Namespace+"/"+p.Name] = p
	for _, s := range r.order {
		if s.name.Namespace == p.Namespace && targets(p.Spec.TargetRefs, s.name.Name) {
			s.policies = append(s.policies, &accessPolicy{p, p.Spec.Mode == api.ModeAudit})
		}
	}
}

// checkAccess says what of a policy is not understood. It repeats what the schema demands: nothing that came in by another
// way may widen access.
func (r *run) checkAccess(p *api.AccessPolicy) error {
	if err := checkRefs(p.Spec.TargetRefs); err != nil {
		return err
	}
	switch p.Spec.Mode {
	case "", api.ModeEnforce, api.ModeAudit:
	default:
		return fmt.Errorf("spec.mode %q is neither enforce nor audit", p.Spec.Mode)
	}
	for i := range p.Spec.Rules {
		if err := r.checkRule(p, &p.Spec.Rules[i]); err != nil {
			return fmt.Errorf("spec.rules[%d]: %w", i, err)
		}
	}
	return nil
}

func (r *run) checkRule(p *api.AccessPolicy, rule *api.AccessRule) error {
	switch rule.Action {
	case "", api.ActionAllow, api.ActionDeny:
	default:
		return fmt.Errorf("action %q is neither allow nor deny", rule.Action)
	}
	for _, f := range rule.From {
		if len(f.ServiceAccounts) == 0 && len(f.Clusters) == 0 && len(f.SPIFFEIDs) == 0 {
			return fmt.Errorf("an entry of from names nobody")
		}
		if err := checkSPIFFEIDs(&f); err != nil {
			return err
		}
		for _, a := range f.ServiceAccounts {
			ns, sa, ok := strings.Cut(a, "/")
			if !ok {
				return fmt.Errorf("service account %q is not <namespace>/<name>", a)
			}
			if _, err := spiffeid.Workload(r.in.Self.TrustDomain, ns, sa); err != nil {
				return fmt.Errorf("service account %q: %w", a, err)
			}
		}
		for _, c := range f.Clusters {
			if _, err := federation.ParseClusterName(c); err != nil {
				return err
			}
		}
	}
	for _, t := range rule.To {
		if len(t.Ports) == 0 && len(t.Methods) == 0 && len(t.Paths) == 0 {
			return fmt.Errorf("an entry of to names nothing")
		}
		for _, m := range t.Methods {
			if m == "" || strings.Trim(m, "ABCDEFGHIJKLMNOPQRSTUVWXYZ-") != "" {
				return fmt.Errorf("method %q is not an upper-case token", m)
			}
		}
		for _, path := range t.Paths {
			if err := checkPath(path); err != nil {
				return err
			}
		}
		if err := r.checkHTTP(p, rule, &t); err != nil {
			return err
		}
	}
	return nil
}

// checkPath accepts the paths that a proxy compares after normalisation, nothing that it would have changed.
func checkPath(p string) error {
	rest, prefix := strings.CutSuffix(p, "/*")
	if prefix && rest == "" {
		return nil
	}
	if !strings.HasPrefix(rest, "/") {
		return fmt.Errorf("path %q does not begin with /", p)
	}
	if strings.ContainsAny(rest, "*%\\?#;") || strings.Contains(rest, "//") || len(p) > 1024 {
		return fmt.Errorf("path %q has a character or a form that no normalised path has; * stands only at the end, after a /", p)
	}
	for _, seg := range strings.Split(rest, "/") {
		if seg == "." || seg == ".." {
			return fmt.Errorf("path %q has a dot segment", p)
		}
	}
	return nil
}

// checkHTTP refuses a denial by method or path on a port whose requests cannot be read: it would deny nothing there.
func (r *run) checkHTTP(p *api.AccessPolicy, rule *api.AccessRule, t *api.AccessTo) error {
	if rule.Action != api.ActionDeny || len(t.Methods) == 0 && len(t.Paths) == 0 {
		return nil
	}
	for _, s := range r.order {
		if s.name.Namespace != p.Namespace || !targets(p.Spec.TargetRefs, s.name.Name) {
			continue
		}
		for _, port := range s.ports {
			if port.protocol == controlpb.Protocol_PROTOCOL_TCP && (len(t.Ports) == 0 || slices.Contains(t.Ports, string(port.name))) {
				return fmt.Errorf("deny by method or path cannot be judged on port %s of %s, which is TCP: name the ports it is for", port.name, s.name)
			}
		}
	}
	return nil
}

// accessNotes says what of a sound policy has no effect now.
func (r *run) accessNotes(p *api.AccessPolicy) string {
	var notes, unknown, missing []string
	for i := range p.Spec.Rules {
		for _, f := range p.Spec.Rules[i].From {
			unknown = append(unknown, r.strangers(&f)...)
			for _, c := range f.Clusters {
				if m := r.byCluster[federation.ClusterName(c)]; c != string(r.in.Self.Cluster) && (m == nil || !m.Ready) {
					unknown = append(unknown, c)
				}
			}
		}
	}
	for _, t := range p.Spec.TargetRefs {
		if r.services[federation.ServiceName{Namespace: p.Namespace, Name: t.Name}] == nil {
			missing = append(missing, t.Name)
		}
	}
	if len(unknown) > 0 {
		slices.Sort(unknown)
		notes = append(notes, "not members, so nobody is allowed or denied there: "+strings.Join(slices.Compact(unknown), ", "))
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		notes = append(notes, "no such service yet: "+strings.Join(slices.Compact(missing), ", "))
	}
	return strings.Join(notes, "; ")
}

// accessOf compiles the access of one port. Enforcing policies beside audits: the audits are left out.
func (r *run) accessOf(s *service, p *port) *controlpb.Access {
	open := map[string]bool{r.in.Self.TrustDomain.String(): true}
	for c := range p.exported {
		open[r.byCluster[c].TrustDomain.String()] = true
	}
	a := &controlpb.Access{DefaultTrustDomains: slices.Sorted(maps.Keys(open))}
	enforced := s.locked || slices.ContainsFunc(s.policies, func(p *accessPolicy) bool { return !p.audit })
	a.HasPolicy = enforced || len(s.policies) > 0
	a.Audit = a.HasPolicy && !enforced
	var deny, allow []*controlpb.AccessRule
	for _, policy := range s.policies {
		if enforced && policy.audit {
			continue
		}
		for i := range policy.obj.Spec.Rules {
			rule := &policy.obj.Spec.Rules[i]
			for _, c := range r.compileRule(policy.obj, rule, i, p, open) {
				if c.Deny {
					deny = append(deny, c)
				} else if !s.locked {
					allow = append(allow, c)
				}
			}
		}
	}
	a.Rules = append(deny, allow...)
	return a
}

// compileRule turns a rule into what a proxy evaluates on one port: one for each entry of to, none where it concerns nobody or
// nothing here. Allow rules reach no further than open; a rule without any identity must never come out, it would mean anyone.
func (r *run) compileRule(policy *api.AccessPolicy, rule *api.AccessRule, index int, p *port, open map[string]bool) []*controlpb.AccessRule {
	ids, domains := map[string]bool{}, map[string]bool{}
	deny := rule.Action == api.ActionDeny
	if len(rule.From) == 0 {
		domains = open
	}
	for _, f := range rule.From {
		if len(f.SPIFFEIDs) > 0 {
			r.exactIDs(&f, deny, open, ids)
			continue
		}
		for _, td := range r.domainsOf(f.Clusters) {
			if !deny && !open[td.String()] {
				continue
			}
			if len(f.ServiceAccounts) == 0 {
				domains[td.String()] = true
			}
			for _, account := range f.ServiceAccounts {
				ns, sa, _ := strings.Cut(account, "/")
				if id, err := spiffeid.Workload(td, ns, sa); err == nil {
					ids[id.String()] = true
				}
			}
		}
	}
	if len(ids) == 0 && len(domains) == 0 {
		return nil
	}
	name := rule.Name
	if name == "" {
		name = "rule-" + strconv.Itoa(index+1)
	}
	make1 := func(methods, paths []string) *controlpb.AccessRule {
		return &controlpb.AccessRule{
			Name: name, Policy: policy.Namespace + "/" + policy.Name, Deny: deny,
			SpiffeIds: slices.Sorted(maps.Keys(ids)), TrustDomains: slices.Sorted(maps.Keys(domains)),
			Methods: sorted(methods), Paths: sorted(paths),
		}
	}
	if len(rule.To) == 0 {
		return []*controlpb.AccessRule{make1(nil, nil)}
	}
	var out []*controlpb.AccessRule
	for _, t := range rule.To {
		if len(t.Ports) > 0 && !slices.Contains(t.Ports, string(p.name)) {
			continue
		}
		if p.protocol == controlpb.Protocol_PROTOCOL_TCP && (len(t.Methods) > 0 || len(t.Paths) > 0) {
			continue // never matches there; checkHTTP has refused it for denials
		}
		out = append(out, make1(t.Methods, t.Paths))
	}
	return out
}

func sorted(list []string) []string {
	if len(list) == 0 {
		return nil
	}
	return slices.Sorted(slices.Values(list))
}

// domainsOf returns the trust domains of clusters; the own one where none is named. Those that are no ready members have none.
func (r *run) domainsOf(clusters []string) []spiffeid.TrustDomain {
	if len(clusters) == 0 {
		return []spiffeid.TrustDomain{r.in.Self.TrustDomain}
	}
	var out []spiffeid.TrustDomain
	for _, c := range clusters {
		if c == string(r.in.Self.Cluster) {
			out = append(out, r.in.Self.TrustDomain)
		} else if p := r.byCluster[federation.ClusterName(c)]; p != nil && p.Ready {
			out = append(out, p.TrustDomain)
		}
	}
	return out
}
