// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
	"github.com/strait-mesh/strait/trust/endpoint/endpointtest"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// foreign is a cluster all of whose identities come from a Workload API server that is not ours, with a trust domain, a CA and a
// shape of chain of its own. Each process has a socket: what it is offered there is what an agent would attest it to be.
type foreign struct {
	*harness.Cluster
	t         *testing.T
	dir       string
	td        spiffeid.TrustDomain
	authority *endpointtest.Authority
	servers   map[string]*endpointtest.Server
}

func newForeign(t *testing.T, f *harness.Federation, cluster, trustDomain string, ttl time.Duration) *foreign {
	t.Helper()
	td, err := spiffeid.ParseTrustDomain(trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	a := &foreign{Cluster: f.Clusters[cluster], t: t, dir: filepath.Join(f.Dir, "api"), td: td, servers: map[string]*endpointtest.Server{}}
	if err := os.Mkdir(a.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if a.authority, err = endpointtest.New(endpointtest.Options{TrustDomain: td, TTL: ttl}); err != nil {
		t.Fatal(err)
	}
	return a
}

// socket serves the IDs with these paths to one kind of process.
func (a *foreign) socket(name string, paths ...string) string {
	a.t.Helper()
	var ids []spiffeid.ID
	for _, p := range paths {
		id, err := spiffeid.Parse("spiffe://" + a.td.String() + p)
		if err != nil {
			a.t.Fatal(err)
		}
		ids = append(ids, id)
	}
	s := a.authority.Server(ids...)
	addr, err := s.Listen(a.dir, name)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(s.Stop)
	a.servers[name] = s
	return addr
}

// identity are the flags of a proxy that takes its identity from the socket.
func (a *foreign) identity(socket, nameFlag, name string) []string {
	return []string{"--token-file=", "--spiffe-endpoint-socket", socket, nameFlag, name, "--cluster", a.Name, "--federation", "acme", "--region", a.Name + "-1"}
}

// up starts what Cluster.Up starts, without our CA and without a token.
func (a *foreign) up() {
	a.t.Helper()
	cp := a.socket("cp", "/ns/ops/sa/node-agent", "/strait/catalog-signer", "/strait/controlplane")
	a.CLI("init", "acme", "--cluster", a.Name, "--region", a.Name+"-1", "--trust-domain", a.td.String(), "--spiffe-endpoint-socket", cp)
	a.StartControlPlane()
	a.StartGateway(1, a.identity(a.socket("gw", "/strait/gateway/gateway-1"), "--name", "gateway-1")...)
}

// sidecar starts a sidecar whose identity is that of its service account, for an application that was registered.
func (a *foreign) sidecar(proxy, serviceAccount string, upstreams ...string) *harness.Sidecar {
	a.t.Helper()
	return a.StartSidecar(proxy, "", upstreams, a.identity(a.socket(proxy, "/ns/shop/sa/"+serviceAccount), "--proxy", "shop/"+proxy)...)
}

// trusted is what a cluster says of the bundles that it holds.
func trusted(t testing.TB, c *harness.Cluster) (own uint64, roots map[string]int, seen map[string]bool) {
	t.Helper()
	var doc struct {
		Source   string
		Sequence uint64 `json:",string"`
		Progress []struct {
			Kind, Name   string
			Acknowledged bool
		}
		Bundles []struct {
			Cluster     string
			Authorities []struct{ Kind string }
		}
	}
	text := c.CLI("trust", "status", "-o", "json")
	if err := json.Unmarshal([]byte(text), &doc); err != nil {
		t.Fatalf("trust status -o json: %v\n%s", err, text)
	}
	roots, seen = map[string]int{}, map[string]bool{}
	for _, b := range doc.Bundles {
		for _, au := range b.Authorities {
			if au.Kind == "root" {
				roots[b.Cluster]++
			}
		}
	}
	for _, p := range doc.Progress {
		if p.Kind == "member" {
			seen[p.Name] = p.Acknowledged
		}
	}
	return doc.Sequence, roots, seen
}

// TestForeignWorkloadAPI: one cluster takes all identities from a Workload API that is not ours, the other has Strait's CA. They join,
// export and call each other; while they do, the foreign leaves rotate every few seconds and the foreign root is rotated three times.
func TestForeignWorkloadAPI(t *testing.T) {
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west"}, CatalogTTL: 9 * time.Second})
	us := newForeign(t, f, "us-east", "elsewhere.example", 20*time.Second)
	eu := f.Clusters["eu-west"]
	us.up()
	eu.Up()
	f.Join("us-east", "eu-west", "shop")

	// Both ways: eu-west calls cart in us-east, us-east calls checkout in eu-west.
	cart, checkout := newBackend(t, "us-east/cart"), newBackend(t, "eu-west/checkout")
	us.Register(harness.Workload{Name: "cart-1", Service: "cart", Address: cart.addr})
	us.Register(harness.Workload{Name: "web", Service: "web"})
	us.sidecar("cart", "cart")
	usWeb := us.sidecar("web", "web", "shop/checkout:http", "shop/cart:http")
	eu.StartSidecar("checkout", eu.Register(harness.Workload{Name: "checkout-1", Service: "checkout", Address: checkout.addr, Token: true}), nil)
	euWeb := eu.StartSidecar("web", eu.Register(harness.Workload{Name: "web", Service: "web", Token: true}), []string{"shop/cart:http"})
	us.CLI("export", "shop/cart", "--to", "eu-west")
	eu.CLI("export", "shop/checkout", "--to", "us-east")
	urls := map[string]string{usWeb.Upstreams[0]: "eu-west/checkout", usWeb.Upstreams[1]: "us-east/cart", euWeb.Upstreams[0]: "us-east/cart"}
	for addr, want := range urls {
		reaches(t, "http://"+addr+"/", want)
	}
	us.refusals(t)

	begin := time.Now()
	var loads []*load
	for addr := range urls {
		loads = append(loads, startLoad(t, "http://"+addr+"/", 30))
	}
	issued := us.authority.Issued()
	reissue := time.NewTicker(3 * time.Second)
	defer reissue.Stop()
	step := func(what string, do func() error, done func() error) {
		t.Helper()
		if err := do(); err != nil {
			t.Fatal(err)
		}
		// Leaves go on rotating while the members take it up.
		for deadline := time.Now().Add(time.Minute); ; {
			err := done()
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: %v", what, err)
			}
			<-reissue.C
			us.authority.Reissue()
		}
		t.Logf("%s after %v", what, time.Since(begin).Round(100*time.Millisecond))
	}
	holds := func(n int) func() error {
		return func() error {
			_, roots, _ := trusted(t, eu)
			own, _, seen := trusted(t, us.Cluster)
			if roots["us-east"] != n || !seen["eu-west"] {
				return fmt.Errorf("eu-west holds %d roots of us-east, want %d; has all of it acknowledged bundle %d: %v", roots["us-east"], n, own, seen["eu-west"])
			}
			return nil
		}
	}
	for range 3 {
		step("a second root is known everywhere", us.authority.Prepare, holds(2))
		before := us.authority.Issued()
		step("issued by it", us.authority.Activate, func() error {
			if n := us.authority.Issued() - before; n < 12 {
				return fmt.Errorf("%d identities so far", n)
			}
			return nil
		})
		step("the first root is gone everywhere", us.authority.Retire, holds(1))
	}
	total := 0
	for _, l := range loads {
		l.stop()
		<-l.done
		calls := l.since(begin)
		total += len(calls)
		failed := 0
		for _, c := range calls {
			if !c.ok() {
				if failed++; failed <= 5 {
					t.Errorf("a call %v after the begin, %v long: status %d, %v, %.200q", c.at.Sub(begin), c.took, c.status, c.err, c.body)
				}
			}
		}
		if failed > 0 {
			t.Errorf("%d of %d calls failed", failed, len(calls))
		}
	}
	own, _, _ := trusted(t, us.Cluster)
	t.Logf("%d calls, %d identities issued meanwhile, bundle %d", total, us.authority.Issued()-issued, own)
	us.entries(t)
	us.restart(t, usWeb)
	reaches(t, "http://"+usWeb.Upstreams[0]+"/", "eu-west/checkout")
}

// refusals are what has no place in a cluster without a CA, each with its reason.
func (a *foreign) refusals(t *testing.T) {
	t.Helper()
	for _, args := range [][]string{
		{"token", "gateway", "gateway-2", "--out", filepath.Join(a.dir, "t")},
		{"workload", "register", "shop/late", "--service", "late", "--token-out", filepath.Join(a.dir, "t")},
		{"access", "issue", "ann", "--role", "viewer", "--out", filepath.Join(a.dir, "ann")},
		{"trust", "rotate", "prepare", "--yes"},
	} {
		if r := a.Try(args...); r.Code != 2 || !strings.Contains(r.Err, "STR-5322") {
			t.Errorf("strait %s: exit %d\n%s", strings.Join(args, " "), r.Code, r.Err)
		}
	}
}

// entries is what check says of the Workload API.
func (a *foreign) entries(t *testing.T) {
	t.Helper()
	out := a.Try("check").Out
	for _, want := range []string{
		"entry spiffe://elsewhere.example/strait/controlplane (control plane): seen", "(catalog signer): seen",
		"entry spiffe://elsewhere.example/strait/gateway/gateway-1 (gateway gateway-1): seen",
		"entry spiffe://elsewhere.example/ns/shop/sa/cart (sidecar shop/cart): seen", "live for 30s", "STR-5323",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("check does not say %q:\n%s", want, out)
		}
	}
	t.Logf("\n%s", out)
}

// restart ends every process of the cluster and starts it again: identities come anew, and numbers do not go back.
func (a *foreign) restart(t *testing.T, web *harness.Sidecar) {
	t.Helper()
	before, _, _ := trusted(t, a.Cluster)
	a.ControlPlane.Stop(20 * time.Second)
	a.ControlPlane.Start()
	a.ControlPlane.Addrs()
	a.Gateways[0].Stop(40 * time.Second)
	a.RestartGateway(a.Gateways[0])
	web.Stop(40 * time.Second)
	web.Restart()
	if after, _, _ := trusted(t, a.Cluster); after != before {
		t.Errorf("bundle %d before the restart, %d after it", before, after)
	}
}
