// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/register"
)

// lookEvery is how often the wall clock is compared with the identity's end: a step of the clock moves no timer.
const lookEvery = 500 * time.Millisecond

// endedTimeout bounds an ordinary renewal once the identity has ended: nothing works until one of the ways does.
const endedTimeout = time.Second

// expired says whether the identity has ended by the wall clock.
func (c *Client) expired() bool {
	id := c.source.Identity()
	return id == nil || !c.cfg.Now().Before(id.NotAfter)
}

// Expired is the problem of an identity that has ended, or nil while there is one that has not.
func (c *Client) Expired() error {
	if !c.expired() {
		return nil
	}
	id := c.source.Identity()
	if id == nil {
		return problem.New(problem.IdentityExpired, "there is no identity yet")
	}
	why := "no attempt to renew it has ended yet"
	if err := c.health.status().LastError; err != nil {
		why = err.Error()
	}
	return problem.New(problem.IdentityExpired, "the identity %s ended at %s", id.ID, id.NotAfter.UTC().Format(time.RFC3339)).WithWhy("%s", why)
}

// expiryLoop notices the end of the identity, also by a step of the clock, and has it renewed at once.
func (c *Client) expiryLoop(ctx context.Context) {
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	was := false
	for {
		ended := c.expired()
		if ended != was {
			was = ended
			if ended {
				c.log.Error("identity expired: nothing is proven and nobody served until it is renewed", "id", c.Info().ID, "not_after", c.Status().NotAfter, "code", problem.IdentityExpired)
			} else {
				c.log.Info("identity valid again", "id", c.Info().ID, "not_after", c.Status().NotAfter)
			}
		}
		if ended {
			select {
			case c.ended <- struct{}{}:
			default:
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// attempt tries once to obtain an identity in place of the present one: the ordinary way, or by one that has ended, while the control
// plane still renews it, or by a fresh token. A connection that still stands is the last resort of clocks that differ.
func (c *Client) attempt(ctx context.Context) error {
	if c.registerFresh(ctx) {
		return nil
	}
	if !c.expired() {
		return c.renew(ctx)
	}
	err := c.renewEnded(ctx)
	if err == nil || ctx.Err() != nil {
		return err
	}
	if c.cfg.TokenFile != "" {
		again := c.register(ctx)
		if again == nil {
			return nil
		}
		err = errors.Join(err, again)
	}
	ctx, cancel := context.WithTimeout(ctx, endedTimeout)
	defer cancel()
	if c.renew(ctx) == nil {
		return nil
	}
	return err
}

// renewEnded renews over strait-renew/1.
func (c *Client) renewEnded(ctx context.Context) error {
	key, csr, err := newKey()
	if err != nil {
		return err
	}
	r, err := register.Renew(ctx, register.RenewConfig{
		Source: c.source, Addresses: c.addresses, Dial: c.cfg.Dial, Request: &controlpb.RenewRequest{CsrDer: csr, Proxy: c.cfg.Name},
	})
	if err != nil {
		return fmt.Errorf("renew ended identity: %w", err)
	}
	return c.take(r, key)
}

// observer are the metrics of identity and trust, the same in every proxy.
type observer struct {
	notAfter, sequence *metric.Gauge
	renewals           *metric.Counter
}

// Observe publishes identity and trust in r from now on: strait_certificate_not_after_seconds, strait_bundle_sequence and
// strait_certificate_renewals_total. It may be called once, before Run.
func (c *Client) Observe(r *metric.Registry) {
	c.observer = &observer{
		notAfter: r.Gauge("strait_certificate_not_after_seconds", "When a certificate ends, Unix time.", "kind", "trust_domain"),
		sequence: r.Gauge("strait_bundle_sequence", "Sequence of the bundle in force.", "trust_domain"),
		renewals: r.Counter("strait_certificate_renewals_total", "Attempts to renew the identity.", "result"),
	}
	c.observer.renewals.With("success").Add(0)
	c.observer.renewals.With("failure").Add(0)
}

func (c *Client) renewedMetric(err error) {
	switch {
	case c.observer == nil:
	case err == nil:
		c.observer.renewals.With("success").Inc()
	default:
		c.observer.renewals.With("failure").Inc()
	}
}

// observeLoop keeps the gauges at what is in force.
func (c *Client) observeLoop(ctx context.Context) {
	if c.observer == nil {
		return
	}
	shown := map[string]bool{}
	for {
		changed := c.source.Changed()
		c.observer.show(c.source, shown)
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

// show publishes the present values; shown are the trust domains that were there before.
func (o *observer) show(s *trust.Source, shown map[string]bool) {
	id := s.Identity()
	if id == nil {
		return
	}
	own := id.ID.TrustDomain().String()
	o.notAfter.With("leaf", own).Set(float64(id.Chain[0].NotAfter.Unix()))
	if len(id.Chain) > 1 {
		o.notAfter.With("issuer", own).Set(float64(id.Chain[1].NotAfter.Unix()))
	}
	bundles := s.Bundles()
	present := map[string]bool{}
	for _, td := range bundles.TrustDomains() {
		b, name, kind := bundles.Get(td), td.String(), "bundle"
		if name == own {
			kind = "root"
		}
		present[name] = true
		if end := b.NotAfter(); !end.IsZero() {
			o.notAfter.With(kind, name).Set(float64(end.Unix()))
		}
		o.sequence.With(name).Set(float64(b.Sequence()))
	}
	for name := range shown {
		if !present[name] {
			o.notAfter.Forget("bundle", name)
			o.sequence.Forget(name)
			delete(shown, name)
		}
	}
	for name := range present {
		shown[name] = true
	}
}
