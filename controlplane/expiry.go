// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"fmt"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// certificates lists what everything here hangs on: the own root, issuer and identity, and the roots of members and of followed
// trust domains. What has no end is left out.
func (c *ControlPlane) certificates() []*controlpb.Certificate {
	var list []*controlpb.Certificate
	add := func(kind, td, subject string, end time.Time) {
		if !end.IsZero() {
			list = append(list, &controlpb.Certificate{Kind: kind, TrustDomain: td, Subject: subject, NotAfterUnix: end.Unix()})
		}
	}
	td := c.self.trustDomain.String()
	add("root", td, "root of "+c.facts.Cluster, c.issuer.Bundle().NotAfter())
	add("issuer", td, "issuer of "+c.facts.Cluster, c.issuer.IssuerNotAfter())
	if own := c.source.Identity(); own != nil {
		add("leaf", td, "control plane", own.NotAfter)
	}
	for _, p := range c.federate.View().Peers {
		if p.Bundle != nil {
			add("bundle", p.TrustDomain.String(), "root of "+p.Cluster.String(), p.Bundle.NotAfter())
		}
	}
	for _, f := range c.foreign.Followed() {
		if f.Bundle != nil {
			add("bundle", f.Endpoint.TrustDomain.String(), "root of the trust domain "+f.Endpoint.TrustDomain.String(), f.Bundle.NotAfter())
		}
	}
	return list
}

// expiryFix says who replaces a certificate, by its kind.
func (c *ControlPlane) expiryFix(cert *controlpb.Certificate) string {
	switch {
	case cert.Kind == "root" && c.elsewhere == nil:
		return "strait trust rotate prepare"
	case cert.Kind == "leaf":
		return "it renews hourly: look at the control plane's log"
	case cert.Kind == "bundle":
		return "it is rotated where it belongs, and its bundle comes here by itself"
	}
	return "strait trust status"
}

func (c *ControlPlane) checkTrust(k *checks, view *federate.View, horizon time.Duration) {
	now := c.now()
	for _, cert := range c.certificates() {
		end := time.Unix(cert.NotAfterUnix, 0)
		left := end.Sub(now)
		limit, code := horizon, problem.RootExpiring
		if own := cert.TrustDomain == c.facts.TrustDomain; own && c.elsewhere != nil { // renewed by others, who issue for shorter
			limit = c.leafMargin()
		}
		if cert.Kind == "leaf" {
			limit, code = c.leafMargin(), problem.CertificateExpiring
		}
		switch {
		case left <= 0:
			k.bad("trust", "fail", code, "nothing that it signed verifies any more", c.expiryFix(cert), "%s has expired", cert.Subject)
		case left < limit:
			k.bad("trust", "warn", code, fmt.Sprintf("that is inside the horizon of %s", shortTime(limit)), c.expiryFix(cert),
				"%s expires in %s (horizon %s)", cert.Subject, shortTime(left), shortTime(limit))
		default:
			k.add("trust", "ok", "%s expires %s", cert.Subject, end.UTC().Format("2006-01-02"))
		}
	}
	c.checkLeaves(k, c.reporting())
	c.checkFollowed(k)
	for _, p := range view.Peers {
		if skew := p.ClockSkew; skew > 10*time.Second || skew < -10*time.Second {
			k.bad("trust", "warn", problem.ClockSkew, "certificates are judged by the clock", "enable NTP on both sides", "the clock of %s differs by %s", p.Cluster, skew.Round(time.Second))
		}
	}
}

// maxListed bounds the processes that check names one by one.
const maxListed = 20

// reporting names the processes that are connected, or have a session that is silent.
func (c *ControlPlane) reporting() map[string]spiffeid.ID {
	out := c.connected()
	for name, s := range c.sessions.View().Sessions {
		out[name] = s.ID
	}
	return out
}

// checkLeaves judges what the processes that report hold: one with so little left has missed three renewals.
func (c *ControlPlane) checkLeaves(k *checks, reporting map[string]spiffeid.ID) {
	if c.elsewhere != nil {
		return // nobody tells of renewals: what is known is the certificate of each process's last connection
	}
	now, margin := c.now(), c.leafMargin()
	judged, late := 0, 0
	for _, h := range c.rotation.Held() {
		if _, ok := reporting[h.Name]; !ok || h.Own.NotAfter.IsZero() {
			continue
		}
		judged++
		left := h.Own.NotAfter.Sub(now)
		if left >= margin && left > 0 {
			continue
		}
		if late++; late > maxListed {
			continue
		}
		if left <= 0 {
			k.bad("trust", "fail", problem.IdentityExpired, "it proves nothing and serves nobody until it renews", "look at its log: does it reach this control plane?",
				"the identity of %s has expired", h.Name)
		} else {
			k.bad("trust", "warn", problem.CertificateExpiring, "it has missed three renewals", "look at its log: does it reach this control plane?",
				"the identity of %s expires in %s", h.Name, shortTime(left))
		}
	}
	switch {
	case late > maxListed:
		k.bad("trust", "warn", problem.CertificateExpiring, "they have missed three renewals", "strait check -o json lists these; look at their logs", "and %d more", late-maxListed)
	case judged > 0 && late == 0:
		k.add("trust", "ok", "the identities of %d reporting processes are renewed in time", judged)
	}
}

// checkFollowed says which foreign trust domains are not, or no longer, followed.
func (c *ControlPlane) checkFollowed(k *checks) {
	for _, b := range c.followedBundles() {
		if b.Error != "" {
			k.bad("trust", "warn", problem.BundleNotFollowed, b.Error, "correct spec.trustDomains of the Federation, or its endpoint; what was held stays in force",
				"the bundle of %s is not refreshed", b.TrustDomain)
		}
	}
}

// leafMargin is how little of its lifetime an identity may have left before three renewals were missed.
func (c *ControlPlane) leafMargin() time.Duration {
	if c.elsewhere != nil {
		return c.elsewhere.lifetime() / 4
	}
	ttl := c.cfg.SVIDTTL
	if ttl <= 0 {
		ttl = ca.DefaultTTL
	}
	return max(ttl-3*c.renewEvery(), 0)
}

// expiryEvery is how often the metrics of trust are computed anew: ages grow by themselves.
const expiryEvery = 10 * time.Second

// expiryLoop publishes ends, sequences and ages.
func (c *ControlPlane) expiryLoop(ctx context.Context) error {
	m := &trustMetrics{
		notAfter: c.metrics.Gauge("strait_certificate_not_after_seconds", "When a certificate ends, Unix time.", "kind", "trust_domain"),
		sequence: c.metrics.Gauge("strait_bundle_sequence", "Sequence of the bundle in force.", "trust_domain"),
		age:      c.metrics.Gauge("strait_bundle_age_seconds", "Time since the origin last confirmed a bundle.", "trust_domain"),
		skew:     c.metrics.Gauge("strait_clock_skew_seconds", "How far a member's clock is ahead of ours.", "peer"),
	}
	t := time.NewTicker(expiryEvery)
	defer t.Stop()
	for {
		changed := c.source.Changed()
		m.show(c)
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		case <-changed:
		}
	}
}

// trustMetrics remember how to forget the series of what has gone.
type trustMetrics struct {
	notAfter, sequence, age, skew *metric.Gauge
	forget                        map[string]func()
}

func (m *trustMetrics) show(c *ControlPlane) {
	gone := m.forget
	m.forget = map[string]func(){}
	put := func(g *metric.Gauge, value float64, labels ...string) {
		key := fmt.Sprintf("%p %q", g, labels)
		g.With(labels...).Set(value)
		m.forget[key] = func() { g.Forget(labels...) }
		delete(gone, key)
	}
	for _, cert := range c.certificates() {
		put(m.notAfter, float64(cert.NotAfterUnix), cert.Kind, cert.TrustDomain)
	}
	now := c.now()
	bundle := func(b *trust.Bundle, confirmed time.Time) {
		td := b.TrustDomain().String()
		put(m.sequence, float64(b.Sequence()), td)
		if !confirmed.IsZero() {
			put(m.age, now.Sub(confirmed).Seconds(), td)
		}
	}
	bundle(c.issuer.Bundle(), now)
	for _, p := range c.federate.View().Peers {
		if p.Bundle != nil {
			bundle(p.Bundle, p.BundleUpdated)
			put(m.skew, p.ClockSkew.Seconds(), p.Cluster.String())
		}
	}
	for _, f := range c.foreign.Followed() {
		if f.Bundle != nil {
			bundle(f.Bundle, f.Confirmed)
		}
	}
	for _, f := range gone {
		f()
	}
}
