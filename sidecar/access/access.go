// SPDX-License-Identifier: Apache-2.0

package access

import (
	"fmt"
	"strings"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Request is what is judged. For a TCP connection HTTP is false and Method and Path are empty.
type Request struct {
	Caller spiffeid.ID
	HTTP   bool
	Method string
	Path   string
}

// Verdict says whether a request may pass and which rule said so.
type Verdict struct {
	Allowed bool
	// Audited is set when the policy would have denied and is in audit mode.
	Audited bool
	// Policy is "<ns>/<name>" of the AccessPolicy that decided; empty when the default did.
	Policy string
	// Rule is the name of the deciding rule; empty when none matched.
	Rule string
}

// Policy is the compiled access of one port. The zero value denies everybody.
type Policy struct {
	hasPolicy bool
	audit     bool
	defaults  map[spiffeid.TrustDomain]bool
	deny      []rule
	allow     []rule
}

type rule struct {
	name, policy string
	ids          map[spiffeid.ID]bool
	domains      map[spiffeid.TrustDomain]bool
	methods      map[string]bool
	exact        map[string]bool
	prefixes     []string // end in "/"
}

// Compile reads a. own is the trust domain of the port's own cluster, always among the default ones.
func Compile(a *controlpb.Access, own spiffeid.TrustDomain) (*Policy, error) {
	p := &Policy{hasPolicy: a.GetHasPolicy(), audit: a.GetAudit(), defaults: map[spiffeid.TrustDomain]bool{}}
	if !own.IsZero() {
		p.defaults[own] = true
	}
	for _, s := range a.GetDefaultTrustDomains() {
		td, err := spiffeid.ParseTrustDomain(s)
		if err != nil {
			return nil, fmt.Errorf("access: default trust domain %q: %w", s, err)
		}
		p.defaults[td] = true
	}
	if len(a.GetRules()) > 0 && !p.hasPolicy {
		return nil, fmt.Errorf("access: %d rules without a policy", len(a.GetRules()))
	}
	for i, r := range a.GetRules() {
		if len(r.ProtoReflect().GetUnknown()) > 0 {
			return nil, fmt.Errorf("access: rule %d (%s) has fields that this version does not know", i, r.GetName())
		}
		c, err := compileRule(r)
		if err != nil {
			return nil, fmt.Errorf("access: rule %d (%s): %w", i, r.GetName(), err)
		}
		if r.GetDeny() {
			p.deny = append(p.deny, c)
		} else {
			p.allow = append(p.allow, c)
		}
	}
	if a != nil && len(a.ProtoReflect().GetUnknown()) > 0 {
		return nil, fmt.Errorf("access: fields that this version does not know")
	}
	return p, nil
}

func compileRule(r *controlpb.AccessRule) (rule, error) {
	c := rule{name: r.GetName(), policy: r.GetPolicy()}
	for _, s := range r.GetSpiffeIds() {
		id, err := spiffeid.Parse(s)
		if err != nil {
			return rule{}, fmt.Errorf("identity %q: %w", s, err)
		}
		if c.ids == nil {
			c.ids = map[spiffeid.ID]bool{}
		}
		c.ids[id] = true
	}
	for _, s := range r.GetTrustDomains() {
		td, err := spiffeid.ParseTrustDomain(s)
		if err != nil {
			return rule{}, fmt.Errorf("trust domain %q: %w", s, err)
		}
		if c.domains == nil {
			c.domains = map[spiffeid.TrustDomain]bool{}
		}
		c.domains[td] = true
	}
	for _, m := range r.GetMethods() {
		if m == "" || strings.ToUpper(m) != m {
			return rule{}, fmt.Errorf("method %q is not an upper-case token", m)
		}
		if c.methods == nil {
			c.methods = map[string]bool{}
		}
		c.methods[m] = true
	}
	for _, p := range r.GetPaths() {
		if !strings.HasPrefix(p, "/") {
			return rule{}, fmt.Errorf("path %q does not begin with /", p)
		}
		if prefix, ok := strings.CutSuffix(p, "*"); ok {
			if !strings.HasSuffix(prefix, "/") || strings.Contains(prefix, "*") {
				return rule{}, fmt.Errorf("path %q: * stands only for everything below a /", p)
			}
			c.prefixes = append(c.prefixes, prefix)
			continue
		}
		if strings.Contains(p, "*") {
			return rule{}, fmt.Errorf("path %q: * stands only for everything below a /", p)
		}
		if c.exact == nil {
			c.exact = map[string]bool{}
		}
		c.exact[p] = true
	}
	return c, nil
}

// Judge decides r.
func (p *Policy) Judge(r Request) Verdict {
	if r.Caller.IsZero() {
		return Verdict{}
	}
	open := p.defaults[r.Caller.TrustDomain()]
	if !p.hasPolicy {
		return Verdict{Allowed: open}
	}
	audited := p.audit && open // an audit blocks nobody, and lets in nobody that the port is not open to
	for i := range p.deny {
		if c := &p.deny[i]; c.caller(r.Caller) && c.denies(r) {
			return Verdict{Allowed: audited, Audited: audited, Policy: c.policy, Rule: c.name}
		}
	}
	for i := range p.allow {
		if c := &p.allow[i]; c.caller(r.Caller) && c.allows(r) {
			return Verdict{Allowed: true, Policy: c.policy, Rule: c.name}
		}
	}
	return Verdict{Allowed: audited, Audited: audited, Policy: p.anyPolicy()}
}

// MayConnect says whether any HTTP request of caller could be allowed. A connection of a caller for whom this is false
// is refused (or ended) as a whole.
func (p *Policy) MayConnect(caller spiffeid.ID) bool {
	if caller.IsZero() {
		return false
	}
	if !p.hasPolicy || p.audit {
		return p.defaults[caller.TrustDomain()]
	}
	for i := range p.deny {
		if c := &p.deny[i]; c.caller(caller) && !c.narrowed() {
			return false
		}
	}
	for i := range p.allow {
		if p.allow[i].caller(caller) {
			return true
		}
	}
	return false
}

func (p *Policy) anyPolicy() string {
	for _, rules := range [][]rule{p.allow, p.deny} {
		for i := range rules {
			if rules[i].policy != "" {
				return rules[i].policy
			}
		}
	}
	return ""
}

// narrowed says that the rule speaks of methods or paths.
func (c *rule) narrowed() bool { return c.methods != nil || c.exact != nil || c.prefixes != nil }

func (c *rule) caller(id spiffeid.ID) bool {
	if len(c.ids) == 0 && len(c.domains) == 0 {
		return true
	}
	return c.ids[id] || c.domains[id.TrustDomain()]
}

// allows: on a connection without requests to judge, a rule narrowed to methods or paths never allows.
func (c *rule) allows(r Request) bool {
	if !r.HTTP {
		return !c.narrowed()
	}
	return c.request(r)
}

// denies: on a connection without requests to judge, a rule that would deny some of them denies all.
func (c *rule) denies(r Request) bool {
	if !r.HTTP {
		return true
	}
	return c.request(r)
}

func (c *rule) request(r Request) bool {
	if c.methods != nil && !c.methods[r.Method] {
		return false
	}
	if c.exact == nil && c.prefixes == nil {
		return true
	}
	if c.exact[r.Path] {
		return true
	}
	for _, prefix := range c.prefixes {
		if strings.HasPrefix(r.Path, prefix) {
			return true
		}
	}
	return false
}
