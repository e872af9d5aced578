// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bytes"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
)

// TestFromNothing is the main job with the real binaries and command lines alone: three clusters are made, joined, a service is
// exported, and curl in us-east reaches nginx in eu-west.
func TestFromNothing(t *testing.T) {
	f := harness.New(t, harness.Options{})
	for _, n := range f.Names {
		f.Clusters[n].Up()
	}
	us, eu := f.Clusters["us-east"], f.Clusters["eu-west"]
	f.Join("us-east", "eu-west", "shop")
	f.Join("us-east", "ap-south", "shop")

	site := nginx(t)
	eu.StartSidecar("site", eu.Register(harness.Workload{Name: "site-1", Service: "site", Address: site, Token: true}), nil)
	web := us.StartSidecar("web", us.Register(harness.Workload{Name: "web", Service: "web", Token: true}), []string{"shop/site:http"}, "--http-proxy", us.FreeAddr())

	// Nothing is offered by default: before the export the call must fail.
	if out, err := curl(t, "--max-time", "5", "http://"+web.Upstreams[0]+"/"); err == nil {
		t.Fatalf("reached a service that was never exported: %s", out)
	}
	eu.CLI("export", "shop/site", "--to", "us-east")
	harness.Eventually(t, 20*time.Second, "curl to reach nginx in eu-west", func() error {
		out, err := curl(t, "--max-time", "5", "http://"+web.Upstreams[0]+"/")
		if err == nil && !strings.Contains(out, "Welcome to nginx!") {
			err = fmt.Errorf("got %.200q", out)
		}
		return err
	})
	// By Host, through the HTTP proxy listener, as an application without a fixed upstream would.
	out, err := curl(t, "--max-time", "5", "-H", "Host: site.shop", "http://"+web.HTTPProxy+"/")
	if err != nil || !strings.Contains(out, "Welcome to nginx!") {
		t.Errorf("by Host: %v %.200q", err, out)
	}
	out, err = curl(t, "--max-time", "5", "-H", "Host: site.shop.svc.eu-west.acme", "http://"+web.HTTPProxy+"/")
	if err != nil || !strings.Contains(out, "Welcome to nginx!") {
		t.Errorf("by pinned Host: %v %.200q", err, out)
	}
	why := us.CLI("why", "site")
	if !strings.Contains(why, "eu-west 100%") {
		t.Errorf("why does not say where traffic goes:\n%s", why)
	}
	t.Logf("\n%s\n%s\n%s", us.CLI("status"), why, us.CLI("member", "list"))
}

func curl(t testing.TB, args ...string) (string, error) {
	t.Helper()
	var out, errw bytes.Buffer
	cmd := exec.Command("curl", append([]string{"-sS", "--fail"}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &errw
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("curl: %w: %s", err, strings.TrimSpace(errw.String()))
	}
	return out.String(), nil
}
