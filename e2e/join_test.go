// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
)

// joinStages are the beginnings of the lines that join prints, in order, when eu-west joins us-east.
var joinStages = []string{
	"token valid", "clock skew", "reach gateway", "identity", "trust exchanged", "approved", "catalog",
	"probe us-east→eu-west", "probe eu-west→us-east",
}

// TestJoinKilled (P5): kill -9 of either control plane at each printed stage of join. Repeating the command completes it, and until
// then nothing routes or trusts.
func TestJoinKilled(t *testing.T) {
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west"}, RTT: map[string]time.Duration{"us-east-eu-west": 100 * time.Millisecond}})
	us, eu := f.Clusters["us-east"], f.Clusters["eu-west"]
	us.Up()
	eu.Up()
	site := newBackend(t, "site@eu-west")
	eu.StartSidecar("site", eu.Register(harness.Workload{Name: "site-1", Service: "site", Address: site.addr, Token: true}), nil)
	eu.CLI("export", "shop/site", "--to", "us-east")
	web := us.StartSidecar("web", us.Register(harness.Workload{Name: "web", Service: "web", Token: true}), []string{"shop/site:http"})
	url := "http://" + web.Upstreams[0] + "/"

	for _, side := range []*harness.Cluster{eu, us} {
		for _, stage := range joinStages {
			began := time.Now()
			killAt(t, f, side, stage, url)
			reaches(t, url, site.name)
			eu.CLI("leave", "--yes")
			harness.Eventually(t, 10*time.Second, "us-east to forget eu-west", func() error {
				if m := us.Members(); len(m) > 0 {
					return fmt.Errorf("still %v", m)
				}
				return nil
			})
			t.Logf("%-8s killed at %-25q complete and left again after %v", side.Name, stage, time.Since(began).Round(10*time.Millisecond))
		}
	}
}

// killAt begins a join, kills the control plane of one side at a stage, and repeats the command.
func killAt(t *testing.T, f *harness.Federation, side *harness.Cluster, stage, url string) {
	t.Helper()
	us, eu := f.Clusters["us-east"], f.Clusters["eu-west"]
	token := f.Token("us-east", "eu-west", "shop")
	killed := false
	first := eu.Stream(func(line string) {
		if killed || !strings.Contains(line, " "+stage+" ") {
			return
		}
		killed = true
		side.ControlPlane.Kill()
		early := !strings.HasPrefix(stage, "probe")
		other := us
		if side == us {
			other = eu
		}
		if m, ok := other.Members()[side.Name]; ok && early && m.State != "joining" {
			t.Errorf("%s killed at %q: %s shows it as %s", side.Name, stage, other.Name, m.State)
		}
		if early {
			unreached(t, url)
		}
		side.RestartControlPlane()
		if m, ok := side.Members()[other.Name]; ok && early && m.State != "joining" {
			t.Errorf("%s killed at %q: after its restart it shows %s as %s", side.Name, stage, other.Name, m.State)
		}
		if early {
			unreached(t, url)
		} else if _, code, err := get(t.Context(), &http.Client{Timeout: time.Second}, url); err == nil && code == 200 {
			// eu-west answers: then it is complete there, and eu-west is the last to be.
			if m := eu.Members()["us-east"]; m.State != "ready" && m.State != "unreachable" {
				t.Errorf("%s killed at %q: a call is answered while eu-west shows us-east as %s", side.Name, stage, m.State)
			}
		}
	}, "join", token)
	if !killed {
		t.Fatalf("stage %q was never printed:\n%s%s", stage, first.Out, first.Err)
	}
	if side == eu && first.Code == 0 && stage != joinStages[len(joinStages)-1] { // after the last there is nothing left to say
		t.Errorf("join ended with success although its control plane was killed at %q:\n%s", stage, first.Err)
	}
	if first.Code != 0 && !strings.Contains(first.Err, "[STR-") {
		t.Errorf("the interrupted join has no code:\n%s", first.Err)
	}
	again := eu.Try("join", token)
	if again.Code != 0 {
		t.Fatalf("%s killed at %q: repeating join: exit %d\n%s\nfirst time: exit %d\n%s", side.Name, stage, again.Code, again.Err, first.Code, first.Err)
	}
	for _, c := range []*harness.Cluster{us, eu} {
		for name, m := range c.Members() {
			if m.State != "ready" {
				t.Errorf("%s killed at %q: after the repeated join %s shows %s as %s (%s)", side.Name, stage, c.Name, name, m.State, m.Reason)
			}
		}
	}
}

// unreached makes one call that must not be answered by anybody behind a sidecar.
func unreached(t *testing.T, url string) {
	t.Helper()
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	if body, code, err := get(t.Context(), client, url); err == nil && code == 200 {
		t.Errorf("%s was answered before the join was complete: %q", url, body)
	}
}

// TestJoinRefused (P5): a token that is used, expired, revoked, damaged, of another federation or for another cluster is refused with
// its own code and changes nothing; approval by hand, --check, and a join without a gateway.
func TestJoinRefused(t *testing.T) {
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west", "impostor", "foreign"}})
	us, eu, impostor, foreign := f.Clusters["us-east"], f.Clusters["eu-west"], f.Clusters["impostor"], f.Clusters["foreign"]
	us.Up()
	eu.Up()
	impostor.InitAs("acme", "eu-west")
	impostor.StartControlPlane()
	foreign.InitAs("globex", "eu-west")
	foreign.StartControlPlane()

	good := f.Token("us-east", "eu-west", "", "--approve", "manual")
	text, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	damaged := bytes.Clone(text)
	damaged[len(damaged)/2] ^= 1
	refused := func(c *harness.Cluster, what, code string, exit int, args ...string) {
		t.Helper()
		r := c.Try(append([]string{"join"}, args...)...)
		if r.Code != exit || !strings.Contains(r.Err, "["+code+"]") {
			t.Errorf("%s: exit %d, want %d and %s:\n%s%s", what, r.Code, exit, code, r.Out, r.Err)
		}
	}
	unchanged := func(what string) {
		t.Helper()
		for _, c := range []*harness.Cluster{us, eu, impostor} {
			if m := c.Members(); len(m) > 0 {
				t.Errorf("%s: %s knows %v", what, c.Name, m)
			}
		}
	}
	write := func(name string, data []byte) string {
		t.Helper()
		if err := os.WriteFile(f.File(name), data, 0o600); err != nil {
			t.Fatal(err)
		}
		return f.File(name)
	}
	refused(eu, "truncated", "STR-2201", 4, write("truncated.join", text[:len(text)*2/3]))
	refused(eu, "damaged", "STR-2201", 4, write("damaged.join", damaged))
	refused(eu, "empty", "STR-2201", 4, write("empty.join", nil))
	refused(foreign, "another federation", "STR-2206", 4, good)
	refused(eu, "for another cluster", "STR-2207", 4, f.Token("us-east", "ap-south", ""))
	refused(us, "its own token", "STR-2207", 4, good)

	short := f.Token("us-east", "eu-west", "", "--ttl", "1s")
	harness.Eventually(t, 10*time.Second, "the token to expire", func() error {
		if s := tokenState(us, 0); s != "expired" {
			return fmt.Errorf("state %s", s)
		}
		return nil
	})
	refused(eu, "expired", "STR-2202", 4, short)

	gone := f.Token("us-east", "eu-west", "")
	var list struct{ Tokens []struct{ Id, State string } }
	us.JSON(&list, "token", "list")
	us.CLI("token", "revoke", list.Tokens[0].Id)
	refused(eu, "revoked", "STR-2203", 4, gone)
	refused(impostor, "without a gateway", "STR-2105", 1, good)
	unchanged("after the refusals")

	// --check tries every stage and changes nothing.
	r := eu.Try("join", good, "--check")
	if r.Code != 0 || !strings.Contains(r.Out, "nothing was changed") {
		t.Errorf("--check: exit %d\n%s%s", r.Code, r.Out, r.Err)
	}
	unchanged("after --check")

	// By hand: exit 3 until the operator approves.
	for range 2 {
		refused(eu, "not approved", "STR-2107", 3, good)
		for _, c := range []*harness.Cluster{us, eu} {
			for name, m := range c.Members() {
				if m.State != "awaiting-approval" || len(m.Tunnels) > 0 {
					t.Errorf("%s shows %s as %s with tunnels %v", c.Name, name, m.State, m.Tunnels)
				}
			}
		}
	}
	t.Logf("\n%s", us.CLI("member", "list"))
	us.CLI("member", "approve", "eu-west")
	eu.CLI("join", good)
	before := us.Members()["eu-west"]
	if before.State != "ready" {
		t.Errorf("us-east shows eu-west as %+v", before)
	}

	// The token is bound: whoever else has a copy is refused, and the member keeps its key and its place.
	impostor.StartGateway(1)
	refused(impostor, "used by another joiner", "STR-2204", 4, good)
	if m := us.Members()["eu-west"]; m.State != "ready" || m.BundleSha256 != before.BundleSha256 {
		t.Errorf("after the impostor us-east shows eu-west as %+v", m)
	}
	if m := impostor.Members(); len(m) > 0 {
		t.Errorf("the impostor knows %v", m)
	}
	refused(impostor, "taken name", "STR-2209", 4, f.Token("us-east", "eu-west", ""))
	eu.CLI("join", good) // the same joiner may run it again
	if out := us.CLI("token", "list"); strings.Contains(out, strings.TrimSpace(string(text))) {
		t.Error("token list prints secrets")
	}
}

// tokenState is the state of the i-th newest join token.
func tokenState(c *harness.Cluster, i int) string {
	var list struct {
		Tokens []struct{ Id, Kind, State string }
	}
	c.JSON(&list, "token", "list")
	for _, k := range list.Tokens {
		if k.Kind != "join" {
			continue
		}
		if i == 0 {
			return k.State
		}
		i--
	}
	return "none"
}
