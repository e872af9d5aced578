// SPDX-License-Identifier: Apache-2.0

package endpoint_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"go.uber.org/goleak"
	"google.golang.org/grpc/test/bufconn"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/endpoint"
	"github.com/strait-mesh/strait/trust/endpoint/endpointtest"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func id(t *testing.T, text string) spiffeid.ID {
	t.Helper()
	v, err := spiffeid.Parse(text)
	must(t, err)
	return v
}

func newDir(t *testing.T) *datadir.Dir {
	t.Helper()
	d, err := datadir.Create(filepath.Join(t.TempDir(), "data"))
	must(t, err)
	t.Cleanup(func() { _ = d.Close() })
	return d
}

const domain = "elsewhere.example"

var (
	controlPlane  = "spiffe://" + domain + "/strait/controlplane"
	catalogSigner = "spiffe://" + domain + "/strait/catalog-signer"
	web           = "spiffe://" + domain + "/ns/shop/sa/web"
)

// rig is a server, in this process, and what a client needs.
type rig struct {
	t         *testing.T
	td        spiffeid.TrustDomain
	authority *endpointtest.Authority
	server    *endpointtest.Server
	dir       *datadir.Dir
	listener  *bufconn.Listener
	stop      func()
}

func newRig(t *testing.T, ttl time.Duration, ids ...string) *rig {
	t.Helper()
	td, err := spiffeid.ParseTrustDomain(domain)
	must(t, err)
	r := &rig{t: t, td: td, dir: newDir(t)}
	r.authority, err = endpointtest.New(endpointtest.Options{TrustDomain: td, TTL: ttl})
	must(t, err)
	r.serve(ids...)
	return r
}

func (r *rig) serve(ids ...string) {
	r.t.Helper()
	var list []spiffeid.ID
	for _, text := range ids {
		list = append(list, id(r.t, text))
	}
	r.server, r.listener = r.authority.Server(list...), bufconn.Listen(64<<10)
	l, s, done := r.listener, r.server, make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	r.stop = func() { s.Stop(); <-done }
}

func (r *rig) config(wants ...endpoint.Want) endpoint.Config {
	if len(wants) == 0 {
		wants = []endpoint.Want{endpoint.ControlPlane(r.td), endpoint.CatalogSigner(r.td)}
	}
	return endpoint.Config{
		Socket: "unix:///run/elsewhere.sock", Wants: wants, Dir: r.dir, File: "bundles/own.json",
		Dial: func(ctx context.Context) (net.Conn, error) { return r.listener.DialContext(ctx) },
	}
}

func (r *rig) open(cfg endpoint.Config) *endpoint.Handle {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	h, err := endpoint.Open(ctx, cfg)
	must(r.t, err)
	return h
}

// until waits for cond, which changes with h.
func until(t *testing.T, h *endpoint.Handle, what string, cond func() bool) {
	t.Helper()
	timeout := time.After(time.Minute)
	for {
		changed := h.Changed()
		if cond() {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// handshake connects two ends of one identity.
func handshake(s *trust.Source) error {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	o := trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"h2"}}
	server := make(chan error, 1)
	go func() { server <- tls.Server(b, s.ServerTLS(o)).Handshake(); _ = b.Close() }()
	err := tls.Client(a, s.ClientTLS(o)).Handshake()
	_ = a.Close()
	return errors.Join(err, <-server)
}

// The process takes what it needs of what it is offered, with the foreign chain and the foreign bundle, and the JWT keys.
func TestOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, time.Hour, web, catalogSigner, controlPlane)
		defer r.stop()
		h := r.open(r.config())
		defer h.Close()
		if got := h.Source().Identity().ID.String(); got != controlPlane {
			t.Errorf("the source's identity is %s", got)
		}
		if got := h.Identity(1); got.ID.String() != catalogSigner || len(got.Chain) != 3 {
			t.Errorf("the second identity is %s with %d certificates", got.ID, len(got.Chain))
		}
		must(t, handshake(h.Source()))
		until(t, h, "JWT keys", func() bool { return len(h.Bundle().JWTKeys()) == 1 })
		if b := h.Bundle(); b.Sequence() != 2 || b.TrustDomain() != r.td || len(b.Roots()) != 1 {
			t.Errorf("bundle %d of %s with %d roots", b.Sequence(), b.TrustDomain(), len(b.Roots()))
		}
		if st := h.Status(); len(st.Offered) != 3 || st.LastError != nil || st.Updated.IsZero() {
			t.Errorf("status %+v", st)
		}
	})
}

// Two days of leaves that live for an hour, with a root that changes every four hours: there is an identity at every moment, it verifies
// against the bundle of that moment, and numbers go up by one with each change and by none without, also over restarts.
func TestTwoDays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, time.Hour, controlPlane, catalogSigner)
		defer func() { r.stop() }()
		h := r.open(r.config())
		until(t, h, "JWT keys", func() bool { return len(h.Bundle().JWTKeys()) == 1 })
		want := uint64(2)
		for minute := range 48 * 60 {
			if minute%240 == 60 {
				must(t, r.authority.Prepare())
				want++
			}
			if minute%240 == 120 {
				must(t, r.authority.Activate())
			}
			if minute%240 == 180 {
				must(t, r.authority.Retire())
				want++
			}
			if minute%500 == 499 { // restarts: of the client, then of the server
				must(t, h.Close())
				h = r.open(r.config())
			}
			if minute%700 == 699 {
				r.stop()
				r.serve(controlPlane, catalogSigner)
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			if minute%3 == 0 {
				if err := handshake(h.Source()); err != nil {
					t.Fatalf("minute %d: %v", minute, err)
				}
			}
			if got := h.Bundle().Sequence(); got != want {
				t.Fatalf("minute %d: sequence %d, want %d", minute, got, want)
			}
			if roots := h.Bundle().Roots(); len(roots) == 2 && roots[0].NotBefore.After(roots[1].NotBefore) {
				t.Fatalf("minute %d: the newest root stands first", minute)
			}
			if signer := h.Identity(1); !time.Now().Before(signer.NotAfter) {
				t.Fatalf("minute %d: the signer ended at %s", minute, signer.NotAfter)
			}
		}
		must(t, h.Close())
		data, err := r.dir.ReadFile("bundles/own.json")
		must(t, err)
		if !bytes.Equal(data, h.Bundle().Marshal()) {
			t.Errorf("the bundle on disk is another: %s", data)
		}
		t.Logf("%d SVIDs, bundle %d", r.authority.Issued(), want)
	})
}

// While the server is away, or refuses this process, the last identity serves until it ends, and not a second longer; when the
// server is back, so is the process, within the pause between attempts.
func TestServerAway(t *testing.T) {
	for name, refuse := range map[string]bool{"away": false, "refusing": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, time.Hour, controlPlane, catalogSigner)
				defer func() { r.stop() }()
				h := r.open(r.config())
				defer h.Close()
				end := h.Source().Identity().NotAfter
				if refuse {
					r.server.Offer()
				} else {
					r.stop()
				}
				time.Sleep(time.Until(end) - time.Second)
				must(t, handshake(h.Source()))
				if h.Status().LastError == nil {
					t.Error("the status says that all is well")
				}
				time.Sleep(2 * time.Second)
				var refused *trust.VerifyError
				if err := handshake(h.Source()); !errors.As(err, &refused) || refused.Reason != "identity_expired" {
					t.Fatalf("an identity that has ended was used: %v", err)
				}
				back := time.Now()
				if refuse {
					r.server.Offer(id(t, controlPlane), id(t, catalogSigner))
				} else {
					r.serve(controlPlane, catalogSigner)
				}
				until(t, h, "recovery", func() bool { return handshake(h.Source()) == nil })
				if took := time.Since(back); took > 8*time.Second {
					t.Errorf("recovered after %v", took)
				}
				if err := h.Status().LastError; err != nil {
					t.Errorf("the status still says %v", err)
				}
			})
		})
	}
}

// An agent that hangs with its streams open is asked again before the identity ends.
func TestSilentServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, time.Hour, controlPlane, catalogSigner)
		defer r.stop()
		h := r.open(r.config())
		defer h.Close()
		r.server.Silence(true)
		for range 24 {
			time.Sleep(10 * time.Minute)
			must(t, handshake(h.Source()))
		}
	})
}

// A workload may be offered several identities: the one in use stays, whatever the order, and another takes over when it is gone.
func TestChoice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		other := "spiffe://" + domain + "/ns/shop/sa/other"
		r := newRig(t, time.Hour, controlPlane, web, other)
		defer r.stop()
		h := r.open(r.config(endpoint.Workload("shop", "")))
		defer h.Close()
		for _, step := range []struct {
			offer []string
			want  string
		}{{[]string{other, web}, web}, {[]string{other}, other}, {[]string{web, other}, other}} {
			var ids []spiffeid.ID
			for _, text := range step.offer {
				ids = append(ids, id(t, text))
			}
			r.server.Offer(ids...)
			synctest.Wait()
			if got := h.Source().Identity().ID.String(); got != step.want {
				t.Errorf("offered %v: %s, want %s", step.offer, got, step.want)
			}
		}
	})
}

func TestWants(t *testing.T) {
	td, err := spiffeid.ParseTrustDomain(domain)
	must(t, err)
	for _, row := range []struct {
		want endpoint.Want
		id   string
		fits bool
	}{
		{endpoint.ControlPlane(td), controlPlane, true},
		{endpoint.ControlPlane(td), catalogSigner, false},
		{endpoint.ControlPlane(td), "spiffe://other.example/strait/controlplane", false},
		{endpoint.ControlPlane(spiffeid.TrustDomain{}), controlPlane, false},
		{endpoint.CatalogSigner(td), catalogSigner, true},
		{endpoint.Gateway("g"), "spiffe://" + domain + "/strait/gateway/g", true},
		{endpoint.Gateway("g"), "spiffe://" + domain + "/strait/gateway/gg", false},
		{endpoint.Gateway("g"), "spiffe://" + domain + "/strait/gateway/g/g", false},
		{endpoint.Workload("shop", ""), web, true},
		{endpoint.Workload("shop", "web"), web, true},
		{endpoint.Workload("shop", "cart"), web, false},
		{endpoint.Workload("sho", ""), web, false},
		{endpoint.Workload("shop", ""), controlPlane, false},
	} {
		if got := row.want.Fits(id(t, row.id)); got != row.fits {
			t.Errorf("%s for %s: %v", row.want.Text, row.id, got)
		}
	}
}

// What does not hold is never put in force, and the error says where, what was offered and what is wrong.
func TestRefused(t *testing.T) {
	foreign, err := endpointtest.New(endpointtest.Options{})
	must(t, err)
	ours, err := endpointtest.New(endpointtest.Options{})
	must(t, err)
	svid := func(a *endpointtest.Authority, text string) *workload.X509SVID {
		v, err := a.SVID(id(t, text))
		must(t, err)
		return v
	}
	expired, err := endpointtest.New(endpointtest.Options{Now: func() time.Time { return time.Now().Add(-25 * time.Hour) }})
	must(t, err)
	for name, row := range map[string]struct {
		edit func(*workload.X509SVID)
		says string
	}{
		"other name": {func(v *workload.X509SVID) { v.SpiffeId = controlPlane; v.X509Svid = svid(ours, web).X509Svid }, "key does not belong"},
		"leaf of another": {func(v *workload.X509SVID) {
			w := svid(ours, web)
			v.X509Svid, v.X509SvidKey, v.Bundle = w.X509Svid, w.X509SvidKey, w.Bundle
		}, "its certificate is " + web},
		"bad name":            {func(v *workload.X509SVID) { v.SpiffeId = "spiffe://Elsewhere.example/x" }, "trust domain has the character"},
		"no chain":            {func(v *workload.X509SVID) { v.X509Svid = nil }, "0 certificates"},
		"broken chain":        {func(v *workload.X509SVID) { v.X509Svid = v.X509Svid[1:] }, "malformed chain"},
		"chain too long":      {func(v *workload.X509SVID) { v.X509Svid = bytes.Repeat(v.X509Svid, 80) }, "at most"},
		"broken key":          {func(v *workload.X509SVID) { v.X509SvidKey = v.X509SvidKey[:40] }, "malformed private key"},
		"key of another":      {func(v *workload.X509SVID) { v.X509SvidKey = svid(foreign, controlPlane).X509SvidKey }, "key does not belong"},
		"another CA's bundle": {func(v *workload.X509SVID) { v.Bundle = foreign.Bundle() }, "untrusted"},
		"no bundle":           {func(v *workload.X509SVID) { v.Bundle = nil }, "without roots"},
		"broken bundle":       {func(v *workload.X509SVID) { v.Bundle = v.Bundle[:100] }, "malformed bundle"},
		"no intermediates":    {func(v *workload.X509SVID) { v.X509Svid = leafOnly(t, v.X509Svid) }, "untrusted"},
		"an issuer as leaf":   {func(v *workload.X509SVID) { v.X509Svid = v.X509Svid[len(leafOnly(t, v.X509Svid)):] }, "identity:"},
		"ended": {func(v *workload.X509SVID) {
			w := svid(expired, controlPlane)
			v.X509Svid, v.X509SvidKey, v.Bundle = w.X509Svid, w.X509SvidKey, w.Bundle
		}, "expired"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, time.Hour, controlPlane)
			defer r.stop()
			r.stop()
			r.server = r.authority.Server(id(t, controlPlane))
			r.server.Edit = func(m *workload.X509SVIDResponse) { row.edit(m.Svids[0]) }
			r.listener = bufconn.Listen(64 << 10)
			done := make(chan struct{})
			go func() { defer close(done); _ = r.server.Serve(r.listener) }()
			defer func() { r.server.Stop(); <-done }()
			cfg := r.config(endpoint.ControlPlane(r.td))
			cfg.Source = trust.NewSource(trust.SourceConfig{})
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			_, err := endpoint.Open(ctx, cfg)
			if !problem.Is(err, problem.IdentityNotOffered) {
				t.Fatalf("error %v", err)
			}
			for _, part := range []string{cfg.Socket, controlPlane, row.says} {
				if text := problem.From(err).Human(); !strings.Contains(text, part) {
					t.Errorf("the error lacks %q: %s", part, text)
				}
			}
			if cfg.Source.Identity() != nil || cfg.Source.Bundles() != nil {
				t.Error("something of it is in force")
			}
		})
	}
}

// leafOnly is the first certificate of a chain.
func leafOnly(t *testing.T, chain []byte) []byte {
	t.Helper()
	n := int(chain[2])<<8 | int(chain[3])
	return chain[:n+4]
}

// Errors of a server that answers nothing, something else, or not this process.
func TestNothingOffered(t *testing.T) {
	open := func(t *testing.T, cfg endpoint.Config) string {
		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		defer cancel()
		_, err := endpoint.Open(ctx, cfg)
		if !problem.Is(err, problem.IdentityNotOffered) || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("error %v", err)
		}
		return problem.From(err).Human()
	}
	t.Run("nobody listens", func(t *testing.T) {
		r := newRig(t, time.Hour)
		defer r.stop()
		cfg := r.config()
		cfg.Dial = nil
		if text := open(t, cfg); !strings.Contains(text, "it does not answer") || !strings.Contains(text, "no such file") {
			t.Error(text)
		}
	})
	t.Run("no entry", func(t *testing.T) {
		r := newRig(t, time.Hour)
		defer r.stop()
		if text := open(t, r.config()); !strings.Contains(text, "no entry for this process") || !strings.Contains(text, catalogSigner) {
			t.Error(text)
		}
	})
	t.Run("one of two", func(t *testing.T) {
		r := newRig(t, time.Hour, controlPlane, web)
		defer r.stop()
		cfg := r.config()
		cfg.Source = trust.NewSource(trust.SourceConfig{})
		if text := open(t, cfg); !strings.Contains(text, "does not offer "+catalogSigner) || !strings.Contains(text, web) {
			t.Error(text)
		}
		if cfg.Source.Identity() != nil {
			t.Error("half of what is needed was put in force")
		}
	})
	t.Run("bad address", func(t *testing.T) {
		if _, err := endpoint.Open(t.Context(), endpoint.Config{Socket: "/run/agent.sock"}); !problem.Is(err, problem.Usage) {
			t.Errorf("error %v", err)
		}
	})
}

// A bundle on disk that cannot be read is no reason to begin at 1 again: members would refuse what follows.
func TestDamagedBundle(t *testing.T) {
	r := newRig(t, time.Hour, controlPlane, catalogSigner)
	defer r.stop()
	must(t, r.dir.WriteFile("bundles/own.json", []byte("{")))
	if _, err := endpoint.Open(t.Context(), r.config()); err == nil || !strings.Contains(err.Error(), "own.json") {
		t.Fatalf("error %v", err)
	}
	must(t, os.Remove(r.dir.Path("bundles/own.json")))
	must(t, r.open(r.config()).Close())
}

// A server without JWT-SVIDs has no JWT keys, also when it had some before.
func TestNoJWTProfile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, time.Hour, controlPlane, catalogSigner)
		h := r.open(r.config())
		until(t, h, "JWT keys", func() bool { return len(h.Bundle().JWTKeys()) == 1 })
		must(t, h.Close())
		r.stop()

		r.server, r.listener = r.authority.Server(id(t, controlPlane), id(t, catalogSigner)), bufconn.Listen(64<<10)
		r.server.NoJWT = true
		done := make(chan struct{})
		go func() { defer close(done); _ = r.server.Serve(r.listener) }()
		defer func() { r.server.Stop(); <-done }()
		h = r.open(r.config())
		defer h.Close()
		if len(h.Bundle().JWTKeys()) != 1 && h.Bundle().Sequence() < 3 {
			t.Error("a restart forgot the JWT keys")
		}
		until(t, h, "no JWT keys", func() bool { return len(h.Bundle().JWTKeys()) == 0 })
		if h.Bundle().Sequence() != 3 {
			t.Errorf("sequence %d", h.Bundle().Sequence())
		}
	})
}

// Federated bundles are in force only for trust domains that the caller names, never for the own one, and go when they are no longer
// offered.
func TestFederated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		partner, err := endpointtest.New(endpointtest.Options{})
		must(t, err)
		r := newRig(t, time.Hour, controlPlane, catalogSigner)
		r.stop()
		offered := map[string][]byte{"spiffe://partner.example": partner.Bundle(), "spiffe://stranger.example": partner.Bundle(), "spiffe://" + domain: partner.Bundle(), "spiffe://broken.example": {1}}
		r.server, r.listener = r.authority.Server(id(t, controlPlane), id(t, catalogSigner)), bufconn.Listen(64<<10)
		r.server.Edit = func(m *workload.X509SVIDResponse) { m.FederatedBundles = offered }
		done := make(chan struct{})
		go func() { defer close(done); _ = r.server.Serve(r.listener) }()
		defer func() { r.server.Stop(); <-done }()

		cfg := r.config()
		h := r.open(cfg)
		if got := h.Source().Bundles().TrustDomains(); len(got) != 1 {
			t.Errorf("bundles of %v without being asked for", got)
		}
		must(t, h.Close())

		cfg.Federated = func(td spiffeid.TrustDomain) bool { return td.String() != "stranger.example" }
		h = r.open(cfg)
		defer h.Close()
		all := h.Source().Bundles()
		if got := all.TrustDomains(); len(got) != 2 || got[1].String() != "partner.example" {
			t.Fatalf("bundles of %v", got)
		}
		if all.Get(r.td).Hash() == all.Get(all.TrustDomains()[1]).Hash() {
			t.Error("a federated bundle stands for the own trust domain")
		}
		delete(offered, "spiffe://partner.example")
		r.authority.Reissue()
		until(t, h, "withdrawal", func() bool { return len(h.Source().Bundles().TrustDomains()) == 1 })
	})
}

func TestParseAddress(t *testing.T) {
	for _, row := range []struct{ in, network, address string }{
		{"unix:///run/agent.sock", "unix", "/run/agent.sock"},
		{"unix:/run/agent.sock", "unix", "/run/agent.sock"},
		{"tcp://127.0.0.1:8000", "tcp", "127.0.0.1:8000"},
		{"tcp://[::1]:8000", "tcp", "[::1]:8000"},
		{"", "", ""}, {"/run/agent.sock", "", ""}, {"unix:agent.sock", "", ""}, {"unix://run/agent.sock", "", ""}, {"unix:///", "", ""},
		{"unix:///a?b", "", ""}, {"unix:///a#b", "", ""}, {"unix:///a#", "", ""}, {"unix:///a?", "", ""}, {"unix://u@/a", "", ""},
		{"tcp://localhost:1", "", ""}, {"tcp://127.0.0.1", "", ""}, {"tcp://127.0.0.1:1/x", "", ""}, {"tcp://127.0.0.1:", "", ""},
		{"https://127.0.0.1:1", "", ""}, {"npipe:x", "", ""}, {"\x00", "", ""},
	} {
		network, address, err := endpoint.ParseAddress(row.in)
		if network != row.network || address != row.address || (err != nil) != (row.network == "") {
			t.Errorf("%q: %q %q %v", row.in, network, address, err)
		}
	}
}
