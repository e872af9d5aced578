// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/discovery"
	"github.com/strait-mesh/strait/controlplane/identity"
	"github.com/strait-mesh/strait/controlplane/rotation"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// rotor is a control plane with its real CA whose processes and members are played by the test.
type rotor struct {
	t *testing.T
	*ControlPlane
	op *operator

	mu      sync.Mutex
	there   map[string]spiffeid.ID
	acked   map[string]uint64
	members map[string]uint64 // cluster → what it has seen
}

func newRotor(t *testing.T) *rotor {
	t.Helper()
	r := &rotor{t: t, ControlPlane: closed(t), there: map[string]spiffeid.ID{}, acked: map[string]uint64{}, members: map[string]uint64{}}
	r.play()
	return r
}

// play puts the test in the place of discovery and federation.
func (r *rotor) play() {
	c := r.ControlPlane
	r.op = &operator{c: c}
	c.rotation.connected = func() map[string]spiffeid.ID {
		r.mu.Lock()
		defer r.mu.Unlock()
		out := map[string]spiffeid.ID{}
		for k, v := range r.there {
			out[k] = v
		}
		return out
	}
	c.rotation.holders = func() ([]byte, []discovery.Holder) {
		r.mu.Lock()
		defer r.mu.Unlock()
		sequence := c.ca.Bundle().Sequence()
		body, err := proto.Marshal(&controlpb.Bundle{TrustDomain: c.self.trustDomain.String(), Sequence: sequence})
		r.must(err)
		var list []discovery.Holder
		for name, id := range r.there {
			list = append(list, discovery.Holder{Peer: id, Node: name, Acked: r.acked[name] == sequence})
		}
		return body, list
	}
	c.rotation.members = func() (out []rotation.MemberState) {
		r.mu.Lock()
		defer r.mu.Unlock()
		for name, seen := range r.members {
			out = append(out, rotation.MemberState{Cluster: name, Seen: seen, Reachable: true})
		}
		return out
	}
}

func (r *rotor) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// process starts a process with an identity.
func (r *rotor) process(name string) {
	r.t.Helper()
	id, err := spiffeid.Workload(r.self.trustDomain, "shop", strings.TrimPrefix(name, "shop/"))
	if !strings.Contains(name, "/") {
		id, err = spiffeid.Gateway(r.self.trustDomain, name)
	}
	r.must(err)
	r.mu.Lock()
	r.there[name] = id
	r.mu.Unlock()
	r.renew(name, false)
}

// renew issues an identity as the RPC does.
func (r *rotor) renew(name string, application bool) {
	r.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	r.must(err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	r.must(err)
	chain, err := r.ca.IssueCSR(csr, r.there[name], 0)
	r.must(err)
	leaf, err := x509.ParseCertificate(chain[0])
	r.must(err)
	r.renewed(identity.Renewal{ID: r.there[name], Proxy: name, Application: application, Issued: trust.Issued(leaf), NotAfter: leaf.NotAfter})
}

// ack has everybody there, and every member, take the present bundle, but for those named.
func (r *rotor) ack(but ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	without := fmt.Sprint(but)
	for name := range r.there {
		if !strings.Contains(without, name) {
			r.acked[name] = r.ca.Bundle().Sequence()
		}
	}
	for name := range r.members {
		if !strings.Contains(without, name) {
			r.members[name] = r.ca.Bundle().Sequence()
		}
	}
}

func (r *rotor) rotate(action string, force bool) (*controlpb.TrustStatusResponse, error) {
	got, err := r.op.TrustRotate(r.t.Context(), &controlpb.TrustRotateRequest{Action: action, Force: force})
	if err != nil {
		err = wire.FromStatus(err)
	}
	return got, err
}

func (r *rotor) done(action string) *controlpb.TrustStatusResponse {
	r.t.Helper()
	got, err := r.rotate(action, false)
	if err != nil {
		r.t.Fatalf("%s: %v", action, err)
	}
	return got
}

// refused expects a step to be refused with a code, naming exactly who is waited for.
func (r *rotor) refused(action string, code problem.Code, names ...string) {
	r.t.Helper()
	before := r.ca.State()
	_, err := r.rotate(action, false)
	if !problem.Is(err, code) {
		r.t.Errorf("%s: %v, want %s", action, err, code)
		return
	}
	if after := r.ca.State(); after.Phase != before.Phase {
		r.t.Errorf("%s was refused and done", action)
	}
	what := problem.From(err).What
	if code == problem.RotationWaits && len(strings.Split(what, "\n")) != len(names) {
		r.t.Errorf("%s waits for\n%s\nwant %v", action, what, names)
	}
	for _, n := range names {
		if !strings.Contains(what, n) {
			r.t.Errorf("%s does not wait for %s:\n%s", action, n, what)
		}
	}
}

func (r *rotor) status() *controlpb.TrustStatusResponse {
	r.t.Helper()
	s, err := r.op.TrustStatus(r.t.Context(), nil)
	r.must(err)
	return s
}

// verifies says whether the control plane's own identities verify by a bundle.
func (r *rotor) verifies(b *trust.Bundle) bool {
	r.t.Helper()
	bundles, err := trust.NewBundles(b)
	r.must(err)
	_, own := trust.Verify(r.source.Identity().Chain, bundles, time.Now())
	_, signer := trust.Verify(r.signer.Load().Chain, bundles, time.Now())
	if (own == nil) != (signer == nil) {
		r.t.Errorf("control plane: %v; catalog signer: %v", own, signer)
	}
	return own == nil
}

// TestRotationStepByStep takes a root through a whole rotation with the real CA: each step is refused while it would cut anybody off, and
// what the control plane itself presents verifies for who knows only the old root, until retire, and for who knows only the new one.
func TestRotationStepByStep(t *testing.T) {
	r := newRotor(t)
	r.process("shop/web")
	r.process("gateway-1")
	r.members["eu-west"] = 1
	r.ack()
	old := r.ca.Bundle()
	if s := r.status(); s.Phase != "steady" || !s.MayAdvance || s.Source != "strait" || s.Sequence != old.Sequence() {
		t.Errorf("at the start %+v", s)
	}
	r.refused("activate", problem.RotationPhase)
	r.refused("retire", problem.RotationPhase)
	r.refused("abort", problem.RotationPhase)
	r.refused("sideways", problem.Usage)

	if s := r.done("prepare"); s.Phase != "prepared" || s.Sequence != old.Sequence()+1 || s.MayAdvance {
		t.Errorf("prepared %+v", s)
	}
	both := r.ca.Bundle()
	if len(both.Roots()) != 2 || !r.source.Bundles().Get(r.self.trustDomain).Equal(both) || !r.verifies(old) {
		t.Error("the prepared root is trusted here, and nothing is issued by it")
	}
	r.done("prepare") // an answer that was lost
	r.refused("retire", problem.RotationPhase)
	r.refused("activate", problem.RotationWaits, "proxy shop/web", "proxy gateway-1")
	r.ack("gateway-1", "eu-west")
	r.refused("activate", problem.RotationWaits, "proxy gateway-1")
	r.ack("eu-west") // a member may lag
	if s := r.status(); !s.MayAdvance {
		t.Errorf("everybody has it: %+v", s.Progress)
	}

	if s := r.done("activate"); s.Phase != "activated" || len(s.Progress) != 0 {
		t.Errorf("activated %+v", s)
	}
	fresh, err := both.WithRoots(both.Roots()[1:])
	r.must(err)
	if !r.verifies(old) || !r.verifies(both) || !r.verifies(fresh) {
		t.Error("the own identities do not verify for everybody")
	}
	if before := r.recall(); before.IsZero() || trust.Issued(r.source.Identity().Chain[0]).Before(before) {
		t.Errorf("own identity of before the recall at %v", before)
	}
	r.done("activate")
	r.refused("prepare", problem.RotationPhase)
	r.refused("abort", problem.RotationPhase)
	r.refused("retire", problem.RotationWaits, "member eu-west", "proxy shop/web", "proxy gateway-1")
	r.ack()
	r.renew("shop/web", false)
	r.refused("retire", problem.RotationWaits, "proxy gateway-1")
	r.renew("gateway-1", false)
	if s := r.status(); !s.MayAdvance {
		t.Errorf("everybody has renewed: %+v", s.Progress)
	}
	_, _, err = r.jwtSigner().SignJWT(r.there["shop/web"], []string{"a"}) // by the new key: waited for by nobody
	r.must(err)

	s := r.done("retire")
	if s.Phase != "steady" || s.Sequence != both.Sequence()+1 || len(s.Progress) != 0 {
		t.Errorf("retired %+v", s)
	}
	if now := r.ca.Bundle(); len(now.Roots()) != 1 || now.Roots()[0].Equal(old.Roots()[0]) {
		t.Error("the old root is still in the bundle")
	}
	if !r.verifies(fresh) || r.verifies(old) || len(r.source.Identity().Chain) != 2 {
		t.Error("the own identities are not of the new root alone")
	}
	r.refused("retire", problem.RotationPhase)
}

func TestRotationAborted(t *testing.T) {
	r := newRotor(t)
	old := r.ca.Bundle()
	r.done("prepare")
	s := r.done("abort")
	if now := r.ca.Bundle(); s.Phase != "steady" || now.Hash() != old.Hash() || now.Sequence() != old.Sequence()+2 || !r.verifies(now) {
		t.Errorf("aborted %+v", s)
	}
}

// Who is left behind by force is named in the answer, and operators whose certificates end with the old root in any case.
func TestRotationForced(t *testing.T) {
	r := newRotor(t)
	r.process("shop/web")
	r.process("gateway-1")
	r.members["eu-west"] = 1
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	r.must(err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	r.must(err)
	_, err = r.op.AccessIssue(t.Context(), &controlpb.AccessIssueRequest{Name: "alice", Role: "viewer", CsrDer: csr, TtlSeconds: 3600})
	r.must(err)
	names := func(s *controlpb.TrustStatusResponse) (out []string) {
		for _, p := range s.Progress {
			out = append(out, p.Kind+" "+p.Name)
		}
		return out
	}
	r.done("prepare")
	r.ack("shop/web", "eu-west")
	s, err := r.rotate("activate", true)
	r.must(err)
	if got := fmt.Sprint(names(s)); got != "[proxy shop/web]" {
		t.Errorf("activate left behind %s", got)
	}
	r.ack("shop/web", "eu-west")
	r.renew("gateway-1", false)
	r.refused("retire", problem.RotationWaits, "member eu-west", "proxy shop/web")
	s, err = r.rotate("retire", true)
	r.must(err)
	if got := fmt.Sprint(names(s)); got != "[member eu-west proxy shop/web operator alice]" || s.Phase != "steady" {
		t.Errorf("retire left behind %s", got)
	}
}

// What is known of processes survives the control plane, and a name that is not its own counts for nobody.
func TestRotationSurvivesRestart(t *testing.T) {
	r := newRotor(t)
	r.process("shop/web")
	r.process("shop/gone")
	r.done("prepare")
	r.ack()
	r.noteAcknowledged()
	delete(r.there, "shop/gone")
	_, _, err := r.jwtSigner().SignJWT(r.there["shop/web"], []string{"a"})
	r.must(err)
	r.done("activate")
	r.renew("shop/web", false)
	r.renewed(identity.Renewal{ID: r.there["shop/web"], Proxy: "other/gone", Issued: time.Now(), NotAfter: time.Now().Add(time.Hour)})
	stop := loop(t, r.rotation.Run)
	stop()
	r.must(r.dir.Close())

	c, err := New(Config{DataDir: r.dir.Path()})
	r.must(err)
	t.Cleanup(func() { _ = c.dir.Close() })
	r.ControlPlane = c
	r.play()
	if s := r.status(); s.Phase != "activated" {
		t.Fatalf("after a restart %+v", s)
	}
	r.refused("retire", problem.RotationWaits, "proxy shop/gone holds an identity of", "tokens JWT-SVIDs")
	r.must(c.denied.Add(r.op.c.mustID(t, "shop", "gone"), "gone for good"))
	r.refused("retire", problem.RotationWaits, "tokens JWT-SVIDs")
}

func (c *ControlPlane) mustID(t *testing.T, namespace, account string) spiffeid.ID {
	t.Helper()
	id, err := spiffeid.Workload(c.self.trustDomain, namespace, account)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// loop runs f until the returned function.
func loop(t *testing.T, f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestRotationIsFollowed: what the CA does by itself is followed at once, too, and who acknowledges is noted as it happens.
func TestRotationIsFollowed(t *testing.T) {
	r := newRotor(t)
	r.process("shop/web")
	defer loop(t, r.rotationLoop)()
	wait := func(what string, cond func() bool) {
		t.Helper()
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for end := time.After(20 * time.Second); !cond(); {
			select {
			case <-tick.C:
			case <-end:
				t.Fatal("not within 20 s: " + what)
			}
		}
	}
	r.must(r.ca.Prepare())
	wait("the bundle", func() bool { return r.source.Bundles().Get(r.self.trustDomain).Equal(r.ca.Bundle()) })
	r.ack()
	wait("the acknowledgement", func() bool { return r.status().MayAdvance })
	r.must(r.ca.Activate())
	wait("own identities", func() bool { return len(r.source.Identity().Chain) == 3 && len(r.signer.Load().Chain) == 3 })
}
