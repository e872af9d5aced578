// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/discovery"
	"github.com/strait-mesh/strait/controlplane/identity"
	"github.com/strait-mesh/strait/controlplane/rotation"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

// closed is a control plane that does not run.
func closed(t *testing.T) *ControlPlane { return closedAt(t, nil) }

func closedAt(t *testing.T, now func() time.Time) *ControlPlane {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "d")
	if _, err := Init(InitConfig{DataDir: dir, Federation: "acme", Cluster: "us-east", Region: "us-east-1"}); err != nil {
		t.Fatal(err)
	}
	c, err := New(Config{DataDir: dir, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.dir.Close() })
	return c
}

func TestWithdrawnIdentityLosesItsConnections(t *testing.T) {
	c := closed(t)
	web, err := spiffeid.Workload(c.self.trustDomain, "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	cart, err := spiffeid.Workload(c.self.trustDomain, "shop", "cart")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan string, 1)
	c.registry.Add(withdrawal.Subject{Identity: web}, func(reason string) { ended <- reason })
	c.registry.Add(withdrawal.Subject{Identity: cart}, func(string) { t.Error("another identity's connection was ended") })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.denyLoop(ctx) }()
	if err := c.denied.Add(web, "stolen"); err != nil {
		t.Fatal(err)
	}
	select {
	case reason := <-ended:
		if reason != "stolen" {
			t.Errorf("ended for %q", reason)
		}
	case <-time.After(5 * time.Second):
		t.Error("the connection stands after 5 s")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestAPICertificateFollowsItsOperator(t *testing.T) {
	c := closed(t)
	leaf := &x509.Certificate{Subject: pkix.Name{CommonName: "alice", Organization: []string{"admin"}}}
	if c.allowAPIClient(leaf) == nil {
		t.Error("allowed without a role")
	}
	for _, step := range []struct {
		role string
		want bool
	}{{"admin", true}, {"viewer", false}, {"admin", true}} {
		if err := c.roles.grant("alice", step.role, time.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		if err := c.allowAPIClient(leaf); (err == nil) != step.want {
			t.Errorf("an admin's certificate while alice is %s: %v", step.role, err)
		}
	}
	id, err := spiffeid.Operator(c.self.trustDomain, "alice")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.denied.Add(id, "left"); err != nil {
		t.Fatal(err)
	}
	if c.allowAPIClient(leaf) == nil {
		t.Error("allowed after alice was withdrawn")
	}
}

func TestWhoMayWithdrawWhom(t *testing.T) {
	c := closed(t)
	as := func(role string) context.Context {
		if err := c.roles.grant(role, role, time.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		id, err := spiffeid.Operator(c.self.trustDomain, role)
		if err != nil {
			t.Fatal(err)
		}
		return peer.NewContext(t.Context(), &peer.Peer{AuthInfo: identity.AuthInfo{Peer: trust.Peer{ID: id}}})
	}
	for _, tt := range []struct {
		path, role string
		want       bool
	}{
		{"ns/shop/sa/web", "operator", true},
		{"strait/gateway/gateway-1", "operator", false},
		{"strait/gateway/gateway-1", "admin", true},
		{"strait/operator/admin", "operator", false},
		{"strait/controlplane", "admin", false},
		{"strait/catalog-signer", "admin", false},
	} {
		id, o := "spiffe://"+c.self.trustDomain.String()+"/"+tt.path, &operator{c: c}
		if _, err := o.WorkloadEvict(as(tt.role), &controlpb.WorkloadEvictRequest{SpiffeId: id}); (err == nil) != tt.want {
			t.Errorf("%s withdraws %s: %v", tt.role, tt.path, err)
		}
		if _, err := o.TrustRevoke(as(tt.role), &controlpb.TrustRevokeRequest{SpiffeId: id, IssuedBeforeNow: true}); (err == nil) != tt.want {
			t.Errorf("%s revokes %s: %v", tt.role, tt.path, err)
		}
		if _, err := o.WorkloadReadmit(as(tt.role), &controlpb.WorkloadReadmitRequest{SpiffeId: id}); (err == nil) != tt.want {
			t.Errorf("%s readmits %s: %v", tt.role, tt.path, err)
		}
	}
	for _, id := range []string{"spiffe://eu-west.acme/ns/shop/sa/web", "shop/web", ""} {
		_, err := (&operator{c: c}).WorkloadEvict(as("admin"), &controlpb.WorkloadEvictRequest{SpiffeId: id})
		if !problem.Is(wire.FromStatus(err), problem.Usage) {
			t.Errorf("withdrawal of %q: %v", id, err)
		}
	}
	if n := len(c.denied.All()); n != 2 {
		t.Errorf("%d identities on the list: %v", n, c.denied.All())
	}
}

// TestWithdrawnGetNothing: neither a token nor a certificate is issued to a withdrawn identity, a token of before is useless then and
// afterwards, and once it is readmitted a new one works.
func TestWithdrawnGetNothing(t *testing.T) {
	now := time.Date(2026, 9, 1, 12, 0, 0, 700e6, time.UTC)
	var mu sync.Mutex
	c := closedAt(t, func() time.Time { mu.Lock(); defer mu.Unlock(); return now })
	o := &operator{c: c}
	web, err := spiffeid.Workload(c.self.trustDomain, "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	token := func() error {
		_, err := o.WorkloadToken(t.Context(), &controlpb.WorkloadTokenRequest{Namespace: "shop", ServiceAccount: "web", Proxy: "web-1"})
		return wire.FromStatus(err)
	}
	issue := func() error { _, err := c.issueAtRegistration(csr(t), web); return err }
	usable := func() (n int) {
		for _, r := range c.tokens.List() {
			if s := r.State(now); s == "unused" || s == "bound" {
				n++
			}
		}
		return n
	}
	if err := errors.Join(token(), issue()); err != nil || usable() == 0 {
		t.Fatal(err, usable())
	}
	before := usable()
	if _, err := o.WorkloadEvict(t.Context(), &controlpb.WorkloadEvictRequest{SpiffeId: web.String(), Reason: "stolen"}); err != nil {
		t.Fatal(err)
	}
	if usable() != before-1 {
		t.Errorf("%d usable tokens of %d: the withdrawn identity's one stands, or another one fell", usable(), before)
	}
	if err := token(); !problem.Is(err, problem.IdentityWithdrawn) || !strings.Contains(problem.From(err).Reason(), "stolen") {
		t.Errorf("a token for a withdrawn identity: %v", err)
	}
	if err := issue(); !problem.Is(err, problem.RegistrationRefused) {
		t.Errorf("a registration of a withdrawn identity: %v", err)
	}
	if err := c.denied.Readmit(web); err != nil {
		t.Fatal(err)
	}
	if err := issue(); !problem.Is(err, problem.RegistrationBusy) {
		t.Errorf("a registration in the second of the readmission: %v", err)
	}
	mu.Lock()
	now = now.Add(300 * time.Millisecond)
	mu.Unlock()
	if err := errors.Join(issue(), token()); err != nil || usable() != before {
		t.Errorf("after the readmission: %v; %d usable tokens", err, usable())
	}
	if _, err := o.WorkloadReadmit(t.Context(), &controlpb.WorkloadReadmitRequest{SpiffeId: "spiffe://" + c.self.trustDomain.String() + "/ns/shop/sa/other"}); !problem.Is(wire.FromStatus(err), problem.NotFound) {
		t.Errorf("readmission of who is not withdrawn: %v", err)
	}
}

// csr is a request for a new key.
func csr(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// ads is a proxy's discovery stream, inside the process.
type ads struct {
	grpc.ServerStream
	ctx  context.Context
	in   chan *controlpb.DeltaDiscoveryRequest
	sent chan *controlpb.DeltaDiscoveryResponse
}

func (a *ads) Context() context.Context                       { return a.ctx }
func (a *ads) Send(r *controlpb.DeltaDiscoveryResponse) error { a.sent <- r; return nil }
func (a *ads) Recv() (*controlpb.DeltaDiscoveryRequest, error) {
	select {
	case r := <-a.in:
		return r, nil
	case <-a.ctx.Done():
		return nil, a.ctx.Err()
	}
}

// proxy opens a discovery stream that is subscribed to withdrawn identities.
func proxy(t *testing.T, c *ControlPlane, name, sa string) *ads {
	t.Helper()
	id, err := spiffeid.Workload(c.self.trustDomain, "shop", sa)
	if err != nil {
		t.Fatal(err)
	}
	owners := maps.Clone(*c.owners.Load())
	owners[name] = id
	c.owners.Store(&owners)
	ctx, cancel := context.WithCancel(peer.NewContext(context.Background(), &peer.Peer{AuthInfo: identity.AuthInfo{Peer: trust.Peer{ID: id}}}))
	a := &ads{ctx: ctx, in: make(chan *controlpb.DeltaDiscoveryRequest, 1), sent: make(chan *controlpb.DeltaDiscoveryResponse, 64)}
	done := make(chan error, 1)
	go func() { done <- c.discovery.DeltaAggregatedResources(a) }()
	t.Cleanup(func() { cancel(); <-done })
	a.in <- &controlpb.DeltaDiscoveryRequest{
		Node: &controlpb.Node{Id: name}, TypeUrl: controlpb.TypeDenied, ResourceNamesSubscribe: []string{discovery.Wildcard},
	}
	return a
}

// ack acknowledges the next response.
func (a *ads) ack(t *testing.T) {
	t.Helper()
	select {
	case r := <-a.sent:
		a.in <- &controlpb.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}
	case <-time.After(10 * time.Second):
		t.Fatal("nothing was sent")
	}
}

// publish is what the compile loop does with withdrawn identities.
func (c *ControlPlane) publishDenied(t *testing.T) {
	t.Helper()
	out := map[string]proto.Message{}
	for id, d := range c.denied.All() {
		m := &controlpb.Denied{SpiffeId: id.String(), Reason: d.Reason}
		if !d.IssuedBefore.IsZero() {
			m.IssuedBeforeMs = d.IssuedBefore.UnixMilli()
		}
		out[id.String()] = m
	}
	if err := c.discovery.Replace(controlpb.TypeDenied, out); err != nil {
		t.Fatal(err)
	}
}

// TestWhoHasConfirmed: a process counts once it has acknowledged the withdrawal as it is published now; one that is not there is
// listed with when it was seen.
func TestWhoHasConfirmed(t *testing.T) {
	c := closed(t)
	o := &operator{c: c}
	web, err := spiffeid.Workload(c.self.trustDomain, "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	gone, err := spiffeid.Workload(c.self.trustDomain, "shop", "gone")
	if err != nil {
		t.Fatal(err)
	}
	c.rotation.Issued("shop/gone-1", gone, false, rotation.Identity{Issued: time.Now(), NotAfter: time.Now().Add(time.Hour)})
	c.publishDenied(t)
	quick, slow := proxy(t, c, "shop/quick-1", "quick"), proxy(t, c, "shop/slow-1", "slow")
	quick.ack(t)
	slow.ack(t)
	if err := c.denied.Add(web, "stolen"); err != nil {
		t.Fatal(err)
	}
	list := func() (confirmed uint32, unconfirmed string) {
		r, err := o.Withdrawals(t.Context(), &controlpb.WithdrawalsRequest{})
		if err != nil || len(r.Withdrawals) != 1 || r.Withdrawals[0].SpiffeId != web.String() {
			t.Fatal(r, err)
		}
		return r.Withdrawals[0].Confirmed, strings.Join(r.Withdrawals[0].Unconfirmed, "; ")
	}
	if n, text := list(); n != 0 {
		t.Errorf("before it is published %d have confirmed it; %s", n, text)
	}
	c.publishDenied(t)
	quick.ack(t)
	want := func(n uint32, texts ...string) {
		t.Helper()
		for limit := time.Now().Add(10 * time.Second); ; {
			changed := c.discovery.Changed()
			got, text := list()
			ok := got == n && strings.Count(text, ";") == len(texts)-1
			for _, s := range texts {
				ok = ok && strings.Contains(text, s)
			}
			if ok {
				return
			}
			if time.Now().After(limit) {
				t.Fatalf("%d have confirmed, not %d; unconfirmed %s; want %q", got, n, text, texts)
			}
			select {
			case <-changed:
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	want(1, "shop/slow-1 (connected", "shop/gone-1 (last seen 20")
	slow.ack(t)
	want(2, "shop/gone-1 (last seen")

	// The readmission is another version: nobody has confirmed that one.
	if err := c.denied.Readmit(web); err != nil {
		t.Fatal(err)
	}
	want(0, "shop/quick-1", "shop/slow-1", "shop/gone-1")
	c.publishDenied(t)
	quick.ack(t)
	want(1, "shop/slow-1", "shop/gone-1")

	// A member hears numbers, and of its own identities only.
	fence, _ := c.denied.Find(web)
	ask := func(from spiffeid.TrustDomain, d ...askedDenial) ([]answeredDenial, error) {
		body, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		reply, err := c.handleWithdrawn(t.Context(), from, body)
		if err != nil {
			return nil, err
		}
		var out []answeredDenial
		return out, json.Unmarshal(reply, &out)
	}
	got, err := ask(c.self.trustDomain, askedDenial{ID: web.String(), IssuedBefore: fence.IssuedBefore.UnixMilli()}, askedDenial{ID: web.String()}, askedDenial{ID: gone.String()})
	if err != nil || !slices.Equal(got, []answeredDenial{{true, 2}, {false, 3}, {false, 3}}) {
		t.Errorf("a member hears %+v, %v", got, err)
	}
	eu, err := spiffeid.ParseTrustDomain("eu-west.acme")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range [][]askedDenial{{{ID: web.String()}}, {{ID: "x"}}, make([]askedDenial, maxAsked+1)} {
		if got, err := ask(eu, d...); err == nil {
			t.Errorf("%.60v was answered: %v", d, got)
		}
	}

	// Eviction waits for those that are missing as long as its caller does.
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	r, err := o.WorkloadEvict(ctx, &controlpb.WorkloadEvictRequest{SpiffeId: web.String()})
	if err != nil || len(r.Unconfirmed) != 3 || ctx.Err() == nil {
		t.Errorf("%v, %v; it has waited: %v", r, err, ctx.Err() != nil)
	}
}
