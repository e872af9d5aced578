// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
	"github.com/strait-mesh/strait/internal/preface"
)

// port is one listener under attack.
type port struct {
	name    string
	address string
	process *harness.Process
	// sheds says that the server ends a connection that stays silent by itself, within 6 s.
	sheds bool
	// alpn are the protocols of which the TLS handshake completes without a certificate of the mesh, "" for a client that names none.
	alpn []string
}

const (
	copies   = 16        // of each connection: one leaked thing for each stands out
	logLimit = 100 << 10 // of what some 3,500 of them may make a process log: less than a line for each
)

// Promise P9: garbage on every port costs no crash and leaves no goroutine and no descriptor behind, while honest calls pass.
func TestGarbageOnEveryPort(t *testing.T) {
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west"}})
	f.Up("shop")
	us, eu := f.Clusters["us-east"], f.Clusters["eu-west"]
	app, raw := newBackend(t, "site"), newEcho(t)
	callee := eu.Register(harness.Workload{Name: "site-1", Service: "site", Address: app.addr, Token: true})
	eu.StartSidecar("site", callee, nil)
	eu.CLI("export", "shop/site", "--to", "us-east")
	local := newBackend(t, "local")
	_, rawPort, _ := net.SplitHostPort(raw)
	us.CLI("workload", "register", "shop/raw-1", "--service", "raw", "--proxy", "web", "--service-account", "web", "--address", "127.0.0.1", "--port", "raw="+rawPort+"/tcp")
	web := us.StartSidecar("web", us.Register(harness.Workload{Name: "web", Service: "web", Address: local.addr, Token: true}),
		[]string{"shop/site:http", "shop/raw:raw"}, "--http-proxy", us.FreeAddr())
	reaches(t, "http://"+web.Upstreams[0]+"/", "site")

	ports := listeners(us, web)
	attacked := []*harness.Process{us.ControlPlane, us.Gateways[0], web.Process}
	pids := map[*harness.Process]int{}
	before := map[*harness.Process]usage{}
	logged := map[*harness.Process]int{}
	for _, p := range attacked {
		pids[p] = p.PID()
		before[p] = settled(t, p)
		log, err := os.ReadFile(p.Log)
		if err != nil {
			t.Fatal(err)
		}
		logged[p] = len(log)
	}
	honest := startLoad(t, "http://"+web.Upstreams[0]+"/", 20)
	start := time.Now()
	var wg sync.WaitGroup
	for _, p := range ports {
		wg.Go(func() { attack(t, p) })
	}
	wg.Go(func() { udpGarbage(t, ports) })
	wg.Wait()
	insideGarbage(t, us, eu, web)
	closed := time.Now()
	honest.stop()
	<-honest.done
	if n, text := failures(honest.since(start)); n > 0 || len(honest.since(start)) == 0 {
		t.Errorf("%d of %d honest calls failed meanwhile:%s", n, len(honest.since(start)), text)
	}
	for _, p := range attacked {
		if !p.Running() || p.PID() != pids[p] {
			t.Fatalf("%s ended:\n%s", p.Name, p.Tail())
		}
		log, err := os.ReadFile(p.Log)
		if err != nil || bytes.Contains(log, []byte("panic")) || bytes.Contains(log, []byte("DATA RACE")) {
			t.Errorf("the log of %s speaks of a panic (%v):\n%s", p.Name, err, p.Tail())
		}
		if n := len(log) - logged[p]; n > logLimit {
			t.Errorf("the garbage made %s log %d KiB", p.Name, n>>10)
		}
		var now usage
		harness.Eventually(t, max(time.Second, 15*time.Second-time.Since(closed)), p.Name+" to let go of everything", func() error {
			now = use(t, p)
			if now.descriptors > before[p].descriptors+copies/3 || now.goroutines > before[p].goroutines+copies/3 {
				return fmt.Errorf("%+v; before %+v", now, before[p])
			}
			return nil
		})
		t.Logf("%s: %+v before, %+v %v after the last garbage; %d bytes logged", p.Name, before[p], now, time.Since(closed).Round(10*time.Millisecond), len(log)-logged[p])
	}
	reaches(t, "http://"+web.Upstreams[0]+"/", "site")
	t.Logf("%d connections of garbage in %v, %d honest calls meanwhile", sent.n, closed.Sub(start).Round(time.Millisecond), len(honest.since(start)))
}

func listeners(c *harness.Cluster, s *harness.Sidecar) []port {
	at := func(p *harness.Process, key string) string {
		a, _ := p.Addrs()[key].(string)
		return a
	}
	gw := c.Gateways[0]
	return []port{
		{name: "control plane 7400", address: at(c.ControlPlane, "Listen"), process: c.ControlPlane, sheds: true, alpn: []string{"strait-register/1", "h2", ""}},
		{name: "configuration API 7401", address: at(c.ControlPlane, "API"), process: c.ControlPlane, sheds: true, alpn: []string{"h2", "http/1.1", ""}},
		{name: "control plane metrics 7402", address: at(c.ControlPlane, "Metrics"), process: c.ControlPlane, sheds: true},
		{name: "gateway 7443", address: at(gw, "Listen"), process: gw, sheds: true, alpn: []string{"strait-join/1", "strait-tcp/1", ""}},
		{name: "gateway local 7444", address: at(gw, "Local"), process: gw, sheds: true, alpn: []string{preface.ALPN}},
		{name: "gateway metrics 7445", address: at(gw, "Metrics"), process: gw, sheds: true},
		{name: "sidecar inbound 15008", address: s.Inbound, process: s.Process, sheds: true, alpn: []string{"h2"}},
		{name: "sidecar metrics 15020", address: s.Metrics, process: s.Process, sheds: true},
		{name: "sidecar upstream http", address: s.Upstreams[0], process: s.Process},
		{name: "sidecar upstream tcp", address: s.Upstreams[1], process: s.Process},
		{name: "sidecar http proxy", address: s.HTTPProxy, process: s.Process},
	}
}

// newEcho is a TCP application that returns what it gets.
func newEcho(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
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
	return l.Addr().String()
}

// usage is what a process holds.
type usage struct{ descriptors, goroutines int }

func use(t *testing.T, p *harness.Process) usage {
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	u := usage{descriptors: len(fds)}
	metrics, _ := p.Addrs()["Metrics"].(string)
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	body, _, err := get(t.Context(), client, "http://"+metrics+"/metrics")
	if err != nil {
		t.Fatalf("metrics of %s: %v", p.Name, err)
	}
	for line := range strings.Lines(body) {
		if v, ok := strings.CutPrefix(line, "go_goroutines "); ok {
			u.goroutines, _ = strconv.Atoi(strings.TrimSpace(v))
		}
	}
	if u.goroutines == 0 {
		t.Fatalf("%s does not count its goroutines", p.Name)
	}
	return u
}

// settled is the most that the process holds in its ordinary business: no look of forty in a row found more.
func settled(t *testing.T, p *harness.Process) usage {
	t.Helper()
	most, same := use(t, p), 0
	harness.Eventually(t, 30*time.Second, p.Name+" to settle", func() error {
		now := use(t, p)
		if same++; now.descriptors > most.descriptors || now.goroutines > most.goroutines {
			same = 0
			most = usage{max(most.descriptors, now.descriptors), max(most.goroutines, now.goroutines)}
		}
		if same < 40 {
			return fmt.Errorf("%+v, now %+v", most, now)
		}
		return nil
	})
	return most
}

// sent counts the connections.
var sent struct {
	sync.Mutex
	n int
}

// attack makes every kind of connection to a port, sixteen of each, the sixteen at once.
func attack(t *testing.T, p port) {
	hello := clientHello(t, "http.site.shop.svc.us-east.acme")
	random := make([]byte, 64<<10)
	_, _ = rand.Read(random)
	signature := preface.Signature[:]
	kinds := []struct {
		name string
		data []byte
		then ending
	}{
		{"nothing", nil, hangup},
		{"one byte", []byte{22}, hangup},
		{"random bytes", random, halfClose},
		{"random bytes, then a reset", random[:100], reset},
		{"HTTP", []byte("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"), halfClose},
		{"HTTP/2", []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x0c\x04\x00\x00\x00\x00\x00\xff\xff\xff\xff"), halfClose},
		{"half a ClientHello", hello[:len(hello)/2], halfClose},
		{"a ClientHello and no more", hello, hangup},
		{"a record of the greatest length", []byte{22, 3, 1, 0xff, 0xff, 1, 0, 0xff}, halfClose},
		{"half a preface", signature, halfClose},
		{"a preface of the greatest length", append(bytes.Clone(signature), 0x21, 0x11, 0xff, 0xff, 1, 2, 3), halfClose},
		{"a preface and a hello", append(append(bytes.Clone(signature), 0x21, 0, 0, 0), hello...), halfClose},
		{"silence", nil, silence},
		{"half a ClientHello, then silence", hello[:len(hello)/2], silence},
		{"a preface, then silence", append(bytes.Clone(signature), 0x21), silence},
	}
	for _, k := range kinds {
		many(copies, func() {
			if err := offend(p, k.data, k.then); err != nil {
				t.Errorf("%s: %s: %v", p.name, k.name, err)
			}
		})
	}
	many(2, func() { bigHeader(t, p, dial(t, p)) })
	for _, alpn := range p.alpn {
		for _, data := range [][]byte{nil, random, []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), {0, 0, 0, 1, 'x'}, {0xff, 0xff, 0xff, 0xff}} {
			many(copies/2, func() {
				if err := offendInside(t, p, alpn, data); err != nil {
					t.Errorf("%s: inside TLS for %q, %d bytes: %v", p.name, alpn, len(data), err)
				}
			})
		}
		bigHeader(t, p, secured(t, p, alpn))
	}
}

func many(n int, f func()) {
	var wg sync.WaitGroup
	for range n {
		wg.Go(f)
	}
	wg.Wait()
	sent.Lock()
	sent.n += n
	sent.Unlock()
}

// ending is how the client ends a connection, or does not.
type ending int

const (
	hangup    ending = iota // closes at once
	halfClose               // ends its direction and reads until the server ends the other
	reset                   // breaks it off
	silence                 // waits for the server to end it
)

// patience is how long a server that sheds the silent may take.
const patience = 6 * time.Second

func offend(p port, data []byte, then ending) error {
	c, err := net.DialTimeout("tcp", p.address, 10*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	bare := c.(*net.TCPConn)
	_ = c.SetDeadline(time.Now().Add(patience))
	_, _ = c.Write(data)
	switch then {
	case hangup:
		return nil
	case reset:
		return bare.SetLinger(0)
	case halfClose:
		_ = bare.CloseWrite()
	case silence:
		if !p.sheds {
			_ = c.SetDeadline(time.Now().Add(time.Second)) // an application may keep quiet
		}
	}
	_, err = io.Copy(io.Discard, c)
	if errors.Is(err, os.ErrDeadlineExceeded) && p.sheds {
		return fmt.Errorf("the server holds the connection for more than %v", patience)
	}
	return nil
}

// stranger is a client certificate that nobody knows.
var stranger = sync.OnceValue(func() tls.Certificate {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, _ := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
})

func dial(t *testing.T, p port) net.Conn {
	c, err := net.DialTimeout("tcp", p.address, 10*time.Second)
	if err != nil {
		t.Errorf("%s: %v", p.name, err)
		return nil
	}
	return c
}

// secured makes a TLS connection as a stranger; nil when the server wants none.
func secured(t *testing.T, p port, alpn string) net.Conn {
	raw := dial(t, p)
	if raw == nil {
		return nil
	}
	config := &tls.Config{InsecureSkipVerify: true, ServerName: "http.web.shop.svc.us-east.acme", Certificates: []tls.Certificate{stranger()}}
	if alpn != "" {
		config.NextProtos = []string{alpn}
	}
	c := tls.Client(raw, config)
	_ = c.SetDeadline(time.Now().Add(patience))
	if c.Handshake() != nil {
		_ = raw.Close()
		return nil
	}
	return c
}

// offendInside writes data inside TLS and waits for the end; without data it is silent.
func offendInside(t *testing.T, p port, alpn string, data []byte) error {
	c := secured(t, p, alpn)
	if c == nil {
		return nil // refused: well done
	}
	defer c.Close()
	_, _ = c.Write(data)
	_ = c.SetReadDeadline(time.Now().Add(11 * time.Second))
	_, err := io.Copy(io.Discard, c)
	if errors.Is(err, os.ErrDeadlineExceeded) && !strings.HasPrefix(string(data), "GET") { // a complete request may keep the connection
		return errors.New("the server holds the connection for more than 11 s")
	}
	return nil
}

// bigHeader writes an HTTP header of 10 MB for as long as the server takes it.
func bigHeader(t *testing.T, p port, c net.Conn) {
	if c == nil {
		return
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(15 * time.Second))
	_, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: site.shop\r\n")
	line := []byte("X-Filler: " + strings.Repeat("a", 64<<10-12) + "\r\n")
	n := 0
	for ; err == nil && n < 10<<20; n += len(line) {
		_, err = c.Write(line)
	}
	if err == nil && p.name != "sidecar upstream tcp" {
		t.Errorf("%s took a header of %d MiB", p.name, n>>20)
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(c, 1<<20))
}

// udpGarbage sends datagrams that look more or less like QUIC.
func udpGarbage(t *testing.T, ports []port) {
	for _, p := range ports {
		if p.name != "gateway 7443" {
			continue
		}
		c, err := net.Dial("udp", p.address)
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		b := make([]byte, 1400)
		for i := range 2000 {
			_, _ = rand.Read(b)
			switch i % 4 {
			case 0:
				copy(b, []byte{0xc3, 0, 0, 0, 1, 8}) // an Initial of version 1
			case 1:
				copy(b, []byte{0xc3, 0x0a, 0x1a, 0x2a, 0x3a, 8}) // a version that nobody speaks
			case 2:
				copy(b, []byte{0xe3, 0, 0, 0, 1, 8}) // a Handshake packet
			}
			_, _ = c.Write(b[:1+int(b[7])*5])
		}
	}
}
