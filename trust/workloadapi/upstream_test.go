// SPDX-License-Identifier: Apache-2.0

package workloadapi_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	upstreamid "github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	upstream "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/workloadapi"
)

// quick renews often, so that rotations take no time.
func quick(c *workloadapi.Config) { c.RenewEvery = 400 * time.Millisecond }

func x509Source(t testing.TB, r *rig) *upstream.X509Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	s, err := upstream.NewX509Source(ctx, upstream.WithClientOptions(upstream.WithAddr(r.address())))
	must(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func serial(t testing.TB, s *upstream.X509Source) *x509.Certificate {
	t.Helper()
	svid, err := s.GetX509SVID()
	must(t, err)
	return svid.Certificates[0]
}

func memberID(t testing.TB, r *rig) upstreamid.ID {
	t.Helper()
	id, err := upstreamid.FromString(r.id.String())
	must(t, err)
	return id
}

// echo is an application that uses go-spiffe's spiffetls with an X509Source, unmodified.
func echo(t *testing.T, s *upstream.X509Source, peer upstreamid.ID) net.Addr {
	t.Helper()
	l, err := spiffetls.ListenWithMode(t.Context(), "tcp", "127.0.0.1:0",
		spiffetls.MTLSServerWithSource(tlsconfig.AuthorizeID(peer), s))
	must(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return l.Addr()
}

func call(t *testing.T, s *upstream.X509Source, to net.Addr, peer upstreamid.ID) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	c, err := spiffetls.DialWithMode(ctx, "tcp", to.String(), spiffetls.MTLSClientWithSource(tlsconfig.AuthorizeID(peer), s))
	if err != nil {
		return err
	}
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(within)))
	if _, err := c.Write([]byte("ping")); err != nil {
		return err
	}
	got := make([]byte, 4)
	if _, err = io.ReadFull(c, got); err == nil && !bytes.Equal(got, []byte("ping")) {
		t.Errorf("got %q", got)
	}
	return err
}

// TestGoSpiffe: two applications of two clusters, each with go-spiffe's own client at its own sidecar, talk through leaf rotations and a
// root rotation of one of them, of which the other learns late.
func TestGoSpiffe(t *testing.T) {
	east, west := newAuthority(t, "us-east.acme.test"), newAuthority(t, "eu-west.acme.test")
	web := serve(t, east, "web", quick, self())
	checkout := serve(t, west, "checkout", quick, self())
	web.trusts(east, west)
	checkout.trusts(east, west)
	webSource, checkoutSource := x509Source(t, web), x509Source(t, checkout)
	addr := echo(t, checkoutSource, memberID(t, web))
	talk := func(when string) {
		t.Helper()
		if err := call(t, webSource, addr, memberID(t, checkout)); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
	}
	holds := func(when string, chain int, root int) {
		t.Helper()
		eventually(t, when, func() bool {
			svid, err := webSource.GetX509SVID()
			must(t, err)
			east.mu.Lock()
			defer east.mu.Unlock()
			return len(svid.Certificates) == chain+1 && svid.Certificates[0].CheckSignatureFrom(east.chain[0]) == nil &&
				svid.Certificates[1].CheckSignatureFrom(east.roots[root].cert) == nil
		})
		talk(when)
	}
	talk("at first")
	svid, err := webSource.GetX509SVID()
	must(t, err)
	if svid.Hint != "web" || svid.ID.String() != web.id.String() {
		t.Errorf("%s with hint %q", svid.ID, svid.Hint)
	}

	for range 2 { // leaf rotations
		before := serial(t, webSource)
		eventually(t, "leaf rotation", func() bool { return !serial(t, webSource).Equal(before) })
		talk("after a leaf rotation")
	}

	east.prepare()
	web.trusts(east, west) // and checkout's sidecar knows nothing of it
	eventually(t, "bundle pushed", func() bool {
		b, err := webSource.GetX509BundleForTrustDomain(memberID(t, web).TrustDomain())
		return err == nil && len(b.X509Authorities()) == 2
	})
	talk("prepared")
	east.activate()
	web.server.RenewIssuedBefore(time.Now().Add(time.Second))
	holds("activated: chain with the sibling, the other end knows the old root alone", 2, 1)
	checkout.trusts(east, west)
	eventually(t, "the other end has learnt", func() bool {
		b, err := checkoutSource.GetX509BundleForTrustDomain(memberID(t, web).TrustDomain())
		return err == nil && len(b.X509Authorities()) == 2
	})
	holds("both roots known", 2, 1)
	east.retire()
	web.trusts(east, west)
	checkout.trusts(east, west)
	eventually(t, "the old root is gone", func() bool {
		b, err := checkoutSource.GetX509BundleForTrustDomain(memberID(t, web).TrustDomain())
		return err == nil && len(b.X509Authorities()) == 1
	})
	talk("retired, before the renewal")
	web.server.RenewIssuedBefore(time.Now().Add(2 * time.Second))
	holds("retired", 1, 0)

	// What is withdrawn is not accepted: the other end loses the trust domain.
	checkout.trusts(west)
	eventually(t, "trust domain withdrawn", func() bool {
		_, err := checkoutSource.GetX509BundleForTrustDomain(memberID(t, web).TrustDomain())
		return err != nil
	})
	if err := call(t, webSource, addr, memberID(t, checkout)); err == nil {
		t.Error("a peer of a trust domain that was withdrawn was accepted")
	}
}

// TestGoSpiffeBundles: bundles of trust domains come apart, each under its own name, and BundleSource has the keys of both kinds.
func TestGoSpiffeBundles(t *testing.T) {
	east, west := newAuthority(t, "us-east.acme.test"), newAuthority(t, "eu-west.acme.test")
	r := serve(t, east, "web", nil, self())
	r.trusts(east, west)
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	bundles, err := upstream.NewBundleSource(ctx, upstream.WithClientOptions(upstream.WithAddr(r.address())))
	must(t, err)
	defer bundles.Close()
	for _, a := range []*authority{east, west} {
		b, err := bundles.GetBundleForTrustDomain(upstreamid.RequireTrustDomainFromString(a.td.String()))
		must(t, err)
		want := a.bundle()
		if len(b.X509Authorities()) != 1 || !b.X509Authorities()[0].Equal(want.Roots()[0]) || len(b.JWTAuthorities()) != 1 || b.JWTAuthorities()[want.JWTKeys()[0].ID] == nil {
			t.Errorf("%s: %d roots, %d keys", a.td, len(b.X509Authorities()), len(b.JWTAuthorities()))
		}
	}
	client, err := upstream.New(ctx, upstream.WithAddr(r.address()))
	must(t, err)
	defer client.Close()
	x, err := client.FetchX509Context(ctx)
	must(t, err)
	if x.Bundles.Len() != 2 || len(x.SVIDs) != 1 {
		t.Errorf("%d bundles, %d SVIDs", x.Bundles.Len(), len(x.SVIDs))
	}
	set, err := client.FetchX509Bundles(ctx)
	must(t, err)
	if set.Len() != 2 {
		t.Errorf("%d bundles", set.Len())
	}
}

// TestGoSpiffeJWT: JWTSource gets tokens and keys; the other cluster's application validates by its source and by its sidecar.
func TestGoSpiffeJWT(t *testing.T) {
	east, west := newAuthority(t, "us-east.acme.test"), newAuthority(t, "eu-west.acme.test")
	web, checkout := serve(t, east, "web", quick, self()), serve(t, west, "checkout", quick, self())
	web.trusts(east, west)
	checkout.trusts(east, west)
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	source := func(r *rig) *upstream.JWTSource {
		s, err := upstream.NewJWTSource(ctx, upstream.WithClientOptions(upstream.WithAddr(r.address())))
		must(t, err)
		t.Cleanup(func() { _ = s.Close() })
		return s
	}
	webSource, checkoutSource := source(web), source(checkout)
	client, err := upstream.New(ctx, upstream.WithAddr(checkout.address()))
	must(t, err)
	defer client.Close()
	audience := checkout.id.String()
	roundTrip := func(when string) string {
		t.Helper()
		svid, err := webSource.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience, ExtraAudiences: []string{"https://bank.test"}})
		must(t, err)
		if svid.ID.String() != web.id.String() || !slices.Contains(svid.Audience, audience) || svid.Hint != "web" {
			t.Errorf("%s: %+v", when, svid)
		}
		eventually(t, when+": keys at the other end", func() bool {
			got, err := jwtsvid.ParseAndValidate(svid.Marshal(), checkoutSource, []string{audience})
			return err == nil && got.ID == svid.ID
		})
		got, err := client.ValidateJWTSVID(ctx, svid.Marshal(), audience)
		must(t, err)
		if got.ID != svid.ID {
			t.Errorf("%s: validated as %s", when, got.ID)
		}
		if _, err := client.ValidateJWTSVID(ctx, svid.Marshal(), "another"); err == nil {
			t.Errorf("%s: valid for another audience", when)
		}
		return svid.Marshal()
	}
	first := roundTrip("at first")
	if again := roundTrip("again"); again != first {
		t.Error("a fresh token though half of its life is left")
	}
	if _, tokens := east.count(); tokens != 1 {
		t.Errorf("%d tokens were asked for", tokens)
	}
	east.prepare()
	web.trusts(east, west)
	checkout.trusts(east, west)
	roundTrip("prepared")
	east.activate()
	web.server.RenewIssuedBefore(time.Now())
	if second := roundTrip("activated"); second == first {
		t.Error("the old token is handed out after the keys have changed")
	}
	east.retire()
	web.trusts(east, west)
	checkout.trusts(east, west)
	roundTrip("retired")
	if _, err := client.ValidateJWTSVID(ctx, first, audience); err == nil {
		t.Error("a token of a key that was retired is valid")
	}
	id, err := upstreamid.FromString(checkout.id.String())
	must(t, err)
	if _, err := webSource.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience, Subject: id}); err == nil {
		t.Error("got a token of another identity")
	}
}

// TestGoSpiffeGRPC: go-spiffe's gRPC credentials on both ends, through a rotation.
func TestGoSpiffeGRPC(t *testing.T) {
	east, west := newAuthority(t, "us-east.acme.test"), newAuthority(t, "eu-west.acme.test")
	web, checkout := serve(t, east, "web", quick, self()), serve(t, west, "checkout", quick, self())
	web.trusts(east, west)
	checkout.trusts(east, west)
	webSource, checkoutSource := x509Source(t, web), x509Source(t, checkout)
	g := grpc.NewServer(grpc.Creds(grpccredentials.MTLSServerCredentials(checkoutSource, checkoutSource, tlsconfig.AuthorizeID(memberID(t, web)))))
	grpc_health_v1.RegisterHealthServer(g, health.NewServer())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); must(t, <-served) })
	check := func(as *upstream.X509Source, want upstreamid.ID) error {
		c, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(grpccredentials.MTLSClientCredentials(as, as, tlsconfig.AuthorizeID(want))))
		must(t, err)
		defer c.Close()
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		_, err = grpc_health_v1.NewHealthClient(c).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		return err
	}
	before := serial(t, webSource)
	must(t, check(webSource, memberID(t, checkout)))
	eventually(t, "rotation", func() bool { return !serial(t, webSource).Equal(before) })
	must(t, check(webSource, memberID(t, checkout)))
	if check(webSource, memberID(t, web)) == nil {
		t.Error("the server was taken for another one")
	}
	if check(checkoutSource, memberID(t, checkout)) == nil {
		t.Error("the server took a caller that it does not allow")
	}
}

// TestStraitAcceptsApplications: the identity of an application is one that Strait's own verify accepts.
func TestStraitAcceptsApplications(t *testing.T) {
	east := newAuthority(t, "us-east.acme.test")
	r := serve(t, east, "web", nil, self())
	svid, err := x509Source(t, r).GetX509SVID()
	must(t, err)
	bundles, err := trust.NewBundles(east.bundle())
	must(t, err)
	p, err := trust.Verify(svid.Certificates, bundles, time.Now())
	must(t, err)
	if p.ID != r.id {
		t.Errorf("verified as %s", p.ID)
	}
}
