// SPDX-License-Identifier: Apache-2.0

package bundleendpoint_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/memnet"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/bundleendpoint"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// memory is a network of pipes with one listener.
type memory struct {
	conns chan net.Conn
	down  atomic.Bool
	done  chan struct{}
	once  sync.Once
}

func newMemory() *memory { return &memory{conns: make(chan net.Conn), done: make(chan struct{})} }

func (m *memory) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	if m.down.Load() {
		return nil, fmt.Errorf("dial %s: unreachable", addr)
	}
	near, far := memnet.Pipe()
	select {
	case m.conns <- far:
		return near, nil
	case <-ctx.Done():
		_, _ = near.Close(), far.Close()
		return nil, ctx.Err()
	}
}

func (m *memory) Accept() (net.Conn, error) {
	select {
	case c := <-m.conns:
		return c, nil
	case <-m.done:
		return nil, net.ErrClosed
	}
}
func (m *memory) Close() error   { m.once.Do(func() { close(m.done) }); return nil }
func (m *memory) Addr() net.Addr { return &net.TCPAddr{} }

// world is a follower of one foreign endpoint, on virtual time.
type world struct {
	*foreign
	net      *memory
	dir      *datadir.Dir
	endpoint bundleendpoint.Endpoint
	roots    *x509.CertPool
	f        *bundleendpoint.Follower
	stop     func()

	mu     sync.Mutex
	asked  []time.Time
	answer http.HandlerFunc // nil: the bundle, as it is
}

func newWorld(t *testing.T) *world {
	w := &world{foreign: newForeign(t, "partner.example", time.Now), net: newMemory(), dir: newDir(t)}
	w.endpoint = bundleendpoint.Endpoint{
		TrustDomain: w.td, URL: "https://partner.example:8443/", Profile: bundleendpoint.ProfileSPIFFE, EndpointID: spiffeid.ControlPlane(w.td), Bundle: w.bundle.Load(),
	}
	w.serveTLS(w.source.BundleServerTLS())
	return w
}

func (w *world) serveTLS(c *tls.Config) {
	h := &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.asked = append(w.asked, time.Now())
		answer := w.answer
		w.mu.Unlock()
		if answer != nil {
			answer(rw, r)
			return
		}
		_, _ = rw.Write(w.bundle.Load().Marshal())
	})}
	h.SetKeepAlivesEnabled(false)
	served := make(chan error, 1)
	go func() { served <- h.Serve(tls.NewListener(w.net, c)) }()
	w.t.Cleanup(func() {
		_ = h.Close()
		<-served
		time.Sleep(10 * time.Second) // virtual: what was closed gets its alert out
	})
}

func (w *world) start() {
	w.t.Helper()
	var err error
	w.f, err = bundleendpoint.NewFollower(bundleendpoint.FollowerConfig{Dir: w.dir, Dial: w.net.dial, WebRoots: w.roots, Now: time.Now})
	must(w.t, err)
	must(w.t, w.f.Set([]bundleendpoint.Endpoint{w.endpoint}))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.f.Run(ctx) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		must(w.t, <-done)
	})
	w.t.Cleanup(w.stop)
	synctest.Wait()
}

func (w *world) now(answer http.HandlerFunc) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answer = answer
}

func (w *world) state() bundleendpoint.Followed {
	w.t.Helper()
	list := w.f.Followed()
	if len(list) != 1 {
		w.t.Fatalf("%d followed", len(list))
	}
	return list[0]
}

// wants waits d and checks what is held then, and what is said of the last attempt.
func (w *world) wants(why string, d time.Duration, sequence uint64, text string) {
	w.t.Helper()
	time.Sleep(d)
	synctest.Wait()
	s := w.state()
	if s.Bundle.Sequence() != sequence {
		w.t.Errorf("%s: sequence %d, want %d", why, s.Bundle.Sequence(), sequence)
	}
	if (s.Err == nil) != (text == "") || s.Err != nil && !strings.Contains(s.Err.Error(), text) {
		w.t.Errorf("%s: error %v, want %q", why, s.Err, text)
	}
}

func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		first := w.bundle.Load().Sequence()
		w.start()
		w.wants("asked at once", 0, first, "")
		if s := w.state(); s.Confirmed != time.Now() || time.Until(s.Next) < 270*time.Second || time.Until(s.Next) > 330*time.Second {
			t.Errorf("confirmed %s, next in %s", s.Confirmed, time.Until(s.Next))
		}
		changed := w.f.Changed()
		w.next()
		w.wants("after the interval", 331*time.Second, first+1, "")
		select {
		case <-changed:
		default:
			t.Error("nobody was told")
		}
		old := w.bundle.Load()
		w.setBundle(old.WithSequence(first))
		w.wants("a lower sequence", 331*time.Second, first+1, "goes back")
		other := newForeign(t, "partner.example", time.Now)
		w.now(func(rw http.ResponseWriter, _ *http.Request) {
			_, _ = rw.Write(other.bundle.Load().WithSequence(first + 1).Marshal())
		})
		w.wants("the same sequence with other roots", time.Minute, first+1, "goes back")
		w.now(func(rw http.ResponseWriter, _ *http.Request) { _, _ = rw.Write(old.WithSequence(0).Marshal()) })
		w.wants("no sequence any more", time.Minute, first+1, "goes back")
		w.now(func(rw http.ResponseWriter, _ *http.Request) {
			_, _ = rw.Write([]byte(`{"keys":[],"spiffe_sequence":99}`))
		})
		w.wants("no roots", 7*time.Minute, first+1, "no roots")

		// What was held survives a restart, and so does its sequence.
		w.stop()
		w.net.down.Store(true)
		w.start()
		w.wants("restarted without a network", 0, first+1, "unreachable")
		w.net.down.Store(false)
		w.wants("restarted", 12*time.Second, first+1, "no roots")
		w.now(nil)
		w.setBundle(old)
		w.wants("answers again", 10*time.Minute, first+1, "")
	})
}

// TestFollowTiming: the publisher's hint is clamped, spread by a tenth, and errors back off up to it.
func TestFollowTiming(t *testing.T) {
	for _, c := range []struct {
		hint string
		want time.Duration
	}{{"", 5 * time.Minute}, {"0", time.Minute}, {"-5", time.Minute}, {"1", time.Minute}, {"600", 10 * time.Minute}, {"1000000000", 24 * time.Hour}} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.source.SetIdentity(w.longLived())
			w.now(func(rw http.ResponseWriter, _ *http.Request) {
				doc := w.bundle.Load().Marshal()
				if c.hint != "" {
					doc = bytes.Replace(doc, []byte(`"spiffe_sequence"`), []byte(`"spiffe_refresh_hint":`+c.hint+`,"spiffe_sequence"`), 1)
				}
				_, _ = rw.Write(doc)
			})
			w.start()
			time.Sleep(20 * c.want)
			synctest.Wait()
			least, most := c.want, time.Duration(0)
			for i := 1; i < len(w.asked); i++ {
				d := w.asked[i].Sub(w.asked[i-1])
				least, most = min(least, d), max(most, d)
			}
			if least < c.want*9/10 || most > c.want*11/10 || len(w.asked) < 17 || least == most {
				t.Errorf("hint %q: asked %d times, %s to %s apart; want %s ±10 %%", c.hint, len(w.asked), least, most, c.want)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.now(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(http.StatusServiceUnavailable) })
		w.start()
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		for i, want := range []time.Duration{10, 20, 40, 80, 160, 300, 300} {
			want *= time.Second
			if d := w.asked[i+1].Sub(w.asked[i]); d < want*9/10 || d > want*11/10 {
				t.Errorf("wait %d after an error: %s, want %s ±10 %%", i+1, d, want)
			}
		}
		if s := w.state(); s.Failures != len(w.asked) || !strings.Contains(fmt.Sprint(s.Err), "503") || !s.Confirmed.IsZero() {
			t.Errorf("%d failures of %d, %v, confirmed %s", s.Failures, len(w.asked), s.Err, s.Confirmed)
		}
	})
}

// longLived is an identity that outlasts the test's virtual time.
func (f *foreign) longLived() *trust.Identity {
	f.t.Helper()
	id, err := f.ca.IssueKey(spiffeid.ControlPlane(f.td), 90*24*time.Hour)
	must(f.t, err)
	return id
}

// TestFollowRotation: the endpoint's own certificate moves to a new root, which was published before.
func TestFollowRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		first := w.bundle.Load().Sequence()
		w.start()
		next := newForeign(t, "partner.example", time.Now)
		both, err := w.bundle.Load().WithRoots(append(next.bundle.Load().Roots(), w.bundle.Load().Roots()...))
		must(t, err)
		w.setBundle(both)
		w.wants("both roots", 6*time.Minute, first+1, "")
		id, err := next.ca.IssueKey(spiffeid.ControlPlane(w.td), 0)
		must(t, err)
		w.source.SetIdentity(id)
		only, err := both.WithRoots(next.bundle.Load().Roots())
		must(t, err)
		w.setBundle(only)
		w.wants("the new root alone", 6*time.Minute, first+2, "")
		w.stop()
		w.start() // the inline bundle still names the old root: what was fetched is in force
		w.wants("restarted", 6*time.Minute, first+2, "")
	})
}

// TestFollowImpostors: only the endpoint configured is believed, and only what it may say.
func TestFollowImpostors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		first := w.bundle.Load().Sequence()
		own := w.source.Identity()
		w.next()
		stranger := newForeign(t, "partner.example", time.Now)
		web, err := spiffeid.Workload(w.td, "shop", "web")
		must(t, err)
		workload, err := w.ca.IssueKey(web, 0)
		must(t, err)
		w.source.SetIdentity(stranger.source.Identity())
		w.start()
		w.wants("another root's certificate", 0, first, "untrusted")
		w.source.SetIdentity(workload)
		w.wants("another identity of the trust domain", time.Minute, first, "not_authorized")
		elsewhere := newForeign(t, "other.example", time.Now)
		w.source.SetIdentity(elsewhere.source.Identity())
		w.wants("another trust domain", time.Minute, first, "unknown_trust_domain")
		w.source.SetIdentity(own)
		w.now(func(rw http.ResponseWriter, _ *http.Request) {
			_, _ = rw.Write(elsewhere.bundle.Load().WithSequence(9).Marshal())
		})
		w.wants("a document of another trust domain", 3*time.Minute, first, "something else than its trust domain")
		w.now(func(rw http.ResponseWriter, _ *http.Request) { _, _ = rw.Write(bytes.Repeat([]byte(" "), 300<<10)) })
		w.wants("a document without end", 6*time.Minute, first, "at most")
		w.now(func(rw http.ResponseWriter, _ *http.Request) { time.Sleep(time.Minute) })
		w.wants("no answer", 7*time.Minute, first, "timeout")
		w.now(nil)
		w.wants("the endpoint itself", 7*time.Minute, first+1, "")
	})
}

func TestFollowRedirects(t *testing.T) {
	hops := func(n int) func(*world) http.HandlerFunc {
		return func(w *world) http.HandlerFunc {
			return func(rw http.ResponseWriter, r *http.Request) {
				var at int
				_, _ = fmt.Sscanf(r.URL.Path, "/hop%d", &at)
				if at == n {
					_, _ = rw.Write(w.bundle.Load().Marshal())
					return
				}
				http.Redirect(rw, r, fmt.Sprintf("https://elsewhere.example/hop%d", at+1), http.StatusFound)
			}
		}
	}
	to := func(url string) func(*world) http.HandlerFunc {
		return func(*world) http.HandlerFunc {
			return func(rw http.ResponseWriter, _ *http.Request) {
				rw.Header().Set("Location", url)
				rw.WriteHeader(http.StatusFound)
			}
		}
	}
	for _, c := range []struct {
		name   string
		answer func(*world) http.HandlerFunc
		err    string
	}{
		{"one hop", hops(1), ""},
		{"five hops", hops(5), ""},
		{"six hops", hops(6), "more than 5 redirects"},
		{"in a circle", to("https://partner.example:8443/"), "more than 5 redirects"},
		{"to http", to("http://partner.example/"), "redirect refused"},
		{"to userinfo", to("https://a:b@partner.example/"), "redirect refused"},
		{"to a user", to("https://a@partner.example/"), "redirect refused"},
		{"to a file", to("file:///etc/passwd"), "redirect refused"},
		{"to nowhere", to("https:///x"), "redirect refused"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				first := w.bundle.Load().Sequence()
				w.next()
				w.now(c.answer(w))
				w.start()
				if c.err == "" {
					first++
				}
				w.wants(c.name, 0, first, c.err)
			})
		})
	}
}

// TestFollowWeb: profile https_web needs no bundle to begin with, and a name that its roots vouch for.
func TestFollowWeb(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{foreign: newForeign(t, "partner.example", time.Now), net: newMemory(), dir: newDir(t)}
		certFile, keyFile, roots := w.webFiles("partner.example")
		pair, err := tls.LoadX509KeyPair(certFile, keyFile)
		must(t, err)
		w.serveTLS(trust.WebServerTLS(func() (*tls.Certificate, error) { return &pair, nil }))
		w.endpoint = bundleendpoint.Endpoint{TrustDomain: w.td, URL: "https://other.example/", Profile: bundleendpoint.ProfileWeb}
		w.roots = roots
		w.start()
		time.Sleep(6 * time.Second)
		if s := w.state(); s.Bundle != nil || s.Err == nil || !strings.Contains(s.Err.Error(), "certificate is valid for partner.example, not other.example") {
			t.Errorf("another name: %v", s.Err)
		}
		w.endpoint.URL = "https://partner.example/"
		must(t, w.f.Set([]bundleendpoint.Endpoint{w.endpoint}))
		w.wants("its own name", 0, w.bundle.Load().Sequence(), "")
		w.stop()
		w.roots = nil
		w.start()
		time.Sleep(6 * time.Second)
		if s := w.state(); s.Err == nil || !strings.Contains(s.Err.Error(), "unknown authority") || s.Bundle == nil {
			t.Errorf("under the system's roots: %v", s.Err)
		}
	})
}

// TestConfigurationChanges: what an operator changes, and what leaving and coming back does not.
func TestConfigurationChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		first := w.bundle.Load().Sequence()
		w.next()
		w.next()
		w.start()
		w.wants("followed", 0, first+2, "")
		must(t, w.f.Set(nil))
		synctest.Wait()
		if len(w.f.Followed()) != 0 {
			t.Error("still followed")
		}
		n := len(w.asked)
		time.Sleep(time.Hour)
		if len(w.asked) != n {
			t.Error("asked although nobody wants to know")
		}
		w.setBundle(w.bundle.Load().WithSequence(first + 1))
		must(t, w.f.Set([]bundleendpoint.Endpoint{w.endpoint}))
		synctest.Wait()
		w.wants("came back", 0, first+2, "goes back")

		// The publisher has lost its CA and begins at 1. The operator vouches for that by another inline bundle.
		anew := newForeign(t, "partner.example", time.Now)
		w.source.SetIdentity(anew.source.Identity())
		w.setBundle(anew.bundle.Load().WithSequence(1))
		w.wants("lost", time.Hour, first+2, "untrusted")
		w.endpoint.Bundle = w.bundle.Load()
		must(t, w.f.Set([]bundleendpoint.Endpoint{w.endpoint}))
		synctest.Wait()
		w.wants("begun anew", 0, 1, "")
		w.stop()
		w.net.down.Store(true)
		w.start()
		w.wants("restarted", 0, 1, "unreachable")

		if err := w.f.Set([]bundleendpoint.Endpoint{w.endpoint, w.endpoint}); err == nil || len(w.f.Followed()) != 1 {
			t.Errorf("twice: %v", err)
		}
	})
}

func TestEndpointCheck(t *testing.T) {
	td, other := domain(t, "partner.example"), domain(t, "other.example")
	a, err := ca.Create(newDir(t), ca.Config{TrustDomain: td})
	must(t, err)
	b := a.Bundle()
	empty, err := trust.NewBundle(td, nil, 1)
	must(t, err)
	good := bundleendpoint.Endpoint{TrustDomain: td, URL: "https://partner.example", Profile: bundleendpoint.ProfileSPIFFE, EndpointID: spiffeid.ControlPlane(td), Bundle: b}
	with := func(f func(*bundleendpoint.Endpoint)) bundleendpoint.Endpoint { e := good; f(&e); return e }
	for _, c := range []struct {
		name string
		e    bundleendpoint.Endpoint
		ok   bool
	}{
		{"good", good, true},
		{"static", bundleendpoint.Endpoint{TrustDomain: td, Bundle: b}, true},
		{"web", bundleendpoint.Endpoint{TrustDomain: td, URL: "https://partner.example/x?y", Profile: bundleendpoint.ProfileWeb}, true},
		{"nothing", bundleendpoint.Endpoint{TrustDomain: td}, false},
		{"no trust domain", with(func(e *bundleendpoint.Endpoint) { e.TrustDomain = spiffeid.TrustDomain{} }), false},
		{"bundle of another", with(func(e *bundleendpoint.Endpoint) { e.TrustDomain, e.EndpointID = other, spiffeid.ControlPlane(other) }), false},
		{"endpoint of another", with(func(e *bundleendpoint.Endpoint) { e.EndpointID = spiffeid.ControlPlane(other) }), false},
		{"no endpoint ID", with(func(e *bundleendpoint.Endpoint) { e.EndpointID = spiffeid.ID{} }), false},
		{"no bundle", with(func(e *bundleendpoint.Endpoint) { e.Bundle = nil }), false},
		{"no roots", with(func(e *bundleendpoint.Endpoint) { e.Bundle = empty }), false},
		{"web with an ID", with(func(e *bundleendpoint.Endpoint) { e.Profile = bundleendpoint.ProfileWeb }), false},
		{"no profile", with(func(e *bundleendpoint.Endpoint) { e.Profile = "" }), false},
		{"http", with(func(e *bundleendpoint.Endpoint) { e.URL = "http://partner.example" }), false},
		{"userinfo", with(func(e *bundleendpoint.Endpoint) { e.URL = "https://u:p@partner.example" }), false},
		{"no host", with(func(e *bundleendpoint.Endpoint) { e.URL = "https:///x" }), false},
		{"port alone", with(func(e *bundleendpoint.Endpoint) { e.URL = "https://:8443" }), false},
		{"opaque", with(func(e *bundleendpoint.Endpoint) { e.URL = "https:partner.example" }), false},
		{"fragment", with(func(e *bundleendpoint.Endpoint) { e.URL = "https://partner.example#x" }), false},
		{"long", with(func(e *bundleendpoint.Endpoint) { e.URL = "https://partner.example/" + strings.Repeat("x", 2048) }), false},
		{"malformed", with(func(e *bundleendpoint.Endpoint) { e.URL = "https://[::1" }), false},
	} {
		if err := c.e.Check(); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestAddresses: class T27, also behind a name.
func TestAddresses(t *testing.T) {
	for _, bad := range []string{
		"127.0.0.1:443", "127.9.9.9:443", "[::1]:443", "169.254.169.254:80", "[fe80::1%eth0]:443", "0.0.0.0:443", "0.1.2.3:443", "[::]:443",
		"[::ffff:127.0.0.1]:443", "[::ffff:169.254.169.254]:80", "224.0.0.1:443", "[ff02::1]:443", "255.255.255.255:443", "localhost:443", "",
	} {
		if bundleendpoint.CheckAddress(bad) == nil {
			t.Errorf("%s: accepted", bad)
		}
	}
	for _, good := range []string{"10.0.0.1:443", "192.0.2.1:8443", "[2001:db8::1]:443"} {
		if err := bundleendpoint.CheckAddress(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	f := newForeign(t, "partner.example", time.Now)
	l := listen(t)
	f.serve(bundleendpoint.ServerConfig{}, l)
	_, port, err := net.SplitHostPort(l.Addr().String())
	must(t, err)
	for _, allow := range []bool{false, true} {
		e := bundleendpoint.Endpoint{TrustDomain: f.td, URL: "https://localhost:" + port, Profile: bundleendpoint.ProfileSPIFFE, EndpointID: spiffeid.ControlPlane(f.td), Bundle: f.bundle.Load().WithSequence(1)}
		f.setBundle(f.bundle.Load().WithSequence(2))
		follower, err := bundleendpoint.NewFollower(bundleendpoint.FollowerConfig{Dir: newDir(t), AllowLocal: allow})
		must(t, err)
		must(t, follower.Set([]bundleendpoint.Endpoint{e}))
		changed := follower.Changed()
		ctx, cancel := context.WithTimeout(t.Context(), within)
		done := make(chan error, 1)
		go func() { done <- follower.Run(ctx) }()
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatal("nothing happened")
		}
		s := follower.Followed()[0]
		if refused := s.Err != nil && strings.Contains(s.Err.Error(), "are refused"); refused == allow || (s.Bundle.Sequence() == 2) != allow {
			t.Errorf("allowed %v: sequence %d, %v", allow, s.Bundle.Sequence(), s.Err)
		}
		cancel()
		must(t, <-done)
	}
}
