// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bufio"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
	"github.com/strait-mesh/strait/internal/crowd/crowdtest"
)

// figures are a process's goroutines and file descriptors.
type figures struct{ goroutines, fds int }

func figuresOf(p *harness.Process, metrics string) (f figures, err error) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: promised}
	resp, err := client.Get("http://" + metrics + "/metrics")
	if err != nil {
		return f, err
	}
	defer resp.Body.Close()
	sc := bufio.NewScanner(resp.Body)
	for sc.Scan() {
		if line := sc.Text(); strings.HasPrefix(line, "go_goroutines") {
			if f.goroutines, err = strconv.Atoi(line[strings.LastIndexByte(line, ' ')+1:]); err != nil {
				return f, err
			}
		}
	}
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.PID()))
	f.fds = len(list)
	if f.goroutines == 0 {
		err = errors.Join(err, sc.Err(), errors.New("the process counts no goroutines"))
	}
	return f, err
}

// calm waits until a process's figures stand still, which they do not right after its start.
func calm(t *testing.T, p *harness.Process, metrics string) (f figures) {
	t.Helper()
	still := 0
	harness.Eventually(t, 60*time.Second, p.Name+" to be calm", func() error {
		now, err := figuresOf(p, metrics)
		if err != nil {
			return err
		}
		if now == f {
			still++
		} else {
			f, still = now, 0
		}
		if still < 5 {
			return fmt.Errorf("%+v", now)
		}
		return nil
	})
	return f
}

// TestSilentConnects: test T10. 2,000 callers connect to each listener of a running cluster and say nothing: they are closed within 6 s, an
// honest call gets through meanwhile, and goroutines and descriptors return to what they were.
func TestSilentConnects(t *testing.T) {
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west"}})
	f.Up("shop")
	us, eu := f.Clusters["us-east"], f.Clusters["eu-west"]
	b := newBackend(t, "site")
	eu.StartSidecar("site", eu.Register(harness.Workload{Name: "site-1", Service: "site", Proxy: "site", Address: b.addr, Token: true}), nil)
	eu.CLI("export", "shop/site", "--to", "us-east")
	near := newBackend(t, "near")
	callee := us.StartSidecar("near", us.Register(harness.Workload{Name: "near-1", Service: "near", Proxy: "near", Address: near.addr, Token: true}), nil)
	web := us.StartSidecar("web", us.Register(harness.Workload{Name: "web", Service: "web", Token: true}), []string{"shop/site:http", "shop/near:http"})
	reaches(t, "http://"+web.Upstreams[0]+"/", "site")
	reaches(t, "http://"+web.Upstreams[1]+"/", "near")

	gateway, control := us.Gateways[0], us.ControlPlane
	for _, l := range []struct {
		name    string
		process *harness.Process
		metrics string
		address string
	}{
		{"7400 gRPC and registration", control, addr(control, "Metrics"), us.GRPC},
		{"7401 configuration API", control, addr(control, "Metrics"), addr(control, "API")},
		{"7402 metrics", control, addr(control, "Metrics"), addr(control, "Metrics")},
		{"operator.sock", control, addr(control, "Metrics"), "unix:" + filepath.Join(us.Dir, "run", "operator.sock")},
		{"api.sock", control, addr(control, "Metrics"), "unix:" + filepath.Join(us.Dir, "run", "api.sock")},
		{"7443 tunnels", gateway, addr(gateway, "Metrics"), addr(gateway, "Listen")},
		{"7444 sidecars", gateway, addr(gateway, "Metrics"), addr(gateway, "Local")},
		{"7445 metrics", gateway, addr(gateway, "Metrics"), addr(gateway, "Metrics")},
		{"15008 inbound", callee.Process, callee.Metrics, callee.Inbound},
		{"15020 metrics", callee.Process, callee.Metrics, callee.Metrics},
	} {
		t.Run(l.name, func(t *testing.T) {
			before := calm(t, l.process, l.metrics)
			conns, since := crowdtest.Connect(t, l.address, crowdtest.Silent)
			start := time.Now()
			honest(t, us, web)
			t.Logf("honest calls took %v", time.Since(start).Round(time.Millisecond))
			crowdtest.AwaitClosed(t, conns, since)
			harness.Eventually(t, 30*time.Second, l.process.Name+" to return to its baseline", func() error {
				now, err := figuresOf(l.process, l.metrics)
				if err == nil && (now.goroutines > before.goroutines+5 || now.fds > before.fds+5) {
					err = fmt.Errorf("%+v, before %+v", now, before)
				}
				return err
			})
		})
	}
}

// honest makes a call in the cluster, one across clusters, and two commands of the command line.
func honest(t *testing.T, c *harness.Cluster, web *harness.Sidecar) {
	t.Helper()
	client := &http.Client{Timeout: promised, Transport: &http.Transport{DisableKeepAlives: true}}
	for _, up := range web.Upstreams {
		if _, code, err := get(t.Context(), client, "http://"+up+"/"); err != nil || code != http.StatusOK {
			t.Errorf("a call: %d, %v", code, err)
		}
	}
	if r := c.Try("status"); r.Code != 0 {
		t.Errorf("strait status: exit %d\n%s", r.Code, r.Err)
	}
	if r := c.Try("get", "workload", "-n", "shop"); r.Code != 0 {
		t.Errorf("strait get: exit %d\n%s", r.Code, r.Err)
	}
}
