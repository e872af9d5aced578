// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
)

// TestBackup: a backup, the loss of the machine of control plane and gateway, a restore. The cluster is itself again, and its peer
// accepts its next catalog. Damaged backups and directories in use are refused.
func TestBackup(t *testing.T) {
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west"}})
	f.Up("shop")
	us, eu := f.Clusters["us-east"], f.Clusters["eu-west"]
	site, late := newBackend(t, "site@eu-west"), newBackend(t, "late@eu-west")
	eu.StartSidecar("site", eu.Register(harness.Workload{Name: "site-1", Service: "site", Address: site.addr, Token: true}), nil)
	web := us.StartSidecar("web", us.Register(harness.Workload{Name: "web", Service: "web", Token: true}), []string{"shop/site:http", "shop/late:http"})
	eu.CLI("export", "shop/site", "--to", "us-east")
	reaches(t, "http://"+web.Upstreams[0]+"/", site.name)

	file := f.File("eu-west.backup")
	eu.CLI("backup", "--out", file)
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the backup has mode %v: %v", info.Mode(), err)
	}
	if r := eu.Try("backup", "--out", file); r.Code != 2 {
		t.Errorf("a second backup into the same file: exit %d %s", r.Code, r.Err)
	}

	// What the backup does not know: the peer has seen later catalogs.
	before := us.Members()["eu-west"]
	eu.CLI("unexport", "shop/site")
	eu.CLI("export", "shop/site", "--to", "us-east")
	harness.Eventually(t, 10*time.Second, "later catalogs", func() error {
		m := us.Members()["eu-west"]
		if number(t, m.CatalogSeq) <= number(t, before.CatalogSeq) && m.CatalogEpoch == before.CatalogEpoch {
			return fmt.Errorf("epoch %s seq %s", m.CatalogEpoch, m.CatalogSeq)
		}
		before = m
		return nil
	})
	exports := eu.CLI("get", "ExportPolicy", "-n", "shop")

	// The machine is lost.
	eu.ControlPlane.Kill()
	eu.Gateways[0].Kill()
	for _, dir := range []string{eu.Dir, filepath.Join(filepath.Dir(eu.Dir), "gateway-1")} {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	refusals(t, f, eu, file)

	eu.CLI("restore", file)
	if r := eu.Try("restore", file); r.Code != 1 || !strings.Contains(r.Err, "[STR-1102]") {
		t.Errorf("restore over a cluster: exit %d %s", r.Code, r.Err)
	}
	eu.RestartControlPlane()
	eu.CLI("token", "gateway", "gateway-1", "--out", filepath.Join(eu.Dir, "tokens", "gateway-1.token.new"))
	if err := os.Rename(filepath.Join(eu.Dir, "tokens", "gateway-1.token.new"), filepath.Join(eu.Dir, "tokens", "gateway-1.token")); err != nil {
		t.Fatal(err)
	}
	eu.RestartGateway(eu.Gateways[0])

	if again := eu.CLI("get", "ExportPolicy", "-n", "shop"); !strings.Contains(again, "export-site") {
		t.Errorf("after the restore:\n%s\nbefore:\n%s", again, exports)
	}
	harness.Eventually(t, 30*time.Second, "the peer to accept the next catalog", func() error {
		m := us.Members()["eu-west"]
		if m.State != "ready" || m.Freshness != "fresh" || number(t, m.CatalogEpoch) <= number(t, before.CatalogEpoch) {
			return fmt.Errorf("us-east shows %+v; before %s/%s", m, before.CatalogEpoch, before.CatalogSeq)
		}
		if m.BundleSha256 != before.BundleSha256 {
			t.Fatalf("another bundle: %s, before %s", m.BundleSha256, before.BundleSha256)
		}
		return nil
	})
	reaches(t, "http://"+web.Upstreams[0]+"/", site.name)

	// It works on: a new service gets an identity of the same root and reaches the peer.
	eu.StartSidecar("late", eu.Register(harness.Workload{Name: "late-1", Service: "late", Address: late.addr, Token: true}), nil)
	eu.CLI("export", "shop/late", "--to", "us-east")
	reaches(t, "http://"+web.Upstreams[1]+"/", late.name)
	for name, m := range eu.Members() {
		if m.State != "ready" {
			t.Errorf("the restored cluster shows %s as %s (%s)", name, m.State, m.Reason)
		}
	}
	t.Logf("\n%s", us.CLI("member", "list"))
}

// refusals tries files that are no whole backup, and a directory that is not empty.
func refusals(t *testing.T, f *harness.Federation, c *harness.Cluster, file string) {
	t.Helper()
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(good)
	flipped[len(flipped)/2] ^= 0x10
	for what, data := range map[string][]byte{
		"truncated": good[:len(good)/2], "without its end": good[:len(good)-4], "damaged": flipped, "empty": nil, "something else": []byte("hello\n"),
	} {
		name := f.File("bad.backup")
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		r := c.Try("restore", name)
		if r.Code != 1 || !strings.Contains(r.Err, "[STR-1104]") {
			t.Errorf("restore of a backup %s: exit %d\n%s%s", what, r.Code, r.Out, r.Err)
		}
		if left, _ := filepath.Glob(filepath.Join(filepath.Dir(c.Dir), "*")); len(left) > 0 {
			for _, l := range left {
				if l == c.Dir || strings.Contains(l, "restore") {
					t.Errorf("restore of a backup %s left %s", what, l)
				}
			}
		}
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.Dir, "mine"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := c.Try("restore", file); r.Code != 1 || !strings.Contains(r.Err, "[STR-1102]") {
		t.Errorf("restore into a directory that is not empty: exit %d\n%s", r.Code, r.Err)
	}
	if err := os.Remove(filepath.Join(c.Dir, "mine")); err != nil {
		t.Fatal(err)
	}
}

func number(t *testing.T, s string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
