// SPDX-License-Identifier: Apache-2.0

package compile_test

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/compile"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

var (
	someNamespaces = []string{"shop", "bank"}
	someServices   = []string{"api", "web", "pay"}
	someClusters   = []string{"eu-west", "ap-south"}
)

// world draws a configuration and peers that offer whatever they like.
func world(rt *rapid.T, t *testing.T) compile.Input {
	in := compile.Input{Self: compile.Self{Federation: "acme", Cluster: "us-east", TrustDomain: td(t, "us-east"), Bundle: []byte("x")}, Objects: &api.Objects{}}
	for _, ns := range someNamespaces {
		for _, n := range someServices {
			if rapid.Bool().Draw(rt, "service") {
				in.Objects.Services = append(in.Objects.Services, service(ns, n, port("http", 80, "http"), port("db", 5432, "tcp")))
				in.Objects.Workloads = append(in.Objects.Workloads, workload(ns, n+"-1", n, n, map[string]int32{"http": 8080, "db": 5432}))
				in.Sessions = append(in.Sessions, session(t, ns, n, n, verdict(n+"-1", "", healthy)))
			}
			if rapid.Bool().Draw(rt, "export") {
				in.Objects.ServiceExports = append(in.Objects.ServiceExports, &api.ServiceExport{ObjectMeta: meta(ns, n)})
			}
			if rapid.Bool().Draw(rt, "policy") {
				to := rapid.SliceOfN(rapid.SampledFrom([]string{"eu-west", "ap-south", "*", "gone"}), 1, 2).Draw(rt, "to")
				ports := rapid.SliceOfN(rapid.SampledFrom([]string{"http", "db"}), 0, 1).Draw(rt, "ports")
				in.Objects.ExportPolicies = append(in.Objects.ExportPolicies, &api.ExportPolicy{ObjectMeta: meta(ns, "export-"+n),
					Spec: api.ExportPolicySpec{Rules: []api.ExportRule{{Services: api.ServiceSelector{Names: []string{n}}, To: api.ExportTo{Clusters: to}, Ports: ports}}}})
			}
		}
	}
	in.Objects.Sort()
	for _, c := range someClusters {
		p := peer(t, c, rapid.SliceOfN(rapid.SampledFrom([]string{"shop", "bank", "*"}), 0, 1).Draw(rt, "sameness")...)
		p.Ready = rapid.Bool().Draw(rt, "ready")
		p.Catalog = drawCatalog(rt, t, c)
		in.Peers = append(in.Peers, p)
	}
	return in
}

func drawCatalog(rt *rapid.T, t *testing.T, cluster string) *compile.Catalog {
	c := &compile.Catalog{Epoch: 1}
	for range rapid.IntRange(0, 5).Draw(rt, "offers") {
		o := offers(t, cluster, rapid.SampledFrom(someNamespaces).Draw(rt, "ns"), rapid.SampledFrom(someServices).Draw(rt, "name"))
		switch rapid.IntRange(0, 5).Draw(rt, "lie") {
		case 0:
			o.Service.SpiffeIds = []string{id(t, "us-east", "shop", "api").String()}
		case 1:
			o.Service.Ports = append(o.Service.Ports, &controlpb.ServicePort{Name: "admin", Number: 1})
		case 2:
			o.Service.Limits = &controlpb.OwnerLimits{Drained: true}
		}
		c.Services = append(c.Services, o)
	}
	return c
}

// local is what belongs to this cluster alone: nothing in it may depend on what a peer offers.
func local(out compile.Output) string {
	var b strings.Builder
	for _, n := range names(out.Resources[controlpb.TypeSelf]) {
		fmt.Fprintln(&b, prototext.MarshalOptions{}.Format(out.Resources[controlpb.TypeSelf][n]))
	}
	for _, n := range names(out.Resources[controlpb.TypeService]) {
		s := out.Resources[controlpb.TypeService][n].(*controlpb.Service)
		if s.Revision == 0 {
			continue // not ours
		}
		s = proto.CloneOf(s)
		s.Remote = nil
		data, _ := proto.MarshalOptions{Deterministic: true}.Marshal(s)
		fmt.Fprintf(&b, "%s %x\n", n, data)
	}
	return b.String()
}

// TestPeersNeverTouchOthers: T28, P2. Two peers and the own cluster have the same names; whatever one peer offers, what is local and
// what the other peer offers stay byte for byte as they were, and only granted namespaces join a federated name.
func TestPeersNeverTouchOthers(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		in := world(rt, t)
		before := compile.Compile(in)
		in.Peers[0].Catalog = drawCatalog(rt, t, string(in.Peers[0].Cluster))
		after := compile.Compile(in)
		if local(before) != local(after) {
			rt.Fatalf("local changed:\n%s\n%s", local(before), local(after))
		}
		for _, n := range names(before.Resources[controlpb.TypeService]) {
			was := remoteOf(before, n, "ap-south")
			if is := remoteOf(after, n, "ap-south"); !proto.Equal(was, is) {
				rt.Fatalf("%s of ap-south changed: %v, %v", n, was, is)
			}
		}
		for n, m := range after.Resources[controlpb.TypeService] {
			for _, r := range m.(*controlpb.Service).Remote {
				ns, _, _ := strings.Cut(n, "/")
				p := in.Peers[0]
				if r.Cluster == "ap-south" {
					p = in.Peers[1]
				}
				granted := len(p.Sameness) == 1 && (p.Sameness[0] == ns || p.Sameness[0] == "*")
				if !p.Ready || r.Same != granted {
					rt.Fatalf("%s of %s: ready %v, same %v, sameness %v", n, r.Cluster, p.Ready, r.Same, p.Sameness)
				}
				for _, s := range r.SpiffeIds {
					if v, err := spiffeid.Parse(s); err != nil || v.TrustDomain() != p.TrustDomain {
						rt.Fatalf("%s of %s accepts %s", n, r.Cluster, s)
					}
				}
			}
		}
	})
}

func remoteOf(out compile.Output, name, cluster string) *controlpb.RemoteCluster {
	s, _ := out.Resources[controlpb.TypeService][name].(*controlpb.Service)
	for _, r := range s.GetRemote() {
		if r.Cluster == cluster {
			return r
		}
	}
	return nil
}

// TestNothingLeavesWithoutBoth checks every grant, catalog entry and open port against the two objects, read naively.
func TestNothingLeavesWithoutBoth(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		in := world(rt, t)
		out := compile.Compile(in)
		may := func(ns, name, port, cluster string) bool {
			ready := false
			for _, p := range in.Peers {
				ready = ready || string(p.Cluster) == cluster && p.Ready
			}
			exported, named, exists := false, false, false
			for _, s := range in.Objects.Services {
				exists = exists || s.Namespace == ns && s.Name == name
			}
			for _, x := range in.Objects.ServiceExports {
				exported = exported || x.Namespace == ns && x.Name == name
			}
			for _, p := range in.Objects.ExportPolicies {
				rule := p.Spec.Rules[0]
				for _, c := range rule.To.Clusters {
					if p.Namespace == ns && rule.Services.Names[0] == name && (c == "*" || c == cluster) && (len(rule.Ports) == 0 || rule.Ports[0] == port) {
						named = true
					}
				}
			}
			return ready && exists && exported && named
		}
		for _, cluster := range someClusters {
			domain := td(t, cluster)
			for _, ns := range someNamespaces {
				for _, n := range someServices {
					g, _ := out.Resources[controlpb.TypeGrant][domain.String()+"/"+ns+"/"+n].(*controlpb.Grant)
					e, _ := out.Catalog[domain]["svc/"+ns+"/"+n].(*controlpb.CatalogService)
					for _, port := range []string{"http", "db"} {
						want := may(ns, n, port, cluster)
						if has(g.GetPorts(), port) != want || has(e.GetPorts(), port) != want {
							rt.Fatalf("%s/%s:%s to %s: want %v, grant %v, catalog %v", ns, n, port, cluster, want, g, e)
						}
						if open, ok := opened(out, ns, n, port, domain.String()); ok && open != want {
							rt.Fatalf("%s/%s:%s open to %s: %v, want %v", ns, n, port, cluster, open, want)
						}
					}
				}
			}
		}
		for domain := range out.Catalog {
			for k := range out.Catalog[domain] {
				if !strings.HasPrefix(k, "svc/") {
					rt.Fatalf("entry %s", k)
				}
			}
		}
	})
}

func has(ports []*controlpb.ServicePort, name string) bool {
	for _, p := range ports {
		if p.Name == name {
			return true
		}
	}
	return false
}

// opened says whether the service's sidecar lets a trust domain in by default.
func opened(out compile.Output, ns, name, port, domain string) (open, ok bool) {
	s, _ := out.Resources[controlpb.TypeSelf][ns+"/"+name].(*controlpb.Self)
	for _, p := range s.GetInbound() {
		if p.PortName == port && p.Service.Name == name {
			for _, d := range p.Access.DefaultTrustDomains {
				open = open || d == domain
			}
			return open, true
		}
	}
	return false, false
}

// TestEveryNameIsOwned: T34. Whatever a namespace's objects say, nothing outside the namespace changes.
func TestEveryNameIsOwned(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		in := world(rt, t)
		before := compile.Compile(in)
		target := []api.TargetRef{{Kind: api.KindService, Name: rapid.SampledFrom(someServices).Draw(rt, "target")}}
		o := *in.Objects
		o.AccessPolicies = []*api.AccessPolicy{{ObjectMeta: meta("bank", "x"), Spec: api.AccessPolicySpec{TargetRefs: target}}}
		o.FailoverPolicies = []*api.FailoverPolicy{{ObjectMeta: meta("bank", "x"), Spec: api.FailoverPolicySpec{TargetRefs: target, Drain: []api.Drain{{Cluster: "us-east"}}}}}
		o.ExportPolicies = append(o.ExportPolicies[:len(o.ExportPolicies):len(o.ExportPolicies)], &api.ExportPolicy{ObjectMeta: meta("bank", "x"),
			Spec: api.ExportPolicySpec{Rules: []api.ExportRule{{Services: api.ServiceSelector{Names: someServices}, To: api.ExportTo{Clusters: []string{"*"}}}}}})
		o.Workloads = append(o.Workloads[:len(o.Workloads):len(o.Workloads)], workload("bank", "evil", "api", "api", map[string]int32{"http": 1}))
		in.Objects = &o
		after := compile.Compile(in)
		for _, u := range []string{controlpb.TypeSelf, controlpb.TypeService, controlpb.TypeGrant} {
			for n, m := range before.Resources[u] {
				if strings.Contains(n, "shop/") && !proto.Equal(m, after.Resources[u][n]) {
					rt.Fatalf("%s %s changed:\n%v\n%v", u, n, m, after.Resources[u][n])
				}
			}
			for n := range after.Resources[u] {
				if strings.Contains(n, "shop/") && before.Resources[u][n] == nil {
					rt.Fatalf("%s %s appeared", u, n)
				}
			}
		}
	})
}

func TestMatchesLabelsOnly(t *testing.T) {
	in := shop(t)
	in.Objects.Services[0].Spec.Selector = nil
	if s := get[*controlpb.Service](t, compile.Compile(in), controlpb.TypeService, "shop/web"); len(s.Local) != 0 {
		t.Error("an empty selector selects")
	}
	if got := federation.SNI("http", federation.ServiceName{Namespace: "shop", Name: "web"}, "us-east", "acme"); got != "http.web.shop.svc.us-east.acme" {
		t.Error(got)
	}
}
