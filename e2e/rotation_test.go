// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bytes"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
	"github.com/strait-mesh/strait/internal/wan"
)

// rotating is clusters under load whose roots are replaced.
type rotating struct {
	f     *harness.Federation
	loads map[string]*load
	url   string
	began time.Time
}

const renewEvery = "5s" // so that identities of before a step are many

// newRotating starts clusters in which us-east calls eu-west, 200 times a second, and eu-west us-east.
func newRotating(t *testing.T, clusters ...string) *rotating {
	t.Helper()
	f := harness.New(t, harness.Options{Clusters: clusters})
	for _, n := range clusters {
		c := f.Clusters[n]
		c.Init()
		c.StartControlPlane()
		c.StartGateway(1, "--renew-every", renewEvery)
	}
	for i, issuer := range clusters {
		for _, joiner := range clusters[i+1:] {
			f.Join(issuer, joiner, "shop")
		}
	}
	r := &rotating{f: f, loads: map[string]*load{}}
	for _, n := range clusters {
		c := f.Clusters[n]
		b := newBackend(t, n)
		service := "in-" + n
		c.StartSidecar(service, c.Register(harness.Workload{Name: service, Service: service, Address: b.addr, Token: true}), nil, "--renew-every", renewEvery)
		c.CLI("export", "shop/"+service, "--to", "*")
	}
	for i, n := range clusters {
		c, to := f.Clusters[n], clusters[(i+1)%len(clusters)]
		s := c.StartSidecar("client", c.Register(harness.Workload{Name: "client", Service: "client", Token: true}), []string{"shop/in-" + to + ":http"}, "--renew-every", renewEvery)
		url := "http://" + s.Upstreams[0] + "/"
		reaches(t, url, to)
		if i == 0 {
			r.url = url
		}
	}
	return r
}

// start begins the load from a cluster to the next one.
func (r *rotating) start(t *testing.T, from string, rps int) {
	t.Helper()
	r.loads[from] = startLoad(t, "http://"+r.f.Clusters[from].Sidecars["client"].Upstreams[0]+"/", rps)
}

// pass fails the test with every call that failed since the load began.
func (r *rotating) pass(t *testing.T, what string) {
	t.Helper()
	for from, l := range r.loads {
		calls := l.since(time.Time{})
		if bad, text := failures(calls); bad > 0 {
			t.Errorf("%s: %d of %d calls from %s failed:%s", what, bad, len(calls), from, text)
		}
	}
}

// handshakes counts the handshakes that any process refused or lost since it started, by process and reason. Only words of package trust
// count, and for tunnels everything but silence: what a cut causes is no handshake of an honest party that was refused.
func (r *rotating) handshakes(t *testing.T) map[string]int {
	t.Helper()
	refused := map[string]int{}
	add := func(p *harness.Process, metrics string) {
		body, code, err := get(t.Context(), http.DefaultClient, "http://"+metrics+"/metrics")
		if err != nil || code != http.StatusOK {
			t.Fatalf("metrics of %s: %d %v", p.Name, code, err)
		}
		for line := range strings.Lines(body) {
			m := handshakeLine.FindStringSubmatch(line)
			if m == nil || m[3] == "0" || m[2] == "timeout" || m[2] == "unreachable" || m[2] == "canceled" || m[2] == "closed" {
				continue
			}
			n, _ := strconv.Atoi(m[3])
			refused[p.Name+" "+m[1]+" "+m[2]] += n
		}
	}
	for _, c := range r.f.Clusters {
		add(c.ControlPlane, addr(c.ControlPlane, "Metrics"))
		for _, g := range c.Gateways {
			add(g, addr(g, "Metrics"))
		}
		for _, s := range c.Sidecars {
			add(s.Process, s.Metrics)
		}
	}
	return refused
}

var handshakeLine = regexp.MustCompile(`^(strait_(?:handshakes_refused|inbound_handshake_failures|tunnel_handshake_failures)_total)\{.*reason="(\w+)".*\} (\d+)`)

// outlast waits until what lost its root has been ended (trust.RootGrace), and as long again.
func (r *rotating) outlast(t *testing.T) {
	t.Helper()
	issued(t, r.loads["us-east"], time.Now(), 8*rate)
}

// root is the one root that a cluster has; PEM.
func root(t *testing.T, c *harness.Cluster) []byte {
	t.Helper()
	block, rest := pem.Decode([]byte(c.CLI("trust", "roots", "--pem", c.Name+".acme")))
	if block == nil || len(bytes.TrimSpace(rest)) > 0 {
		t.Fatalf("%s does not have one root", c.Name)
	}
	return block.Bytes
}

// step takes one step of a rotation by the command line.
func step(t *testing.T, c *harness.Cluster, args ...string) {
	t.Helper()
	began := time.Now()
	r := c.Try(append([]string{"trust", "rotate"}, args...)...)
	if r.Code != 0 {
		t.Fatalf("%s: strait trust rotate %v: exit %d\n%s%s\n%s", c.Name, args, r.Code, r.Out, r.Err, c.CLI("trust", "status", "-o", "wide"))
	}
	t.Logf("%s: rotate %v took %v: %s%s", c.Name, args, time.Since(began).Round(10*time.Millisecond), r.Out, r.Err)
}

// settled expects phase steady, a root that is not old, and old in no file that says whom anybody trusts.
func (r *rotating) settled(t *testing.T, c *harness.Cluster, old []byte) {
	t.Helper()
	var s struct {
		Phase    string
		Progress []struct {
			Name                  string
			Acknowledged, Renewed bool
		}
	}
	harness.Eventually(t, 20*time.Second, c.Name+": everybody to have followed", func() error {
		c.JSON(&s, "trust", "status")
		if s.Phase != "steady" {
			t.Fatalf("%s: phase %s", c.Name, s.Phase)
		}
		for _, p := range s.Progress {
			if !p.Acknowledged || !p.Renewed {
				return fmt.Errorf("%+v", p)
			}
		}
		return nil
	})
	if bytes.Equal(root(t, c), old) {
		t.Fatalf("%s still has its old root", c.Name)
	}
	harness.Eventually(t, 20*time.Second, "the old root of "+c.Name+" to be gone from every bundle", func() error { return mentions(r.f.Dir, old) })
}

// mentions is an error while a file of any process that says whom it trusts has a certificate.
func mentions(dir string, certificate []byte) error {
	text := []byte(base64.StdEncoding.EncodeToString(certificate))
	files := 0
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) { // replaced meanwhile
			return nil
		}
		if err != nil {
			return err
		}
		if in := filepath.Base(filepath.Dir(p)); e.IsDir() || in != "bundles" && in != "snapshot" && in != "peers" || strings.Contains(p, "store") {
			return nil
		}
		files++
		data, err := os.ReadFile(p)
		if err == nil && bytes.Contains(data, text) {
			return fmt.Errorf("%s has it", p)
		}
		return nil
	})
	if err == nil && files < 10 {
		return fmt.Errorf("only %d files were looked at", files)
	}
	return err
}

// TestRootRotation (P4, T1): the root of each cluster is replaced by the command line under load, while every process renews its identity
// every few seconds. No request fails, nobody keeps the old root, and what is started afterwards works.
func TestRootRotation(t *testing.T) {
	r := newRotating(t, "us-east", "eu-west")
	canary := harness.NewCanary(t)
	r.began = time.Now()
	r.start(t, "us-east", rate)
	r.start(t, "eu-west", 20)
	for _, n := range r.f.Names {
		c := r.f.Clusters[n]
		old := root(t, c)
		step(t, c, "prepare", "--wait")
		step(t, c, "activate", "--wait")
		step(t, c, "retire", "--wait")
		r.settled(t, c, old)
		r.outlast(t)
		r.pass(t, "after the rotation of "+n)
	}
	eu, us := r.f.Clusters["eu-west"], r.f.Clusters["us-east"]
	for _, l := range r.loads {
		l.end()
	}
	r.pass(t, "both rotations")
	if refused := r.handshakes(t); len(refused) > 0 {
		t.Errorf("handshakes of honest parties were refused: %v", refused)
	}
	calls := len(r.loads["us-east"].since(time.Time{}))
	t.Logf("%d calls in %v, the host stalled for %v at most", calls, time.Since(r.began).Round(time.Second), canary.Between(r.began, time.Now()).Round(time.Millisecond))
	for from, to := range map[*harness.Cluster]string{us: "eu-west", eu: "us-east"} {
		if m := from.Members()[to]; m.State != "ready" || len(m.Tunnels) == 0 {
			t.Errorf("%s sees %s as %+v", from.Name, to, m)
		}
	}

	eu.Gateways[0].Kill()
	eu.RestartGateway(eu.Gateways[0])
	us.Sidecars["client"].Kill()
	us.Sidecars["client"].Restart()
	reaches(t, r.url, "eu-west")
	eu.StartSidecar("late", eu.Register(harness.Workload{Name: "late", Service: "late", Token: true}), []string{"shop/in-us-east:http"})
	reaches(t, "http://"+eu.Sidecars["late"].Upstreams[0]+"/", "us-east")
}

// TestRootRotationSoak (STRAIT_SOAK): identities are renewed every five seconds for two minutes under load, then each root is replaced while a
// third member is cut off during prepare and activate. It needs no new join, and nothing fails that does not need it.
func TestRootRotationSoak(t *testing.T) {
	if os.Getenv("STRAIT_SOAK") == "" {
		t.Skip("takes about five minutes: STRAIT_SOAK=1")
	}
	r := newRotating(t, "us-east", "eu-west", "ap-south")
	r.start(t, "us-east", rate)
	began := time.Now()
	harness.Eventually(t, 130*time.Second, "two minutes of renewals", func() error {
		if d := time.Since(began); d < 2*time.Minute {
			return fmt.Errorf("%v", d)
		}
		return nil
	})
	r.pass(t, "renewals")
	ap := r.f.Clusters["ap-south"]
	for _, n := range []string{"us-east", "eu-west"} {
		c := r.f.Clusters[n]
		old := root(t, c)
		r.f.Cut("ap-south", true)
		step(t, c, "prepare", "--wait")
		step(t, c, "activate")
		if refused := c.Try("trust", "rotate", "retire"); refused.Code != 1 || !strings.Contains(refused.Err, "STR-5122") || !strings.Contains(refused.Err, "member ap-south") {
			t.Fatalf("%s: retire while ap-south is cut off: exit %d\n%s", n, refused.Code, refused.Err)
		}
		r.pass(t, "while ap-south was cut off")
		r.f.Cut("ap-south", false)
		step(t, c, "retire", "--wait", "--timeout", "80s")
		r.settled(t, c, old)
		r.outlast(t)
		r.pass(t, "after the rotation of "+n)
	}
	reaches(t, "http://"+ap.Sidecars["client"].Upstreams[0]+"/", "us-east")
	// The third root, while ap-south and eu-west do not reach each other: the load goes on between us-east and eu-west.
	apart := func(dark bool) {
		r.f.Links(func(a, b string, l wan.Link) wan.Link {
			l.Dark = dark && a != "us-east" && b != "us-east"
			return l
		})
	}
	old := root(t, ap)
	apart(true)
	step(t, ap, "prepare", "--wait")
	step(t, ap, "activate")
	if refused := ap.Try("trust", "rotate", "retire"); refused.Code != 1 || !strings.Contains(refused.Err, "STR-5122") || !strings.Contains(refused.Err, "member eu-west") {
		t.Fatalf("ap-south: retire while eu-west is cut off: exit %d\n%s", refused.Code, refused.Err)
	}
	apart(false)
	step(t, ap, "retire", "--wait", "--timeout", "80s")
	r.settled(t, ap, old)
	r.outlast(t)
	r.pass(t, "all rotations")
	if refused := r.handshakes(t); len(refused) > 0 {
		t.Errorf("handshakes of honest parties were refused: %v", refused)
	}
	t.Logf("%d calls", len(r.loads["us-east"].since(time.Time{})))
}
