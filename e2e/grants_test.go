// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Promises P2, P4 and P7: what a wholly compromised member reaches, attracts and introduces, and how fast it loses what it had.
//
// us-east and eu-west grant each other the namespace shop, ap-south is a member without sameness. eu-west offers one of two
// ports of site to us-east, south to ap-south, both to the two of them, and secret to nobody.
func TestPeerReachesOnlyWhatWasGranted(t *testing.T) {
	f := harness.New(t, harness.Options{})
	for _, n := range f.Names {
		f.Clusters[n].Up()
	}
	us, eu, ap := f.Clusters["us-east"], f.Clusters["eu-west"], f.Clusters["ap-south"]
	f.Join("us-east", "eu-west", "shop")
	f.Join("us-east", "ap-south", "")
	f.Join("eu-west", "ap-south", "")

	w := &grantsWorld{t: t, us: us, eu: eu, ap: ap}
	w.startServices()
	w.red = newRedTeam(t, us, eu)
	w.south = newRedTeam(t, ap, eu)
	var err error
	if w.usTunnel, err = w.red.tunnel(eu, "/strait/gateway/red"); err != nil {
		t.Fatalf("a gateway identity of a member got no session: %v", err)
	}
	if w.apTunnel, err = w.south.tunnel(eu, "/strait/gateway/red"); err != nil {
		t.Fatalf("a gateway identity of a member got no session: %v", err)
	}
	w.reachable()
	w.headers()
	w.handles()
	w.serverNames()
	w.identities()
	w.listeners()
	w.attractsNothing()
	w.introductions()
	for name, b := range map[string]*backend{"secret": w.secret, "admin": w.admin} {
		if n := b.served.Load(); n != 0 {
			t.Errorf("%s was reached %d times", name, n)
		}
	}
	w.unexport()
	w.evict()
}

type grantsWorld struct {
	t                                  *testing.T
	us, eu, ap                         *harness.Cluster
	site, admin, secret, toSouth, both *backend
	callee, web                        *harness.Sidecar
	red, south                         *redTeam
	usTunnel, apTunnel                 *tunnel.Session
}

// drip answers one line at once and another every 50 ms until the client goes away.
func drip(w http.ResponseWriter, r *http.Request) {
	for r.Context().Err() == nil {
		fmt.Fprintln(w, "drip")
		w.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (w *grantsWorld) startServices() {
	t := w.t
	w.site, w.admin, w.secret = newBackend(t, "site"), newBackend(t, "admin"), newBackend(t, "secret")
	w.toSouth, w.both = newBackend(t, "south"), newBackend(t, "both")
	w.site.handle = func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/drip" {
			drip(rw, r)
			return
		}
		fmt.Fprintln(rw, "site")
	}
	_, adminPort, _ := net.SplitHostPort(w.admin.addr)
	_, sitePort, _ := net.SplitHostPort(w.site.addr)
	token := filepath.Join(filepath.Dir(w.eu.Dir), "callee.token")
	w.eu.CLI("workload", "register", "shop/site-1", "--service", "site", "--proxy", "callee", "--service-account", "callee", "--address", "127.0.0.1",
		"--port", "http="+sitePort, "--port", "admin="+adminPort+"/http", "--token-out", token)
	for name, b := range map[string]*backend{"secret": w.secret, "south": w.toSouth, "both": w.both} {
		_, port, _ := net.SplitHostPort(b.addr)
		w.eu.CLI("workload", "register", "shop/"+name+"-1", "--service", name, "--proxy", "callee", "--service-account", "callee", "--address", "127.0.0.1",
			"--port", "http="+port)
	}
	w.callee = w.eu.StartSidecar("callee", token, nil)
	w.eu.CLI("export", "shop/site", "--to", "us-east", "--ports", "http")
	w.eu.CLI("export", "shop/south", "--to", "ap-south")
	w.eu.CLI("export", "shop/both", "--to", "us-east,ap-south")
	w.web = w.us.StartSidecar("web", w.us.Register(harness.Workload{Name: "web", Service: "web", Token: true}),
		[]string{"shop/site:http", "shop/secret:http", "shop/site:admin", "shop/popular:http", "shop/popular:http@ap-south"})
	reaches(t, "http://"+w.web.Upstreams[0]+"/", "site")
}

// header is the one that an honest gateway of us-east would send, changed.
func (w *grantsWorld) header(change func(*tunnel.Header)) tunnel.Header {
	h := tunnel.Header{Service: "shop/site", Port: "http", Source: "spiffe://us-east.acme/ns/shop/sa/web", Hops: 1, Deadline: 5 * time.Second}
	if change != nil {
		change(&h)
	}
	return h
}

const siteSNI = "http.site.shop.svc.eu-west.acme"

// get makes one request over a tunnel, end to end as the workload of that path.
func (w *grantsWorld) get(r *redTeam, s *tunnel.Session, h tunnel.Header, sni, path string) (string, error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), 10*time.Second)
	defer cancel()
	c, err := r.inner(ctx, &streamConn{ctx: ctx, s: s, h: h}, "/ns/shop/sa/web", sni)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return httpGet(c, path)
}

func httpGet(c *tls.Conn, path string) (string, error) {
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: site.shop\r\nConnection: close\r\n\r\n", path); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "", err
	}
	body, err := io.ReadAll(resp.Body)
	return fmt.Sprintf("%d %s", resp.StatusCode, strings.TrimSpace(string(body))), err
}

// reachable is the control: what was granted answers to exactly the client that everything else below uses.
func (w *grantsWorld) reachable() {
	got, err := w.get(w.red, w.usTunnel, w.header(nil), siteSNI, "/")
	if err != nil || got != "200 site" {
		w.t.Fatalf("what is exported is not reachable by the raw client: %q, %v", got, err)
	}
	asSouth := w.header(func(h *tunnel.Header) { h.Service, h.Source = "shop/south", "spiffe://ap-south.acme/ns/shop/sa/web" })
	got, err = w.get(w.south, w.apTunnel, asSouth, "http.south.shop.svc.eu-west.acme", "/")
	if err != nil || got != "200 south" {
		w.t.Fatalf("what is exported to ap-south is not reachable by ap-south: %q, %v", got, err)
	}
}

// headers sends every header that names what was not granted, or speaks for whom it may not.
func (w *grantsWorld) headers() {
	t := w.t
	hello := clientHello(t, siteSNI)
	services := []string{
		"", "/", "shop", "shop/", "/site", "shop/site/", "shop//site", "*", "*/*", "shop/*", "*/site", "SHOP/site", "shop/Site", "shop/site.", ".shop/site",
		"shop/site:http", "shop/site@eu-west", "shop/site.svc.eu-west.acme", "shop/secret", "shop/south", "shop/sit", "shop/sites", "default/site", "strait/controlplane",
		"strait/gateway", "kube-system/kube-dns", "default/kubernetes", "../shop/site", "shop/../shop/site", "shop/site\x00", "shop/site\n", " shop/site",
		"us-east.acme/shop/site", "shop/web", "127.0.0.1/site", w.site.addr, strings.Repeat("a", 63) + "/" + strings.Repeat("b", 63),
	}
	for _, s := range services {
		st, rest := probe(t, w.usTunnel, w.header(func(h *tunnel.Header) { h.Service = s }), hello)
		if st.Code != preface.CodeNotExported && st.Code != preface.CodeBadRequest || len(rest) != 0 {
			t.Errorf("service %q: %s %s, then %d bytes", s, st.Code, st.Reason, len(rest))
		}
	}
	_, number, _ := net.SplitHostPort(w.site.addr)
	for _, p := range []string{"", "*", "admin", "HTTP", "Http", "http ", "http/tcp", "http.site", "http:admin", "grpc", "0", "80", number, "15008", "7400"} {
		st, rest := probe(t, w.usTunnel, w.header(func(h *tunnel.Header) { h.Port = p }), hello)
		if st.Code != preface.CodeNotExported && st.Code != preface.CodeBadRequest || len(rest) != 0 {
			t.Errorf("port %q: %s %s, then %d bytes", p, st.Code, st.Reason, len(rest))
		}
	}
	for _, e := range []string{"*", "shop/site", "shop/secret", "0"} {
		if st, _ := probe(t, w.usTunnel, w.header(func(h *tunnel.Header) { h.Export = e }), hello); st.Code != preface.CodeNotExported {
			t.Errorf("export id %q: %s %s", e, st.Code, st.Reason)
		}
	}
	sources := []string{
		"", "web", "spiffe://eu-west.acme/ns/shop/sa/callee", "spiffe://ap-south.acme/ns/shop/sa/web", "spiffe://us-east.acme/strait/gateway/gateway-1",
		"spiffe://us-east.acme/strait/controlplane", "spiffe://us-east.acme/strait/operator/admin", "spiffe://us-east.acme", "spiffe://us-east.acme/",
		"spiffe://US-EAST.acme/ns/shop/sa/web", "spiffe://us-east.acme./ns/shop/sa/web", "spiffe://x.us-east.acme/ns/shop/sa/web", "spiffe://acme/ns/shop/sa/web",
		"spiffe://us-east.acme/ns/shop/sa/web?x", "spiffe://us-east.acme/ns/shop/sa/../sa/web", "spiffe://us-east.acme@eu-west.acme/ns/shop/sa/web",
		"https://us-east.acme/ns/shop/sa/web", "spiffe://us-east.acme/ns/shop/sa/*",
	}
	for _, s := range sources {
		st, rest := probe(t, w.usTunnel, w.header(func(h *tunnel.Header) { h.Source = s }), hello)
		if st.Code != preface.CodeDenied || len(rest) != 0 {
			t.Errorf("source %q: %s %s, then %d bytes", s, st.Code, st.Reason, len(rest))
		}
	}
	for _, n := range []uint8{0, 2, 255} {
		if st, _ := probe(t, w.usTunnel, w.header(func(h *tunnel.Header) { h.Hops = n }), hello); st.Code != preface.CodeBadRequest {
			t.Errorf("%d hops: %s %s", n, st.Code, st.Reason)
		}
	}
	// The other member is offered other things: what is us-east's is not ap-south's, and the other way round above.
	asSouth := func(service, port string) tunnel.Header {
		return w.header(func(h *tunnel.Header) {
			h.Service, h.Port, h.Source = service, port, "spiffe://ap-south.acme/ns/shop/sa/web"
		})
	}
	for _, h := range []tunnel.Header{asSouth("shop/site", "http"), asSouth("shop/site", "admin"), asSouth("shop/secret", "http")} {
		if st, _ := probe(t, w.apTunnel, h, hello); st.Code != preface.CodeNotExported {
			t.Errorf("ap-south to %s:%s: %s %s", h.Service, h.Port, st.Code, st.Reason)
		}
	}
	// Nor does it reach them by speaking for us-east.
	if st, _ := probe(t, w.apTunnel, w.header(func(h *tunnel.Header) { h.Service = "shop/both" }), clientHello(t, "http.both.shop.svc.eu-west.acme")); st.Code != preface.CodeDenied {
		t.Errorf("ap-south as a workload of us-east: %s %s", st.Code, st.Reason)
	}
}

// handles: opaque, one consumer's mean nothing to another, and foreign ones do no harm.
func (w *grantsWorld) handles() {
	t := w.t
	hello := clientHello(t, "http.both.shop.svc.eu-west.acme")
	usHeader := w.header(func(h *tunnel.Header) { h.Service = "shop/both" })
	apHeader := w.header(func(h *tunnel.Header) { h.Service, h.Source = "shop/both", "spiffe://ap-south.acme/ns/shop/sa/web" })
	mine, _ := probe(t, w.usTunnel, usHeader, hello)
	again, _ := probe(t, w.usTunnel, usHeader, hello)
	theirs, _ := probe(t, w.apTunnel, apHeader, hello)
	if mine.Code != preface.CodeOK || mine.Handle.IsZero() || mine.Handle != again.Handle {
		t.Errorf("handles of one instance: %s %x, then %s %x", mine.Code, mine.Handle, again.Code, again.Handle)
	}
	if theirs.Code != preface.CodeOK || theirs.Handle == mine.Handle {
		t.Errorf("two consumers see the same handle %x (%s)", theirs.Handle, theirs.Code)
	}
	usHeader.Avoid = []preface.Handle{theirs.Handle, {}, {1}, {2}, {3}, {4}, {5}, {0xff}}
	if st, _ := probe(t, w.usTunnel, usHeader, hello); st.Code != preface.CodeOK {
		t.Errorf("avoiding handles of another consumer: %s %s", st.Code, st.Reason)
	}
	usHeader.Avoid = []preface.Handle{mine.Handle}
	if st, _ := probe(t, w.usTunnel, usHeader, hello); st.Code != preface.CodeNoHealthyInstance {
		t.Errorf("avoiding the only instance: %s %s", st.Code, st.Reason)
	}
}

// serverNames: a granted header does not carry an inner hello that names anything else.
func (w *grantsWorld) serverNames() {
	t := w.t
	names := []string{
		"", "admin.site.shop.svc.eu-west.acme", "http.secret.shop.svc.eu-west.acme", "http.site.shop.svc.us-east.acme", "http.site.shop.svc.eu-west.other",
		"http.site.shop.svc.eu-west.acme.", "HTTP.site.shop.svc.eu-west.acme", "site.shop.svc.eu-west.acme", "site.shop.svc.clusterset.local", "eu-west.acme",
		"*.site.shop.svc.eu-west.acme", "x.http.site.shop.svc.eu-west.acme", "localhost", "127.0.0.1",
	}
	for _, n := range names {
		st, rest := probe(t, w.usTunnel, w.header(nil), clientHello(t, n))
		if st.Code != preface.CodeBadRequest || len(rest) != 0 {
			t.Errorf("inner server name %q: %s %s, then %d bytes", n, st.Code, st.Reason, len(rest))
		}
	}
	hello := clientHello(t, siteSNI)
	garbage := [][]byte{[]byte("GET / HTTP/1.1\r\nHost: site.shop\r\n\r\n"), {22, 3, 1, 0xff, 0xff}, make([]byte, 32<<10), hello[:len(hello)/2]}
	for _, g := range garbage { // the last one is half a hello, then silence: refused in 2 s
		st, rest := probe(t, w.usTunnel, w.header(nil), g)
		if st.Code != preface.CodeBadRequest || len(rest) != 0 {
			t.Errorf("%d bytes %.10q instead of a hello: %s %s, then %d bytes", len(g), g, st.Code, st.Reason, len(rest))
		}
	}
}

// foreignCA is a root that nobody here trusts.
func foreignCA(t testing.TB, name string) *ca.CA {
	t.Helper()
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "strait"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dir.Close() })
	td, err := spiffeid.ParseTrustDomain(name)
	if err != nil {
		t.Fatal(err)
	}
	a, err := ca.Create(dir, ca.Config{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// identities: only gateways of members get a session.
func (w *grantsWorld) identities() {
	t := w.t
	for _, path := range []string{"/ns/shop/sa/web", "/strait/controlplane", "/strait/operator/admin", "/strait/catalog-signer"} {
		if _, err := w.red.tunnel(w.eu, path); err == nil {
			t.Errorf("%s of us-east got a session with the gateway of eu-west", path)
		}
	}
	for _, td := range []string{"mars.acme", "us-east.acme", "eu-west.acme"} { // unknown, and known names under another root
		stranger := redTeamOf(t, foreignCA(t, td), w.eu)
		if _, err := stranger.tunnel(w.eu, "/strait/gateway/gateway-1"); err == nil {
			t.Errorf("a gateway of %s under a root of its own got a session", td)
		}
	}
}

// listeners: the member's identities open no other door of eu-west, and its callee's sidecar judges by itself.
func (w *grantsWorld) listeners() {
	t := w.t
	local, _ := w.eu.Gateways[0].Addrs()["Local"].(string)
	control := w.eu.GRPC
	doors := []struct{ name, address, path, alpn string }{
		{"local listener of the gateway", local, "/ns/shop/sa/web", preface.ALPN},
		{"local listener of the gateway", local, "/strait/gateway/gateway-1", preface.ALPN},
		{"discovery of the control plane", control, "/strait/controlplane", "h2"},
		{"discovery of the control plane", control, "/strait/gateway/gateway-1", "h2"},
		{"discovery of the control plane", control, "/ns/shop/sa/callee", "h2"},
		{"discovery of the control plane", control, "/strait/operator/admin", "h2"},
	}
	for _, d := range doors {
		if err := w.red.knock(t.Context(), d.address, d.path, d.alpn); err == nil {
			t.Errorf("%s of us-east was let in at the %s", d.path, d.name)
		}
	}
	direct := func(r *redTeam, sni string) string {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", w.callee.Inbound)
		if err != nil {
			t.Fatal(err)
		}
		c, err := r.inner(ctx, raw, "/ns/shop/sa/web", sni)
		if err != nil {
			return err.Error()
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		got, err := httpGet(c, "/")
		if err != nil {
			return err.Error()
		}
		return got
	}
	if got := direct(w.red, siteSNI); got != "200 site" {
		t.Errorf("control: the callee's sidecar does not serve what is exported: %s", got)
	}
	for _, sni := range []string{"admin.site.shop.svc.eu-west.acme", "http.secret.shop.svc.eu-west.acme", "http.south.shop.svc.eu-west.acme"} {
		if got := direct(w.red, sni); strings.HasPrefix(got, "2") {
			t.Errorf("the callee's sidecar let us-east in at %s: %s", sni, got)
		}
	}
	if got := direct(w.south, siteSNI); strings.HasPrefix(got, "2") {
		t.Errorf("the callee's sidecar let ap-south in at %s: %s", siteSNI, got)
	}
}

// knock makes an mTLS connection and waits for the server's verdict: nil when it lets the client in.
func (r *redTeam) knock(ctx context.Context, address, path, alpn string) error {
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer raw.Close()
	c := tls.Client(raw, r.source(path).ClientTLS(trust.TLSOptions{Authorize: func(spiffeid.ID) error { return nil }, ALPN: []string{alpn}}))
	if err := c.HandshakeContext(ctx); err != nil {
		return err
	}
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	if alpn == "h2" {
		_, _ = io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
	}
	_, err = c.Read(make([]byte, 1))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil // it waits for us to speak: let in
	}
	return err
}
