// SPDX-License-Identifier: Apache-2.0

package proxyclient_test

import (
	"context"
	"crypto/tls"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"github.com/strait-mesh/strait/controlplane/discovery"
	"github.com/strait-mesh/strait/controlplane/identity"
	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/register"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// within is how long anything may take that happens at once on an idle machine.
const within = 20 * time.Second

// clock is the wall clock of a test, moved by hand.
type clock struct{ ahead atomic.Int64 }

func (c *clock) Now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) Advance(d time.Duration) { c.ahead.Add(int64(d)) }

// cluster is a control plane made of real parts: CA, registration, identity, discovery.
type cluster struct {
	t           *testing.T
	clock       *clock
	td          spiffeid.TrustDomain
	ca          *ca.CA
	source      *trust.Source
	tokens      *register.Tokens
	discovery   *discovery.Server
	withdrawals *withdrawal.Registry
	denied      *identity.DenyList
	renewals    atomic.Int64
	net         *memory                          // nil: TCP
	grace       time.Duration                    // how long ended identities are renewed
	renewed     atomic.Pointer[identity.Renewal] // the last one
	addr        string
	serverID    spiffeid.ID // whom the listener claims to be; the control plane unless a test says otherwise

	mu    sync.Mutex
	selfs map[string]spiffeid.ID
	stop  func()
}

func newCluster(t *testing.T) *cluster { t.Helper(); return newClusterOf(t, "us-east.acme") }

func newClusterOf(t *testing.T, trustDomain string) *cluster {
	t.Helper()
	c := &cluster{t: t, clock: &clock{}, selfs: map[string]spiffeid.ID{}}
	td, err := spiffeid.ParseTrustDomain(trustDomain)
	must(t, err)
	c.td = td
	c.serverID = spiffeid.ControlPlane(td)
	dir := newDir(t)
	c.ca, err = ca.Create(dir, ca.Config{TrustDomain: td, Now: c.clock.Now})
	must(t, err)
	c.tokens, err = register.OpenTokens(dir, c.clock.Now)
	must(t, err)
	c.denied, err = identity.OpenDenyList(dir, c.clock.Now)
	must(t, err)
	c.withdrawals = withdrawal.New(withdrawal.Config{Now: c.clock.Now})
	c.source = trust.NewSource(trust.SourceConfig{Now: c.clock.Now})
	bundles, err := trust.NewBundles(c.ca.Bundle())
	must(t, err)
	c.source.SetBundles(bundles)
	c.renewOwn()
	c.newDiscovery()
	return c
}

// renewOwn gives the control plane a fresh identity of its own.
func (c *cluster) renewOwn() {
	id, err := c.ca.IssueKey(c.serverID, 0)
	must(c.t, err)
	c.source.SetIdentity(id)
}

// newDiscovery replaces the discovery server by an empty one, as a restart does.
func (c *cluster) newDiscovery() {
	var err error
	c.discovery, err = discovery.New(discovery.Config{
		Peer: identity.IDFromContext,
		Authorize: discovery.RoleAuthorize(c.td, func(name string) (spiffeid.ID, bool) {
			c.mu.Lock()
			defer c.mu.Unlock()
			id, ok := c.selfs[name]
			return id, ok
		}),
	})
	must(c.t, err)
}

// serve listens, at the same address each time, until the returned function or the end of the test.
func (c *cluster) serve() {
	c.t.Helper()
	var inner net.Listener
	var err error
	if c.net != nil {
		inner = c.net.listen()
	} else {
		addr := c.addr
		if addr == "" {
			addr = "127.0.0.1:0"
		}
		inner, err = net.Listen("tcp", addr)
		must(c.t, err)
	}
	c.addr = inner.Addr().String()
	registrations := &register.Server{
		Tokens: c.tokens, Bundle: c.ca.Bundle, Cluster: "us-east", Federation: "acme", Now: c.clock.Now,
		Sign: func(csr []byte, id spiffeid.ID) ([][]byte, error) { return c.ca.IssueCSR(csr, id, 0) },
	}
	ids, err := identity.New(identity.Config{
		Signer: c.ca, Bundle: c.ca.Bundle, JWT: c.ca, Denied: c.denied.Denied,
		Renewed: func(r identity.Renewal) {
			c.renewals.Add(1)
			c.renewed.Store(&r)
		},
	})
	must(c.t, err)
	l, err := identity.Open(inner, identity.ListenerConfig{
		Source: c.source, TrustDomain: c.td, Denied: c.denied.Denied, Withdrawals: c.withdrawals,
		Register: func(ctx context.Context, conn *tls.Conn) { registrations.ServeConn(ctx, conn) },
		Renew:    ids.RenewExpired(c.source, c.td, c.grace, c.clock.Now), RenewGrace: c.grace,
	})
	must(c.t, err)
	g := grpc.NewServer(identity.ServerOptions()...)
	ids.Register(g)
	c.discovery.Register(g)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	c.stop = sync.OnceFunc(func() {
		g.Stop()
		_ = l.Close()
		<-served
	})
	c.t.Cleanup(c.stop)
}

// sidecarToken writes a registration token for a sidecar and returns its file.
func (c *cluster) sidecarToken(proxy, sa string) string {
	c.t.Helper()
	ns := filepath.Dir(proxy)
	id, err := spiffeid.Workload(c.td, ns, sa)
	must(c.t, err)
	c.mu.Lock()
	c.selfs[proxy] = id
	c.mu.Unlock()
	return c.token(register.Grant{Kind: register.KindSidecar, Name: proxy, SPIFFEID: id, Region: "us", Zone: "a"})
}

func (c *cluster) gatewayToken(name string) string {
	c.t.Helper()
	id, err := spiffeid.Gateway(c.td, name)
	must(c.t, err)
	return c.token(register.Grant{Kind: register.KindGateway, Name: name, SPIFFEID: id, Region: "us"})
}

func (c *cluster) token(g register.Grant) string {
	c.t.Helper()
	tok, err := c.tokens.Issue(g, 15*time.Minute)
	must(c.t, err)
	pin := c.ca.Bundle().Hash()
	tok.BundleSHA256, tok.TrustDomain = pin[:], c.td
	file := filepath.Join(c.t.TempDir(), "token")
	must(c.t, os.WriteFile(file, []byte(tok.Encode()), 0o600))
	return file
}

func (c *cluster) config(role proxyclient.Role, name, token string, dir *datadir.Dir) proxyclient.Config {
	return proxyclient.Config{
		Role: role, Name: name, DataDir: dir, ControlPlane: []string{c.addr}, TokenFile: token, Now: c.clock.Now, Version: "test",
		SnapshotEvery: 10 * time.Millisecond,
	}
}

// open opens a client and runs it until the returned function or the end of the test.
func open(t *testing.T, cfg proxyclient.Config) (*proxyclient.Client, func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	c, err := proxyclient.Open(ctx, cfg)
	must(t, err)
	return c, run(t, c)
}

func run(t *testing.T, c *proxyclient.Client) func() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func newDir(t *testing.T) *datadir.Dir {
	t.Helper()
	d, err := datadir.Create(filepath.Join(t.TempDir(), "data"))
	must(t, err)
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until cond holds.
func eventually(t *testing.T, what string, cond func() bool) {
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

// judge is what a control plane judges connections by.
func (c *cluster) judge(s withdrawal.Subject) (string, bool) {
	reason, denied := c.denied.Denied(s.Identity, s.Issued)
	return reason, !denied
}

// replace puts the content of file from in place of that of file to.
func replace(t *testing.T, to, from string) {
	t.Helper()
	data, err := os.ReadFile(from)
	must(t, err)
	must(t, os.WriteFile(to, data, 0o600))
}
