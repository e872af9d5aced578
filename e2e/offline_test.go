// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
)

// enough reports an error until n calls have ended.
func enough(l *load, n int) error {
	if got := len(l.since(time.Time{})); got < n {
		return fmt.Errorf("%d calls so far", got)
	}
	return nil
}

// TestOffline (P11): the control planes of all clusters are gone for nine catalog ttls (STRAIT_SOAK: for five minutes). Calls inside
// and across clusters go on, a dead instance is avoided, and a restarted sidecar or gateway starts from its snapshot.
func TestOffline(t *testing.T) {
	const ttl = 3 * time.Second
	away := 9 * ttl
	if os.Getenv("STRAIT_SOAK") != "" {
		away = 5 * time.Minute
	}
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west"}, CatalogTTL: ttl})
	f.Up("shop")
	us, eu := f.Clusters["us-east"], f.Clusters["eu-west"]
	for _, c := range []*harness.Cluster{us, eu} {
		c.StartSidecar("client", c.Register(harness.Workload{Name: "client", Service: "client", Token: true}), []string{"shop/near-" + c.Name + ":http", "shop/far:http"})
	}
	backends := map[string]*backend{}
	serve := func(c *harness.Cluster, service string, n int) *harness.Sidecar {
		name := fmt.Sprintf("%s-%d", service, n)
		b := newBackend(t, name+"@"+c.Name)
		backends[b.name] = b
		return c.StartSidecar(name, c.Register(harness.Workload{Name: name, Service: service, Proxy: name, Address: b.addr, Token: true}), nil)
	}
	for n := 1; n <= 2; n++ {
		serve(us, "near-us-east", n)
		serve(eu, "far", n)
	}
	eu.CLI("export", "shop/far", "--to", "us-east")
	client := us.Sidecars["client"]
	near, far := "http://"+client.Upstreams[0]+"/", "http://"+client.Upstreams[1]+"/"
	reaches(t, near, "near-us-east-1")
	reaches(t, near, "near-us-east-2")
	reaches(t, far, "far-1")
	reaches(t, far, "far-2")
	loads := map[string]*load{"inside": startLoad(t, near, 20), "across": startLoad(t, far, 20)}
	steady := func(what string, from time.Time, n int) {
		t.Helper()
		for name, l := range loads {
			harness.Eventually(t, 30*time.Second, what+": calls "+name, func() error {
				if got := len(l.since(from)); got < n {
					return fmt.Errorf("%d calls", got)
				}
				return nil
			})
			if bad, text := failures(l.since(from)); bad > 0 {
				t.Errorf("%s: %d calls %s failed:%s", what, bad, name, text)
			}
		}
	}
	steady("before", time.Now(), 40)

	down := time.Now()
	us.ControlPlane.Kill()
	eu.ControlPlane.Kill()
	steady("without control planes", down, 60)

	// One instance of each service dies, with all its sidecar knows.
	died := time.Now()
	backends["near-us-east-1@us-east"].stop()
	backends["far-1@eu-west"].stop()
	after := died.Add(2 * time.Second)
	harness.Eventually(t, 10*time.Second, "two seconds", func() error {
		if time.Now().Before(after) {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	steady("after the death of an instance", after, 60)
	for name, l := range loads {
		for _, c := range l.since(after) {
			if strings.Contains(c.body, "-1@") {
				t.Errorf("%s: answered by a dead instance: %s", name, c.body)
				break
			}
		}
	}

	// A client's sidecar, a callee's, and a gateway start again from what they have on disk.
	restart := func(what, url, want string, again func()) {
		t.Helper()
		began := time.Now()
		again()
		reaches(t, url, want)
		t.Logf("%s: back after %v", what, time.Since(began).Round(10*time.Millisecond))
	}
	restart("sidecar of a callee", far, "far-2", func() { eu.Sidecars["far-2"].Kill(); eu.Sidecars["far-2"].Restart() })
	restart("gateway", far, "far-2", func() { eu.Gateways[0].Kill(); eu.RestartGateway(eu.Gateways[0]) })
	restart("sidecar of the caller", far, "far-2", func() { client.Kill(); client.Restart() })
	reaches(t, near, "near-us-east-2")

	back := time.Now()
	steady("after the restarts", back, 40)
	harness.Eventually(t, away+10*time.Second, "the time without control planes to pass", func() error {
		if d := time.Since(down); d < away {
			return fmt.Errorf("%v", d)
		}
		return nil
	})
	steady("after nine ttls", back, 40)

	// They come back: nothing is noticed, and configuration has an effect again.
	us.RestartControlPlane()
	eu.RestartControlPlane()
	returned := time.Now()
	for _, c := range []*harness.Cluster{us, eu} {
		harness.Eventually(t, 20*time.Second, c.Name+" to see its member again", func() error {
			for name, m := range c.Members() {
				if m.State != "ready" || m.Freshness != "fresh" {
					return fmt.Errorf("%s is %s, %s", name, m.State, m.Freshness)
				}
			}
			return nil
		})
	}
	steady("with control planes again", back, 60)
	steady("a while later", returned.Add(2*time.Second), 60)
	eu.CLI("unexport", "shop/far")
	loads["across"].stop()
	harness.Eventually(t, 10*time.Second, "the export to end", func() error {
		_, code, err := get(t.Context(), http.DefaultClient, far)
		if err == nil && code == http.StatusOK {
			return fmt.Errorf("still answered")
		}
		return nil
	})
}
