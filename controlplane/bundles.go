// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/compile"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/bundleendpoint"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// BundlesConfig is how a control plane federates with trust domains of no members.
type BundlesConfig struct {
	Listen           string // of the own bundle's endpoint; "": none
	WebCert, WebKey  string // PEM files: the endpoint's profile is https_web; "": https_spiffe
	WebRoots         string // PEM file: what endpoints of profile https_web are verified by; "": the system's roots
	AllowLocalTarget bool   // follow endpoints at loopback and link-local addresses
}

// foreignTrust follows what Federation.spec.trustDomains names.
type foreignTrust struct {
	*bundleendpoint.Follower
	invalid atomic.Pointer[[]compile.Foreign] // entries that are not followed
}

func (c *ControlPlane) openBundles() (err error) {
	cfg := bundleendpoint.FollowerConfig{Dir: c.dir, AllowLocal: c.cfg.Bundles.AllowLocalTarget, Now: c.now, Logger: c.log}
	if file := c.cfg.Bundles.WebRoots; file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("roots of bundle endpoints: %w", err)
		}
		cfg.WebRoots = x509.NewCertPool()
		if !cfg.WebRoots.AppendCertsFromPEM(pem) {
			return fmt.Errorf("roots of bundle endpoints: no certificate in %s", file)
		}
	}
	c.foreign.invalid.Store(&[]compile.Foreign{})
	c.foreign.Follower, err = bundleendpoint.NewFollower(cfg)
	return err
}

// listenBundles serves the own bundle, if that is configured.
func (c *ControlPlane) listenBundles() ([]server, error) {
	b := c.cfg.Bundles
	if b.Listen == "" {
		if b.WebCert != "" || b.WebKey != "" {
			return nil, errors.New("a certificate for the bundle endpoint, and no address for it")
		}
		return nil, nil
	}
	s, err := bundleendpoint.NewServer(bundleendpoint.ServerConfig{
		Bundle: c.issuer.Bundle, Source: c.source, CertFile: b.WebCert, KeyFile: b.WebKey, Now: c.now, Logger: c.log,
	})
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", b.Listen)
	if err != nil {
		return nil, err
	}
	c.addrs.Bundle = l.Addr().String()
	c.log.Info("bundle endpoint", "listen", c.addrs.Bundle, "profile", s.Profile())
	return []server{{"bundle endpoint", func() error { return s.Serve(l) }, func() { _ = s.Close() }}}, nil
}

// bundlesLoop follows the configuration, and those whom it names.
func (c *ControlPlane) bundlesLoop(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- c.foreign.Run(ctx) }()
	for last := ""; ; {
		objects, members := c.objects.Changed(), c.federate.Changed()
		var list []api.TrustDomain
		if f := c.federationObject(); f != nil {
			list = f.Spec.TrustDomains
		}
		taken := c.memberDomains()
		if now, err := json.Marshal([]any{list, taken}); err == nil && string(now) != last {
			last = string(now)
			c.follow(list, taken)
		}
		select {
		case <-ctx.Done():
			return <-done
		case <-objects:
		case <-members:
		}
	}
}

// memberDomains maps the trust domains that bring their bundles themselves to their clusters.
func (c *ControlPlane) memberDomains() map[string]string {
	taken := map[string]string{c.self.trustDomain.String(): c.self.cluster.String()}
	for _, p := range c.federate.View().Peers {
		taken[p.TrustDomain.String()] = p.Cluster.String()
	}
	return taken
}

// follow puts a list in force. An entry that cannot be followed is left out, and the Federation object says why.
func (c *ControlPlane) follow(list []api.TrustDomain, taken map[string]string) {
	var endpoints []bundleendpoint.Endpoint
	invalid := []compile.Foreign{}
	for _, t := range list {
		e, err := endpointOf(t)
		if err == nil && taken[t.Name] != "" {
			err = fmt.Errorf("it is the trust domain of the member %s, which brings its own bundle", taken[t.Name])
		}
		if err == nil && slices.ContainsFunc(endpoints, func(o bundleendpoint.Endpoint) bool { return o.TrustDomain == e.TrustDomain }) {
			err = errors.New("it stands twice")
		}
		if err != nil {
			invalid = append(invalid, compile.Foreign{Invalid: "trust domain " + t.Name + ": " + err.Error()})
			c.log.Warn("foreign trust domain not followed", "trust_domain", t.Name, "err", err)
			continue
		}
		endpoints = append(endpoints, e)
	}
	c.foreign.invalid.Store(&invalid)
	if err := c.foreign.Set(endpoints); err != nil {
		c.log.Error("foreign trust domains", "err", err) // endpointOf has checked each
	}
}

// endpointOf reads one entry of the configuration.
func endpointOf(t api.TrustDomain) (e bundleendpoint.Endpoint, err error) {
	if e.TrustDomain, err = spiffeid.ParseTrustDomain(t.Name); err != nil {
		return e, err
	}
	if t.Bundle != "" {
		if e.Bundle, err = trust.ParseBundle(e.TrustDomain, []byte(t.Bundle)); err != nil {
			return e, err
		}
	}
	if t.Endpoint != nil {
		e.URL, e.Profile = t.Endpoint.URL, t.Endpoint.Profile
		if t.Endpoint.SPIFFEID != "" {
			if e.EndpointID, err = spiffeid.Parse(t.Endpoint.SPIFFEID); err != nil {
				return e, fmt.Errorf("spiffeID: %w", err)
			}
		}
	}
	return e, e.Check()
}

// foreignInput is what compile is told.
func (c *ControlPlane) foreignInput() []compile.Foreign {
	out := slices.Clone(*c.foreign.invalid.Load())
	for _, f := range c.foreign.Followed() {
		v := compile.Foreign{TrustDomain: f.Endpoint.TrustDomain}
		if f.Bundle != nil {
			v.Bundle, v.BundleSeq = f.Bundle.Marshal(), f.Bundle.Sequence()
		}
		out = append(out, v)
	}
	return out
}

// followedBundles are the bundles of trust domains of no members, for trust status.
func (c *ControlPlane) followedBundles() []*controlpb.TrustedBundle {
	var out []*controlpb.TrustedBundle
	for _, f := range c.foreign.Followed() {
		b := &controlpb.TrustedBundle{TrustDomain: f.Endpoint.TrustDomain.String(), Source: f.Endpoint.Profile}
		if f.Endpoint.URL == "" {
			b.Source = "configuration"
		}
		if f.Err != nil {
			b.Error = f.Err.Error()
		}
		if !f.Confirmed.IsZero() {
			b.UpdatedUnix = f.Confirmed.Unix()
		}
		if f.Bundle != nil {
			sum := f.Bundle.Hash()
			b.Sequence, b.Sha256, b.Authorities = f.Bundle.Sequence(), hex.EncodeToString(sum[:]), authoritiesOf(f.Bundle)
		}
		out = append(out, b)
	}
	for _, i := range *c.foreign.invalid.Load() {
		name, _, _ := strings.Cut(strings.TrimPrefix(i.Invalid, "trust domain "), ":")
		out = append(out, &controlpb.TrustedBundle{TrustDomain: name, Source: "configuration", Error: i.Invalid})
	}
	return out
}
