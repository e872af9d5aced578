// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// meshes are two clusters that know each other: sources of one workload each.
type meshes struct {
	rootA, rootB *authority
	a, b         *trust.Source
	idA, idB     spiffeid.ID
}

func newMeshes(t testing.TB, now func() time.Time) *meshes {
	m := &meshes{rootA: newRoot(t, "root a"), rootB: newRoot(t, "root b"), idA: parseID(t, "spiffe://a.mesh/ns/shop/sa/web"), idB: parseID(t, "spiffe://b.mesh/ns/shop/sa/checkout")}
	both := set(t, m.rootA.bundle("a.mesh", 1), m.rootB.bundle("b.mesh", 1))
	m.a, m.b = trust.NewSource(trust.SourceConfig{Now: now}), trust.NewSource(trust.SourceConfig{Now: now})
	m.a.SetIdentity(m.rootA.issuer("issuer a").identity(m.idA.String(), t0.Add(time.Hour)))
	m.b.SetIdentity(m.rootB.issuer("issuer b").identity(m.idB.String(), t0.Add(time.Hour)))
	m.a.SetBundles(both)
	m.b.SetBundles(both)
	return m
}

// exchange connects a client and a server over a socket, sends "ping" and "pong", and returns both ends' errors and states. A
// TLS 1.3 client knows that it was accepted only from the first byte, so its error is that of the exchange.
func exchange(t testing.TB, client, server *tls.Config) (ce, se error, cs, ss tls.ConnectionState) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var wg sync.WaitGroup
	wg.Go(func() {
		raw, err := ln.Accept()
		if err != nil {
			se = err
			return
		}
		c := tls.Server(raw, server)
		defer c.Close()
		if se = trust.Handshake(context.Background(), c); se != nil {
			return
		}
		ss = c.ConnectionState()
		buf := make([]byte, 4)
		if _, se = io.ReadFull(c, buf); se == nil {
			_, se = c.Write([]byte("pong"))
		}
	})
	raw, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := tls.Client(raw, client)
	if ce = trust.Handshake(context.Background(), c); ce == nil {
		cs = c.ConnectionState()
		_, _ = c.Write([]byte("ping"))
		_, ce = io.ReadFull(c, make([]byte, 4))
	}
	_ = c.Close()
	wg.Wait()
	return ce, se, cs, ss
}

func reason(err error) string {
	var v *trust.VerifyError
	if errors.As(err, &v) {
		return v.Reason
	}
	return ""
}

func TestMutualTLS(t *testing.T) {
	m := newMeshes(t, at(t0))
	server := trust.TLSOptions{Authorize: trust.AuthorizeID(m.idA), ALPN: []string{"h2"}}
	client := trust.TLSOptions{Authorize: trust.AuthorizeID(m.idB), ALPN: []string{"h2"}, ServerName: "http.checkout.shop.svc.b.mesh"}
	ce, se, cs, ss := exchange(t, m.a.ClientTLS(client), m.b.ServerTLS(server))
	if ce != nil || se != nil {
		t.Fatalf("client %v, server %v", ce, se)
	}
	for who, cs := range map[string]tls.ConnectionState{"client": cs, "server": ss} {
		p, err := trust.PeerFromState(cs)
		if err != nil {
			t.Fatal(err)
		}
		if want := map[string]spiffeid.ID{"client": m.idB, "server": m.idA}[who]; p.ID != want || !p.NotAfter.Equal(t0.Add(time.Hour)) {
			t.Errorf("%s sees %s until %s", who, p.ID, p.NotAfter)
		}
		if cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != "h2" || cs.DidResume || cs.ServerName != client.ServerName {
			t.Errorf("%s: version %x, protocol %q, resumed %t, name %q", who, cs.Version, cs.NegotiatedProtocol, cs.DidResume, cs.ServerName)
		}
		if cs.CurveID != tls.X25519MLKEM768 {
			t.Errorf("%s: key exchange %v", who, cs.CurveID)
		}
	}
}

func TestRefusals(t *testing.T) {
	m := newMeshes(t, at(t0))
	anyone := trust.TLSOptions{Authorize: trust.AuthorizeAny()}
	onlyB := trust.NewSource(trust.SourceConfig{Now: at(t0)})
	onlyB.SetIdentity(m.b.Identity())
	onlyB.SetBundles(set(t, m.rootB.bundle("b.mesh", 1)))
	late := trust.NewSource(trust.SourceConfig{Now: at(t0.Add(2 * time.Hour))})
	late.SetIdentity(m.a.Identity())
	late.SetBundles(m.a.Bundles())
	empty := trust.NewSource(trust.SourceConfig{})
	noCert := m.a.ClientTLS(anyone)
	noCert.GetClientCertificate = nil
	tls12 := m.a.ClientTLS(anyone)
	tls12.MinVersion, tls12.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	for _, tt := range []struct {
		name           string
		client, server *tls.Config
		clientReason   string // of the client's error; "" = only that there is one
		serverReason   string
	}{
		{"server does not trust the client", m.a.ClientTLS(anyone), onlyB.ServerTLS(anyone), "", "unknown_trust_domain"},
		{"client does not trust the server", onlyB.ClientTLS(anyone), m.a.ServerTLS(anyone), "unknown_trust_domain", ""},
		{"server does not authorize", m.a.ClientTLS(anyone), m.b.ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeID(m.idB)}), "", "not_authorized"},
		{"client does not authorize", m.a.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeID(m.idA)}), m.b.ServerTLS(anyone), "not_authorized", ""},
		{"server without an authorizer", m.a.ClientTLS(anyone), m.b.ServerTLS(trust.TLSOptions{}), "", "not_authorized"},
		{"client without an authorizer", m.a.ClientTLS(trust.TLSOptions{}), m.b.ServerTLS(anyone), "not_authorized", ""},
		{"client without a certificate", noCert, m.b.ServerTLS(anyone), "", ""},
		{"client without an identity yet", empty.ClientTLS(anyone), m.b.ServerTLS(anyone), "", ""},
		{"server without an identity yet", m.a.ClientTLS(anyone), empty.ServerTLS(anyone), "", ""},
		{"own identity has expired", late.ClientTLS(anyone), m.b.ServerTLS(anyone), "expired", ""},
		{"own identity of the server has expired", m.b.ClientTLS(anyone), late.ServerTLS(anyone), "", "identity_expired"},
		{"TLS 1.2", tls12, m.b.ServerTLS(anyone), "", ""},
		{"other protocol", m.a.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"x"}}), m.b.ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"h2"}}), "", ""},
	} {
		ce, se, _, _ := exchange(t, tt.client, tt.server)
		if ce == nil || se == nil {
			t.Errorf("%s: client %v, server %v", tt.name, ce, se)
			continue
		}
		if tt.clientReason != "" && reason(ce) != tt.clientReason {
			t.Errorf("%s: client %v, want %s", tt.name, ce, tt.clientReason)
		}
		if tt.serverReason != "" && reason(se) != tt.serverReason {
			t.Errorf("%s: server %v, want %s", tt.name, se, tt.serverReason)
		}
	}
}

// TestNoResumption: class T1. A client that keeps tickets gets none, so that after its trust domain is withdrawn none of 100
// connections is accepted.
func TestNoResumption(t *testing.T) {
	m := newMeshes(t, at(t0))
	anyone := trust.TLSOptions{Authorize: trust.AuthorizeAny()}
	client := m.a.ClientTLS(anyone)
	client.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	client.ServerName = "b"
	server := m.b.ServerTLS(anyone)
	for range 3 {
		ce, se, cs, _ := exchange(t, client, server)
		if ce != nil || se != nil || cs.DidResume {
			t.Fatalf("client %v, server %v, resumed %t", ce, se, cs.DidResume)
		}
	}
	if _, ok := client.ClientSessionCache.Get("b"); ok {
		t.Error("the server gave a ticket out")
	}
	m.b.SetBundles(m.b.Bundles().Without(m.idA.TrustDomain()))
	for range 100 {
		if ce, se, _, _ := exchange(t, client, server); ce == nil || reason(se) != "unknown_trust_domain" {
			t.Fatalf("after withdrawal: client %v, server %v", ce, se)
		}
	}
}

// TestBuiltOncePerGeneration: a handshake takes the certificate, with its parsed leaf, that the present generation has; it makes none.
func TestBuiltOncePerGeneration(t *testing.T) {
	m := newMeshes(t, at(t0))
	o := trust.TLSOptions{Authorize: trust.AuthorizeAny()}
	rooted := o
	rooted.SendRoots = true
	client, server, roots := m.a.ClientTLS(o), m.a.ServerTLS(o), m.a.ServerTLS(rooted)
	if server.GetConfigForClient != nil {
		t.Error("the configuration is chosen at each handshake")
	}
	get := map[string]func() *tls.Certificate{
		"client":     func() *tls.Certificate { c, _ := client.GetClientCertificate(nil); return c },
		"server":     func() *tls.Certificate { c, _ := server.GetCertificate(nil); return c },
		"with roots": func() *tls.Certificate { c, _ := roots.GetCertificate(nil); return c },
	}
	before := map[string]*tls.Certificate{}
	for name, f := range get {
		before[name] = f()
		if before[name] == nil || before[name].Leaf == nil || f() != before[name] {
			t.Errorf("%s: another certificate at each handshake", name)
		}
		if n := testing.AllocsPerRun(100, func() { f() }); n != 0 {
			t.Errorf("%s: %v allocations at each handshake", name, n)
		}
	}
	if n := len(before["with roots"].Certificate) - len(before["server"].Certificate); n != 1 {
		t.Errorf("%d roots are sent", n)
	}
	m.a.SetIdentity(m.rootA.issuer("issuer a").identity(m.idA.String(), t0.Add(time.Hour)))
	for name, f := range get {
		if c := f(); c == before[name] || c.Leaf != m.a.Identity().Chain[0] {
			t.Errorf("%s: the certificate of the generation before", name)
		}
	}
}

// TestResumedSessionIsRefused: class T1, the second line. Were tickets ever given out, what resumes is refused all the same, before and
// after a withdrawal.
func TestResumedSessionIsRefused(t *testing.T) {
	m := newMeshes(t, at(t0))
	anyone := trust.TLSOptions{Authorize: trust.AuthorizeAny(), ServerName: "b"}
	client, server := m.a.ClientTLS(anyone), m.b.ServerTLS(anyone)
	server.SessionTicketsDisabled, client.SessionTicketsDisabled = false, false
	client.ClientSessionCache = tls.NewLRUClientSessionCache(200)
	client.Time, server.Time = at(t0), at(t0) // crypto/tls keeps tickets of certificates that are valid by its own clock
	if ce, se, _, _ := exchange(t, client, server); ce != nil || se != nil {
		t.Fatalf("client %v, server %v", ce, se)
	}
	kept, ok := client.ClientSessionCache.Get("b")
	if !ok {
		t.Fatal("no ticket: this test shows nothing")
	}
	for i := range 100 {
		if i == 50 {
			m.b.SetBundles(m.b.Bundles().Without(m.idA.TrustDomain()))
		}
		client.ClientSessionCache.Put("b", kept)
		if ce, se, _, ss := exchange(t, client, server); ce == nil || reason(se) != "untrusted" && reason(ce) != "untrusted" || ss.HandshakeComplete {
			t.Fatalf("attempt %d: client %v, server %v", i, ce, se)
		}
	}
}

// TestClientTakesNoTickets: even a server that hands tickets out resumes nothing with our client.
func TestClientTakesNoTickets(t *testing.T) {
	m := newMeshes(t, at(t0))
	anyone := trust.TLSOptions{Authorize: trust.AuthorizeAny(), ServerName: "b"}
	client, server := m.a.ClientTLS(anyone), m.b.ServerTLS(anyone)
	server.SessionTicketsDisabled = false
	for range 3 {
		if ce, se, cs, _ := exchange(t, client, server); ce != nil || se != nil || cs.DidResume {
			t.Fatalf("client %v, server %v, resumed %t", ce, se, cs.DidResume)
		}
	}
}

func TestPinned(t *testing.T) {
	m := newMeshes(t, at(t0))
	pin := m.rootB.bundle("b.mesh", 1).Hash()
	join := trust.TLSOptions{AcceptUnverifiedClient: true, SendRoots: true, ALPN: []string{trust.ALPNJoin}}
	server := m.b.ServerTLS(join)
	options := trust.TLSOptions{Authorize: trust.AuthorizeID(m.idB), ALPN: []string{trust.ALPNJoin}}
	stranger := trust.NewSource(trust.SourceConfig{Now: at(t0)})
	stranger.SetIdentity(newRoot(t, "root c").issuer("issuer c").identity("spiffe://c.mesh/strait/gateway/gw", t0.Add(time.Hour)))

	var got trust.Pinned
	ce, se, _, ss := exchange(t, trust.PinnedClientTLS(pin, stranger, nil, options, func(p trust.Pinned) { got = p }), server)
	if ce != nil || se != nil {
		t.Fatalf("client %v, server %v", ce, se)
	}
	if got.Peer.ID != m.idB || got.Bundle.Hash() != pin || got.Bundle.TrustDomain() != m.idB.TrustDomain() {
		t.Errorf("pinned: %v", got)
	}
	if len(ss.PeerCertificates) != 2 {
		t.Errorf("the server sees %d certificates", len(ss.PeerCertificates))
	}
	if p, err := trust.PeerFromState(ss); err == nil {
		t.Errorf("an unverified client passes for %s", p.ID)
	}

	// A server in between has a root and an identity of the same name of its own, and may send the real root as well.
	mitm := trust.NewSource(trust.SourceConfig{Now: at(t0)})
	fake := newRoot(t, "root b")
	mitm.SetIdentity(fake.identity(m.idB.String(), t0.Add(time.Hour)))
	mitm.SetBundles(set(t, fake.bundle("b.mesh", 1)))
	appended := mitm.ServerTLS(join)
	appended.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		id := mitm.Identity()
		return &tls.Certificate{Certificate: append(id.ChainDER(), fake.cert.Raw, m.rootB.cert.Raw), PrivateKey: id.Key}, nil
	}
	spliced := mitm.ServerTLS(join)
	spliced.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		id := mitm.Identity()
		return &tls.Certificate{Certificate: append(id.ChainDER(), m.rootB.cert.Raw), PrivateKey: id.Key}, nil
	}
	silent := m.b.ServerTLS(trust.TLSOptions{AcceptUnverifiedClient: true, ALPN: []string{trust.ALPNJoin}})
	wrong := options
	wrong.Authorize = trust.AuthorizeID(m.idA)
	none := options
	none.ALPN = nil
	for _, tt := range []struct {
		name   string
		pin    [32]byte
		o      trust.TLSOptions
		server *tls.Config
		want   string // of the client
	}{
		{"another root", pin, options, mitm.ServerTLS(join), "untrusted"},
		{"another root, ours after it", pin, options, appended, "untrusted"},
		{"own leaf, our root after it", pin, options, spliced, "untrusted"},
		{"no roots sent", pin, options, silent, "untrusted"},
		{"zero pin", [32]byte{}, options, server, "untrusted"},
		{"right cluster, wrong identity", pin, wrong, server, "not_authorized"},
		{"no protocol", pin, none, server, ""},
		{"not the join protocol", pin, trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"h2"}},
			m.b.ServerTLS(trust.TLSOptions{AcceptUnverifiedClient: true, SendRoots: true, ALPN: []string{"h2"}}), ""},
	} {
		called := false
		ce, _, _, _ := exchange(t, trust.PinnedClientTLS(tt.pin, stranger, nil, tt.o, func(trust.Pinned) { called = true }), tt.server)
		if ce == nil || tt.want != "" && (reason(ce) != tt.want || called) {
			t.Errorf("%s: %v (callback %t), want %q", tt.name, ce, called, tt.want)
		}
	}
}

// TestByALPN: class T7. Whoever reaches a port by the lenient protocol gets nothing of the strict one.
func TestByALPN(t *testing.T) {
	m := newMeshes(t, at(t0))
	mutual := m.b.ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeID(m.idA), ALPN: []string{"h2"}})
	open := m.b.ServerTLS(trust.TLSOptions{ServerOnly: true, SendRoots: true, ALPN: []string{"strait-register/1"}})
	server := trust.ByALPN(mutual, open)
	pin := m.rootB.bundle("b.mesh", 1).Hash()
	for _, tt := range []struct {
		name  string
		alpn  []string
		named bool // with a certificate
		want  string
	}{
		{"mutual", []string{"h2"}, true, "h2"},
		{"registering", []string{"strait-register/1"}, false, "strait-register/1"},
		{"mutual without a certificate", []string{"h2"}, false, ""},
		{"both offered without a certificate", []string{"strait-register/1", "h2"}, false, ""},
		{"neither", []string{"x"}, true, ""},
		{"none", nil, true, ""},
	} {
		o := trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: tt.alpn}
		client := m.a.ClientTLS(o)
		if !tt.named {
			client = trust.PinnedClientTLS(pin, nil, at(t0), o, nil)
		}
		ce, se, _, ss := exchange(t, client, server)
		if (ce == nil) != (tt.want != "") || ss.NegotiatedProtocol != tt.want && tt.want != "" {
			t.Errorf("%s: client %v, server %v, protocol %q", tt.name, ce, se, ss.NegotiatedProtocol)
		}
	}
	for _, lone := range []*tls.Config{open} { // without ByALPN in front
		if ce, se, _, _ := exchange(t, m.a.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny()}), lone); ce == nil || se == nil {
			t.Errorf("a client without protocol: client %v, server %v", ce, se)
		}
	}
}

// TestRotationUnderLoad: promise P13 for leaves and roots. Identities and bundles change under handshakes, in the order prepare,
// activate, retire, and no handshake fails.
func TestRotationUnderLoad(t *testing.T) {
	m := newMeshes(t, at(t0))
	client := m.a.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeID(m.idB)})
	server := m.b.ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeID(m.idA)})
	var stop atomic.Bool
	var n atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for !stop.Load() {
				if ce, se, _, _ := exchange(t, client, server); ce != nil || se != nil {
					t.Errorf("client %v, server %v", ce, se)
					return
				}
				n.Add(1)
			}
		})
	}
	advance := func(by int64) { // both sides have used the present material
		for start := n.Load(); n.Load() < start+by && !t.Failed(); {
			<-time.After(time.Millisecond)
		}
	}
	rootB, tdB := m.rootB, m.idB.TrustDomain()
	for generation := range 3 {
		m.a.SetIdentity(m.rootA.issuer("issuer a").identity(m.idA.String(), t0.Add(time.Hour)))
		next := newRoot(t, "root b")
		both, err := m.a.Bundles().Get(tdB).WithRoots(append(m.a.Bundles().Get(tdB).Roots(), next.cert))
		if err != nil {
			t.Fatal(err)
		}
		m.a.SetBundles(m.a.Bundles().With(both)) // prepare
		m.b.SetBundles(m.b.Bundles().With(both))
		advance(8)
		m.b.SetIdentity(next.issuer("issuer b").identity(m.idB.String(), t0.Add(time.Hour))) // activate
		advance(8)
		only, err := trust.NewBundle(tdB, both.Roots()[len(both.Roots())-1:], both.Sequence()+1)
		if err != nil {
			t.Fatal(err)
		}
		m.a.SetBundles(m.a.Bundles().With(only)) // retire
		m.b.SetBundles(m.b.Bundles().With(only))
		advance(8)
		t.Logf("generation %d after %d handshakes", generation, n.Load())
	}
	stop.Store(true)
	wg.Wait()
	old := trust.NewSource(trust.SourceConfig{Now: at(t0)})
	old.SetIdentity(rootB.identity(m.idB.String(), t0.Add(time.Hour)))
	old.SetBundles(m.b.Bundles())
	if ce, _, _, _ := exchange(t, client, old.ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny()})); reason(ce) != "untrusted" {
		t.Errorf("the retired root: %v", ce)
	}
}

func TestSourceReadyAndChanged(t *testing.T) {
	root := newRoot(t, "root")
	id := root.identity(web, t0.Add(time.Hour))
	bundles := set(t, root.bundle("a.mesh", 1))
	synctest.Test(t, func(t *testing.T) {
		s := trust.NewSource(trust.SourceConfig{Now: at(t0)})
		done := make(chan error, 1)
		go func() { done <- s.Ready(t.Context()) }()
		pending := func(when string) {
			synctest.Wait()
			select {
			case err := <-done:
				t.Fatalf("ready %s: %v", when, err)
			default:
			}
		}
		pending("at first")
		changed := s.Changed()
		s.SetIdentity(id)
		<-changed
		pending("without a bundle")
		s.SetBundles(bundles)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := trust.NewSource(trust.SourceConfig{}).Ready(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("an empty source: %v", err)
		}
	})
}

// TestHandshakeDeadline: class T10. One who connects and says nothing is let go after 5 s.
func TestHandshakeDeadline(t *testing.T) {
	m := newMeshes(t, at(t0))
	synctest.Test(t, func(t *testing.T) {
		far, near := net.Pipe()
		defer far.Close()
		start := time.Now()
		err := trust.Handshake(t.Context(), tls.Server(near, m.b.ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny()})))
		if took := time.Since(start); err == nil || took != trust.HandshakeTimeout {
			t.Errorf("%v after %v", err, took)
		}
		if _, err := far.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("the connection stays: %v", err)
		}
	})
}

func TestIdentityPEM(t *testing.T) {
	root := newRoot(t, "root")
	id := root.issuer("issuer").identity(web, t0.Add(time.Hour))
	data, err := id.MarshalPEM()
	if err != nil {
		t.Fatal(err)
	}
	back, err := trust.ParseIdentityPEM(data)
	if err != nil || back.ID != id.ID || len(back.Chain) != 2 || !back.NotAfter.Equal(id.NotAfter) || !back.NotBefore.Equal(id.NotBefore) {
		t.Fatalf("came back as %+v, %v", back, err)
	}
	other, err := root.identity(web, t0.Add(time.Hour)).MarshalPEM()
	if err != nil {
		t.Fatal(err)
	}
	key := data[bytes.Index(data, []byte("-----BEGIN PRIVATE")):]
	otherKey := other[bytes.Index(other, []byte("-----BEGIN PRIVATE")):]
	for name, bad := range map[string][]byte{
		"empty": nil, "no key": bytes.TrimSuffix(data, key), "no certificate": key, "cut": data[:len(data)-60],
		"another key": append(bytes.TrimSuffix(bytes.Clone(data), key), otherKey...), "two keys": append(bytes.Clone(data), otherKey...),
		"malformed key": append(bytes.TrimSuffix(bytes.Clone(data), key), "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"...),
	} {
		_, err := trust.ParseIdentityPEM(bad)
		if err == nil {
			t.Errorf("%s: accepted", name)
		} else if strings.Contains(err.Error(), "BEGIN") || strings.Contains(err.Error(), string(key[40:60])) {
			t.Errorf("%s: the error shows the file: %v", name, err)
		}
	}
}
