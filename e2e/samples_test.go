// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"fmt"
	"net/http"
	"os"
	"regexp"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/strait-mesh/strait/e2e/harness"
)

// TestSamples runs the command line's samples that need two clusters, as a script that a reader can run in their head:
// testdata/samples.txt. Its commands are us and eu (strait against that cluster), until PATTERN COMMAND… (repeat it until its standard
// output matches), call (one request from web in us-east to checkout), and break and heal (three of the four local instances).
func TestSamples(t *testing.T) {
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west"}, RTT: map[string]time.Duration{"us-east-eu-west": 80 * time.Millisecond}})
	us, eu := f.Clusters["us-east"], f.Clusters["eu-west"]
	us.Up()
	eu.Up()
	local := instances(t, us, 4)
	instances(t, eu, 2)
	web := us.StartSidecar("web", us.Register(harness.Workload{Name: "web", Service: "web", Token: true}), []string{"shop/checkout:http"})

	strait := func(c *harness.Cluster) func(*testscript.TestScript, bool, []string) {
		return func(ts *testscript.TestScript, neg bool, args []string) {
			err := ts.Exec(harness.Bin(t, "strait"), append([]string{"--data-dir", c.Dir}, args...)...)
			if neg == (err == nil) {
				ts.Fatalf("%s: strait %v: %v", c.Name, args, err)
			}
		}
	}
	clusters := map[string]*harness.Cluster{"us": us, "eu": eu}
	testscript.Run(t, testscript.Params{
		Files: []string{"testdata/samples.txt"},
		Setup: func(e *testscript.Env) error {
			e.Setenv("HOME", e.WorkDir)
			return os.MkdirAll(e.WorkDir, 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"us": strait(us), "eu": strait(eu),
			"until": func(ts *testscript.TestScript, _ bool, args []string) {
				pattern := regexp.MustCompile("(?m)" + args[0])
				harness.Eventually(t, 30*time.Second, fmt.Sprint(args), func() error {
					r := clusters[args[1]].Try(args[2:]...)
					if !pattern.MatchString(r.Out) {
						return fmt.Errorf("exit %d\n%s%s", r.Code, r.Out, r.Err)
					}
					return nil
				})
			},
			"call": func(ts *testscript.TestScript, _ bool, _ []string) {
				body, code, err := get(t.Context(), &http.Client{Timeout: 10 * time.Second}, "http://"+web.Upstreams[0]+"/")
				if err != nil || code != http.StatusOK {
					ts.Fatalf("call: %d %s %v", code, body, err)
				}
			},
			"break": func(*testscript.TestScript, bool, []string) {
				for _, b := range local[:3] {
					b.stop()
				}
			},
			"heal": func(*testscript.TestScript, bool, []string) {
				for _, b := range local[:3] {
					b.start(t)
				}
			},
		},
	})
}

// instances starts n applications of checkout behind one sidecar.
func instances(t *testing.T, c *harness.Cluster, n int) []*backend {
	t.Helper()
	var list []*backend
	token := ""
	for i := range n {
		b := newBackend(t, fmt.Sprintf("%s-%d", c.Name, i+1))
		list = append(list, b)
		if file := c.Register(harness.Workload{Name: fmt.Sprintf("checkout-%d", i+1), Service: "checkout", Address: b.addr, Token: i == 0}); file != "" {
			token = file
		}
	}
	c.StartSidecar("checkout", token, nil)
	return list
}
