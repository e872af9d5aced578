// SPDX-License-Identifier: Apache-2.0

package proxyclient_test

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/discovery"
	"github.com/strait-mesh/strait/controlplane/identity"
	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/endpoint"
	"github.com/strait-mesh/strait/trust/endpoint/endpointtest"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// elsewhere is a control plane that issues nothing: its own identity, like its proxies', comes from a Workload API.
type elsewhere struct {
	t         *testing.T
	td        spiffeid.TrustDomain
	authority *endpointtest.Authority
	source    *trust.Source
	discovery *discovery.Server
	addr      string
	sockets   string
}

func newElsewhere(t *testing.T) *elsewhere {
	t.Helper()
	td, err := spiffeid.ParseTrustDomain("elsewhere.example")
	must(t, err)
	e := &elsewhere{t: t, td: td, sockets: t.TempDir()}
	e.authority, err = endpointtest.New(endpointtest.Options{TrustDomain: td, TTL: time.Minute})
	must(t, err)
	h, err := endpoint.Open(t.Context(), endpoint.Config{Socket: e.socket("cp", "/strait/controlplane"), Wants: []endpoint.Want{endpoint.ControlPlane(td)}, Dir: newDir(t)})
	must(t, err)
	t.Cleanup(func() { _ = h.Close() })
	e.source = h.Source()
	e.discovery, err = discovery.New(discovery.Config{
		Peer: identity.IDFromContext, Authorize: discovery.RoleAuthorize(td, func(string) (spiffeid.ID, bool) { return spiffeid.ID{}, false }),
	})
	must(t, err)
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	e.addr = inner.Addr().String()
	l, err := identity.Open(inner, identity.ListenerConfig{Source: e.source, TrustDomain: td})
	must(t, err)
	g := grpc.NewServer(identity.ServerOptions()...)
	e.discovery.Register(g)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	t.Cleanup(sync.OnceFunc(func() { g.Stop(); _ = l.Close(); <-served }))
	return e
}

func (e *elsewhere) socket(name string, paths ...string) string {
	e.t.Helper()
	var ids []spiffeid.ID
	for _, p := range paths {
		id, err := spiffeid.Parse("spiffe://" + e.td.String() + p)
		must(e.t, err)
		ids = append(ids, id)
	}
	s := e.authority.Server(ids...)
	addr, err := s.Listen(e.sockets, name)
	must(e.t, err)
	e.t.Cleanup(s.Stop)
	return addr
}

func (e *elsewhere) config(role proxyclient.Role, name, socket string) proxyclient.Config {
	return proxyclient.Config{
		Role: role, Name: name, DataDir: newDir(e.t), ControlPlane: []string{e.addr}, WorkloadAPI: socket, Version: "test", SnapshotEvery: 10 * time.Millisecond,
		Self: proxyclient.Info{Cluster: "us-east", Federation: "acme", Locality: federation.Locality{Region: "us", Zone: "a"}},
	}
}

// A gateway and a sidecar without a token: who they are comes from the Workload API, what their place is from the configuration, and the
// own bundle from the Workload API alone, whatever the control plane says. The root changes under them.
func TestWorkloadAPI(t *testing.T) {
	e := newElsewhere(t)
	root, err := trust.NewBundle(e.td, e.source.Bundles().Get(e.td).Roots(), 900)
	must(t, err)
	must(t, e.discovery.Replace(controlpb.TypeBundle, map[string]proto.Message{
		e.td.String(): &controlpb.Bundle{TrustDomain: e.td.String(), Jwks: root.Marshal(), Sequence: 900},
	}))
	for _, tt := range []struct {
		role     proxyclient.Role
		name, id string
		offered  []string
	}{
		{proxyclient.Gateway, "gateway-1", "/strait/gateway/gateway-1", []string{"/ns/x/sa/y", "/strait/gateway/gateway-2", "/strait/gateway/gateway-1"}},
		{proxyclient.Sidecar, "shop/cart-1", "/ns/shop/sa/cart", []string{"/strait/gateway/gateway-1", "/ns/other/sa/cart", "/ns/shop/sa/cart", "/ns/shop/sa/web"}},
	} {
		t.Run(string(tt.role), func(t *testing.T) {
			client, _ := open(t, e.config(tt.role, tt.name, e.socket(string(tt.role), tt.offered...)))
			info := client.Info()
			if info.ID.String() != "spiffe://elsewhere.example"+tt.id || info.Name != tt.name || info.TrustDomain != e.td || info.Cluster != "us-east" || info.Locality.Zone != "a" {
				t.Fatalf("info %+v", info)
			}
			client.Subscribe(controlpb.TypeBundle, e.td.String())
			ctx, cancel := context.WithTimeout(t.Context(), within)
			defer cancel()
			if _, state, err := client.Wait(ctx, controlpb.TypeBundle, e.td.String()); state != proxyclient.Known || err != nil {
				t.Fatalf("no discovery: %v %v", state, err)
			}
			eventually(t, "acknowledgement", func() bool {
				acked, subscribed, _ := e.discovery.Acked(controlpb.TypeBundle, e.td.String())
				return acked == subscribed && acked > 0
			})
			if seq := client.Source().Bundles().Get(e.td).Sequence(); seq >= 900 {
				t.Errorf("the own bundle is the control plane's: %d", seq)
			}
			before := client.Source().Identity().Chain[0]
			must(t, e.authority.Prepare())
			must(t, e.authority.Activate())
			eventually(t, "an identity by the new root", func() bool { return client.Source().Identity().Chain[0] != before })
			must(t, e.authority.Retire())
			eventually(t, "the old root to go", func() bool { return len(client.Source().Bundles().Get(e.td).Roots()) == 1 })
			if st := client.Status(); st.LastError != nil || st.Renewed.IsZero() || !st.NotAfter.Equal(client.Source().Identity().NotAfter) {
				t.Errorf("status %+v", st)
			}
		})
	}
}

func TestWorkloadAPIRefused(t *testing.T) {
	e := newElsewhere(t)
	for name, tt := range map[string]struct {
		edit func(*proxyclient.Config)
		says string
	}{
		"token and socket":   {func(c *proxyclient.Config) { c.TokenFile = filepath.Join(t.TempDir(), "token") }, "two origins"},
		"no cluster":         {func(c *proxyclient.Config) { c.Self.Cluster = "" }, "required"},
		"no address":         {func(c *proxyclient.Config) { c.ControlPlane = nil }, "no address of a control plane"},
		"nothing that fits":  {func(c *proxyclient.Config) { c.Name = "bank/cart" }, "/ns/bank/sa/"},
		"service account":    {func(c *proxyclient.Config) { c.ServiceAccount = "till" }, "/ns/shop/sa/till"},
		"no such socket":     {func(c *proxyclient.Config) { c.WorkloadAPI = "unix://" + e.sockets + "/none" }, "does not answer"},
		"not an address":     {func(c *proxyclient.Config) { c.WorkloadAPI = "/run/agent.sock" }, "unix:///path"},
		"gateway's identity": {func(c *proxyclient.Config) { c.Role, c.Name = proxyclient.Gateway, "gateway-9" }, "/strait/gateway/gateway-9"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := e.config(proxyclient.Sidecar, "shop/cart", e.socket("s", "/ns/shop/sa/cart"))
			tt.edit(&cfg)
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			client, err := proxyclient.Open(ctx, cfg)
			if err == nil {
				_ = client.Close()
				t.Fatal("it opened")
			}
			if text := problem.From(err).Human() + err.Error(); !strings.Contains(text, tt.says) {
				t.Errorf("the error lacks %q: %s", tt.says, text)
			}
		})
	}
}
