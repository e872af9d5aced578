// SPDX-License-Identifier: Apache-2.0

package catalog_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func td(s string) spiffeid.TrustDomain {
	d, err := spiffeid.ParseTrustDomain(s)
	if err != nil {
		panic(err)
	}
	return d
}

var usEast, euWest, apSouth = td("us-east.acme"), td("eu-west.acme"), td("ap-south.acme")

// authority is one cluster's CA and its catalog signer.
type authority struct {
	ca     *ca.CA
	signer *trust.Identity
}

func newAuthority(t testing.TB, d spiffeid.TrustDomain, now func() time.Time) *authority {
	t.Helper()
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "ca"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	c, err := ca.Create(dir, ca.Config{TrustDomain: d, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	return &authority{ca: c, signer: issue(t, c, spiffeid.CatalogSigner(d))}
}

func issue(t testing.TB, c *ca.CA, id spiffeid.ID) *trust.Identity {
	t.Helper()
	i, err := c.IssueKey(id, 0)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func bundles(t testing.TB, as ...*authority) *trust.Bundles {
	t.Helper()
	var l []*trust.Bundle
	for _, a := range as {
		l = append(l, a.ca.Bundle())
	}
	b, err := trust.NewBundles(l...)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func storeDir(t testing.TB) *datadir.Dir {
	t.Helper()
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	sub, err := dir.Sub("catalogs")
	if err != nil {
		t.Fatal(err)
	}
	return sub
}

func encode(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err)
	}
	return b
}

func service(ns, name string, healthy uint32) []byte {
	return encode(&controlpb.CatalogService{
		Service: &controlpb.ServiceRef{Namespace: ns, Name: name}, Ports: []*controlpb.ServicePort{{Name: "http", Number: 80}},
		SpiffeIds: []string{"spiffe://eu-west.acme/ns/" + ns + "/sa/" + name}, Zones: map[string]*controlpb.HealthCounts{"a": {Healthy: healthy}},
	})
}

func gateway(name string, addresses ...string) []byte {
	return encode(&controlpb.GatewayRecord{Name: name, Addresses: addresses})
}

// peer is an origin run by hand: each call of publish is one signature.
type peer struct {
	t      testing.TB
	a      *authority
	epoch  uint64
	now    func() time.Time
	origin *catalog.Origin
	stop   func()
}

func newPeer(t testing.TB, a *authority, now func() time.Time) *peer {
	p := &peer{t: t, a: a, epoch: 1, now: now}
	p.restart()
	t.Cleanup(func() { p.stop() })
	return p
}

// restart makes a new origin under the present epoch.
func (p *peer) restart() {
	p.t.Helper()
	if p.stop != nil {
		p.stop()
	}
	var mu sync.Mutex
	o, err := catalog.NewOrigin(catalog.OriginConfig{
		Self: p.a.signer.ID.TrustDomain(), Signer: func() *trust.Identity { return p.a.signer }, Now: p.now, Debounce: time.Nanosecond,
		Epoch: func(_ context.Context, atLeast uint64) (uint64, error) {
			mu.Lock()
			defer mu.Unlock()
			p.epoch = max(p.epoch, atLeast)
			return p.epoch, nil
		},
	})
	if err != nil {
		p.t.Fatal(err)
	}
	p.origin = o
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); o.Run(ctx) }()
	p.stop = func() { cancel(); <-done }
}

// publish offers entries to us-east and waits until they are signed.
func (p *peer) publish(entries map[string][]byte) {
	p.t.Helper()
	changed := p.origin.Changed()
	if err := p.origin.Set(usEast, entries); err != nil {
		p.t.Fatal(err)
	}
	for p.origin.Head(usEast) == nil || !sameEntries(p.origin.Update(usEast, 0, 0), entries) {
		<-changed
		changed = p.origin.Changed()
	}
}

func sameEntries(u *controlpb.CatalogUpdate, want map[string][]byte) bool {
	if len(u.GetEntries()) != len(want) {
		return false
	}
	for _, e := range u.GetEntries() {
		if string(want[e.GetKey()]) != string(e.GetBody()) {
			return false
		}
	}
	return true
}

func TestHeadRoundTrip(t *testing.T) {
	h := catalog.Head{TrustDomain: euWest, Consumer: usEast, Epoch: 3, Seq: 41, Hash: [32]byte{1, 2, 3}, Count: 2,
		IssuedAt: time.UnixMilli(1795356000123).UTC(), TTL: time.Minute, BundleSequence: 7}
	b := h.Marshal()
	got, err := catalog.ParseHead(b)
	if err != nil || *got != h {
		t.Fatalf("parsed %+v, %v", got, err)
	}
	for i := range b {
		if _, err := catalog.ParseHead(b[:i]); err == nil {
			t.Errorf("a head cut at %d was accepted", i)
		}
	}
	if _, err := catalog.ParseHead(append(b, 0)); err == nil {
		t.Error("a byte too many was accepted")
	}
	for name, edit := range map[string]func(*catalog.Head){
		"epoch zero": func(h *catalog.Head) { h.Epoch = 0 }, "seq zero": func(h *catalog.Head) { h.Seq = 0 },
		"no ttl": func(h *catalog.Head) { h.TTL = 0 }, "long ttl": func(h *catalog.Head) { h.TTL = 2 * time.Hour },
		"no consumer": func(h *catalog.Head) { h.Consumer = spiffeid.TrustDomain{} },
		"no time":     func(h *catalog.Head) { h.IssuedAt = time.UnixMilli(-1) },
	} {
		bad := h
		edit(&bad)
		if _, err := catalog.ParseHead(bad.Marshal()); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func FuzzParseHead(f *testing.F) {
	f.Add(catalog.Head{TrustDomain: euWest, Consumer: usEast, Epoch: 1, Seq: 1, TTL: time.Minute, IssuedAt: time.UnixMilli(1)}.Marshal())
	f.Add([]byte{1, 0, 8})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := catalog.ParseHead(b)
		if err == nil && string(h.Marshal()) != string(b) {
			t.Errorf("%x is not the encoding of what it parses to", b)
		}
	})
}

func TestVerifyHead(t *testing.T) {
	now := time.Now()
	eu, us, ap := newAuthority(t, euWest, nil), newAuthority(t, usEast, nil), newAuthority(t, apSouth, nil)
	all := bundles(t, eu, us, ap)
	h := catalog.Head{TrustDomain: euWest, Consumer: usEast, Epoch: 1, Seq: 1, TTL: time.Minute, IssuedAt: now.Truncate(time.Millisecond).UTC()}
	good, err := catalog.Sign(h, eu.signer)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := catalog.VerifyHead(good, all, euWest, usEast, now); err != nil || *got != h {
		t.Fatalf("a good head: %+v, %v", got, err)
	}
	// forge signs h's bytes with an identity that Sign would refuse.
	forge := func(h catalog.Head, as *trust.Identity) *controlpb.SignedHead {
		own := h
		own.TrustDomain = as.ID.TrustDomain()
		signer := *as
		signer.ID = spiffeid.CatalogSigner(own.TrustDomain)
		sh, err := catalog.Sign(own, &signer)
		if err != nil {
			t.Fatal(err)
		}
		if own.TrustDomain != h.TrustDomain {
			sh.Head = h.Marshal()
		}
		return sh
	}
	gw, err := spiffeid.Gateway(euWest, "gateway-1")
	if err != nil {
		t.Fatal(err)
	}
	future := h
	future.IssuedAt = now.Add(time.Hour)
	futureHead, err := catalog.Sign(future, eu.signer)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, reason     string
		sh               *controlpb.SignedHead
		b                *trust.Bundles
		origin, consumer spiffeid.TrustDomain
		now              time.Time
	}{
		{"nothing", "malformed", nil, all, euWest, usEast, now},
		{"no chain", "signer", &controlpb.SignedHead{Head: good.Head, Signature: good.Signature}, all, euWest, usEast, now},
		{"garbage chain", "malformed", &controlpb.SignedHead{Head: good.Head, Signature: good.Signature, ChainDer: [][]byte{{1}}}, all, euWest, usEast, now},
		{"for somebody else", "consumer", good, all, euWest, apSouth, now},
		{"of somebody else", "signer", good, all, apSouth, usEast, now},
		{"bundle withdrawn", "signer", good, all.Without(euWest), euWest, usEast, now},
		{"expired signer", "signer", good, all, euWest, usEast, now.Add(40 * time.Hour)},
		{"signed by the peer's gateway", "signer", forge(h, issue(t, eu.ca, gw)), all, euWest, usEast, now},
		{"signed by the peer's control plane", "signer", forge(h, issue(t, eu.ca, spiffeid.ControlPlane(euWest))), all, euWest, usEast, now},
		{"signed by another member", "signer", forge(h, ap.signer), all, euWest, usEast, now},
		{"another head's signature", "signature", &controlpb.SignedHead{Head: future.Marshal(), Signature: good.Signature, ChainDer: good.ChainDer}, all, euWest, usEast, now},
		{"from the future", "time", futureHead, all, euWest, usEast, now},
	} {
		_, err := catalog.VerifyHead(c.sh, c.b, c.origin, c.consumer, c.now)
		var he *catalog.HeadError
		if !errors.As(err, &he) || he.Reason != c.reason {
			t.Errorf("%s: %v, want reason %s", c.name, err, c.reason)
		}
	}
	if _, err := catalog.Sign(h, us.signer); err == nil {
		t.Error("us-east signed for eu-west")
	}
}

func TestCheckAddress(t *testing.T) {
	for addr, ok := range map[string]bool{
		"198.51.100.4:7443": true, "[2001:db8::1]:7443": true, "gw.example.com:7443": true, "10.0.0.1:443": true, "gw:1": true,
		"127.0.0.1:7443": false, "[::1]:7443": false, "169.254.169.254:80": false, "[fe80::1]:1": false, "[fe80::1%25eth0]:1": false,
		"0.0.0.0:1": false, "[::]:1": false, "[::ffff:127.0.0.1]:1": false, "224.0.0.1:1": false, "255.255.255.255:1": false, "0.1.2.3:1": false,
		"127.1:80": false, "2130706433:80": false, "0x7f000001:80": false, "localhost:80": false, "x.localhost.:80": false,
		"198.51.100.4": false, "198.51.100.4:0": false, "198.51.100.4:65536": false, "198.51.100.4:080": false, "198.51.100.4:http": false,
		":7443": false, "": false, "a b:1": false, "a..b:1": false, "-a:1": false, "gw.example.com:7443/x": false, "user@gw:1": false,
	} {
		if err := catalog.CheckAddress(addr, false); (err == nil) != ok {
			t.Errorf("%q: %v", addr, err)
		}
	}
	for _, addr := range []string{"127.0.0.1:7443", "[::1]:7443", "localhost:1"} {
		if err := catalog.CheckAddress(addr, true); err != nil {
			t.Errorf("%q with loopback allowed: %v", addr, err)
		}
	}
	if err := catalog.CheckAddress("169.254.169.254:80", true); err == nil {
		t.Error("allowing loopback allows link-local")
	}
}

func TestStoreFollowsOrigin(t *testing.T) {
	now := time.Now
	eu := newAuthority(t, euWest, nil)
	p := newPeer(t, eu, now)
	b := bundles(t, eu)
	dir := storeDir(t)
	s := openStore(t, dir, catalog.StoreConfig{})

	p.publish(map[string][]byte{"svc/shop/checkout": service("shop", "checkout", 2), "gw/gateway-1": gateway("gateway-1", "198.51.100.4:7443")})
	r, err := s.Apply(euWest, p.origin.Update(usEast, 0, 0), b)
	if err != nil || !r.Changed || !r.Fresh {
		t.Fatalf("snapshot: %+v, %v", r, err)
	}
	if v := s.View(euWest); len(v.Services) != 1 || len(v.Gateways) != 1 || v.Services[0].GetZones()["a"].GetHealthy() != 2 {
		t.Errorf("view %+v", v)
	}

	// A delta: one changed, one removed, one new.
	p.publish(map[string][]byte{"svc/shop/checkout": service("shop", "checkout", 1), "svc/shop/cart": service("shop", "cart", 1)})
	e, q := s.Have(euWest)
	u := p.origin.Update(usEast, e, q)
	if u.Snapshot || len(u.Entries) != 3 {
		t.Errorf("want a delta of three entries, got %v", u)
	}
	if r, err := s.Apply(euWest, u, b); err != nil || !r.Changed {
		t.Fatalf("delta: %+v, %v", r, err)
	}
	if r, err := s.Apply(euWest, u, b); err != nil || r.Changed || r.Fresh {
		t.Errorf("the same delta again: %+v, %v", r, err)
	}
	if v := s.View(euWest); len(v.Services) != 2 || len(v.Gateways) != 0 {
		t.Errorf("view %+v", v)
	}

	// Signed again without change: fresher, not changed, nothing sent but the head.
	e, q = s.Have(euWest)
	if u := p.origin.Update(usEast, e, q); len(u.Entries) != 0 || u.Snapshot {
		t.Errorf("nothing is missing and %v is sent", u)
	}

	// The state survives a restart, and so does the refusal to go back.
	s2 := openStore(t, dir, catalog.StoreConfig{})
	if v := s2.View(euWest); v == nil || len(v.Services) != 2 || v.Head.Seq != s.View(euWest).Head.Seq {
		t.Errorf("after a restart: %+v", v)
	}
	if v := s2.View(apSouth); v != nil || s2.Freshness(apSouth, true) != 3 {
		t.Error("something is known of a stranger")
	}
	if err := s2.Forget(euWest); err != nil {
		t.Fatal(err)
	}
	if s2.View(euWest) != nil || len(s2.Origins()) != 0 || openStore(t, dir, catalog.StoreConfig{}).View(euWest) != nil {
		t.Error("what was forgotten is still there")
	}
}

func openStore(t testing.TB, dir *datadir.Dir, cfg catalog.StoreConfig) *catalog.Store {
	t.Helper()
	cfg.Self = usEast
	s, err := catalog.OpenStore(dir, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestRollbackForkJump(t *testing.T) {
	eu := newAuthority(t, euWest, nil)
	p := newPeer(t, eu, time.Now)
	b := bundles(t, eu)
	dir := storeDir(t)
	s := openStore(t, dir, catalog.StoreConfig{})
	must := func(u *controlpb.CatalogUpdate) {
		t.Helper()
		if _, err := s.Apply(euWest, u, b); err != nil {
			t.Fatal(err)
		}
	}
	p.publish(map[string][]byte{"svc/shop/a": service("shop", "a", 1)})
	old := p.origin.Update(usEast, 0, 0)
	must(old)
	p.publish(map[string][]byte{"svc/shop/a": service("shop", "a", 2)})
	second := p.origin.Update(usEast, 0, 0)
	must(second)

	for _, restarted := range []bool{false, true} {
		if restarted {
			s = openStore(t, dir, catalog.StoreConfig{})
		}
		var rb *catalog.RollbackError
		if _, err := s.Apply(euWest, old, b); !errors.As(err, &rb) || rb.HeldSeq != 2 || rb.Seq != 1 {
			t.Errorf("an older catalog (restarted: %v): %v", restarted, err)
		}
		if v := s.View(euWest); v.Services[0].GetZones()["a"].GetHealthy() != 2 {
			t.Error("it was believed")
		}
	}

	// A second signer with the same keys and epoch: another catalog 1.2.
	p.epoch = 1
	p.restart()
	p.publish(map[string][]byte{"svc/shop/b": service("shop", "b", 1)})
	p.publish(map[string][]byte{"svc/shop/c": service("shop", "c", 1)})
	fork := p.origin.Update(usEast, 0, 0)
	var fe *catalog.ForkError
	if _, err := s.Apply(euWest, fork, b); !errors.As(err, &fe) {
		t.Fatalf("a fork: %v", err)
	}
	for _, store := range []*catalog.Store{s, openStore(t, dir, catalog.StoreConfig{})} {
		c := store.Conflict(euWest)
		if c == nil || !proto.Equal(c.First, second.Head) || !proto.Equal(c.Second, fork.Head) {
			t.Errorf("evidence %v", c)
		}
		if v := store.View(euWest); v.Services[0].GetService().GetName() != "a" {
			t.Error("the first was not kept")
		}
	}

	// The forked origin learns of the head that we hold, and jumps.
	if err := p.origin.Meet(s.Signed(euWest), b); err != nil {
		t.Fatal(err)
	}
	p.publish(map[string][]byte{"svc/shop/d": service("shop", "d", 1)})
	for h := p.origin.Head(usEast); h.Epoch < 2; h = p.origin.Head(usEast) {
		<-p.origin.Changed()
	}
	must(p.origin.Update(usEast, 0, 0))
	if e, q, _ := s.Mark(euWest); e != 2 {
		t.Errorf("mark %d.%d, want the next epoch", e, q)
	}
	if err := p.origin.Meet(s.Signed(euWest), b); err != nil {
		t.Fatal(err)
	}
	if h := p.origin.Head(usEast); h.Epoch != 2 {
		t.Errorf("meeting its own newest head moved it to epoch %d", h.Epoch)
	}

	// An epoch beyond all reason.
	h := catalog.Head{TrustDomain: euWest, Consumer: usEast, Epoch: 3 + catalog.MaxEpochJump, Seq: 1, IssuedAt: time.Now(), TTL: time.Minute}
	sh, err := catalog.Sign(h, eu.signer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Apply(euWest, &controlpb.CatalogUpdate{Head: sh, Snapshot: true}, b); !errors.Is(err, catalog.ErrEpochJump) {
		t.Errorf("a far epoch: %v", err)
	}
	if err := p.origin.Meet(sh, b); !errors.Is(err, catalog.ErrEpochJump) {
		t.Errorf("meeting it: %v", err)
	}

	// A mark that was kept elsewhere protects a store that lost its files.
	empty := openStore(t, storeDir(t), catalog.StoreConfig{})
	empty.Remember(euWest, 2, 1, [32]byte{9})
	var rb *catalog.RollbackError
	if _, err := empty.Apply(euWest, old, b); !errors.As(err, &rb) {
		t.Errorf("below a remembered mark: %v", err)
	}
}

func TestRestoredBackupJumps(t *testing.T) {
	eu := newAuthority(t, euWest, nil)
	b := bundles(t, eu)
	s := openStore(t, storeDir(t), catalog.StoreConfig{})
	p := newPeer(t, eu, time.Now)
	p.epoch = 9
	p.publish(map[string][]byte{"svc/shop/a": service("shop", "a", 1)})
	if _, err := s.Apply(euWest, p.origin.Update(usEast, 0, 0), b); err != nil {
		t.Fatal(err)
	}
	p.epoch = 4 // restored
	p.restart()
	if err := p.origin.Meet(s.Signed(euWest), b); err != nil {
		t.Fatal(err)
	}
	p.publish(map[string][]byte{"svc/shop/a": service("shop", "a", 2)})
	if _, err := s.Apply(euWest, p.origin.Update(usEast, 0, 0), b); err != nil {
		t.Errorf("after the jump: %v", err)
	}
	if e, _, _ := s.Mark(euWest); e != 10 {
		t.Errorf("epoch %d, want one more than the one that was met", e)
	}
}

func TestForeignThingsRefuseTheHead(t *testing.T) {
	eu := newAuthority(t, euWest, nil)
	b := bundles(t, eu)
	svc := func(edit func(*controlpb.CatalogService)) []byte {
		m := &controlpb.CatalogService{Service: &controlpb.ServiceRef{Namespace: "shop", Name: "a"}}
		edit(m)
		return encode(m)
	}
	none := func(*controlpb.CatalogService) {}
	many := make([]*controlpb.ServicePort, 65)
	for i := range many {
		many[i] = &controlpb.ServicePort{Name: fmt.Sprintf("p%d", i), Number: 1}
	}
	for _, c := range []struct {
		name, key string
		body      []byte
	}{
		{"another service's key", "svc/shop/b", svc(none)},
		{"no service", "svc/shop/a", []byte{0xff}},
		{"bad name", "svc/shop/A", encode(&controlpb.CatalogService{Service: &controlpb.ServiceRef{Namespace: "shop", Name: "A"}})},
		{"identity of us", "svc/shop/a", svc(func(m *controlpb.CatalogService) { m.SpiffeIds = []string{"spiffe://us-east.acme/ns/shop/sa/a"} })},
		{"identity of a gateway", "svc/shop/a", svc(func(m *controlpb.CatalogService) { m.SpiffeIds = []string{"spiffe://eu-west.acme/strait/gateway/g"} })},
		{"identity in upper case", "svc/shop/a", svc(func(m *controlpb.CatalogService) { m.SpiffeIds = []string{"spiffe://EU-west.acme/ns/shop/sa/a"} })},
		{"port zero", "svc/shop/a", svc(func(m *controlpb.CatalogService) { m.Ports = []*controlpb.ServicePort{{Name: "http"}} })},
		{"doubled port", "svc/shop/a", svc(func(m *controlpb.CatalogService) {
			m.Ports = []*controlpb.ServicePort{{Name: "http", Number: 1}, {Name: "http", Number: 2}}
		})},
		{"many ports", "svc/shop/a", svc(func(m *controlpb.CatalogService) { m.Ports = many })},
		{"escape in a reason", "svc/shop/a", svc(func(m *controlpb.CatalogService) { m.Limits = &controlpb.OwnerLimits{DrainReason: "\x1b[31m"} })},
		{"loopback", "gw/g", gateway("g", "127.0.0.1:7443")},
		{"metadata service", "gw/g", gateway("g", "198.51.100.4:7443", "169.254.169.254:80")},
		{"another gateway's key", "gw/h", gateway("g", "198.51.100.4:7443")},
		{"gateway with a slash", "gw/a/b", gateway("a/b", "198.51.100.4:7443")},
		{"large entry", "svc/shop/a", append(svc(none), make([]byte, 70<<10)...)},
	} {
		s := openStore(t, storeDir(t), catalog.StoreConfig{})
		p := newPeer(t, eu, time.Now)
		p.publish(map[string][]byte{"svc/shop/good": service("shop", "good", 1), c.key: c.body})
		var fe *catalog.ForeignError
		if _, err := s.Apply(euWest, p.origin.Update(usEast, 0, 0), b); !errors.As(err, &fe) || fe.Key != c.key {
			t.Errorf("%s: %v", c.name, err)
		}
		if s.View(euWest) != nil {
			t.Errorf("%s: a part of it was believed", c.name)
		}
		p.stop()
	}
}

func TestQuotas(t *testing.T) {
	eu := newAuthority(t, euWest, nil)
	b := bundles(t, eu)
	now := time.Now()
	clock := func() time.Time { return now }
	entries := func(n int, healthy uint32) map[string][]byte {
		m := map[string][]byte{}
		for i := range n {
			name := fmt.Sprintf("s%d", i)
			m["svc/shop/"+name] = service("shop", name, healthy)
		}
		return m
	}
	p := newPeer(t, eu, clock)
	apply := func(s *catalog.Store, n int, healthy uint32) error {
		p.publish(entries(n, healthy))
		_, err := s.Apply(euWest, p.origin.Update(usEast, 0, 0), b)
		return err
	}
	quota := func(err error) string {
		var q *catalog.QuotaError
		if errors.As(err, &q) {
			return q.Quota
		}
		return fmt.Sprint(err)
	}
	s := openStore(t, storeDir(t), catalog.StoreConfig{MaxEntries: 10, MaxBytes: 2000, ChangesPerSecond: 5, Now: clock})
	if err := apply(s, 10, 1); err != nil {
		t.Fatalf("at the quota: %v", err)
	}
	if got := quota(apply(s, 11, 1)); got != "entries" {
		t.Errorf("above it: %s", got)
	}
	if got := quota(apply(s, 10, 2)); got != "changes" {
		t.Errorf("all change at once: %s", got)
	}
	now = now.Add(2 * time.Second)
	if err := apply(s, 10, 3); err != nil {
		t.Errorf("the allowance has grown: %v", err)
	}
	// Heads that change nothing are changes, too: each is stored.
	idle := openStore(t, storeDir(t), catalog.StoreConfig{MaxEntries: 10, ChangesPerSecond: 5, Now: clock})
	h := catalog.Head{TrustDomain: euWest, Consumer: usEast, Epoch: 1, Hash: emptyHash(t, eu), TTL: time.Minute, IssuedAt: now}
	for range 11 {
		h.Seq++
		sh, err := catalog.Sign(h, eu.signer)
		if err != nil {
			t.Fatal(err)
		}
		_, err = idle.Apply(euWest, &controlpb.CatalogUpdate{Head: sh, Snapshot: true}, b)
		if want := map[bool]string{false: "<nil>", true: "changes"}[h.Seq > 10]; quota(err) != want {
			t.Errorf("update %d in one moment: %s, want %s", h.Seq, quota(err), want)
		}
	}
	small := openStore(t, storeDir(t), catalog.StoreConfig{MaxBytes: 100, Now: clock})
	if got := quota(apply(small, 10, 4)); got != "bytes" {
		t.Errorf("too many bytes: %s", got)
	}
	if got := quota(p.origin.Set(usEast, entries(catalog.DefaultMaxEntries+1, 1))); got != "entries" {
		t.Errorf("an origin offers more than any consumer takes: %s", got)
	}
}

func TestTamperedEntries(t *testing.T) {
	eu := newAuthority(t, euWest, nil)
	b := bundles(t, eu)
	s := openStore(t, storeDir(t), catalog.StoreConfig{})
	p := newPeer(t, eu, time.Now)
	p.publish(map[string][]byte{"svc/shop/a": service("shop", "a", 1), "svc/shop/b": service("shop", "b", 1)})
	tamper := func(edit func(*controlpb.CatalogUpdate)) *controlpb.CatalogUpdate {
		u := proto.Clone(p.origin.Update(usEast, 0, 0)).(*controlpb.CatalogUpdate)
		edit(u)
		return u
	}
	for name, u := range map[string]*controlpb.CatalogUpdate{
		"entry left out":  tamper(func(u *controlpb.CatalogUpdate) { u.Entries = u.Entries[:1] }),
		"body changed":    tamper(func(u *controlpb.CatalogUpdate) { u.Entries[0].Body = service("shop", "a", 9) }),
		"version changed": tamper(func(u *controlpb.CatalogUpdate) { u.Entries[0].Version = 7 }),
		"entry doubled":   tamper(func(u *controlpb.CatalogUpdate) { u.Entries = append(u.Entries, u.Entries[0]) }),
		"entry added": tamper(func(u *controlpb.CatalogUpdate) {
			u.Entries = append(u.Entries, &controlpb.CatalogEntry{Key: "svc/shop/c", Version: 1})
		}),
		"tombstone":           tamper(func(u *controlpb.CatalogUpdate) { u.Entries[0].Deleted = true }),
		"a million entries":   tamper(func(u *controlpb.CatalogUpdate) { u.Entries = make([]*controlpb.CatalogEntry, 1e6) }),
		"delta from nothing":  tamper(func(u *controlpb.CatalogUpdate) { u.Snapshot = false }),
		"no head":             {},
		"key longer than all": tamper(func(u *controlpb.CatalogUpdate) { u.Entries[0].Key = strings.Repeat("k", 300) }),
	} {
		if _, err := s.Apply(euWest, u, b); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if e, _, _ := s.Mark(euWest); e != 0 || s.View(euWest) != nil {
		t.Error("a refused update left something behind")
	}
}

func TestFreshness(t *testing.T) {
	now := time.Now().Truncate(time.Millisecond)
	clock := func() time.Time { return now }
	eu := newAuthority(t, euWest, clock)
	b := bundles(t, eu)
	s := openStore(t, storeDir(t), catalog.StoreConfig{Now: clock})
	h := catalog.Head{TrustDomain: euWest, Consumer: usEast, Epoch: 1, Seq: 1, Hash: emptyHash(t, eu), TTL: time.Minute, IssuedAt: now.Add(-5 * time.Minute)}
	put := func() {
		t.Helper()
		sh, err := catalog.Sign(h, eu.signer)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Apply(euWest, &controlpb.CatalogUpdate{Head: sh, Snapshot: true}, b); err != nil {
			t.Fatal(err)
		}
	}
	want := func(what, without, with string) {
		t.Helper()
		if a, b := s.Freshness(euWest, false).String(), s.Freshness(euWest, true).String(); a != without || b != with {
			t.Errorf("%s: %s without a tunnel, %s with; want %s, %s", what, a, b, without, with)
		}
	}
	put()
	want("just arrived, from a clock that is behind", "fresh", "fresh")
	now = now.Add(time.Minute)
	want("one ttl", "fresh", "fresh")
	now = now.Add(time.Second)
	want("more than one ttl", "stale", "stale")
	put() // a replay of the same head
	want("replayed", "stale", "stale")
	now = now.Add(2*time.Minute + time.Second)
	want("more than three", "withdrawn", "stale")
	h.IssuedAt = now
	put()
	want("signed again", "fresh", "fresh")

	// A head that was held back for an hour is not fresh because it has only now arrived.
	now = now.Add(time.Hour)
	h.IssuedAt = h.IssuedAt.Add(time.Second)
	put()
	want("held back", "withdrawn", "stale")
}

// emptyHash is the hash of no entries.
func emptyHash(t *testing.T, a *authority) [32]byte {
	p := newPeer(t, a, time.Now)
	p.publish(nil)
	return p.origin.Head(usEast).Hash
}

// TestOriginResigns: heads are signed again every ttl/3, the term is read before each signature, and a lost term stops signing.
func TestOriginResigns(t *testing.T) {
	eu := newAuthority(t, euWest, nil)
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		reads, lost := 0, false
		o, err := catalog.NewOrigin(catalog.OriginConfig{
			Self: euWest, Signer: func() *trust.Identity { return eu.signer },
			Epoch: func(context.Context, uint64) (uint64, error) {
				mu.Lock()
				defer mu.Unlock()
				reads++
				if lost {
					return 0, errors.New("another replica holds the term")
				}
				return 5, nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := o.Set(usEast, map[string][]byte{"svc/shop/a": nil}); err != nil {
			t.Fatal(err)
		}
		if o.Update(usEast, 0, 0) != nil || o.Head(usEast) != nil {
			t.Error("something is offered before it is signed")
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- o.Run(ctx) }()
		start := time.Now()
		synctest.Wait()
		first := o.Head(usEast)
		if first == nil || first.Epoch != 5 || first.Seq != 1 || !first.IssuedAt.Equal(start) {
			t.Fatalf("first head %+v", first)
		}
		<-o.Changed()
		if d := time.Since(start); d != 20*time.Second {
			t.Errorf("signed again after %v, want ttl/3", d)
		}
		again := o.Head(usEast)
		if again.Seq != 1 || again.Hash != first.Hash || !again.IssuedAt.Equal(start.Add(20*time.Second)) {
			t.Errorf("signed again: %+v", again)
		}
		mu.Lock()
		if reads != 2 {
			t.Errorf("the term was read %d times for two signatures", reads)
		}
		lost = true
		mu.Unlock()
		if err := o.Set(usEast, nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		if h := o.Head(usEast); *h != *again {
			t.Errorf("signed without the term: %+v", h)
		}
		mu.Lock()
		lost = false
		mu.Unlock()
		<-o.Changed()
		if h := o.Head(usEast); h.Seq != 2 || h.Count != 0 {
			t.Errorf("after the term came back: %+v", h)
		}
		o.Drop(usEast)
		if o.Update(usEast, 0, 0) != nil {
			t.Error("something is offered to a dropped consumer")
		}
		if err := o.Set(usEast, map[string][]byte{"svc/shop/a": nil}); err != nil {
			t.Fatal(err)
		}
		<-o.Changed()
		if h := o.Head(usEast); h.Seq != 3 {
			t.Errorf("a consumer that comes back is at %d, want a number that was not used", h.Seq)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
