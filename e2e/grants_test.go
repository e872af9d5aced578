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
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/federation/join"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/internal/problem"
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

// attractsNothing: ap-south exports a name that us-east has too; without sameness it gets no call of it, not even when every
// instance elsewhere is gone.
func (w *grantsWorld) attractsNothing() {
	t := w.t
	lure, honest := newBackend(t, "lure"), newBackend(t, "honest")
	w.ap.StartSidecar("popular", w.ap.Register(harness.Workload{Name: "popular-1", Service: "popular", Address: lure.addr, Token: true}), nil)
	w.ap.CLI("export", "shop/popular", "--to", "*")
	w.us.StartSidecar("popular", w.us.Register(harness.Workload{Name: "popular-1", Service: "popular", Address: honest.addr, Token: true}), nil)
	plain, pinned := "http://"+w.web.Upstreams[3]+"/", "http://"+w.web.Upstreams[4]+"/"
	reaches(t, pinned, "lure") // control: it is a member, and the service is reachable by the name that says whose it is
	before := lure.served.Load()
	reaches(t, plain, "honest")
	client := &http.Client{Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	for range 200 {
		if body, code, err := get(t.Context(), client, plain); err != nil || code != 200 || body != "honest" {
			t.Fatalf("plain name: %q %d %v", body, code, err)
		}
	}
	honest.stop()
	harness.Eventually(t, 15*time.Second, "us-east to see that its only instance is gone", func() error {
		body, code, err := get(t.Context(), client, plain)
		if err == nil && code < 500 {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	})
	for range 20 {
		if body, code, err := get(t.Context(), client, plain); err == nil && code < 500 {
			t.Errorf("without any instance of its own: %d %s", code, body)
		}
	}
	if n := lure.served.Load() - before; n != 0 {
		t.Errorf("the peer without sameness attracted %d calls", n)
	}
}

// introductions: a member's word about others takes no name that exists, and grants nothing.
func (w *grantsWorld) introductions() {
	t := w.t
	id, err := w.red.ca.IssueKey(w.red.identity("/strait/controlplane"), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	parse := func(td string) spiffeid.TrustDomain {
		v, err := spiffeid.ParseTrustDomain(td)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	introduce := func(td, cluster string) string {
		in := join.Introduction{
			Federation: "acme", Introducer: w.red.td, Receiver: parse("eu-west.acme"), Subject: parse(td), Cluster: federation.ClusterName(cluster),
			Region: "nowhere", BundleHash: foreignCA(t, td).Bundle().Hash(), TokenID: "0123456789abcdef", Issued: time.Now(), Expires: time.Now().Add(join.IntroductionTTL),
		}
		gw, err := spiffeid.Gateway(in.Subject, "gateway-1")
		if err != nil {
			t.Fatal(err)
		}
		in.Gateways = []join.TokenGateway{{ID: gw, Addresses: []string{"127.0.0.1:9"}}}
		body, err := join.SignIntroduction(in, id)
		if err != nil {
			t.Fatal(err)
		}
		a, err := ask(t.Context(), w.usTunnel, "introduce", body)
		if err != nil {
			t.Fatalf("introduce %s: %v", cluster, err)
		}
		return a.ErrorCode
	}
	before := w.eu.CLI("member", "list", "--no-headers")
	taken := string(problem.NameTaken)
	for _, c := range []struct{ td, cluster string }{
		{"ap-south.acme", "ap-south"},     // a member, under another root
		{"ap-south.evil", "ap-south"},     // a member's name, of another trust domain
		{"ap-south.acme", "new-name"},     // a member's trust domain, under another name
		{"eu-west.acme", "eu-west"},       // the receiver itself
		{"eu-west.evil", "eu-west"},       // its name
		{"us-east.acme", "us-east"},       // the introducer, under another root
		{"x.ap-south.acme", "ap-south-x"}, // a sub-domain of a member's
	} {
		if code := introduce(c.td, c.cluster); code != taken {
			t.Errorf("introduced %s as %s: answer %q, want %s", c.td, c.cluster, code, taken)
		}
	}
	if after := w.eu.CLI("member", "list", "--no-headers"); memberNames(after) != memberNames(before) {
		t.Errorf("refused introductions changed the members:\n%s\n%s", before, after)
	}
	// Control: a name that nobody has waits for an operator, and is trusted with nothing.
	if code := introduce("mars.acme", "mars"); code != "" {
		t.Fatalf("a new name was refused: %s", code)
	}
	if out := w.eu.CLI("member", "list", "--no-headers"); !strings.Contains(lineOf(out, "mars"), "awaiting") {
		t.Errorf("an introduced cluster does not await approval:\n%s", out)
	}
	mars := redTeamOf(t, foreignCA(t, "mars.acme"), w.eu)
	if _, err := mars.tunnel(w.eu, "/strait/gateway/gateway-1"); err == nil {
		t.Error("an introduced cluster got a session before it was approved")
	}
	w.eu.CLI("member", "evict", "mars", "--yes")
	if code := introduce("mars.acme", "mars"); code != taken {
		t.Errorf("an evicted name was introduced again: answer %q", code)
	}
}

func memberNames(list string) string {
	var names []string
	for line := range strings.Lines(list) {
		if fields := strings.Fields(line); len(fields) > 0 {
			names = append(names, fields[0])
		}
	}
	return strings.Join(names, " ")
}

func lineOf(text, prefix string) string {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(strings.TrimLeft(line, "* "), prefix) {
			return line
		}
	}
	return ""
}

// stream is an open response that must end; ended says when it did.
type stream struct {
	ended chan error
	close func()
}

func watchStream(r io.Reader, stop func()) *stream {
	s := &stream{ended: make(chan error, 1), close: stop}
	go func() {
		_, err := io.Copy(io.Discard, r)
		s.ended <- err
	}()
	return s
}

// openStreams opens one endless response through the raw client and one through the sidecars.
func (w *grantsWorld) openStreams() []*stream {
	t := w.t
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	raw := &streamConn{ctx: context.WithoutCancel(ctx), s: w.usTunnel, h: w.header(nil)}
	c, err := w.red.inner(ctx, raw, "/ns/shop/sa/web", siteSNI)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(c, "GET /drip HTTP/1.1\r\nHost: site.shop\r\n\r\n")
	first := make([]byte, 12)
	if _, err := io.ReadFull(c, first); err != nil || string(first) != "HTTP/1.1 200" {
		t.Fatalf("stream over the tunnel: %q, %v", first, err)
	}
	resp, err := http.Get("http://" + w.web.Upstreams[0] + "/drip")
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("stream through the sidecars: %v %v", resp, err)
	}
	return []*stream{watchStream(c, func() { raw.Close() }), watchStream(resp.Body, func() { resp.Body.Close() })}
}

// withdrawn waits until every stream has ended, and checks that it did within 5 s of since and by a reset.
func (w *grantsWorld) withdrawn(what string, since time.Time, streams []*stream) {
	t := w.t
	for i, s := range streams {
		select {
		case err := <-s.ended:
			took := time.Since(since)
			if took > 5*time.Second {
				t.Errorf("%s: open stream %d ended after %v", what, i, took)
			}
			if err == nil {
				t.Errorf("%s: open stream %d ended as if it were complete", what, i)
			}
			t.Logf("%s: open stream %d ended after %v: %v", what, i, took.Round(time.Millisecond), err)
		case <-time.After(15 * time.Second):
			t.Errorf("%s: open stream %d goes on after %v", what, i, time.Since(since))
		}
		s.close()
	}
}

func (w *grantsWorld) unexport() {
	t := w.t
	streams := w.openStreams()
	since := time.Now()
	w.eu.CLI("unexport", "shop/site")
	w.withdrawn("unexport", since, streams)
	hello := clientHello(t, siteSNI)
	if st, _ := probe(t, w.usTunnel, w.header(nil), hello); st.Code != preface.CodeNotExported {
		t.Errorf("after unexport: %s %s", st.Code, st.Reason)
	}
	if body, code, err := get(t.Context(), http.DefaultClient, "http://"+w.web.Upstreams[0]+"/"); err == nil && code == 200 {
		t.Errorf("after unexport the client still got %d %q", code, body)
	}
	if took := time.Since(since); took > 5*time.Second {
		t.Errorf("unexport had full effect only after %v", took)
	}
	w.eu.CLI("export", "shop/site", "--to", "us-east", "--ports", "http")
	reaches(t, "http://"+w.web.Upstreams[0]+"/", "site")
}

func (w *grantsWorld) evict() {
	t := w.t
	streams := w.openStreams()
	since := time.Now()
	w.eu.CLI("member", "evict", "us-east", "--yes")
	w.withdrawn("evict", since, streams)
	select {
	case <-w.usTunnel.Done():
	case <-time.After(5 * time.Second):
		t.Error("the session of an evicted member goes on")
	}
	if took := time.Since(since); took > 5*time.Second {
		t.Errorf("the session of the evicted member ended after %v", took)
	}
	if _, err := w.red.tunnel(w.eu, "/strait/gateway/red2"); err == nil {
		t.Error("an evicted member got a new session")
	}
	if body, code, err := get(t.Context(), http.DefaultClient, "http://"+w.web.Upstreams[0]+"/"); err == nil && code == 200 {
		t.Errorf("after evict the client still got %d %q", code, body)
	}
	// The other member keeps what it has.
	asSouth := w.header(func(h *tunnel.Header) { h.Service, h.Source = "shop/south", "spiffe://ap-south.acme/ns/shop/sa/web" })
	if got, err := w.get(w.south, w.apTunnel, asSouth, "http.south.shop.svc.eu-west.acme", "/"); err != nil || got != "200 south" {
		t.Errorf("after evicting us-east, ap-south gets %q, %v", got, err)
	}
}
