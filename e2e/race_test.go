// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/strait-mesh/strait/e2e/harness"
)

// TestTokenRace (P5, T32): two clusters that call themselves the same redeem one join token at the same moment, with real processes. Exactly
// one wins, the other is told that the token is used, and the issuer knows one member. Twenty times with STRAIT_SOAK, else twice.
func TestTokenRace(t *testing.T) {
	rounds := 2
	if soak() {
		rounds = 20
	}
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "left", "right"}})
	us := f.Clusters["us-east"]
	us.Up()
	wins := map[string]int{}
	for i := range rounds {
		name := fmt.Sprintf("race-%d", i)
		joiners := []*harness.Cluster{f.Clusters["left"], f.Clusters["right"]}
		for _, c := range joiners {
			c.Reset(f.File(fmt.Sprintf("%s-%d", c.Name, i)))
			c.InitAs("acme", name)
			c.StartControlPlane()
			c.StartGateway(1)
		}
		token := f.Token("us-east", name, "")
		var wg sync.WaitGroup
		results := make([]harness.Result, len(joiners))
		begin := make(chan struct{})
		for j, c := range joiners {
			wg.Go(func() { <-begin; results[j] = c.Try("join", token) })
		}
		close(begin)
		wg.Wait()
		won := 0
		for j, r := range results {
			switch {
			case r.Code == 0:
				won++
				wins[joiners[j].Name]++
			case r.Code != 4 || !strings.Contains(r.Err, "[STR-2204]") && !strings.Contains(r.Err, "[STR-2209]"):
				t.Errorf("%s, the loser of round %d: exit %d\n%s%s", joiners[j].Name, i, r.Code, r.Out, r.Err)
			}
		}
		if won != 1 {
			t.Errorf("round %d: %d winners\n%s\n%s", i, won, results[0].Err, results[1].Err)
		}
		if m := us.Members(); m[name].State != "ready" || len(m) != i+1 {
			t.Errorf("round %d: the issuer knows %v", i, m)
		}
		for _, c := range joiners {
			for _, p := range c.Processes() {
				p.Kill()
			}
		}
	}
	t.Logf("wins: %v", wins)
}
