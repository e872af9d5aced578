// SPDX-License-Identifier: Apache-2.0

package compile_test

import (
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/compile"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestDeniedOfPeers: what a peer withdraws of its own reaches our proxies; whatever else it names does not.
func TestDeniedOfPeers(t *testing.T) {
	in := shop(t)
	eu := -1
	for i := range in.Peers {
		if in.Peers[i].TrustDomain == td(t, "eu-west") {
			eu = i
		}
	}
	if eu < 0 {
		t.Fatal("no such peer")
	}
	gateway, err := spiffeid.Gateway(td(t, "eu-west"), "gw-1")
	if err != nil {
		t.Fatal(err)
	}
	before := time.UnixMilli(1_700_000_000_000)
	in.Peers[eu].Denied = []compile.Denied{
		{ID: gateway, Reason: "withdrawn by eu-west"}, {ID: id(t, "eu-west", "shop", "pay"), IssuedBefore: before},
		{ID: id(t, "us-east", "shop", "web")}, {ID: id(t, "ap-south", "shop", "web")},
	}
	out := compile.Compile(in)
	all := out.Resources[controlpb.TypeDenied]
	if len(all) != 2 {
		t.Fatalf("%d denied: %v", len(all), all)
	}
	if d := get[*controlpb.Denied](t, out, controlpb.TypeDenied, gateway.String()); d.Reason != "withdrawn by eu-west" || d.IssuedBeforeMs != 0 {
		t.Errorf("gateway: %v", d)
	}
	if d := get[*controlpb.Denied](t, out, controlpb.TypeDenied, id(t, "eu-west", "shop", "pay").String()); d.IssuedBeforeMs != before.UnixMilli() {
		t.Errorf("workload: %v", d)
	}
	if n := strings.Count(strings.Join(out.Problems, "\n"), "not its own"); n != 2 {
		t.Errorf("problems %q", out.Problems)
	}
	if s := get[*controlpb.Service](t, out, controlpb.TypeService, "shop/web"); len(s.Local) != 1 {
		t.Error("a peer withdrew our workload")
	}
}

// TestReadmittedIdentityServes: what is withdrawn only as far as older certificates go is no reason to leave an instance out.
func TestReadmittedIdentityServes(t *testing.T) {
	in := shop(t)
	web := id(t, "us-east", "shop", "web")
	in.Denied = []compile.Denied{{ID: web, IssuedBefore: time.UnixMilli(5)}, {ID: id(t, "eu-west", "shop", "web")}}
	out := compile.Compile(in)
	if s := get[*controlpb.Service](t, out, controlpb.TypeService, "shop/web"); len(s.Local) != 1 {
		t.Error("it is left out")
	}
	if len(out.Resources[controlpb.TypeDenied]) != 1 || get[*controlpb.Denied](t, out, controlpb.TypeDenied, web.String()).IssuedBeforeMs != 5 {
		t.Errorf("denied %v", out.Resources[controlpb.TypeDenied])
	}
}
