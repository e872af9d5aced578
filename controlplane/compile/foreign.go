// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"errors"
	"fmt"
	"strings"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Foreign is a followed trust domain of no member. Its bundle lets its identities prove who they are; only rules of AccessPolicy
// objects that name them exactly let them call.
type Foreign struct {
	TrustDomain spiffeid.TrustDomain
	Bundle      []byte // JWKS; empty: none is held yet
	BundleSeq   uint64
	// Invalid says why an entry of the Federation object is not followed at all. TrustDomain may then be zero.
	Invalid string
}

// member is the name of the cluster that has a trust domain, the own one included; empty when none has.
func (r *run) member(td spiffeid.TrustDomain) string {
	if td == r.in.Self.TrustDomain {
		return r.in.Self.Cluster.String()
	}
	for _, p := range r.in.Peers {
		if p.TrustDomain == td {
			return p.Cluster.String()
		}
	}
	return ""
}

// emitForeign makes the bundles of foreign trust domains, and says on the Federation object which entries are not in force.
func (r *run) emitForeign() {
	var bad []string
	for _, f := range r.in.Foreign {
		switch owner := r.member(f.TrustDomain); {
		case f.Invalid != "":
			bad = append(bad, f.Invalid)
		case owner != "":
			bad = append(bad, fmt.Sprintf("%s is the trust domain of the member %s, which brings its own bundle", f.TrustDomain, owner))
		case len(f.Bundle) > 0:
			r.put(controlpb.TypeBundle, f.TrustDomain.String(),
				&controlpb.Bundle{TrustDomain: f.TrustDomain.String(), Jwks: f.Bundle, Sequence: f.BundleSeq})
		}
	}
	for _, o := range r.in.Objects.Federations {
		if o.Name != string(r.in.Self.Federation) || len(o.Spec.TrustDomains) == 0 && len(o.Status.Conditions) == 0 {
			continue
		}
		ref := api.Ref{Kind: api.KindFederation, Name: o.Name}
		if len(bad) > 0 {
			r.condition(ref, o.Generation, "Accepted", false, "Invalid", strings.Join(bad, "; "))
		} else {
			r.condition(ref, o.Generation, "Accepted", true, "Valid", "")
		}
	}
}

// checkSPIFFEIDs says what of an entry's exact identities is not understood.
func checkSPIFFEIDs(f *api.AccessFrom) error {
	if len(f.SPIFFEIDs) == 0 {
		return nil
	}
	if len(f.ServiceAccounts) > 0 || len(f.Clusters) > 0 {
		return errors.New("spiffeIDs stands alone in an entry of from")
	}
	for _, s := range f.SPIFFEIDs {
		if _, err := spiffeid.Parse(s); err != nil {
			return fmt.Errorf("spiffeIDs: %q: %w", s, err)
		}
	}
	return nil
}

// foreign says whether a trust domain is followed and belongs to no member.
func (r *run) foreign(td spiffeid.TrustDomain) bool {
	if r.member(td) != "" {
		return false
	}
	for _, f := range r.in.Foreign {
		if f.TrustDomain == td && f.Invalid == "" {
			return true
		}
	}
	return false
}

// exactIDs adds the identities that an entry names to ids. Allowed are those of trust domains that the port is open to, and those of
// foreign trust domains: naming one exactly is the consent.
func (r *run) exactIDs(f *api.AccessFrom, deny bool, open, ids map[string]bool) {
	for _, s := range f.SPIFFEIDs {
		id, err := spiffeid.Parse(s)
		if err == nil && (deny || open[id.TrustDomain().String()] || r.foreign(id.TrustDomain())) {
			ids[id.String()] = true
		}
	}
}

// strangers are the trust domains of an entry's identities that nobody here can prove.
func (r *run) strangers(f *api.AccessFrom) []string {
	var out []string
	for _, s := range f.SPIFFEIDs {
		if id, err := spiffeid.Parse(s); err == nil && r.member(id.TrustDomain()) == "" && !r.foreign(id.TrustDomain()) {
			out = append(out, id.TrustDomain().String())
		}
	}
	return out
}
