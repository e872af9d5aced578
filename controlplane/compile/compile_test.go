// SPDX-License-Identifier: Apache-2.0

package compile_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/compile"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func td(t testing.TB, cluster string) spiffeid.TrustDomain {
	t.Helper()
	v, err := spiffeid.ParseTrustDomain(cluster + ".acme")
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func id(t testing.TB, cluster, ns, sa string) spiffeid.ID {
	t.Helper()
	v, err := spiffeid.Workload(td(t, cluster), ns, sa)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func meta(ns, name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: ns, Name: name, Generation: 1, ResourceVersion: "7", UID: types.UID("uid-" + ns + "-" + name)}
}

func service(ns, name string, ports ...api.ServicePort) *api.Service {
	s := &api.Service{ObjectMeta: meta(ns, name), Spec: api.ServiceSpec{Selector: map[string]string{"app": name}, Ports: ports}}
	s.Labels = map[string]string{"tier": "api"}
	return s
}

func port(name string, number int32, protocol string) api.ServicePort {
	return api.ServicePort{Name: name, Port: number, AppProtocol: protocol, TargetPort: intstr.FromString(name)}
}

func workload(ns, name, app, proxy string, ports map[string]int32) *api.Workload {
	w := &api.Workload{ObjectMeta: meta(ns, name), Spec: api.WorkloadSpec{Address: "10.0.0.1", Ports: ports, Proxy: proxy}}
	w.Labels = map[string]string{"app": app}
	return w
}

func session(t testing.TB, ns, proxy, sa string, verdicts ...compile.InstanceHealth) compile.Session {
	return compile.Session{Namespace: ns, Proxy: proxy, ID: id(t, "us-east", ns, sa), InboundAddress: "10.0.0.9:15008", Instances: verdicts}
}

func verdict(workload, port string, h controlpb.Health) compile.InstanceHealth {
	return compile.InstanceHealth{Workload: workload, Port: port, Health: h}
}

const (
	healthy   = controlpb.Health_HEALTH_HEALTHY
	unhealthy = controlpb.Health_HEALTH_UNHEALTHY
)

func peer(t testing.TB, cluster string, sameness ...string) compile.Peer {
	return compile.Peer{TrustDomain: td(t, cluster), Cluster: federation.ClusterName(cluster), Federation: "acme", Region: cluster + "-1", Ready: true,
		Sameness: sameness, Bundle: []byte("jwks " + cluster), BundleSeq: 3, Tunnel: compile.Tunnel{Up: true, RTT: 81 * time.Millisecond, Transport: "quic"}}
}

func offers(t testing.TB, cluster, ns, name string) compile.Offered {
	return compile.Offered{Version: 5, Service: &controlpb.CatalogService{
		Service: &controlpb.ServiceRef{Namespace: ns, Name: name}, Ports: []*controlpb.ServicePort{{Name: "http", Number: 80, Protocol: controlpb.Protocol_PROTOCOL_HTTP1}},
		SpiffeIds: []string{id(t, cluster, ns, name).String()}, Zones: map[string]*controlpb.HealthCounts{"z": {Healthy: 2}}, ExportId: "x",
	}}
}

// shop is us-east with one service of two instances behind one sidecar, and eu-west beside it.
func shop(t testing.TB) compile.Input {
	return compile.Input{
		Self: compile.Self{Federation: "acme", Cluster: "us-east", Locality: federation.Locality{Region: "us-east-1", Zone: "a"}, TrustDomain: td(t, "us-east"),
			Bundle: []byte("own jwks"), BundleSeq: 1},
		Objects: &api.Objects{
			Services: []*api.Service{service("shop", "web", port("http", 80, "http"), port("db", 5432, "tcp"))},
			Workloads: []*api.Workload{workload("shop", "web-1", "web", "web", map[string]int32{"http": 8080, "db": 5433}),
				workload("shop", "web-2", "web", "web", map[string]int32{"http": 8081})},
		},
		Sessions: []compile.Session{session(t, "shop", "web", "web", verdict("web-1", "http", healthy), verdict("web-1", "db", healthy), verdict("web-2", "http", unhealthy))},
		Gateways: []compile.Gateway{{Name: "gw-1", LocalAddress: "10.0.0.3:7444", Advertise: []string{"203.0.113.1:7443"}, Zone: "a"}},
		Peers:    []compile.Peer{peer(t, "eu-west")},
	}
}

func export(in *compile.Input, ns, name string, to []string, ports ...string) {
	in.Objects.ServiceExports = append(in.Objects.ServiceExports, &api.ServiceExport{ObjectMeta: meta(ns, name)})
	in.Objects.ExportPolicies = append(in.Objects.ExportPolicies, &api.ExportPolicy{ObjectMeta: meta(ns, "export-"+name), Spec: api.ExportPolicySpec{
		Rules: []api.ExportRule{{Services: api.ServiceSelector{Names: []string{name}}, To: api.ExportTo{Clusters: to}, Ports: ports}}}})
	in.Objects.Sort()
}

func get[T proto.Message](t testing.TB, out compile.Output, typeURL, name string) T {
	t.Helper()
	m, ok := out.Resources[typeURL][name].(T)
	if !ok {
		t.Fatalf("no %s %s; there are %v", typeURL, name, names(out.Resources[typeURL]))
	}
	return m
}

func names(m map[string]proto.Message) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func condition(out compile.Output, ref api.Ref, kind string) string {
	for _, u := range out.Conditions {
		for _, c := range u.Conditions {
			if u.Ref == ref && c.Type == kind {
				return string(c.Status) + " " + c.Reason + ": " + c.Message
			}
		}
	}
	return "none"
}

func want(t *testing.T, got proto.Message, text string) {
	t.Helper()
	w := proto.Clone(got)
	proto.Reset(w)
	if err := prototext.Unmarshal([]byte(text), w); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(got, w) {
		t.Errorf("got\n%s\nwant\n%s", prototext.Format(got), prototext.Format(w))
	}
}

func TestSelf(t *testing.T) {
	out := compile.Compile(shop(t))
	want(t, get[*controlpb.Self](t, out, controlpb.TypeSelf, "shop/web"), `
name: "shop/web" spiffe_id: "spiffe://us-east.acme/ns/shop/sa/web" federation: "acme" cluster: "us-east" trust_domain: "us-east.acme"
locality: {region: "us-east-1" zone: "a"}
inbound: {service: {namespace: "shop" name: "web"} port_name: "db" port_number: 5432 sni: "db.web.shop.svc.us-east.acme" protocol: PROTOCOL_TCP
  instances: {workload: "web-1" address: "10.0.0.1:5433" zone: "a"} access: {default_trust_domains: "us-east.acme"}}
inbound: {service: {namespace: "shop" name: "web"} port_name: "http" port_number: 80 sni: "http.web.shop.svc.us-east.acme" protocol: PROTOCOL_HTTP1
  instances: {workload: "web-1" address: "10.0.0.1:8080" zone: "a"} instances: {workload: "web-2" address: "10.0.0.1:8081" zone: "a"}
  access: {default_trust_domains: "us-east.acme"}}`)
}

func TestServiceLocal(t *testing.T) {
	out := compile.Compile(shop(t))
	s := get[*controlpb.Service](t, out, controlpb.TypeService, "shop/web")
	if len(s.Local) != 1 || s.Revision != 7 {
		t.Fatalf("%v", s)
	}
	want(t, s.Local[0], `proxy: "shop/web" inbound_address: "10.0.0.9:15008" spiffe_id: "spiffe://us-east.acme/ns/shop/sa/web"
locality: {region: "us-east-1" zone: "a"} health: {healthy: 1 unhealthy: 1}
instances: {workload: "web-1" health: HEALTH_HEALTHY port_name: "db"} instances: {workload: "web-1" health: HEALTH_HEALTHY port_name: "http"}
instances: {workload: "web-2" health: HEALTH_UNHEALTHY port_name: "http"}`)
	want(t, s.Policy, `trip_percent: 50 spill_below_percent: 70 min_endpoints: 1 tunnel_loss_percent: 5 return_percent: 75 return_after_ms: 120000 ramp_ms: 60000
passive: {consecutive_5xx: 5 eject_for_ms: 30000} active: {every_ms: 1000}`)
}

// TestPorts: how a service's port finds the workload's.
func TestPorts(t *testing.T) {
	for _, c := range []struct {
		name string
		port api.ServicePort
		own  map[string]int32
		want string
	}{
		{"by name", api.ServicePort{Name: "http", Port: 80, TargetPort: intstr.FromString("web")}, map[string]int32{"web": 8080}, "10.0.0.1:8080"},
		{"by a name that is missing", api.ServicePort{Name: "http", Port: 80, TargetPort: intstr.FromString("web")}, nil, ""},
		{"by number", api.ServicePort{Name: "http", Port: 80, TargetPort: intstr.FromInt32(9090)}, map[string]int32{"http": 8080}, "10.0.0.1:9090"},
		{"same name", api.ServicePort{Name: "http", Port: 80}, map[string]int32{"http": 8080}, "10.0.0.1:8080"},
		{"same name under the API's default", api.ServicePort{Name: "http", Port: 80, TargetPort: intstr.FromInt32(80)}, map[string]int32{"http": 8080}, "10.0.0.1:8080"},
		{"same number", api.ServicePort{Name: "http", Port: 80}, nil, "10.0.0.1:80"},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := shop(t)
			in.Objects.Services = []*api.Service{service("shop", "web", c.port)}
			in.Objects.Workloads = []*api.Workload{workload("shop", "web-1", "web", "web", c.own)}
			got := ""
			if in := get[*controlpb.Self](t, compile.Compile(in), controlpb.TypeSelf, "shop/web").Inbound; len(in) > 0 {
				got = in[0].Instances[0].Address
			}
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// TestIdentity: a sidecar stands for workloads of its own proven identity only.
func TestIdentity(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*compile.Input)
		served bool
		said   string
	}{
		{"fits", func(*compile.Input) {}, true, "True Attached"},
		{"another account", func(in *compile.Input) { in.Sessions[0].ID = id(t, "us-east", "shop", "evil") }, false, "False IdentityMismatch"},
		{"another namespace", func(in *compile.Input) { in.Sessions[0].ID = id(t, "us-east", "evil", "web") }, false, "False NoSession"},
		{"a peer's", func(in *compile.Input) { in.Sessions[0].ID = id(t, "eu-west", "shop", "web") }, false, "False NoSession"},
		{"a gateway's", func(in *compile.Input) { in.Sessions[0].ID, _ = spiffeid.Gateway(td(t, "us-east"), "gw-1") }, false, "False NoSession"},
		{"withdrawn", func(in *compile.Input) {
			in.Denied = []compile.Denied{{ID: id(t, "us-east", "shop", "web"), Reason: "lost"}}
		}, false, "False TrustRefused"},
		{"none", func(in *compile.Input) { in.Sessions = nil }, false, "False NoSession"},
		{"an impostor beside it", func(in *compile.Input) {
			in.Sessions = append(in.Sessions, compile.Session{Namespace: "shop", Proxy: "web", ID: id(t, "us-east", "evil", "web"), InboundAddress: "1.1.1.1:1"})
		}, true, "True Attached"},
		{"silent", func(in *compile.Input) { in.Sessions[0].Silent = true }, true, "True Attached"},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := shop(t)
			export(&in, "shop", "web", []string{"*"})
			c.change(&in)
			out := compile.Compile(in)
			s := get[*controlpb.Service](t, out, controlpb.TypeService, "shop/web")
			if got := len(s.Local) == 1; got != c.served {
				t.Errorf("served %v, want %v", got, c.served)
			}
			entry := out.Catalog[td(t, "eu-west")]["svc/shop/web"].(*controlpb.CatalogService)
			if got := len(entry.Zones) > 0; got != c.served {
				t.Errorf("offered with health %v, want %v: %v", got, c.served, entry)
			}
			if got := condition(out, api.Ref{Kind: api.KindWorkload, Namespace: "shop", Name: "web-1"}, "Attached"); !strings.HasPrefix(got, c.said) {
				t.Errorf("condition %q, want %q", got, c.said)
			}
		})
	}
}

func TestOneProxyOneIdentity(t *testing.T) {
	in := shop(t)
	in.Sessions = nil
	in.Objects.Workloads[1].Spec.ServiceAccount = "other"
	out := compile.Compile(in)
	if got := condition(out, api.Ref{Kind: api.KindWorkload, Namespace: "shop", Name: "web-2"}, "Accepted"); !strings.HasPrefix(got, "False Conflict") {
		t.Error(got)
	}
}

func TestDraining(t *testing.T) {
	in := shop(t)
	export(&in, "shop", "web", []string{"*"})
	in.Objects.Workloads[1].Spec.Drain = true
	out := compile.Compile(in)
	e := get[*controlpb.Service](t, out, controlpb.TypeService, "shop/web").Local[0]
	if e.Draining || e.Health.Unhealthy != 0 || e.Health.Healthy != 1 {
		t.Errorf("%v", e)
	}
	in.Objects.Workloads[0].Spec.Drain = true
	if e := get[*controlpb.Service](t, compile.Compile(in), controlpb.TypeService, "shop/web").Local[0]; !e.Draining {
		t.Errorf("%v", e)
	}
	in.Objects.Workloads[0].Spec.Drain, in.Sessions[0].Draining = false, true
	out = compile.Compile(in)
	if c := out.Catalog[td(t, "eu-west")]["svc/shop/web"].(*controlpb.CatalogService); len(c.Zones) != 0 {
		t.Errorf("a draining sidecar is offered: %v", c)
	}
}

// TestExport: nothing leaves without a ServiceExport and a rule that names it, to ready members and on named ports only.
func TestExport(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*compile.Input)
		ports  []string // granted to eu-west; nil: no grant
	}{
		{"neither", func(*compile.Input) {}, nil},
		{"export alone", func(in *compile.Input) { export(in, "shop", "web", []string{"*"}); in.Objects.ExportPolicies = nil }, nil},
		{"policy alone", func(in *compile.Input) { export(in, "shop", "web", []string{"*"}); in.Objects.ServiceExports = nil }, nil},
		{"both", func(in *compile.Input) { export(in, "shop", "web", []string{"eu-west"}) }, []string{"http", "db"}},
		{"any", func(in *compile.Input) { export(in, "shop", "web", []string{"*"}) }, []string{"http", "db"}},
		{"to another", func(in *compile.Input) { export(in, "shop", "web", []string{"ap-south"}) }, nil},
		{"to ourselves", func(in *compile.Input) { export(in, "shop", "web", []string{"us-east"}) }, nil},
		{"one port", func(in *compile.Input) { export(in, "shop", "web", []string{"*"}, "http") }, []string{"http"}},
		{"no such port", func(in *compile.Input) { export(in, "shop", "web", []string{"*"}, "admin") }, nil},
		{"joining", func(in *compile.Input) { export(in, "shop", "web", []string{"*"}); in.Peers[0].Ready = false }, nil},
		{"policy of another namespace", func(in *compile.Input) {
			export(in, "shop", "web", []string{"*"})
			in.Objects.ExportPolicies[0].Namespace = "evil"
		}, nil},
		{"export of another namespace", func(in *compile.Input) {
			export(in, "shop", "web", []string{"*"})
			in.Objects.ServiceExports[0].Namespace = "evil"
		}, nil},
		{"by label", func(in *compile.Input) {
			export(in, "shop", "web", []string{"*"}, "http")
			in.Objects.ExportPolicies[0].Spec.Rules[0].Services = api.ServiceSelector{MatchLabels: map[string]string{"tier": "api"}}
		}, []string{"http"}},
		{"by another label", func(in *compile.Input) {
			export(in, "shop", "web", []string{"*"}, "http")
			in.Objects.ExportPolicies[0].Spec.Rules[0].Services = api.ServiceSelector{MatchLabels: map[string]string{"tier": "db"}}
		}, nil},
		{"by nothing", func(in *compile.Input) {
			export(in, "shop", "web", []string{"*"}, "http")
			in.Objects.ExportPolicies[0].Spec.Rules[0].Services = api.ServiceSelector{}
		}, nil},
		{"two rules", func(in *compile.Input) {
			export(in, "shop", "web", []string{"*"}, "http")
			in.Objects.ExportPolicies[0].Spec.Rules = append(in.Objects.ExportPolicies[0].Spec.Rules, api.ExportRule{
				Services: api.ServiceSelector{Names: []string{"web"}}, To: api.ExportTo{Clusters: []string{"eu-west"}}, Ports: []string{"db"}})
		}, []string{"http", "db"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := shop(t)
			c.change(&in)
			out := compile.Compile(in)
			var got []string
			if g, ok := out.Resources[controlpb.TypeGrant]["eu-west.acme/shop/web"].(*controlpb.Grant); ok {
				for _, p := range g.Ports {
					got = append(got, p.Name)
				}
				entry := out.Catalog[td(t, "eu-west")]["svc/shop/web"].(*controlpb.CatalogService)
				if entry.ExportId != g.ExportId || len(entry.Ports) != len(g.Ports) || g.ExportId == "" {
					t.Errorf("catalog and grant differ: %v, %v", entry, g)
				}
			} else if len(out.Resources[controlpb.TypeGrant]) > 0 || out.Catalog[td(t, "eu-west")]["svc/shop/web"] != nil {
				t.Errorf("offered without a grant")
			}
			if !slices.Equal(got, c.ports) {
				t.Errorf("granted %v, want %v", got, c.ports)
			}
			for _, p := range get[*controlpb.Self](t, out, controlpb.TypeSelf, "shop/web").Inbound {
				if open := slices.Contains(p.Access.DefaultTrustDomains, "eu-west.acme"); open != slices.Contains(c.ports, p.PortName) {
					t.Errorf("port %s open to eu-west: %v", p.PortName, open)
				}
			}
		})
	}
}

func TestCatalogEntry(t *testing.T) {
	in := shop(t)
	export(&in, "shop", "web", []string{"*"}, "http")
	in.Objects.Workloads[1].Spec.Zone = "b"
	in.Objects.Federations = []*api.Federation{{ObjectMeta: meta("", "acme"), Spec: api.FederationSpec{Drain: []api.Drain{{Cluster: "us-east", Reason: "move"}, {Cluster: "eu-west"}}}}}
	out := compile.Compile(in)
	c := out.Catalog[td(t, "eu-west")]
	e := c["svc/shop/web"].(*controlpb.CatalogService)
	want(t, e, `service: {namespace: "shop" name: "web"} ports: {name: "http" number: 80 protocol: PROTOCOL_HTTP1}
spiffe_ids: "spiffe://us-east.acme/ns/shop/sa/web" zones: {key: "a" value: {healthy: 1}} zones: {key: "b" value: {unhealthy: 1}}
limits: {drained: true drain_reason: "move"} export_id: "`+e.ExportId+`"`)
	want(t, c["gw/gw-1"], `name: "gw-1" addresses: "203.0.113.1:7443" zone: "a"`)
	if strings.Contains(prototext.Format(e), "10.0.0.") {
		t.Error("a workload's address leaves")
	}
	s := get[*controlpb.Service](t, out, controlpb.TypeService, "shop/web")
	if !slices.Equal(s.Policy.LocallyDrained, []string{"eu-west"}) || !s.OwnLimits.GetDrained() {
		t.Errorf("drains: %v %v", s.Policy.LocallyDrained, s.OwnLimits)
	}
	again := shop(t)
	export(&again, "shop", "web", []string{"*"}, "http")
	again.Objects.ServiceExports[0].UID = "another"
	if x := compile.Compile(again).Catalog[td(t, "eu-west")]["svc/shop/web"].(*controlpb.CatalogService); x.ExportId == e.ExportId {
		t.Error("an export that was withdrawn and made again has the same id")
	}
}

func TestRemote(t *testing.T) {
	in := shop(t)
	in.Peers[0].Sameness = []string{"shop"}
	in.Peers[0].Catalog = &compile.Catalog{Epoch: 2, Seq: 9, Freshness: controlpb.Freshness_FRESHNESS_FRESH,
		Services: []compile.Offered{offers(t, "eu-west", "shop", "web"), offers(t, "eu-west", "shop", "cart"), offers(t, "eu-west", "bank", "vault")}}
	out := compile.Compile(in)
	want(t, get[*controlpb.Service](t, out, controlpb.TypeService, "shop/web").Remote[0], `cluster: "eu-west" federation: "acme" trust_domain: "eu-west.acme" region: "eu-west-1"
ports: {name: "http" number: 80 protocol: PROTOCOL_HTTP1} spiffe_ids: "spiffe://eu-west.acme/ns/shop/sa/web" zones: {key: "z" value: {healthy: 2}} same: true
freshness: FRESHNESS_FRESH catalog_epoch: 2 catalog_seq: 5 tunnel_up: true rtt_seconds: 0.08 transport: "quic"`)
	if s := get[*controlpb.Service](t, out, controlpb.TypeService, "shop/cart"); len(s.Ports) != 1 || len(s.Local) != 0 || !s.Remote[0].Same {
		t.Errorf("a service that is only there: %v", s)
	}
	if s := get[*controlpb.Service](t, out, controlpb.TypeService, "bank/vault"); s.Remote[0].Same || len(s.Ports) != 0 {
		t.Errorf("a namespace without sameness: %v", s)
	}
	in.Objects.Peers = []*api.Peer{{ObjectMeta: meta("", "eu-west"), Spec: api.PeerSpec{TrustDomain: "eu-west.acme"}}}
	if s := get[*controlpb.Service](t, compile.Compile(in), controlpb.TypeService, "shop/web"); s.Remote[0].Same {
		t.Error("the Peer object took sameness away and it stayed")
	}
	in.Objects.Peers[0].Spec = api.PeerSpec{TrustDomain: "other.acme", Sameness: []string{"*"}}
	if s := get[*controlpb.Service](t, compile.Compile(in), controlpb.TypeService, "shop/web"); s.Remote[0].Same {
		t.Error("sameness of a Peer object for another trust domain applies")
	}
	in.Peers[0].Ready = false
	out = compile.Compile(in)
	if s := get[*controlpb.Service](t, out, controlpb.TypeService, "shop/web"); len(s.Remote) != 0 || out.Resources[controlpb.TypeService]["shop/cart"] != nil {
		t.Error("a joining peer's catalog routes")
	}
	if b := out.Resources[controlpb.TypeBundle]; b["eu-west.acme"] != nil || b["us-east.acme"] == nil {
		t.Errorf("bundles %v", names(b))
	}
	if p := get[*controlpb.Peer](t, out, controlpb.TypePeer, "eu-west.acme"); p.State != controlpb.PeerState_PEER_STATE_JOINING {
		t.Error(p)
	}
}

// TestLyingPeers: P2, T34. A peer speaks of its own identities only, and of no name that is taken.
func TestLyingPeers(t *testing.T) {
	in := shop(t)
	foreign := offers(t, "eu-west", "shop", "web")
	foreign.Service.SpiffeIds = append(foreign.Service.SpiffeIds, id(t, "us-east", "shop", "web").String())
	bad := offers(t, "eu-west", "shop", "cart")
	bad.Service.Service.Name = "../x"
	port := offers(t, "eu-west", "shop", "pay")
	port.Service.Ports[0].Name = "a.b"
	in.Objects.Peers = []*api.Peer{{ObjectMeta: meta("", "eu-west"), Spec: api.PeerSpec{TrustDomain: "eu-west.acme", Sameness: []string{"*"}}}}
	in.Peers[0].Catalog = &compile.Catalog{Services: []compile.Offered{foreign, bad, port, {Service: nil}}}
	own, twin := peer(t, "ap-south"), peer(t, "af-south")
	own.Cluster, twin.Cluster = "us-east", "eu-west"
	same := peer(t, "sa-east")
	same.TrustDomain = in.Self.TrustDomain
	for _, p := range []compile.Peer{own, twin, same} {
		p.Sameness = []string{"*"}
		p.Catalog = &compile.Catalog{Services: []compile.Offered{offers(t, "us-east", "shop", "web")}}
		in.Peers = append(in.Peers, p)
	}
	out := compile.Compile(in)
	if s := get[*controlpb.Service](t, out, controlpb.TypeService, "shop/web"); len(s.Remote) != 0 {
		t.Errorf("remote %v", s.Remote)
	}
	if got := names(out.Resources[controlpb.TypeService]); !slices.Equal(got, []string{"shop/web"}) {
		t.Errorf("services %v", got)
	}
	if len(out.Problems) != 6 { // the two entries without a proper name share one
		t.Errorf("problems: %s", strings.Join(out.Problems, "\n"))
	}
	in.Objects.Peers = nil
	if p := compile.Compile(in).Resources[controlpb.TypePeer]; len(p) != 0 {
		t.Errorf("two claim one name and nobody said whose it is: %v", names(p))
	}
}

func TestFailoverPolicy(t *testing.T) {
	n, f := int32(60), 2.5
	in := shop(t)
	after := metav1.Duration{Duration: 0}
	p := &api.FailoverPolicy{ObjectMeta: meta("shop", "web"), Spec: api.FailoverPolicySpec{
		TargetRefs: []api.TargetRef{{Group: api.GroupMCS, Kind: api.KindServiceImport, Name: "web"}},
		Priorities: []api.Priority{{Clusters: []string{"local"}}, {Clusters: []string{"eu-west", "ap"}, Weights: map[string]int32{"eu-west": 80}}, {AnyOf: &api.AnyOf{Except: []string{"cn"}}}},
		Trip:       &api.Trip{MinHealthyPercent: &n, TunnelLossPercent: &f}, Return: &api.Return{After: &after},
		Drain: []api.Drain{{Cluster: "eu-west"}},
	}}
	in.Objects.FailoverPolicies = []*api.FailoverPolicy{p}
	out := compile.Compile(in)
	want(t, get[*controlpb.Service](t, out, controlpb.TypeService, "shop/web").Policy, `name: "shop/web" generation: 1 tiers: {clusters: "local"}
tiers: {clusters: "eu-west" clusters: "ap" weights: {key: "eu-west" value: 80}} tiers: {any: true except: "cn"} locally_drained: "eu-west"
trip_percent: 60 spill_below_percent: 70 min_endpoints: 1 tunnel_loss_percent: 2.5 return_percent: 75 return_after_ms: -1 ramp_ms: 60000
passive: {consecutive_5xx: 5 eject_for_ms: 30000} active: {every_ms: 1000}`)
	ref := api.Ref{Kind: api.KindFailoverPolicy, Namespace: "shop", Name: "web"}
	if got := condition(out, ref, "Accepted"); got != "True Valid: no members, and left out until they join: ap" {
		t.Error(got)
	}

	younger := *p
	younger.ObjectMeta = meta("shop", "a-later")
	younger.CreationTimestamp = metav1.NewTime(time.Unix(1, 0))
	in.Objects.FailoverPolicies = []*api.FailoverPolicy{&younger, p}
	out = compile.Compile(in)
	if s := get[*controlpb.Service](t, out, controlpb.TypeService, "shop/web"); s.Policy.Name != "shop/web" {
		t.Errorf("the younger policy won: %s", s.Policy.Name)
	}
	if got := condition(out, api.Ref{Kind: api.KindFailoverPolicy, Namespace: "shop", Name: "a-later"}, "Conflict"); !strings.HasPrefix(got, "True Conflict: web has the older policy web") {
		t.Error(got)
	}

	broken := *p
	broken.Generation = 2
	high := int32(90)
	broken.Spec.Trip = &api.Trip{MinHealthyPercent: &high, SpillBelowHealthyPercent: &high}
	in.Objects.FailoverPolicies, in.LastGood = []*api.FailoverPolicy{&broken}, out.LastGood
	out = compile.Compile(in)
	if s := get[*controlpb.Service](t, out, controlpb.TypeService, "shop/web"); s.Policy.Generation != 1 || s.Policy.TripPercent != 60 {
		t.Errorf("the last good version did not stay: %v", s.Policy)
	}
	if got := condition(out, ref, "Accepted"); !strings.HasPrefix(got, "False Invalid") || !strings.HasSuffix(got, "generation 1 stays in force") {
		t.Error(got)
	}
	foreign := *p
	foreign.Namespace = "evil"
	in.Objects.FailoverPolicies, in.LastGood = []*api.FailoverPolicy{&foreign}, compile.LastGood{}
	if s := get[*controlpb.Service](t, compile.Compile(in), controlpb.TypeService, "shop/web"); s.Policy.Name != "" {
		t.Error("a policy of another namespace applies")
	}
}

func TestDeterministic(t *testing.T) {
	text := func(out compile.Output) string {
		var b strings.Builder
		for _, u := range []string{controlpb.TypeSelf, controlpb.TypeService, controlpb.TypeGateway, controlpb.TypeBundle, controlpb.TypePeer, controlpb.TypeGrant, controlpb.TypeDenied} {
			for _, n := range names(out.Resources[u]) {
				data, err := proto.MarshalOptions{Deterministic: true}.Marshal(out.Resources[u][n])
				if err != nil {
					t.Fatal(err)
				}
				fmt.Fprintf(&b, "%s %s %x\n", u, n, data)
			}
		}
		rest, err := json.Marshal([]any{out.Conditions, out.Problems, out.LastGood, out.Exports})
		if err != nil {
			t.Fatal(err)
		}
		return b.String() + string(rest)
	}
	in := shop(t)
	export(&in, "shop", "web", []string{"*"})
	for _, c := range []string{"ap-south", "af-south"} {
		p := peer(t, c, "*")
		p.Catalog = &compile.Catalog{Services: []compile.Offered{offers(t, c, "shop", "web"), offers(t, c, "shop", "cart")}}
		in.Peers = append(in.Peers, p)
	}
	first := text(compile.Compile(in))
	for range 20 {
		slices.Reverse(in.Peers)
		slices.Reverse(in.Sessions)
		if again := text(compile.Compile(in)); again != first {
			t.Fatalf("differs:\n%s\n%s", first, again)
		}
	}
}
