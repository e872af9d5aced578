// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/endpoint/endpointtest"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func initForeign(t *testing.T, socket string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "cp")
	r, err := Init(InitConfig{DataDir: dir, Federation: "acme", Cluster: "us-east", Region: "us-east-1", TrustDomain: "elsewhere.example", WorkloadAPI: socket})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Entries) != 3 || r.GatewayTokenFile != "" || r.BundleSHA256 != "" {
		t.Errorf("%+v", r)
	}
	return dir
}

// Where identities come from is fixed at init: neither a variable that is set nor one that is missing changes it.
func TestWhereIdentitiesComeFrom(t *testing.T) {
	const socket = "unix:///run/agent.sock"
	foreign, ours := initForeign(t, socket), filepath.Join(t.TempDir(), "cp")
	if _, err := Init(InitConfig{DataDir: ours, Federation: "acme", Cluster: "us-east", Region: "us-east-1"}); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ dir, socket, says string }{
		"a CA, and a socket":      {ours, socket, "holds a CA"},
		"no CA, and no socket":    {foreign, "", "address of the Workload API is missing"},
		"no CA, and a bad socket": {foreign, "/run/agent.sock", "unix:///path"},
	} {
		if _, err := New(Config{DataDir: tt.dir, WorkloadAPI: tt.socket}); !problem.Is(err, problem.ConfigInvalid) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, dir := range []string{ours, foreign} {
		for _, socket := range []string{"", socket} {
			_, err := Init(InitConfig{DataDir: dir, Federation: "acme", Cluster: "us-east", Region: "us-east-1", TrustDomain: "elsewhere.example", WorkloadAPI: socket})
			if !problem.Is(err, problem.AlreadyInitialized) {
				t.Errorf("init over %s: %v", dir, err)
			}
		}
	}
}

// A control plane waits for its identities, and says what it waits for; without them it serves nothing.
func TestWaitsForIdentity(t *testing.T) {
	socket := "unix://" + filepath.Join(t.TempDir(), "none.sock")
	c, err := New(Config{DataDir: initForeign(t, socket), WorkloadAPI: socket})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	err = c.Run(ctx)
	text := problem.From(err).Human()
	if !problem.Is(err, problem.IdentityNotOffered) || !strings.Contains(text, socket) || !strings.Contains(text, "spiffe://elsewhere.example/strait/catalog-signer") {
		t.Errorf("%v\n%s", err, text)
	}
	if c.addrs != (Addrs{}) {
		t.Errorf("it listens: %+v", c.addrs)
	}
}

// Without a CA everything that would issue is refused with the reason, everything else goes on; with one nothing changes.
func TestNeedsCA(t *testing.T) {
	td, err := spiffeid.ParseTrustDomain("elsewhere.example")
	if err != nil {
		t.Fatal(err)
	}
	authority, err := endpointtest.New(endpointtest.Options{TrustDomain: td, TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	server := authority.Server(spiffeid.ControlPlane(td), spiffeid.CatalogSigner(td))
	defer server.Stop()
	socket, err := server.Listen(t.TempDir(), "s")
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := New(Config{DataDir: initForeign(t, socket), WorkloadAPI: socket})
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.dir.Close()
	if err := foreign.awaitIdentity(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer foreign.elsewhere.Close()
	if !foreign.source.Identity().ID.IsControlPlane() || !foreign.signer.Load().ID.IsCatalogSigner() || foreign.issuer.Bundle().TrustDomain() != td {
		t.Error("the identities are not in force")
	}
	if end := foreign.issuer.IssuerNotAfter(); end.IsZero() || end.After(time.Now().Add(25*time.Hour)) {
		t.Errorf("the issuer ends at %s", end)
	}
	if _, err := foreign.issuer.IssueCSR(nil, spiffeid.ControlPlane(td), 0); !problem.Is(err, problem.IdentitiesElsewhere) {
		t.Errorf("issue: %v", err)
	}
	ours := closed(t)
	passed := func(context.Context, any) (any, error) { return nil, nil }
	methods := map[string]bool{}
	for service, desc := range map[string]grpc.ServiceDesc{"strait.v1.Operator": controlpb.Operator_ServiceDesc, "strait.v1.Identity": controlpb.Identity_ServiceDesc} {
		for _, m := range desc.Methods {
			name := "/" + service + "/" + m.MethodName
			methods[name] = true
			info := &grpc.UnaryServerInfo{FullMethod: name}
			if _, err := ours.needsCA(t.Context(), nil, info, passed); err != nil {
				t.Errorf("with a CA %s: %v", name, err)
			}
			_, err := foreign.needsCA(t.Context(), nil, info, passed)
			if _, issues := issuing[name]; issues != problem.Is(wire.FromStatus(err), problem.IdentitiesElsewhere) {
				t.Errorf("without a CA %s: %v", name, err)
			}
		}
	}
	for name := range issuing {
		if !methods[name] {
			t.Errorf("%s is in the table and not in a proto", name)
		}
	}
	if err := foreign.registrationRefused(); !problem.Is(err, problem.RegistrationRefused) || ours.registrationRefused() != nil {
		t.Errorf("registration: %v", err)
	}
}
