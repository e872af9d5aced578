// SPDX-License-Identifier: Apache-2.0

package workloadapi_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/workloadapi"
)

// TestMain also is the program that tests start as another user: see children_test.go.
func TestMain(m *testing.M) {
	if socket := os.Getenv(childEnv); socket != "" {
		os.Exit(child(socket))
	}
	goleak.VerifyTestMain(m)
}

// within bounds every wait of a test that succeeds.
const within = 20 * time.Second

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until cond holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(within)
	for !cond() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("%s: not within %v", what, within)
		}
	}
}

// authority is a CA that does what Strait's does during rotations: roots, an issuer that one or two roots have certified, JWT keys.
type authority struct {
	t  testing.TB
	td spiffeid.TrustDomain

	mu       sync.Mutex
	roots    []*signer // that the bundle has
	issuer   *ecdsa.PrivateKey
	issuers  int
	chain    []*x509.Certificate // of the issuer: siblings of one key
	jwt      []*ecdsa.PrivateKey // the last one signs
	sequence uint64
	ttl      time.Duration
	away     error // what requests get
	issued   int
	tokens   int
}

type signer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return k
}

func newAuthority(t testing.TB, td string) *authority {
	t.Helper()
	name, err := spiffeid.ParseTrustDomain(td)
	must(t, err)
	a := &authority{t: t, td: name, ttl: time.Hour, jwt: []*ecdsa.PrivateKey{newKey(t)}}
	a.roots = []*signer{a.root(1)}
	a.newIssuer()
	return a
}

func (a *authority) root(n int64) *signer {
	key := newKey(a.t)
	return &signer{a.sign(&x509.Certificate{
		SerialNumber: big.NewInt(n), Subject: pkix.Name{CommonName: fmt.Sprintf("%s root %d", a.td, n)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: a.td.String()}},
	}, key.Public(), nil, key), key}
}

func (a *authority) sign(template *x509.Certificate, key any, parent *x509.Certificate, by *ecdsa.PrivateKey) *x509.Certificate {
	template.NotBefore, template.NotAfter = time.Now().Add(-trust.Backdate).Truncate(time.Second), time.Now().Add(24*time.Hour)
	if !template.IsCA {
		template.NotAfter = time.Now().Add(a.ttl)
	}
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, by)
	must(a.t, err)
	c, err := x509.ParseCertificate(der)
	must(a.t, err)
	return c
}

// newIssuer makes an issuer that every root of the bundle certifies, the newest first.
func (a *authority) newIssuer() {
	a.issuer, a.chain = newKey(a.t), nil
	a.issuers++
	for i := len(a.roots) - 1; i >= 0; i-- {
		a.chain = append(a.chain, a.sign(&x509.Certificate{
			SerialNumber: big.NewInt(int64(100 + i)), Subject: pkix.Name{CommonName: a.td.String() + " issuer", SerialNumber: fmt.Sprint(a.issuers)},
			IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
			URIs: []*url.URL{{Scheme: "spiffe", Host: a.td.String()}},
		}, a.issuer.Public(), a.roots[i].cert, a.roots[i].key))
	}
}

// prepare publishes another root and another JWT key; activate issues by it; retire takes the old one away.
func (a *authority) prepare() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.roots = append(a.roots, a.root(int64(len(a.roots)+1)))
	a.jwt = append([]*ecdsa.PrivateKey{newKey(a.t)}, a.jwt...)
	a.sequence++
}

func (a *authority) activate() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.newIssuer()
	a.jwt[0], a.jwt[len(a.jwt)-1] = a.jwt[len(a.jwt)-1], a.jwt[0]
}

func (a *authority) retire() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.roots, a.chain, a.jwt = a.roots[len(a.roots)-1:], a.chain[:1], a.jwt[len(a.jwt)-1:]
	a.sequence++
}

func (a *authority) bundle() *trust.Bundle {
	a.mu.Lock()
	defer a.mu.Unlock()
	var roots []*x509.Certificate
	for _, r := range a.roots {
		roots = append(roots, r.cert)
	}
	b, err := trust.NewBundle(a.td, roots, a.sequence+1)
	must(a.t, err)
	var keys []trust.JWTKey
	for _, k := range a.jwt {
		keys = append(keys, trust.JWTKey{ID: keyID(k), Key: k.Public()})
	}
	b, err = b.WithJWTKeys(keys)
	must(a.t, err)
	return b
}

func keyID(k *ecdsa.PrivateKey) string {
	der, _ := x509.MarshalPKIXPublicKey(k.Public())
	sum := sha256.Sum256(der)
	return base64.RawURLEncoding.EncodeToString(sum[:9])
}

func (a *authority) identity(id spiffeid.ID) (*trust.Identity, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.away != nil {
		return nil, a.away
	}
	key := newKey(a.t)
	leaf := a.sign(&x509.Certificate{
		SerialNumber: big.NewInt(int64(1000 + a.issued)), Subject: pkix.Name{CommonName: "leaf"}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, URIs: []*url.URL{id.URL()},
	}, key.Public(), a.chain[0], a.issuer)
	a.issued++
	ders := [][]byte{leaf.Raw}
	for _, c := range a.chain {
		ders = append(ders, c.Raw)
	}
	return trust.NewIdentity(ders, key)
}

func (a *authority) token(id spiffeid.ID, audience []string) (string, time.Time, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.away != nil {
		return "", time.Time{}, a.away
	}
	a.tokens++
	key, end := a.jwt[len(a.jwt)-1], time.Now().Add(5*time.Minute).Truncate(time.Second)
	part := func(v any) string {
		data, err := json.Marshal(v)
		must(a.t, err)
		return base64.RawURLEncoding.EncodeToString(data)
	}
	signed := part(map[string]any{"alg": "ES256", "kid": keyID(key), "typ": "JWT"}) + "." +
		part(map[string]any{"sub": id.String(), "aud": audience, "exp": end.Unix(), "iat": time.Now().Unix(), "jti": fmt.Sprint(a.tokens)})
	sum := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	must(a.t, err)
	return signed + "." + base64.RawURLEncoding.EncodeToString(append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)), end, nil
}

func (a *authority) set(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

func (a *authority) count() (issued, tokens int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.issued, a.tokens
}

var errAway = errors.New("the control plane is away")

// rig is a server of one workload with its socket.
type rig struct {
	t      testing.TB
	ca     *authority
	id     spiffeid.ID
	source *trust.Source
	server *workloadapi.Server
	socket string
	log    *logbook

	mu      sync.Mutex
	denied  map[spiffeid.ID]time.Time
	refused map[string]int
	stop    func()
}

func (r *rig) RequestIdentity(context.Context) (*trust.Identity, error) { return r.ca.identity(r.id) }

func (r *rig) RequestJWT(_ context.Context, audience []string) (string, time.Time, error) {
	return r.ca.token(r.id, audience)
}

// self selects this very process.
func self() workloadapi.Selector {
	uid := uint32(os.Getuid())
	return workloadapi.Selector{UID: &uid}
}

// serve starts a server of the authority's workload ns/shop/sa/<account>, with the selectors given.
func serve(t testing.TB, ca *authority, account string, change func(*workloadapi.Config), selectors ...workloadapi.Selector) *rig {
	t.Helper()
	r := &rig{t: t, ca: ca, source: trust.NewSource(trust.SourceConfig{}), log: &logbook{}, denied: map[spiffeid.ID]time.Time{}, refused: map[string]int{}}
	var err error
	r.id, err = spiffeid.Workload(ca.td, "shop", account)
	must(t, err)
	r.trusts(ca)
	dir, err := os.MkdirTemp("", "wlapi")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	r.socket = filepath.Join(dir, "api.sock")
	cfg := workloadapi.Config{
		Source: r.source, Issuer: r, Logger: slog.New(r.log),
		Denied: func(id spiffeid.ID, issued time.Time) (string, bool) {
			r.mu.Lock()
			defer r.mu.Unlock()
			before, ok := r.denied[id]
			return "stolen", ok && issued.Before(before)
		},
		Refused: func(reason string) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.refused[reason]++
		},
	}
	if change != nil {
		change(&cfg)
	}
	r.server, err = workloadapi.New(cfg)
	must(t, err)
	r.allow(selectors...)
	l, err := workloadapi.Listen(r.socket, cfg.Logger)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.server.Run(ctx, l) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		must(t, <-done)
		if _, err := os.Lstat(r.socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is left: %v", err)
		}
	})
	t.Cleanup(r.stop)
	return r
}

func (r *rig) address() string { return "unix://" + r.socket }

func (r *rig) allow(selectors ...workloadapi.Selector) {
	r.server.SetAccess(workloadapi.Access{ID: r.id, Proxy: "shop/web", Hint: "web", Selectors: selectors})
}

// trusts replaces the bundles by the present ones of these authorities.
func (r *rig) trusts(list ...*authority) {
	r.t.Helper()
	var bundles []*trust.Bundle
	for _, a := range list {
		bundles = append(bundles, a.bundle())
	}
	set, err := trust.NewBundles(bundles...)
	must(r.t, err)
	r.source.SetBundles(set)
}

func (r *rig) deny(id spiffeid.ID, before time.Time) {
	r.mu.Lock()
	r.denied[id] = before
	r.mu.Unlock()
	r.server.Reconsider()
}

func (r *rig) refusals(reason string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.refused[reason]
}

// logbook keeps lines.
type logbook struct {
	mu    sync.Mutex
	lines []string
}

func (l *logbook) Enabled(context.Context, slog.Level) bool { return true }

func (l *logbook) Handle(_ context.Context, r slog.Record) error {
	line := r.Level.String() + " " + r.Message
	r.Attrs(func(a slog.Attr) bool { line += fmt.Sprintf(" %s=%v", a.Key, a.Value); return true })
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, line)
	return nil
}

func (l *logbook) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l *logbook) WithGroup(string) slog.Handler      { return l }

func (l *logbook) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.lines...)
}
