// SPDX-License-Identifier: Apache-2.0

package bundleendpoint_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	gospiffeid "github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/bundleendpoint"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const within = 20 * time.Second

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newDir(t testing.TB) *datadir.Dir {
	t.Helper()
	d, err := datadir.Create(filepath.Join(t.TempDir(), "data"))
	must(t, err)
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func domain(t testing.TB, s string) spiffeid.TrustDomain {
	t.Helper()
	td, err := spiffeid.ParseTrustDomain(s)
	must(t, err)
	return td
}

// foreign is a trust domain with a CA and an endpoint of its own.
type foreign struct {
	t      testing.TB
	td     spiffeid.TrustDomain
	ca     *ca.CA
	source *trust.Source
	bundle atomic.Pointer[trust.Bundle]
	web    *ca.CA // signs the web certificate
}

func newForeign(t testing.TB, name string, now func() time.Time) *foreign {
	t.Helper()
	f := &foreign{t: t, td: domain(t, name)}
	var err error
	f.ca, err = ca.Create(newDir(t), ca.Config{TrustDomain: f.td, Now: now})
	must(t, err)
	f.web, err = ca.Create(newDir(t), ca.Config{TrustDomain: f.td, Now: now})
	must(t, err)
	f.source = trust.NewSource(trust.SourceConfig{Now: now})
	f.setBundle(f.ca.Bundle())
	id, err := f.ca.IssueKey(spiffeid.ControlPlane(f.td), 0)
	must(t, err)
	f.source.SetIdentity(id)
	return f
}

func (f *foreign) setBundle(b *trust.Bundle) {
	f.t.Helper()
	f.bundle.Store(b)
	set, err := trust.NewBundles(b)
	must(f.t, err)
	f.source.SetBundles(set)
}

// next publishes the same roots under the next sequence.
func (f *foreign) next() { b := f.bundle.Load(); f.setBundle(b.WithSequence(b.Sequence() + 1)) }

// webFiles writes a certificate of the web's PKI and its key, and returns the roots that verify it.
func (f *foreign) webFiles(names ...string) (cert, key string, roots *x509.CertPool) {
	f.t.Helper()
	c, k, err := f.web.IssueServing(names, []net.IP{net.IPv4(127, 0, 0, 1)}, 24*time.Hour)
	must(f.t, err)
	dir := f.t.TempDir()
	cert, key = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	must(f.t, os.WriteFile(cert, c, 0o600))
	must(f.t, os.WriteFile(key, k, 0o600))
	roots = x509.NewCertPool()
	if !roots.AppendCertsFromPEM(f.web.APIRootPEM()) {
		f.t.Fatal("no roots")
	}
	return cert, key, roots
}

func (f *foreign) serve(cfg bundleendpoint.ServerConfig, l net.Listener) *bundleendpoint.Server {
	f.t.Helper()
	cfg.Bundle, cfg.Source = f.bundle.Load, f.source
	s, err := bundleendpoint.NewServer(cfg)
	must(f.t, err)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	f.t.Cleanup(func() {
		must(f.t, s.Close())
		must(f.t, <-served)
	})
	return s
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	return l
}

// watcher is go-spiffe's side of WatchBundle.
type watcher struct {
	t    *testing.T
	hint time.Duration
	seen chan *spiffebundle.Bundle
	set  *spiffebundle.Set
}

func (w *watcher) NextRefresh(hint time.Duration) time.Duration {
	w.hint = hint
	return time.Millisecond
}

func (w *watcher) OnUpdate(b *spiffebundle.Bundle) {
	w.set.Add(b)
	select {
	case w.seen <- b.Clone():
	default:
	}
}
func (w *watcher) OnError(err error) { w.t.Errorf("go-spiffe: %v", err) }

// TestGoSPIFFEFollows holds the endpoint to what another implementation asks of it, in both profiles and through a change.
func TestGoSPIFFEFollows(t *testing.T) {
	for _, profile := range []string{bundleendpoint.ProfileSPIFFE, bundleendpoint.ProfileWeb} {
		t.Run(profile, func(t *testing.T) {
			f := newForeign(t, "us-east.acme", time.Now)
			var cfg bundleendpoint.ServerConfig
			td := gospiffeid.RequireTrustDomainFromString("us-east.acme")
			first, err := spiffebundle.Parse(td, f.bundle.Load().Marshal())
			must(t, err)
			w := &watcher{t: t, seen: make(chan *spiffebundle.Bundle), set: spiffebundle.NewSet(first)}
			auth := federation.WithSPIFFEAuth(w.set, gospiffeid.RequireFromString("spiffe://us-east.acme/strait/controlplane"))
			if profile == bundleendpoint.ProfileWeb {
				var roots *x509.CertPool
				cfg.CertFile, cfg.KeyFile, roots = f.webFiles("localhost")
				auth = federation.WithWebPKIRoots(roots)
			}
			l := listen(t)
			s := f.serve(cfg, l)
			if s.Profile() != profile {
				t.Errorf("profile %s", s.Profile())
			}
			url := "https://" + l.Addr().String()
			b, err := federation.FetchBundle(t.Context(), td, url, auth)
			must(t, err)
			if n, ok := b.SequenceNumber(); !ok || n != f.bundle.Load().Sequence() || len(b.X509Authorities()) != 1 {
				t.Fatalf("sequence %d, %d roots", n, len(b.X509Authorities()))
			}
			ctx, cancel := context.WithTimeout(t.Context(), within)
			defer cancel()
			done := make(chan error, 1)
			go func() { done <- federation.WatchBundle(ctx, td, url, w, auth) }()
			<-w.seen
			f.next()
			want := f.bundle.Load().Sequence()
			for n := uint64(0); n != want; {
				select {
				case b := <-w.seen:
					n, _ = b.SequenceNumber()
				case <-ctx.Done():
					t.Fatalf("sequence %d was not seen", want)
				}
			}
			cancel()
			<-done
			if w.hint != bundleendpoint.DefaultRefreshHint {
				t.Errorf("refresh hint %s", w.hint)
			}
		})
	}
}

// TestServerAnswersNothingElse: one method, one path, no client certificate needed, no keep-alive.
func TestServerAnswersNothingElse(t *testing.T) {
	f := newForeign(t, "us-east.acme", time.Now)
	l := listen(t)
	f.serve(bundleendpoint.ServerConfig{}, l)
	tr := &http.Transport{TLSClientConfig: trust.BundleClientTLS(f.bundle.Load(), spiffeid.ControlPlane(f.td), nil)}
	defer tr.CloseIdleConnections()
	client := &http.Client{Transport: tr, Timeout: within}
	for _, c := range []struct {
		method, path string
		status       int
	}{
		{"GET", "/", 200}, {"GET", "/?x=y", 200}, {"HEAD", "/", 405}, {"POST", "/", 405}, {"PUT", "/", 405}, {"DELETE", "/", 405}, {"OPTIONS", "/", 405},
		{"GET", "/metrics", 404}, {"GET", "/bundle", 404}, {"GET", "//", 404},
	} {
		q, err := http.NewRequestWithContext(t.Context(), c.method, "https://"+l.Addr().String()+c.path, http.NoBody)
		must(t, err)
		r, err := client.Do(q)
		must(t, err)
		body, err := io.ReadAll(r.Body)
		must(t, err)
		r.Body.Close()
		if r.StatusCode != c.status || !r.Close {
			t.Errorf("%s %s: %d, closes %v; want %d", c.method, c.path, r.StatusCode, r.Close, c.status)
		}
		if c.status == 200 {
			if b, err := trust.ParseBundle(f.td, body); err != nil || !b.Equal(f.bundle.Load()) || b.RefreshHint() != bundleendpoint.DefaultRefreshHint {
				t.Errorf("%s %s: %v", c.method, c.path, err)
			}
		}
	}
}

// TestServerBounds: who says nothing is closed, and 300 of them do not keep a reader out.
func TestServerBounds(t *testing.T) {
	f := newForeign(t, "us-east.acme", time.Now)
	l := listen(t)
	f.serve(bundleendpoint.ServerConfig{}, l)
	begin := time.Now()
	var silent []net.Conn
	for range 300 {
		c, err := net.Dial("tcp", l.Addr().String())
		must(t, err)
		defer c.Close()
		silent = append(silent, c)
	}
	tr := &http.Transport{TLSClientConfig: trust.BundleClientTLS(f.bundle.Load(), spiffeid.ControlPlane(f.td), nil)}
	defer tr.CloseIdleConnections()
	r, err := (&http.Client{Transport: tr, Timeout: within}).Get("https://" + l.Addr().String())
	must(t, err)
	r.Body.Close()
	for _, c := range silent {
		must(t, c.SetReadDeadline(begin.Add(6*time.Second)))
		if _, err := io.Copy(io.Discard, c); err != nil && os.IsTimeout(err) {
			t.Fatalf("a silent connection is open after %s", time.Since(begin))
		}
	}
}

// TestWebCertificateIsReread: a renewed pair is used without a restart, half of one is not.
func TestWebCertificateIsReread(t *testing.T) {
	f := newForeign(t, "us-east.acme", time.Now)
	cert, key, roots := f.webFiles("localhost")
	var ahead atomic.Int64
	l := listen(t)
	f.serve(bundleendpoint.ServerConfig{CertFile: cert, KeyFile: key, Now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }}, l)
	serial := func() string {
		c, err := tls.Dial("tcp", l.Addr().String(), trust.WebClientTLS(roots, nil))
		must(t, err)
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	first := serial()
	cert2, key2, _ := f.webFiles("localhost")
	data, err := os.ReadFile(cert2)
	must(t, err)
	must(t, os.WriteFile(cert, data, 0o600))
	ahead.Add(int64(2 * time.Second))
	if serial() != first {
		t.Error("a certificate without its key was used")
	}
	data, err = os.ReadFile(key2)
	must(t, err)
	must(t, os.WriteFile(key, data, 0o600))
	ahead.Add(int64(2 * time.Second))
	if serial() == first {
		t.Error("the new certificate is not used")
	}
}

func TestNewServerRefuses(t *testing.T) {
	f := newForeign(t, "us-east.acme", time.Now)
	cert, key, _ := f.webFiles("localhost")
	for name, cfg := range map[string]bundleendpoint.ServerConfig{
		"no bundle":      {Source: f.source},
		"nobody":         {Bundle: f.bundle.Load},
		"no key":         {Bundle: f.bundle.Load, Source: f.source, CertFile: cert},
		"no certificate": {Bundle: f.bundle.Load, Source: f.source, KeyFile: key},
		"swapped":        {Bundle: f.bundle.Load, Source: f.source, CertFile: key, KeyFile: cert},
		"missing":        {Bundle: f.bundle.Load, Source: f.source, CertFile: cert + "x", KeyFile: key},
	} {
		if _, err := bundleendpoint.NewServer(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
