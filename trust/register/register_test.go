// SPDX-License-Identifier: Apache-2.0

package register_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/register"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// issuer is a control plane that registers.
type issuer struct {
	ca     *ca.CA
	source *trust.Source
	tokens *register.Tokens
	server *register.Server
	clock  *clock
	log    bytes.Buffer
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	i := &issuer{clock: &clock{now: t0}}
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "strait"))
	if err != nil {
		t.Fatal(err)
	}
	if i.ca, err = ca.Create(dir, ca.Config{TrustDomain: td, Now: i.clock.Now}); err != nil {
		t.Fatal(err)
	}
	if i.tokens, err = register.OpenTokens(dir, i.clock.Now); err != nil {
		t.Fatal(err)
	}
	id, err := i.ca.IssueKey(spiffeid.ControlPlane(td), 0)
	if err != nil {
		t.Fatal(err)
	}
	i.source = trust.NewSource(trust.SourceConfig{Now: i.clock.Now})
	i.source.SetIdentity(id)
	i.source.SetBundles(must(trust.NewBundles(i.ca.Bundle())))
	i.server = &register.Server{
		Tokens: i.tokens, Bundle: i.ca.Bundle, Cluster: "us-east", Federation: "acme", Now: i.clock.Now, Logger: slog.New(slog.NewTextHandler(&i.log, nil)),
		Sign: func(csr []byte, id spiffeid.ID) ([][]byte, error) { return i.ca.IssueCSR(csr, id, 0) },
	}
	return i
}

func (i *issuer) token(t *testing.T, g register.Grant) register.Token {
	t.Helper()
	tok, err := i.tokens.Issue(g, 15*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	hash := i.ca.Bundle().Hash()
	tok.BundleSHA256 = hash[:]
	return tok
}

// listen serves registrations, beside mutual TLS, on one port, and returns its address. Everything has ended when the test has.
func (i *issuer) listen(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	config := trust.ByALPN(i.source.ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"h2"}}), register.TLS(i.source))
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			raw, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { i.server.ServeConn(ctx, tls.Server(raw, config)) })
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		cancel()
		wg.Wait()
	})
	return ln.Addr().String()
}

func (i *issuer) client(tok register.Token, addrs ...string) register.ClientConfig {
	return register.ClientConfig{Token: tok, Addresses: addrs, Now: i.clock.Now}
}

func TestRegister(t *testing.T) {
	i := newIssuer(t)
	addr := i.listen(t)
	for _, g := range []register.Grant{gateway, sidecar} {
		tok, err := register.ParseToken(i.token(t, g).Encode())
		if err != nil {
			t.Fatal(err)
		}
		r, err := register.Register(t.Context(), i.client(tok, addr))
		if err != nil {
			t.Fatal(err)
		}
		if r.Identity.ID != g.SPIFFEID || r.Name != g.Name || r.Cluster != "us-east" || r.Federation != "acme" || r.Region != g.Region || r.Zone != g.Zone ||
			r.Bundle.Hash() != i.ca.Bundle().Hash() || !r.Identity.NotAfter.Equal(t0.Add(ca.DefaultTTL)) {
			t.Errorf("registered as %+v", r)
		}
		if strings.Contains(i.log.String(), string(tok.Secret)) {
			t.Error("the secret is in the log")
		}
	}
}

// TestRepeat: an answer that was lost may be had again with the same key, and with no other.
func TestRepeat(t *testing.T) {
	i := newIssuer(t)
	cfg := i.client(i.token(t, gateway), i.listen(t))
	cfg.Key = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	for range 3 {
		if _, err := register.Register(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	cfg.Key = nil
	_, err := register.Register(t.Context(), cfg)
	if !problem.Is(err, problem.RegistrationRefused) || !strings.Contains(problem.From(err).Reason(), "used already") {
		t.Errorf("another key: %v", err)
	}
}

func TestRegisterRefusals(t *testing.T) {
	i := newIssuer(t)
	addr := i.listen(t)
	expired, revoked, wrong := i.token(t, gateway), i.token(t, gateway), i.token(t, gateway)
	if err := i.tokens.Revoke(revoked.ID); err != nil {
		t.Fatal(err)
	}
	wrong.Secret = make([]byte, 16)
	foreign := newIssuer(t).token(t, gateway)
	foreign.BundleSHA256 = expired.BundleSHA256
	for _, tt := range []struct {
		name string
		tok  register.Token
		want string
	}{{"revoked", revoked, "revoked"}, {"wrong secret", wrong, "secret is not right"}, {"of another cluster", foreign, "unknown here"}} {
		_, err := register.Register(t.Context(), i.client(tt.tok, addr, addr))
		if !problem.Is(err, problem.RegistrationRefused) || !strings.Contains(problem.From(err).Reason(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	i.clock.add(16 * time.Minute)
	if _, err := register.Register(t.Context(), i.client(expired, addr)); !problem.Is(err, problem.RegistrationRefused) {
		t.Errorf("expired: %v", err)
	}
	if _, err := register.Register(t.Context(), i.client(i.token(t, gateway))); err == nil {
		t.Error("registered without an address")
	}
}

// TestImposter: somebody in between, with a root and a control plane of the same names, learns nothing that works elsewhere, and
// the newcomer goes on to the next address.
func TestImposter(t *testing.T) {
	real, fake := newIssuer(t), newIssuer(t)
	realAddr, fakeAddr := real.listen(t), fake.listen(t)
	tok := real.token(t, gateway)
	_, err := register.Register(t.Context(), real.client(tok, fakeAddr))
	var v *trust.VerifyError
	if !problem.Is(err, problem.RegistrationRefused) || !errors.As(err, &v) || v.Reason != "untrusted" {
		t.Errorf("%v", err)
	}
	if r, err := register.Register(t.Context(), real.client(tok, fakeAddr, realAddr)); err != nil || r.Identity.ID != gateway.SPIFFEID {
		t.Errorf("past the imposter: %v", err)
	}
	// Another identity of the right cluster is no control plane either.
	id, err := real.ca.IssueKey(gateway.SPIFFEID, 0)
	if err != nil {
		t.Fatal(err)
	}
	real.source.SetIdentity(id)
	if _, err := register.Register(t.Context(), real.client(real.token(t, gateway), realAddr)); !errors.As(err, &v) || v.Reason != "not_authorized" {
		t.Errorf("a gateway as registrar: %v", err)
	}
}

// TestRelayedProof: a proof seen on one connection is refused on another, and answers keep to one connection.
func TestRelayedProof(t *testing.T) {
	i := newIssuer(t)
	addr := i.listen(t)
	tok := i.token(t, gateway)
	csr := must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))))
	first, second := i.dial(t, addr), i.dial(t, addr)
	defer first.Close()
	defer second.Close()
	req := &controlpb.RegisterRequest{TokenId: tok.ID, CsrDer: csr, Proof: register.Proof(tok, exporter(t, first), csr)}
	if code := ask(t, second, req).ErrorCode; code != string(problem.RegistrationRefused) {
		t.Errorf("on another connection: %q", code)
	}
	if r := ask(t, first, req); r.ErrorCode != "" || len(r.ChainDer) != 2 {
		t.Errorf("on its own: %v", r)
	}
}

// TestTokenIsBound: a token gives the namespace and service account that it was issued for, until it expires, whatever its holder asks for.
func TestTokenIsBound(t *testing.T) {
	i := newIssuer(t)
	addr := i.listen(t)
	tok := i.token(t, sidecar)
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	csr := must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "admin"}, DNSNames: []string{"us-east.acme"},
		URIs: []*url.URL{{Scheme: "spiffe", Host: td.String(), Path: "/ns/shop/sa/admin"}, {Scheme: "spiffe", Host: "eu-west.acme", Path: "/strait/controlplane"}},
	}, key))
	c := i.dial(t, addr)
	defer c.Close()
	r := ask(t, c, &controlpb.RegisterRequest{TokenId: tok.ID, CsrDer: csr, Proof: register.Proof(tok, exporter(t, c), csr)})
	if r.ErrorCode != "" {
		t.Fatalf("%s: %s", r.ErrorCode, r.ErrorMessage)
	}
	id := must(trust.NewIdentity(r.ChainDer, key))
	if id.ID != sidecar.SPIFFEID || r.Name != sidecar.Name || len(id.Chain[0].URIs) != 1 || len(id.Chain[0].DNSNames) != 0 || id.Chain[0].Subject.CommonName != "" {
		t.Errorf("the token gave %s to %s: %v", id.ID, r.Name, id.Chain[0].Subject)
	}
	late := i.token(t, sidecar)
	i.clock.add(15 * time.Minute)
	if _, err := register.Register(t.Context(), i.client(late, addr)); !problem.Is(err, problem.RegistrationRefused) || !strings.Contains(problem.From(err).Reason(), "expired") {
		t.Errorf("at the second of its end: %v", err)
	}
}

func (i *issuer) dial(t *testing.T, addr string) *tls.Conn {
	t.Helper()
	raw, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	c := tls.Client(raw, trust.PinnedClientTLS(i.ca.Bundle().Hash(), nil, i.clock.Now, trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{register.ALPN}}, nil))
	if err := trust.Handshake(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	return c
}

func exporter(t *testing.T, c *tls.Conn) []byte {
	cs := c.ConnectionState()
	b, err := cs.ExportKeyingMaterial("EXPORTER-strait-register/1", nil, 32)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func ask(t *testing.T, c *tls.Conn, req *controlpb.RegisterRequest) *controlpb.RegisterResponse {
	t.Helper()
	if err := register.WriteMessage(c, req); err != nil {
		t.Fatal(err)
	}
	var resp controlpb.RegisterResponse
	if err := register.ReadMessage(c, &resp); err != nil {
		t.Fatal(err)
	}
	return &resp
}

// TestGarbage: whatever is sent, the server closes or refuses, within its deadline, and serves the next one.
func TestGarbage(t *testing.T) {
	i := newIssuer(t)
	addr := i.listen(t)
	tok := i.token(t, gateway)
	frame := func(n uint32, body string) []byte { return append(binary.BigEndian.AppendUint32(nil, n), body...) }
	for name, bytes := range map[string][]byte{
		"length 0": frame(0, ""), "length 64 KiB + 1": frame(64<<10+1, ""), "length 2^32-1": frame(1<<32-1, "x"), "no message": frame(4, "\xff\xff\xff\xff"), "plain HTTP": []byte("GET / HTTP/1.1\r\n\r\n"),
	} {
		c := i.dial(t, addr)
		if _, err := c.Write(bytes); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		_ = c.SetReadDeadline(time.Now().Add(3 * time.Second))
		if n, err := c.Read(make([]byte, 1)); n != 0 || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
		_ = c.Close()
	}
	i.clock.add(time.Minute) // the address has its share of the rate again
	for name, csr := range map[string][]byte{"empty request": nil, "no request": []byte("garbage")} {
		c := i.dial(t, addr)
		r := ask(t, c, &controlpb.RegisterRequest{TokenId: tok.ID, CsrDer: csr, Proof: register.Proof(tok, exporter(t, c), csr)})
		if r.ErrorCode != string(problem.RegistrationRefused) || len(r.ChainDer) != 0 {
			t.Errorf("%s: %v", name, r)
		}
		_ = c.Close()
	}
	c := i.dial(t, addr)
	if r := ask(t, c, &controlpb.RegisterRequest{TokenId: "x\n\x1b[2J" + strings.Repeat("y", 5000)}); r.ErrorCode != string(problem.RegistrationRefused) {
		t.Errorf("odd id: %v", r)
	}
	_ = c.Close()
	if strings.Contains(i.log.String(), "yyyy") || strings.Contains(i.log.String(), "\x1b") {
		t.Error("a stranger writes into the log")
	}
	if _, err := register.Register(t.Context(), i.client(tok, addr)); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

// TestSilence: one who connects, or handshakes, and says nothing is gone after 5 s.
func TestSilence(t *testing.T) {
	i := newIssuer(t)
	for _, handshake := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			near, far := net.Pipe()
			start := time.Now()
			done := make(chan struct{})
			go func() {
				defer close(done)
				i.server.ServeConn(t.Context(), tls.Server(far, register.TLS(i.source)))
			}()
			if handshake {
				c := tls.Client(near, trust.PinnedClientTLS(i.ca.Bundle().Hash(), nil, i.clock.Now, trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{register.ALPN}}, nil))
				if err := c.HandshakeContext(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			<-done
			if took := time.Since(start); took != register.Timeout {
				t.Errorf("handshake %t: took %v", handshake, took)
			}
			_, _ = io.Copy(io.Discard, near)
			_ = near.Close()
		})
	}
}

func TestRate(t *testing.T) {
	i := newIssuer(t)
	i.server.Rate = 10 // 1 a second from one address, 10 at once
	addr := i.listen(t)
	tok := i.token(t, gateway)
	tok.Secret = make([]byte, 16)
	busy := func() bool {
		_, err := register.Register(t.Context(), i.client(tok, addr))
		if !problem.Is(err, problem.RegistrationRefused) && !problem.Is(err, problem.RegistrationBusy) {
			t.Fatal(err)
		}
		return problem.Is(err, problem.RegistrationBusy)
	}
	for n := range 10 {
		if busy() {
			t.Fatalf("limited after %d", n)
		}
	}
	if !busy() {
		t.Error("the eleventh at once is answered")
	}
	i.clock.add(time.Second)
	if busy() {
		t.Error("a second later none is answered")
	}
	if !busy() {
		t.Error("a second later two are answered")
	}
}

// TestLyingServer: what the authenticated server answers is checked as well.
func TestLyingServer(t *testing.T) {
	i := newIssuer(t)
	addr := i.listen(t)
	sign := i.server.Sign
	other := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	for name, lie := range map[string]func(csr []byte, id spiffeid.ID) ([][]byte, error){
		"another's key": func(_ []byte, id spiffeid.ID) ([][]byte, error) {
			return sign(must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, other)), id)
		},
		"another ID":     func(csr []byte, _ spiffeid.ID) ([][]byte, error) { return sign(csr, sidecar.SPIFFEID) },
		"no certificate": func([]byte, spiffeid.ID) ([][]byte, error) { return nil, nil },
		"an error":       func([]byte, spiffeid.ID) ([][]byte, error) { return nil, errors.New("the disk is full of secrets") },
	} {
		i.server.Sign = lie
		_, err := register.Register(t.Context(), i.client(i.token(t, gateway), addr))
		if err == nil || strings.Contains(err.Error(), "disk") || problem.Is(err, problem.RegistrationRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzFrame: no frame makes the reader panic, hold more than it was sent, or return what does not come back.
func FuzzFrame(f *testing.F) {
	var b bytes.Buffer
	_ = register.WriteMessage(&b, &controlpb.RegisterRequest{TokenId: "aaaaaaaaaaaaaaaa", Proof: make([]byte, 32), CsrDer: []byte("csr")})
	f.Add(b.Bytes())
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		var req, again controlpb.RegisterRequest
		if register.ReadMessage(bytes.NewReader(data), &req) != nil {
			return
		}
		var out bytes.Buffer
		if err := register.WriteMessage(&out, &req); err != nil {
			t.Fatal(err)
		}
		if err := register.ReadMessage(&out, &again); out.Len() == 0 && err != nil && proto.Size(&req) > 0 || err == nil && !proto.Equal(&req, &again) {
			t.Fatalf("does not come back: %v", err)
		}
	})
}
