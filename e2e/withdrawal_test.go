// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// promised is within what a withdrawal is in force everywhere that the control plane reaches (promise P4).
const promised = 5 * time.Second

// withdrawalWorld is us-east with two gateways and eu-west with two: near is served in us-east, site in eu-west; web and cart call both.
type withdrawalWorld struct {
	t         *testing.T
	f         *harness.Federation
	us, eu    *harness.Cluster
	web, cart *harness.Sidecar
	near      *harness.Sidecar
	site      *harness.Sidecar
	cartToken string
}

// TestWithdrawal: test T1, promise P4. What is withdrawn loses every connection within 5 s, in its own cluster and in others, and gets
// no new one; what is not goes on.
func TestWithdrawal(t *testing.T) {
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west"}, Gateways: 2})
	f.Up("shop")
	w := &withdrawalWorld{t: t, f: f, us: f.Clusters["us-east"], eu: f.Clusters["eu-west"]}
	w.start()
	w.evictWorkload()
	w.readmitWorkload()
	w.revokeGateway()
	w.revokeOperator()
	w.pausedSidecar()
}

func (w *withdrawalWorld) start() {
	t := w.t
	for name, c := range map[string]*harness.Cluster{"near": w.us, "site": w.eu} {
		b := newBackend(t, name)
		b.handle = func(rw http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/drip" {
				drip(rw, r)
				return
			}
			fmt.Fprintln(rw, name)
		}
		s := c.StartSidecar(name, c.Register(harness.Workload{Name: name + "-1", Service: name, Proxy: name, Address: b.addr, Token: true}), nil)
		if c == w.us {
			w.near = s
		} else {
			w.site = s
		}
	}
	w.eu.CLI("export", "shop/site", "--to", "us-east")
	for c, name := range map[*harness.Cluster]string{w.us: "rawnear", w.eu: "raw"} {
		token := c.Register(harness.Workload{Name: name + "-1", Service: name, Proxy: name, Address: rawDrip(t), Port: "tcp", Token: true})
		c.StartSidecar(name, token, nil)
	}
	w.eu.CLI("export", "shop/raw", "--to", "us-east")
	upstreams := []string{"shop/site:http", "shop/near:http", "shop/raw:tcp", "shop/rawnear:tcp"}
	w.web = w.us.StartSidecar("web", w.us.Register(harness.Workload{Name: "web", Service: "web", Token: true}), upstreams)
	w.cartToken = w.us.Register(harness.Workload{Name: "cart", Service: "cart", Token: true})
	w.cart = w.us.StartSidecar("cart", w.cartToken, upstreams)
	for _, s := range []*harness.Sidecar{w.web, w.cart} {
		rawFrom(t, s.Upstreams[2])
		rawFrom(t, s.Upstreams[3])
		reaches(t, "http://"+s.Upstreams[0]+"/", "site")
		reaches(t, "http://"+s.Upstreams[1]+"/", "near")
	}
}

// rawDrip is an application that writes a line every 50 ms to whoever connects. It returns its address.
func rawDrip(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				tick := time.NewTicker(50 * time.Millisecond)
				defer tick.Stop()
				for range tick.C {
					_ = c.SetWriteDeadline(time.Now().Add(promised))
					if _, err := io.WriteString(c, "drip\n"); err != nil {
						return
					}
				}
			})
		}
	})
	return l.Addr().String()
}

// dripping is a response that goes on until something ends it.
type dripping struct {
	body io.Closer
	mu   sync.Mutex
	last time.Time
	done chan struct{}
	err  error
}

// dripFrom opens one and waits until it drips.
func dripFrom(t *testing.T, url string) *dripping {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(url + "/drip")
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("stream of %s: %v", url, err)
	}
	return follow(t, resp.Body, url)
}

// rawFrom opens a connection to an upstream of plain TCP and waits until it drips.
func rawFrom(t *testing.T, address string) *dripping {
	t.Helper()
	var d *dripping
	harness.Eventually(t, 20*time.Second, address+" to drip", func() error {
		c, err := net.Dial("tcp", address)
		if err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(promised))
		if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
			_ = c.Close()
			return err
		}
		_ = c.SetReadDeadline(time.Time{})
		d = follow(t, c, address)
		return nil
	})
	return d
}

// follow reads until the end, and waits for the beginning.
func follow(t *testing.T, from io.ReadCloser, what string) *dripping {
	t.Helper()
	d := &dripping{body: from, done: make(chan struct{})}
	t.Cleanup(func() { _ = d.body.Close(); <-d.done })
	first := make(chan struct{})
	go func() {
		defer close(d.done)
		sc := bufio.NewScanner(from)
		for n := 0; sc.Scan(); n++ {
			if n == 0 {
				close(first)
			}
			d.mu.Lock()
			d.last = time.Now()
			d.mu.Unlock()
		}
		if d.err = sc.Err(); d.err == nil {
			d.err = io.EOF
		}
	}()
	select {
	case <-first:
	case <-time.After(10 * time.Second):
		t.Fatalf("stream of %s does not begin", what)
	}
	return d
}

// drips reports whether anything came since a time.
func (d *dripping) drips(since time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.last.After(since)
}

// ends requires that a stream breaks off, and not as if it were complete, within the promised time since start.
func (d *dripping) ends(t *testing.T, what string, start time.Time) {
	t.Helper()
	select {
	case <-d.done:
		if errors.Is(d.err, io.EOF) && !errors.Is(d.err, io.ErrUnexpectedEOF) {
			t.Errorf("%s ended as if it were complete", what)
		}
		t.Logf("%s ended after %v: %v", what, time.Since(start).Round(time.Millisecond), d.err)
	case <-time.After(time.Until(start.Add(promised))):
		t.Errorf("%s stands %v after the withdrawal", what, promised)
	}
}

// goesOn requires that a stream drips now.
func (d *dripping) goesOn(t *testing.T, what string) {
	t.Helper()
	now := time.Now()
	harness.Eventually(t, promised, what+" to go on", func() error {
		select {
		case <-d.done:
			t.Fatalf("%s has ended: %v", what, d.err)
		default:
		}
		if !d.drips(now) {
			return errors.New("nothing comes")
		}
		return nil
	})
}

// source is the identity that a process has on disk, as a thief would take it.
func (w *withdrawalWorld) source(c *harness.Cluster, dir string) *trust.Source {
	w.t.Helper()
	read := func(name string) []byte {
		data, err := os.ReadFile(filepath.Join(w.f.Dir, c.Name, dir, name))
		if err != nil {
			w.t.Fatal(err)
		}
		return data
	}
	id, err := trust.ParseIdentityPEM(read("identity/svid.pem"))
	if err != nil {
		w.t.Fatal(err)
	}
	bundles := &trust.Bundles{}
	for _, name := range w.f.Names {
		td, err := spiffeid.ParseTrustDomain(name + ".acme")
		if err != nil {
			w.t.Fatal(err)
		}
		jwks, err := os.ReadFile(filepath.Join(w.f.Clusters[name].Dir, "bundles", "own.json"))
		if err != nil {
			w.t.Fatal(err)
		}
		b, err := trust.ParseBundle(td, jwks)
		if err != nil {
			w.t.Fatal(err)
		}
		bundles = bundles.With(b)
	}
	s := trust.NewSource(trust.SourceConfig{})
	s.SetIdentity(id)
	s.SetBundles(bundles)
	return s
}

// door is a listener and what one asks of it.
type door struct{ name, address, sni, alpn string }

// enter connects with an identity and says whether anything of it was accepted: the other end keeps the connection and reads on, or
// answers. cache makes the second and later ones try to resume.
func enter(s *trust.Source, d door, cache tls.ClientSessionCache) error {
	options := trust.TLSOptions{Authorize: trust.AuthorizeAny(), ServerName: d.sni}
	if d.alpn != "" {
		options.ALPN = []string{d.alpn}
	}
	cfg := s.ClientTLS(options)
	cfg.ClientSessionCache = cache
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: promised}, "tcp", d.address, cfg)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Second))
	if _, err := io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return nil // it listens on
	}
	return err
}

func addr(p *harness.Process, name string) string { s, _ := p.Addrs()[name].(string); return s }

// accepted counts how many of n attempts at doors get in.
func accepted(s *trust.Source, n int, doors ...door) (got int, where string) {
	cache := tls.NewLRUClientSessionCache(64)
	for i := range n {
		d := doors[i%len(doors)]
		if enter(s, d, cache) == nil {
			got++
			where = d.name
		}
	}
	return got, where
}

func (w *withdrawalWorld) evictWorkload() {
	t := w.t
	thief := w.source(w.us, "sc-web")
	doors := []door{
		{"sidecar in the own cluster", w.near.Inbound, "http.near.shop.svc.us-east.acme", "h2"},
		{"sidecar in another cluster", w.site.Inbound, "http.site.shop.svc.eu-west.acme", "h2"},
		{"local listener of gateway-1", addr(w.us.Gateways[0], "Local"), "gateway-1", preface.ALPN},
		{"control plane", w.us.GRPC, "", "h2"},
	}
	for _, d := range doors {
		if err := enter(thief, d, nil); err != nil && d.alpn != preface.ALPN { // that one wants a hello, and says nothing to this one
			t.Errorf("before the eviction: %s: %v", d.name, err)
		}
	}
	across, inside := dripFrom(t, "http://"+w.web.Upstreams[0]), dripFrom(t, "http://"+w.web.Upstreams[1])
	rawAcross, rawInside := rawFrom(t, w.web.Upstreams[2]), rawFrom(t, w.web.Upstreams[3])
	otherAcross, otherInside := dripFrom(t, "http://"+w.cart.Upstreams[0]), dripFrom(t, "http://"+w.cart.Upstreams[1])

	start := time.Now()
	r := w.us.Try("workload", "evict", "shop/web", "--reason", "host stolen", "--yes")
	t.Logf("evict: %v, exit %d\n%s%s", time.Since(start).Round(time.Millisecond), r.Code, r.Out, r.Err)
	if r.Code != 0 {
		t.Errorf("exit %d: everybody was reachable", r.Code)
	}
	across.ends(t, "the stream across clusters", start)
	inside.ends(t, "the stream inside the cluster", start)
	rawAcross.ends(t, "the TCP connection across clusters", start)
	rawInside.ends(t, "the TCP connection inside the cluster", start)
	if got, where := accepted(thief, 100, doors...); got > 0 {
		t.Errorf("%d of 100 new or resumed connections of the evicted identity were accepted, one by the %s", got, where)
	}
	client := &http.Client{Timeout: promised, Transport: &http.Transport{DisableKeepAlives: true}}
	for _, up := range w.web.Upstreams[:2] {
		if body, code, err := get(t.Context(), client, "http://"+up+"/"); err == nil && code == http.StatusOK {
			t.Errorf("a call of the evicted workload was answered: %s", body)
		}
	}
	otherAcross.goesOn(t, "another workload's stream across clusters")
	otherInside.goesOn(t, "another workload's stream inside the cluster")

	list := w.us.CLI("trust", "withdrawals")
	if !strings.Contains(list, "spiffe://us-east.acme/ns/shop/sa/web") || !strings.Contains(list, "host stolen") {
		t.Errorf("withdrawals:\n%s", list)
	}
	if r := w.us.Try("workload", "register", "shop/web", "--service", "web", "--token-out", w.f.File("early.token")); r.Code == 0 || !strings.Contains(r.Err, "STR-5311") {
		t.Errorf("a token for an evicted identity: exit %d %s", r.Code, r.Err)
	}
}

func (w *withdrawalWorld) readmitWorkload() {
	t := w.t
	thief := w.source(w.us, "sc-web")
	w.us.CLI("workload", "readmit", "shop/web")
	doors := []door{
		{"sidecar in the own cluster", w.near.Inbound, "http.near.shop.svc.us-east.acme", "h2"},
		{"sidecar in another cluster", w.site.Inbound, "http.site.shop.svc.eu-west.acme", "h2"},
		{"control plane", w.us.GRPC, "", "h2"},
	}
	if got, where := accepted(thief, 30, doors...); got > 0 {
		t.Errorf("%d of 30 connections with the old certificate were accepted after the readmission, one by the %s", got, where)
	}
	token := w.us.Register(harness.Workload{Name: "web", Service: "web", Token: true})
	text, err := os.ReadFile(token)
	if err != nil {
		t.Fatal(err)
	}
	file := w.f.File("web.token")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	w.web.Stop(30 * time.Second)
	w.web = w.us.StartSidecar("web", file, []string{"shop/site:http", "shop/near:http", "shop/raw:tcp", "shop/rawnear:tcp"})
	reaches(t, "http://"+w.web.Upstreams[1]+"/", "near")
	reaches(t, "http://"+w.web.Upstreams[0]+"/", "site")
	if got, where := accepted(thief, 30, doors...); got > 0 {
		t.Errorf("%d of 30 connections with the old certificate were accepted once the workload was back, one by the %s", got, where)
	}
}

// attempt makes one attempt at a tunnel with the identity of a gateway.
func (w *withdrawalWorld) attempt(s *trust.Source, target *harness.Cluster) error {
	e, err := tunnel.Listen(tunnel.Config{Name: "thief", Source: s})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = e.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	td, err := spiffeid.ParseTrustDomain(target.Name + ".acme")
	if err != nil {
		return err
	}
	e.SetPeers([]tunnel.Peer{{TrustDomain: td, Cluster: target.Name, Ready: true, Gateways: []tunnel.Gateway{{Name: "gateway-1", Addresses: []string{addr(target.Gateways[0], "Listen")}}}}})
	why := ""
	harness.Eventually(w.t, 15*time.Second, "an attempt at a tunnel to end", func() error {
		if why = e.LastError(td); why == "" && e.Pick(td) == nil {
			return errors.New("under way")
		}
		return nil
	})
	if why == "" {
		return nil
	}
	return errors.New(why)
}

func (w *withdrawalWorld) revokeGateway() {
	t := w.t
	thief := w.source(w.us, "gateway-1")
	if err := w.attempt(thief, w.eu); err != nil {
		t.Errorf("before the revocation: %v", err)
	}
	inside := dripFrom(t, "http://"+w.cart.Upstreams[1])
	var across []*dripping
	for range 8 { // one inner connection each, over both gateways in turn
		across = append(across, rawFrom(t, w.cart.Upstreams[2]))
	}
	start := time.Now()
	r := w.us.Try("trust", "revoke", "spiffe://us-east.acme/strait/gateway/gateway-1", "--reason", "host lost", "--yes")
	t.Logf("revoke: %v, exit %d\n%s%s", time.Since(start).Round(time.Millisecond), r.Code, r.Out, r.Err)
	if r.Code != 0 {
		t.Errorf("exit %d: everybody was reachable", r.Code)
	}
	harness.Eventually(t, time.Until(start.Add(promised)), "eu-west to end the tunnels of gateway-1", func() error {
		var m struct {
			Members []struct {
				Cluster string
				Tunnels []struct{ State, PeerGateway string }
			}
		}
		w.eu.JSON(&m, "member", "list")
		for _, member := range m.Members {
			for _, tn := range member.Tunnels {
				if member.Cluster == "us-east" && tn.PeerGateway == "gateway-1" && tn.State == "up" {
					return fmt.Errorf("%+v", member.Tunnels)
				}
			}
		}
		return nil
	})
	<-time.After(time.Until(start.Add(promised)))
	ended := 0
	for _, d := range across {
		select {
		case <-d.done:
			ended++
		default:
			d.goesOn(t, "a connection through the other gateway")
		}
	}
	if ended == 0 || ended == len(across) {
		t.Errorf("%d of %d connections across clusters ended: want those through the revoked gateway", ended, len(across))
	}
	t.Logf("%d of %d connections across clusters went through the revoked gateway, and ended", ended, len(across))
	for n := range 10 {
		if err := w.attempt(thief, w.eu); err == nil {
			t.Fatalf("attempt %d at a tunnel with the identity of the revoked gateway was accepted", n)
		}
	}
	if got, where := accepted(thief, 20, door{"control plane", w.us.GRPC, "", "h2"}); got > 0 {
		t.Errorf("%d of 20 connections of the revoked gateway were accepted by the %s", got, where)
	}
	inside.goesOn(t, "a stream inside the cluster")
	client := &http.Client{Timeout: promised, Transport: &http.Transport{DisableKeepAlives: true}}
	failed := 0
	for range 100 {
		if _, code, err := get(t.Context(), client, "http://"+w.cart.Upstreams[0]+"/"); err != nil || code != http.StatusOK {
			failed++
		}
	}
	if failed > 0 {
		t.Errorf("%d of 100 calls through the other gateway failed", failed)
	}
}

func (w *withdrawalWorld) revokeOperator() {
	t := w.t
	dir := w.f.File("ada")
	w.us.CLI("access", "issue", "ada", "--role", "operator", "--out", dir)
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, n := range names {
		files = append(files, n.Name())
	}
	t.Logf("access: %v", files)
	api := addr(w.us.ControlPlane, "API")
	pool := x509.NewCertPool()
	caPEM, err := os.ReadFile(filepath.Join(dir, "api-ca.pem"))
	if err != nil || !pool.AppendCertsFromPEM(caPEM) {
		t.Fatalf("API CA: %v in %v", err, files)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "api.pem"), filepath.Join(dir, "api.pem"))
	if err != nil {
		t.Fatalf("%v in %v", err, files)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}}, ForceAttemptHTTP2: true}}
	defer client.CloseIdleConnections()
	url := "https://" + api + "/api/v1/namespaces"
	resp, err := client.Get(url + "?watch=true")
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("watch: %v %v", resp, err)
	}
	defer resp.Body.Close()
	ended := make(chan error, 1)
	go func() { _, err := io.Copy(io.Discard, resp.Body); ended <- err }()
	start := time.Now()
	w.us.CLI("trust", "revoke", "spiffe://us-east.acme/strait/operator/ada", "--reason", "left", "--yes")
	select {
	case err := <-ended:
		t.Logf("the operator's watch ended after %v: %v", time.Since(start).Round(time.Millisecond), err)
	case <-time.After(time.Until(start.Add(promised))):
		t.Error("the operator's watch stands")
	}
	got := 0
	for range 100 {
		client.CloseIdleConnections()
		r, err := client.Get(url)
		if err != nil {
			continue
		}
		_ = r.Body.Close()
		if r.StatusCode == http.StatusOK {
			got++
		}
	}
	if got > 0 {
		t.Errorf("%d of 100 requests of a revoked operator were answered", got)
	}
}

// pausedSidecar: a process that does not run confirms nothing, is listed, and ends what was withdrawn as soon as it runs again.
func (w *withdrawalWorld) pausedSidecar() {
	t := w.t
	paused := w.us.Sidecars["rawnear"]
	inside := rawFrom(t, w.cart.Upstreams[3]) // plain TCP: nobody gives it up for silence
	paused.Signal(syscall.SIGSTOP)
	stopped := true
	resume := func() {
		if stopped {
			paused.Signal(syscall.SIGCONT)
			stopped = false
		}
	}
	defer resume()
	r := w.us.Try("workload", "evict", "spiffe://us-east.acme/ns/shop/sa/cart", "--yes")
	if r.Code != 10 || !strings.Contains(r.Err, "STR-5312") || !strings.Contains(r.Err, "shop/rawnear") {
		t.Errorf("with a paused sidecar: exit %d\n%s%s", r.Code, r.Out, r.Err)
	}
	if list := w.us.CLI("trust", "withdrawals"); !strings.Contains(list, "shop/rawnear (") {
		t.Errorf("the paused sidecar is not listed:\n%s", list)
	}
	start := time.Now()
	resume()
	select {
	case <-inside.done:
		t.Logf("the stream at the paused sidecar ended %v after it went on", time.Since(start).Round(time.Millisecond))
	case <-time.After(promised):
		t.Error("the stream at the paused sidecar stands after it went on")
	}
	harness.Eventually(t, 30*time.Second, "the paused sidecar to confirm", func() error {
		var l struct {
			Withdrawals []struct {
				SpiffeID    string `json:"spiffeId"`
				Unconfirmed []string
			}
		}
		w.us.JSON(&l, "trust", "withdrawals")
		for _, x := range l.Withdrawals {
			if strings.HasSuffix(x.SpiffeID, "/sa/cart") && len(x.Unconfirmed) == 0 {
				return nil
			}
		}
		return fmt.Errorf("%+v", l.Withdrawals)
	})
	if got, where := accepted(w.source(w.us, "sc-cart"), 20, door{"sidecar that was paused", paused.Inbound, "tcp.rawnear.shop.svc.us-east.acme", ""}); got > 0 {
		t.Errorf("%d of 20 connections were accepted by the %s", got, where)
	}
}
