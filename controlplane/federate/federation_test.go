// SPDX-License-Identifier: Apache-2.0

package federate_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// admit joins joiner to issuer.
func admit(t *testing.T, issuer, joiner *cluster) {
	t.Helper()
	token := issuer.issue(&controlpb.TokenIssueRequest{Cluster: joiner.name})
	joiner.waitGateway()
	if _, err := joiner.join(token); err != nil {
		t.Fatal(err)
	}
	issuer.waitState(joiner.name, federate.StateReady)
}

func service(t *testing.T, ns, name string) (key string, body []byte) {
	t.Helper()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(&controlpb.CatalogService{
		Service: &controlpb.ServiceRef{Namespace: ns, Name: name},
		Ports:   []*controlpb.ServicePort{{Name: "http", Number: 80, Protocol: controlpb.Protocol_PROTOCOL_HTTP1}},
		Zones:   map[string]*controlpb.HealthCounts{"a": {Healthy: 2}}, ExportId: "export-" + name,
	})
	must(t, err)
	return "svc/" + ns + "/" + name, b
}

func offer(t *testing.T, to *cluster, ns string, names ...string) map[spiffeid.TrustDomain]map[string][]byte {
	t.Helper()
	entries := map[string][]byte{}
	for _, n := range names {
		k, b := service(t, ns, n)
		entries[k] = b
	}
	return map[spiffeid.TrustDomain]map[string][]byte{to.td: entries}
}

func (c *cluster) waitServices(peer string, want ...string) {
	c.w.t.Helper()
	c.eventually("services of "+peer+": "+strings.Join(want, " "), func(v *federate.View) bool {
		p := v.ByCluster(federation.ClusterName(peer))
		if p == nil || p.Catalog == nil {
			return false
		}
		var got []string
		for _, s := range p.Catalog.Services {
			got = append(got, s.GetService().GetName())
		}
		slices.Sort(got)
		return slices.Equal(got, want)
	})
}

func TestIntroductionWaitsForApproval(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west", "ap-south")
	w.start()
	us, eu, ap := w.clusters["us-east"], w.clusters["eu-west"], w.clusters["ap-south"]
	admit(t, us, eu)
	admit(t, us, ap)
	eu.waitState("ap-south", federate.StateAwaiting)
	ap.waitState("eu-west", federate.StateAwaiting)
	p := eu.m.View().ByCluster("ap-south")
	if p.IntroducedBy != "us-east" || p.Bundle != nil || p.Resource() != nil || len(p.Sameness) != 0 {
		t.Errorf("introduced peer %+v", p)
	}
	if _, err := eu.m.Approve(context.Background(), "ap-south"); err != nil {
		t.Fatal(err)
	}
	eu.waitState("ap-south", federate.StateJoining)
	if p := eu.m.View().ByCluster("ap-south"); p.Bundle != nil {
		t.Error("one side's approval was enough to trust")
	}
	eu.restart()
	eu.waitGateway()
	if _, err := ap.m.Approve(context.Background(), "eu-west"); err != nil {
		t.Fatal(err)
	}
	eu.waitState("ap-south", federate.StateReady)
	ap.waitState("eu-west", federate.StateReady)
	ap.m.SetOffers(offer(t, eu, "shop", "checkout"))
	eu.waitServices("ap-south", "checkout")
}

func TestIntroductionByNamedIntroducerIsApproved(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west", "ap-south")
	for _, name := range []string{"eu-west", "ap-south"} {
		w.clusters[name].change = func(c *federate.Config) {
			c.Introducers = func() []federation.ClusterName { return []federation.ClusterName{"us-east"} }
		}
	}
	w.start()
	us, eu, ap := w.clusters["us-east"], w.clusters["eu-west"], w.clusters["ap-south"]
	admit(t, us, eu)
	admit(t, us, ap)
	eu.waitState("ap-south", federate.StateReady)
	ap.waitState("eu-west", federate.StateReady)
	// a restart of the introducer introduces nobody again
	us.restart()
	us.waitGateway()
	if n := len(eu.m.View().Alarms); n != 0 {
		t.Errorf("%d alarms: %v", n, eu.m.View().Alarms)
	}
}

// TestIntroductionNeverReplaces: a member that introduces somebody under a name that is known, evicted, reserved or our own is
// refused, and both sides are alarmed.
func TestIntroductionNeverReplaces(t *testing.T) {
	for _, kind := range []string{"known", "evicted", "reserved", "token"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "us-east", "eu-west", "ap-south")
			impostor := w.add("impostor", "impostor.acme") // calls itself ap-south
			impostor.change = func(c *federate.Config) { c.Cluster = "ap-south" }
			us, eu, ap := w.clusters["us-east"], w.clusters["eu-west"], w.clusters["ap-south"]
			if kind == "reserved" {
				eu.change = func(c *federate.Config) {
					c.Reserved = func() []federation.ClusterName { return []federation.ClusterName{"ap-south"} }
				}
			}
			w.start()
			admit(t, us, eu)
			switch kind {
			case "known", "evicted":
				admit(t, eu, ap)
			case "token":
				eu.issue(&controlpb.TokenIssueRequest{Cluster: "ap-south"})
			}
			if kind == "known" || kind == "evicted" {
				// eu introduces ap to us, which has to forget it before the impostor can join there
				us.eventually("ap-south introduced", func(v *federate.View) bool { return v.ByCluster("ap-south") != nil })
				us.m.Evict(context.Background(), "ap-south")
			}
			if kind == "evicted" {
				if _, err := eu.m.Evict(context.Background(), "ap-south"); err != nil {
					t.Fatal(err)
				}
			}
			token := us.issue(&controlpb.TokenIssueRequest{Cluster: "ap-south"})
			impostor.waitGateway()
			if _, err := impostor.join(token); err != nil {
				t.Fatal(err)
			}
			alarmed := func(v *federate.View) bool {
				return slices.ContainsFunc(v.Alarms, func(a federate.Alarm) bool { return a.Kind == "introduction_refused" && a.Cluster == "ap-south" })
			}
			eu.eventually("alarm", alarmed)
			us.eventually("alarm", alarmed)
			if p := eu.m.View().Peer(impostor.td); p != nil {
				t.Errorf("the impostor is known: %+v", p)
			}
			if p := eu.m.View().Peer(ap.td); kind == "known" && (p == nil || p.BundleHash != ap.ca.Bundle().Hash()) {
				t.Errorf("the member was changed: %+v", p)
			}
		})
	}
}

func TestEvictDropsEverythingAndReservesTheName(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	w.start()
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	admit(t, us, eu)
	eu.m.SetOffers(offer(t, us, "shop", "checkout"))
	us.waitServices("eu-west", "checkout")
	member, err := us.m.Evict(context.Background(), "eu-west")
	if err != nil || member.GetState() != "evicted" {
		t.Fatal(member, err)
	}
	v := us.m.View()
	if p := v.ByCluster("eu-west"); p.Resource() != nil || p.Catalog != nil || p.Bundle != nil || v.Bundles.Get(eu.td) != nil {
		t.Errorf("something is left: %+v", p)
	}
	eu.eventually("the tunnel's end", func(v *federate.View) bool { return !v.ByCluster("us-east").TunnelUp })
	if _, err := us.m.Ask(context.Background(), eu.td, "probe", nil); !problem.Is(err, problem.ClusterUnreachable) {
		t.Errorf("ask an evicted member: %v", err)
	}
	us.restart()
	us.waitState("eu-west", federate.StateEvicted)
	if _, err := us.m.Approve(context.Background(), "eu-west"); !problem.Is(err, problem.NameTaken) {
		t.Errorf("approve: %v", err)
	}
	// the operator's explicit token brings it back
	token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
	if _, err := eu.join(token); err != nil {
		t.Fatal(err)
	}
	us.waitState("eu-west", federate.StateReady)
}

func TestLeaveTellsPeersAndRejoinWithNewKeys(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	w.start()
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	admit(t, us, eu)
	eu.m.SetOffers(offer(t, us, "shop", "checkout"))
	us.waitServices("eu-west", "checkout")
	var stages []string
	must(t, eu.m.Leave(context.Background(), func(p *controlpb.JoinProgress) { stages = append(stages, p.GetStage()+" "+p.GetDetail()) }))
	want := []string{"withdraw from 1 members", "tell us-east", "drop eu-west trusts only itself"}
	if !slices.Equal(stages, want) {
		t.Errorf("got %q, want %q", stages, want)
	}
	none := func(v *federate.View) bool { return len(v.Peers) == 0 && len(v.Bundles.TrustDomains()) == 1 }
	eu.eventually("nobody", none)
	us.eventually("nobody", none)
	// the machine is lost; a new one with new keys takes the name, its catalog numbers begin anew
	eu.kill()
	fresh := w.add("eu-west", "eu-west.acme")
	fresh.start()
	admit(t, us, fresh)
	fresh.m.SetOffers(offer(t, us, "shop", "checkout", "cart"))
	us.waitServices("eu-west", "cart", "checkout")
}

func TestJoinWithTakenNameIsRefused(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	thief := w.add("thief", "thief.acme")
	thief.change = func(c *federate.Config) { c.Cluster = "eu-west" }
	w.start()
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	admit(t, us, eu)
	token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
	thief.waitGateway()
	if _, err := thief.join(token); !problem.Is(err, problem.NameTaken) {
		t.Fatalf("got %v", err)
	}
	us.eventually("alarm", func(v *federate.View) bool { return len(v.Alarms) == 1 && v.Alarms[0].Kind == "name_taken" })
	list, _ := us.m.TokenList(context.Background())
	if list[0].GetState() != "unused" {
		t.Errorf("a refused name used the token up: %v", list[0])
	}
	suffix := w.add("suffix", "west.eu-west.acme")
	suffix.change = func(c *federate.Config) { c.Cluster = "suffix" }
	suffix.start()
	token = us.issue(&controlpb.TokenIssueRequest{Cluster: "suffix"})
	suffix.waitGateway()
	if _, err := suffix.join(token); !problem.Is(err, problem.NameTaken) {
		t.Fatalf("a trust domain below another: %v", err)
	}
}

func TestCatalogFlows(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	w.start()
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	eu.m.SetOffers(offer(t, us, "shop", "checkout")) // before anybody is known
	admit(t, us, eu)
	us.waitServices("eu-west", "checkout")
	p := us.m.View().ByCluster("eu-west")
	if p.Freshness != federation.Fresh || p.Catalog.Head.Consumer != us.td || len(p.Catalog.Gateways) != 1 {
		t.Errorf("catalog %+v %v", p.Catalog, p.Freshness)
	}
	eu.m.SetOffers(offer(t, us, "shop", "checkout", "cart"))
	us.waitServices("eu-west", "cart", "checkout")
	eu.m.SetOffers(nil)
	us.waitServices("eu-west")
	if m := us.m.View().Members(time.Now()); len(m) != 2 || m[0].GetState() != "self" || m[1].GetState() != "ready" || m[1].GetCatalogSeq() == 0 {
		t.Errorf("members %v", m)
	}
	us.restart()
	us.waitServices("eu-west") // from disk and again from the peer
	eu.m.SetOffers(offer(t, us, "shop", "mail"))
	us.waitServices("eu-west", "mail")
}

// TestRestoreFromOlderBackup: a cluster that lost its machine comes back with an older epoch; its peers accept its next catalog
// and see no fork.
func TestRestoreFromOlderBackup(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	w.start()
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	admit(t, us, eu)
	eu.kill()
	backup := t.TempDir()
	must(t, os.CopyFS(filepath.Join(backup, "copy"), os.DirFS(eu.path)))
	for i := range 3 { // three more terms after the backup
		eu.start()
		eu.waitGateway()
		eu.m.SetOffers(offer(t, us, "shop", "checkout", []string{"a", "b", "c"}[i]))
		us.waitServices("eu-west", []string{"a", "b", "c"}[i], "checkout")
		eu.kill()
	}
	before := us.m.View().ByCluster("eu-west").Catalog.Head.Epoch
	// two days pass: no certificate of before is valid any more
	us.kill()
	w.mu.Lock()
	w.skew["us-east"], w.skew["eu-west"] = 48*time.Hour, 48*time.Hour
	w.mu.Unlock()
	us.start()
	must(t, os.RemoveAll(eu.path))
	must(t, os.CopyFS(eu.path, os.DirFS(filepath.Join(backup, "copy"))))
	eu.start()
	eu.waitGateway()
	eu.m.SetOffers(offer(t, us, "shop", "restored"))
	us.waitServices("eu-west", "restored")
	p := us.m.View().ByCluster("eu-west")
	if p.Conflict || p.Refused != "" || p.Catalog.Head.Epoch <= before || len(us.m.View().Alarms) != 0 {
		t.Errorf("after the restore: epoch %d (was %d), conflict %v, refused %q, alarms %v", p.Catalog.Head.Epoch, before, p.Conflict, p.Refused, us.m.View().Alarms)
	}
}

func TestQueries(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west", "ap-south")
	w.start()
	us, eu, ap := w.clusters["us-east"], w.clusters["eu-west"], w.clusters["ap-south"]
	admit(t, us, eu)
	eu.m.Handle("echo", func(_ context.Context, from spiffeid.TrustDomain, body []byte) ([]byte, error) {
		if string(body) == "fail" {
			return nil, errors.New("a detail of ours")
		}
		if string(body) == "typed" {
			return nil, problem.New(problem.NotExported, "no")
		}
		return []byte(from.String() + " " + string(body)), nil
	})
	r, err := us.m.Ask(context.Background(), eu.td, "echo", []byte("hello"))
	if err != nil || string(r.Body) != "us-east.acme hello" || r.Transport != "quic" || r.Gateway != "gateway-1" {
		t.Errorf("got %+v, %v", r, err)
	}
	if _, err := us.m.Ask(context.Background(), eu.td, "echo", []byte("fail")); !problem.Is(err, problem.Internal) || strings.Contains(err.Error(), "detail") {
		t.Errorf("an internal error: %v", err)
	}
	if _, err := us.m.Ask(context.Background(), eu.td, "echo", []byte("typed")); !problem.Is(err, problem.NotExported) {
		t.Errorf("a typed error: %v", err)
	}
	if _, err := us.m.Ask(context.Background(), eu.td, "nonsense", nil); !problem.Is(err, problem.VersionSkew) {
		t.Errorf("an unknown method: %v", err)
	}
	if _, err := us.m.Ask(context.Background(), ap.td, "echo", nil); !problem.Is(err, problem.ClusterUnreachable) {
		t.Errorf("a stranger: %v", err)
	}
	// a stranger's question, should its gateway let it through, is not answered
	eu.waitGateway()
	a := eu.gw.ask(ap.td, &controlpb.Query{Method: "echo", TimeoutMs: 1000})
	if a.GetErrorCode() != string(problem.TrustRefused) {
		t.Errorf("a stranger asks: %v", a)
	}
}

// TestJoiningMayOnlyProbe: between approval and the probes a peer can ask nothing else.
func TestJoiningMayOnlyProbe(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	w.start()
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
	eu.waitGateway()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	err := eu.m.Join(ctx, token, nil, false, func(p *controlpb.JoinProgress) {
		if p.GetStage() == "catalog" {
			cancel()
		}
	})
	if err == nil {
		t.Fatal("join went on")
	}
	us.waitState("eu-west", federate.StateJoining)
	for _, method := range []string{"introduce", "head-of", "trace"} {
		if a := us.gw.ask(eu.td, &controlpb.Query{Method: method, TimeoutMs: 1000}); a.GetErrorCode() != string(problem.ProbeFailed) {
			t.Errorf("%s while joining: %v", method, a)
		}
	}
	if p := us.m.View().ByCluster("eu-west"); p.Catalog != nil || p.Resource().GetState() != controlpb.PeerState_PEER_STATE_JOINING {
		t.Errorf("joining peer %+v", p)
	}
}

func TestLinkIsForOwnGatewaysOnly(t *testing.T) {
	w := newWorld(t, "us-east")
	us := w.clusters["us-east"]
	w.start()
	us.waitGateway()
	for _, id := range []string{"", "spiffe://eu-west.acme/strait/gateway/gateway-1", "spiffe://us-east.acme/ns/shop/sa/web", "spiffe://us-east.acme/strait/controlplane"} {
		ctx, cancel := context.WithTimeout(metadata.NewIncomingContext(context.Background(), metadata.Pairs("test-id", id)), 5*time.Second)
		err := us.m.Link(bareStream{ctx: ctx})
		cancel()
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%q: %v", id, err)
		}
	}
}

func TestSamenessAndMirror(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	objects := &fakeObjects{peers: map[federation.ClusterName]federate.Peer{"former": {}}, changed: make(chan struct{}, 100)}
	us.change = func(c *federate.Config) { c.Objects = objects }
	w.start()
	admit(t, us, eu)
	must(t, us.m.SetSameness(eu.td, []string{"shop", "all"}))
	if err := us.m.SetSameness(eu.td, []string{"No Namespace"}); !problem.Is(err, problem.Usage) {
		t.Errorf("got %v", err)
	}
	objects.wait(t, func(peers map[federation.ClusterName]federate.Peer) bool {
		p, former := peers["eu-west"], peers["former"]
		return p.Ready() && p.Same("x") && former.Cluster == "" && len(peers) == 1
	})
	us.restart()
	us.eventually("sameness from disk", func(v *federate.View) bool { return v.ByCluster("eu-west").Same("x") })
}

type fakeObjects struct {
	mu      sync.Mutex
	peers   map[federation.ClusterName]federate.Peer
	changed chan struct{}
}

func (f *fakeObjects) Upsert(_ context.Context, p federate.Peer) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.peers[p.Cluster] = p
	f.changed <- struct{}{}
	return nil
}

func (f *fakeObjects) Delete(_ context.Context, cluster federation.ClusterName) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.peers, cluster)
	f.changed <- struct{}{}
	return nil
}

func (f *fakeObjects) List(context.Context) ([]federation.ClusterName, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []federation.ClusterName
	for name := range f.peers {
		out = append(out, name)
	}
	return out, nil
}

func (f *fakeObjects) wait(t *testing.T, ok func(map[federation.ClusterName]federate.Peer) bool) {
	t.Helper()
	timer := time.NewTimer(10 * time.Second)
	defer timer.Stop()
	for {
		f.mu.Lock()
		done := ok(f.peers)
		f.mu.Unlock()
		if done {
			return
		}
		select {
		case <-f.changed:
		case <-timer.C:
			t.Fatalf("objects %v", f.peers)
		}
	}
}

// bareStream is a link that never gets past its identity.
type bareStream struct {
	federateStream
	ctx context.Context
}

func (s bareStream) Context() context.Context { return s.ctx }

type federateStream interface {
	Send(*controlpb.ControlMessage) error
	Recv() (*controlpb.GatewayMessage, error)
	SetHeader(metadata.MD) error
	SendHeader(metadata.MD) error
	SetTrailer(metadata.MD)
	SendMsg(any) error
	RecvMsg(any) error
}

// A control plane that was killed while its gateway was linked still names that gateway: sidecars go on using it until it links again.
func TestOwnGatewayIsKeptOverAKill(t *testing.T) {
	w := newWorld(t, "us-east")
	us := w.clusters["us-east"]
	var cfg federate.Config
	us.change = func(c *federate.Config) { cfg = *c }
	us.restart()
	us.waitGateway()
	us.kill()
	m, err := federate.New(cfg)
	must(t, err)
	list := m.View().Gateways
	if len(list) != 1 || list[0].Connected || us.now().Sub(list[0].LastSeen) > time.Minute {
		t.Fatalf("own gateways after a kill: %+v", list)
	}
}
