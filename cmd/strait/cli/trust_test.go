// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/cmd/strait/cli"
	"github.com/strait-mesh/strait/controlplane"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// sampleTrust is a rotation that waits for one member, one process that is connected and one that is not.
func sampleTrust(phase string) *controlpb.TrustStatusResponse {
	end := time.Date(2036, 11, 19, 0, 0, 0, 0, time.UTC).Unix()
	seen := at.Add(-90 * time.Minute).Unix()
	r := &controlpb.TrustStatusResponse{
		Cluster: "us-east", TrustDomain: "us-east.acme", Phase: phase, SinceUnix: at.Add(-6*time.Minute - 13*time.Second).Unix(), Sequence: 2, Source: "strait",
		Authorities: []*controlpb.Authority{
			{Kind: "root", State: "retiring", Fingerprint: "4f9a2107c1d2e3f4a5b6", Subject: "Strait root of us-east.acme", NotAfterUnix: end, Key: "here"},
			{Kind: "root", State: "active", Fingerprint: "b6a5f4e3d2c107219a4f", Subject: "Strait root of us-east.acme", NotAfterUnix: end, Key: "offline"},
			{Kind: "jwt", State: "active", Fingerprint: "k1"},
		},
		Progress: []*controlpb.RotationProgress{
			{Kind: "member", Name: "ap-south", Sequence: 1, LastSeenUnix: seen},
			{Kind: "member", Name: "eu-west", Sequence: 2, Acknowledged: true, Reachable: true},
			{Kind: "proxy", Name: "gateway-1", Sequence: 2, Acknowledged: true, Renewed: true, Reachable: true},
			{Kind: "proxy", Name: "shop/cart", Sequence: 1, LastSeenUnix: seen},
			{Kind: "proxy", Name: "shop/web", Sequence: 2, Acknowledged: true, Reachable: true},
			{Kind: "operator", Name: "alice", Acknowledged: true, LastSeenUnix: seen},
		},
		Bundles: []*controlpb.TrustedBundle{
			{TrustDomain: "eu-west.acme", Cluster: "eu-west", Sequence: 3, Source: "catalog", UpdatedUnix: at.Add(-12 * time.Second).Unix(),
				Authorities: []*controlpb.Authority{{Kind: "root", State: "active", Fingerprint: "00ff", NotAfterUnix: end}}},
			{TrustDomain: "partner.example", Sequence: 9, Source: "https_web", Error: "connection refused", Authorities: []*controlpb.Authority{{Kind: "root", State: "active", NotAfterUnix: end}}},
		},
	}
	if phase == "prepared" {
		for _, p := range r.Progress {
			p.Renewed = false
		}
	}
	return r
}

func TestTrustStatus(t *testing.T) {
	r := cli.NewRendering(at, "table", false)
	if err := r.TrustStatus(sampleTrust("activated")); err != nil {
		t.Fatal(err)
	}
	equal(t, "activated", r.Out.String(), `
us-east   trust domain us-east.acme   bundle 2   phase activated since 2026-11-22 14:02:11 (6m13s)

AUTHORITY  STATE     ENDS        KEY      SHA-256
root       retiring  2036-11-19  here     4f9a2107c1d2e3f4
root       active    2036-11-19  offline  b6a5f4e3d2c10721
jwt        active    -           -        k1

WHO        KIND      STATE   BUNDLE  IDENTITY  SEEN
ap-south   member    ✗ away  1 of 2  -         1h30m ago
eu-west    member    ✓ ok    2       -         now
gateway-1  proxy     ✓ ok    2       renewed   now
shop/cart  proxy     ✗ away  1 of 2  old       1h30m ago
shop/web   proxy     … wait  2       old       now
alice      operator  … wait  -       old       1h30m ago

TRUSTED          CLUSTER  BUNDLE  ROOTS  ROOT ENDS   CONFIRMED  FROM
eu-west.acme     eu-west  3       1      2036-11-19  12s ago    catalog
partner.example  -        9       1      2036-11-19  never      https_web
! warn  bundle of partner.example: connection refused

next: strait trust rotate retire --wait (bundle 2: 2 of 3 processes, 1 of 2 members; renewed: 1 of 3 processes; away: 1)
`)

	prepared := sampleTrust("prepared")
	prepared.MayAdvance, prepared.Bundles = true, nil
	r = cli.NewRendering(at, "table", true)
	if err := r.TrustStatus(prepared); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"shop/web   proxy     + ok    2       -         now\n", "alice      operator  + ok    -       -         1h30m ago\n",
		"\nnext: strait trust rotate activate (nobody would be left behind)\n"} {
		if !strings.Contains(r.Out.String(), want) {
			t.Errorf("prepared lacks %q:\n%s", want, r.Out.String())
		}
	}

	steady := sampleTrust("steady")
	steady.MayAdvance = true
	r = cli.NewRendering(at, "table", false)
	if err := r.TrustStatus(steady); err != nil {
		t.Fatal(err)
	}
	if out := r.Out.String(); strings.Contains(out, "gateway-1") || !strings.Contains(out, "shop/cart") || !strings.Contains(out, "next: strait trust rotate prepare") {
		t.Errorf("steady lists those who lack something:\n%s", out)
	}
	r = cli.NewRendering(at, "wide", false)
	if err := r.TrustStatus(steady); err != nil {
		t.Fatal(err)
	}
	if out := r.Out.String(); !strings.Contains(out, "gateway-1") || !strings.Contains(out, "4f9a2107c1d2e3f4a5b6") {
		t.Errorf("-o wide lists all, in full:\n%s", out)
	}
	r = cli.NewRendering(at, "json", false)
	if err := r.TrustStatus(steady); err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Kind, Phase string
		Progress    []map[string]any
	}
	if err := json.Unmarshal(r.Out.Bytes(), &doc); err != nil || doc.Kind != "TrustStatus" || doc.Phase != "steady" || len(doc.Progress) != 6 {
		t.Errorf("-o json: %v %+v", err, doc)
	}
	r = cli.NewRendering(at, "yaml", false)
	if err := r.TrustStatus(steady); err != nil || !strings.Contains(r.Out.String(), "\nkind: TrustStatus\n") {
		t.Errorf("-o yaml: %v\n%s", err, r.Out.String())
	}

	elsewhere := &controlpb.TrustStatusResponse{Cluster: "us-east", TrustDomain: "us-east.acme", Phase: "steady", Source: "workload-api"}
	r = cli.NewRendering(at, "table", false)
	if err := r.TrustStatus(elsewhere); err != nil {
		t.Fatal(err)
	}
	equal(t, "workload API", r.Out.String(), `
us-east   trust domain us-east.acme   bundle 0   phase steady
identities come from a SPIFFE Workload API

next: roots are rotated where they come from
`)
}

func TestTrustRoots(t *testing.T) {
	r := cli.NewRendering(at, "table", false)
	if err := r.TrustRoots(sampleTrust("activated")); err != nil {
		t.Fatal(err)
	}
	equal(t, "roots", r.Out.String(), `
TRUST DOMAIN     CLUSTER  STATE     SUBJECT                      ENDS        SHA-256
us-east.acme     us-east  retiring  Strait root of us-east.acme  2036-11-19  4f9a2107c1d2e3f4
us-east.acme     us-east  active    Strait root of us-east.acme  2036-11-19  b6a5f4e3d2c10721
eu-west.acme     eu-west  active                                 2036-11-19  00ff
partner.example  -        active                                 2036-11-19
`)
}

// Whom --force has left behind is told, each with what it must do.
func TestLeftBehind(t *testing.T) {
	left := sampleTrust("activated")
	left.Progress = append(left.Progress[:1], left.Progress[3:]...)
	left.Progress = append(left.Progress, &controlpb.RotationProgress{Kind: "proxy", Name: "gateway-2"})
	r := cli.NewRendering(at, "table", false)
	r.LeftBehind("retire", left)
	equal(t, "retire", r.Err.String(), `
! warn  member ap-south has bundle 1 of ours and refuses our identities until it joins again: strait token issue --cluster ap-south --out FILE, and on that cluster strait join FILE  [STR-5122]
! warn  proxy shop/cart does not know the new root: it has to register again with a new token (strait workload register, with --token-out)  [STR-5122]
! warn  proxy shop/web holds an identity of the old root: others refuse it until it renews; when that fails, it has to register again (strait workload register, with --token-out)  [STR-5122]
! warn  operator alice has a certificate of the old root: strait access issue alice --role ROLE  [STR-5122]
! warn  proxy gateway-2 does not know the new root: it has to register again with a new token (strait token gateway gateway-2 --out FILE)  [STR-5122]
`)
	r = cli.NewRendering(at, "table", false)
	left.Progress = left.Progress[1:2]
	r.LeftBehind("activate", left)
	equal(t, "activate", r.Err.String(), "! warn  proxy shop/cart has bundle 1, and knows only the old root: before retire it has to take bundle 2  [STR-5122]\n")
}

// inspected is a data directory with a CA, and what may be inspected.
func inspected(t *testing.T) (dir string, identity *trust.Identity, bundle *trust.Bundle) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "cp")
	if _, err := controlplane.Init(controlplane.InitConfig{DataDir: dir, Federation: "acme", Cluster: "us-east", Region: "r"}); err != nil {
		t.Fatal(err)
	}
	d, err := datadir.Open(dir, datadir.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	authority, err := ca.Open(d, ca.Config{})
	if err != nil {
		t.Fatal(err)
	}
	identity, err = authority.IssueKey(spiffeid.ControlPlane(authority.TrustDomain()), 0)
	if err != nil {
		t.Fatal(err)
	}
	return dir, identity, authority.Bundle()
}

func TestTrustInspect(t *testing.T) {
	isolate(t)
	dir, identity, bundle := inspected(t)
	_, stranger, foreign := inspected(t)
	tmp := t.TempDir()
	file := func(name string, data []byte) string {
		f := filepath.Join(tmp, name)
		if err := os.WriteFile(f, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	}
	svid, err := identity.MarshalPEM()
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := stranger.MarshalPEM()
	if err != nil {
		t.Fatal(err)
	}
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: bundle.Roots()[0].Raw})
	token, err := os.ReadFile(filepath.Join(dir, "tokens", "gateway-1.token"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		data []byte
		code int
		want []string
	}{
		{"svid.pem", svid, 0, []string{"spiffe id     spiffe://us-east.acme/strait/controlplane", "private keys  1, not shown", "verified by the bundle of us-east.acme (sequence 1)"}},
		{"leaf.der", identity.Chain[0].Raw, 4, []string{"spiffe://us-east.acme/strait/controlplane", "✗ fail  untrusted"}},
		{"stranger.pem", theirs, 4, []string{"✗ fail  untrusted"}}, // the same names, another root
		{"root.pem", root, 0, []string{"Strait root of us-east.acme", "not judged: no SPIFFE identity"}},
		{"bundle.json", bundle.Marshal(), 0, []string{"found         bundle", "trust domain  us-east.acme", "sequence      1"}},
		{"foreign.json", foreign.Marshal(), 0, []string{"sequence      1"}},
		{"gateway.token", token, 0, []string{"found         registration-token", "for           gateway gateway-1"}},
		{"nothing", []byte("nothing of ours"), 1, []string{"[STR-5206]"}},
		{"broken.pem", []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), 1, []string{"[STR-5206]"}},
		{"broken.json", []byte(`{"keys":1}`), 1, []string{"[STR-5206]"}},
	} {
		code, out, errw := run(t, "--data-dir", dir, "trust", "inspect", file(c.name, c.data))
		if code != c.code {
			t.Errorf("%s: exit %d, want %d\n%s%s", c.name, code, c.code, out, errw)
		}
		for _, want := range c.want {
			if !strings.Contains(out+errw, want) {
				t.Errorf("%s lacks %q:\n%s%s", c.name, want, out, errw)
			}
		}
		if strings.Contains(out+errw, "PRIVATE") {
			t.Errorf("%s shows a key", c.name)
		}
	}
	if code, out, _ := run(t, "--data-dir", dir, "trust", "inspect", file("again.pem", svid), "-o", "json", "--jq", ".verdict"); code != 0 || out != "verified\n" {
		t.Errorf("-o json: exit %d, %q", code, out)
	}
	if code, out, _ := run(t, "--data-dir", filepath.Join(tmp, "none"), "trust", "inspect", file("alone.pem", svid)); code != 0 || !strings.Contains(out, "no bundle can be read here") {
		t.Errorf("without a bundle: exit %d\n%s", code, out)
	}
}

func TestTrustInspectServer(t *testing.T) {
	isolate(t)
	dir, identity, _ := inspected(t)
	source := trust.NewSource(trust.SourceConfig{})
	source.SetIdentity(identity)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serveInspected(c, source)
		}
	}()
	code, out, errw := run(t, "--data-dir", dir, "trust", "inspect", l.Addr().String())
	if code != 0 || !strings.Contains(out, "found         server in "+l.Addr().String()) || !strings.Contains(out, "verified by the bundle of us-east.acme") {
		t.Errorf("exit %d\n%s%s", code, out, errw)
	}
	_ = l.Close()
	<-served
	if code, _, errw := run(t, "--data-dir", dir, "trust", "inspect", l.Addr().String()); code != 1 || !strings.Contains(errw, "[STR-5206]") {
		t.Errorf("nobody there: exit %d\n%s", code, errw)
	}
}

func TestTrustRootsPEM(t *testing.T) {
	isolate(t)
	dir, _, bundle := inspected(t)
	code, out, _ := run(t, "--data-dir", dir, "trust", "roots", "--pem", "us-east.acme")
	block, rest := pem.Decode([]byte(out))
	if code != 0 || block == nil || string(block.Bytes) != string(bundle.Roots()[0].Raw) || len(rest) != 0 {
		t.Errorf("exit %d\n%s", code, out)
	}
	if code, _, errw := run(t, "--data-dir", dir, "trust", "roots", "--pem", "eu-west.acme"); code != problem.ExitNotFound {
		t.Errorf("exit %d\n%s", code, errw)
	}
}

// The codes of a rotation explain themselves, and the way out of an expiring root is to rotate it.
func TestExplainRotation(t *testing.T) {
	for code, want := range map[problem.Code]string{
		problem.RotationPhase: "prepare, activate, retire", problem.RotationWaits: "--wait", problem.RotationUnfinished: "goes on by itself",
		problem.RotationElsewhere: "external CA", problem.NothingPresented: "HOST:PORT", problem.RootExpiring: "strait trust rotate prepare",
	} {
		exit, out, _ := run(t, "explain", string(code))
		if exit != 0 || !strings.Contains(out, want) {
			t.Errorf("%s lacks %q: exit %d\n%s", code, want, exit, out)
		}
	}
}

// serveInspected is one handshake of a server, which sees nothing after the hello.
func serveInspected(c net.Conn, source *trust.Source) {
	defer c.Close()
	s := tls.Server(c, source.ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"h2"}}))
	_ = s.Handshake()
}
