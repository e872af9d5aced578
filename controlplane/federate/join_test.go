// SPDX-License-Identifier: Apache-2.0

package federate_test

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/internal/problem"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestJoinPrintsTheSample(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	w.start()
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west", Sameness: []string{"shop"}})
	steps, err := eu.join(token, "all")
	must(t, err)
	want := []string{
		`token +token valid +federation acme, issued by us-east \d+s ago, single use, expires in 1[45]m`,
		`clock +clock skew +[+-]0\.\d\ds \(limit 30s\)`,
		`reach +reach gateway +quic us-east\.example:7443  rtt 78ms  mtu 1350  \(tcp fallback also open\)`,
		`identity +identity +us-east proved spiffe://us-east\.acme/strait/gateway/gateway-1, fingerprint [0-9A-F]{2}:[0-9A-F]{2}\.\.:[0-9A-F]{2} matches token`,
		`trust +trust exchanged +roots: us-east \(exp 20\d\d-\d\d\), eu-west \(exp 20\d\d-\d\d\); name scope eu-west\.acme`,
		`approved +approved +auto \(token scope: approve=auto\)`,
		`catalog +catalog +0 services offered to us, 0 ours exported yet`,
		`probe-in +probe us-east→eu-west +200 in \d+ms`,
		`probe-out +probe eu-west→us-east +200 in \d+ms`,
		`ready +eu-west is a ready member of acme +Next: strait export SERVICE --to us-east`,
	}
	if len(steps) != len(want) {
		t.Fatalf("%d steps, want %d: %v", len(steps), len(want), steps)
	}
	for i, s := range steps {
		got := fmt.Sprintf("%s %s %s", s.GetStage(), s.GetTitle(), s.GetDetail())
		if s.GetState() != "ok" || !regexp.MustCompile("^"+want[i]+"$").MatchString(got) {
			t.Errorf("step %d: %s %q, want %q", i, s.GetState(), got, want[i])
		}
	}
	if last := steps[len(steps)-1]; !last.GetDone() || last.GetMember().GetState() != "ready" {
		t.Errorf("last step %v", last)
	}
	p, q := us.m.View().ByCluster("eu-west"), eu.m.View().ByCluster("us-east")
	if !p.Ready() || !q.Ready() || !p.Same("shop") || p.Same("other") || !q.Same("anything") {
		t.Errorf("peers %+v %+v", p, q)
	}
	list, err := us.m.TokenList(context.Background())
	must(t, err)
	if len(list) != 1 || list[0].GetState() != "used" || list[0].GetBoundTo() != "eu-west.acme" {
		t.Errorf("tokens %v", list)
	}
	if us.m.View().Bundles.Get(eu.td) == nil || eu.m.View().Bundles.Get(us.td) == nil {
		t.Error("bundles were not exchanged")
	}
}

func TestJoinWaitsForApproval(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	w.start()
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west", Approve: "manual"})
	steps, err := eu.join(token)
	if !problem.Is(err, problem.AwaitingApproval) || problem.From(err).Exit() != 3 {
		t.Fatalf("join: %v", err)
	}
	if last := steps[len(steps)-1]; last.GetStage() != "approved" || last.GetState() != "wait" {
		t.Errorf("last step %v", last)
	}
	for _, c := range []*cluster{us, eu} {
		v := c.m.View()
		if p := v.Peers[0]; p.State != federate.StateAwaiting || p.Resource() != nil || p.Bundle != nil || v.Bundles.Get(p.TrustDomain) != nil {
			t.Errorf("%s trusts before approval: %+v", c.name, p)
		}
	}
	if _, err := eu.m.Approve(context.Background(), "us-east"); !problem.Is(err, problem.AwaitingApproval) {
		t.Errorf("the joiner approved itself: %v", err)
	}
	if _, err := us.m.Approve(context.Background(), "eu-west"); err != nil {
		t.Fatal(err)
	}
	us.restart() // what was approved is on disk
	us.waitGateway()
	if _, err := eu.join(token); err != nil {
		t.Fatal(err)
	}
	us.waitState("eu-west", federate.StateReady)
	eu.waitState("us-east", federate.StateReady)
	if _, err := eu.join(token, "shop"); err != nil || !eu.m.View().ByCluster("us-east").Same("shop") {
		t.Errorf("the same command once more: %v", err)
	}
}

// TestJoinSurvivesKills kills either control plane at each printed stage and runs the same command again.
func TestJoinSurvivesKills(t *testing.T) {
	stages := []string{"token", "clock", "reach", "identity", "trust", "approved", "catalog", "probe-in", "probe-out"}
	for _, victim := range []string{"eu-west", "us-east"} {
		for _, stage := range stages {
			t.Run(victim+"/"+stage, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, "us-east", "eu-west")
				w.start()
				us, eu := w.clusters["us-east"], w.clusters["eu-west"]
				token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
				eu.waitGateway()
				killAt(t, w, eu, token, stage, victim)
				if stage != "probe-out" {
					for _, c := range []*cluster{us, eu} {
						for _, p := range c.m.View().Peers {
							if p.Ready() {
								t.Errorf("after a kill at %s %s is ready at %s", stage, p.Cluster, c.name)
							}
						}
					}
				}
				us.waitGateway()
				eu.waitGateway()
				if _, err := eu.join(token); err != nil {
					t.Fatalf("the same command again: %v", err)
				}
				us.waitState("eu-west", federate.StateReady)
				eu.waitState("us-east", federate.StateReady)
			})
		}
	}
}

// killAt runs the join in a goroutine that does not return from the progress of that stage before the victim was killed and
// restarted.
func killAt(t *testing.T, w *world, joiner *cluster, token, stage, victim string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	at, resume, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	m := joiner.m
	go func() {
		done <- m.Join(ctx, token, nil, false, func(p *controlpb.JoinProgress) {
			if p.GetStage() == stage && p.GetState() == "ok" && !p.GetDone() {
				close(at)
				<-resume
			}
		})
	}()
	select {
	case <-at:
	case err := <-done:
		t.Fatalf("join ended before %s: %v", stage, err)
	}
	v := w.clusters[victim]
	v.kill()
	cancel() // the command line is gone
	close(resume)
	<-done
	v.start()
}

func TestJoinCheckChangesNothing(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	w.start()
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
	eu.waitGateway()
	var got []string
	err := eu.m.Join(context.Background(), token, nil, true, func(p *controlpb.JoinProgress) { got = append(got, p.GetStage()+" "+p.GetState()) })
	must(t, err)
	want := "token ok, clock ok, reach ok, identity ok, trust skip, approved ok, catalog skip, probe-in skip, probe-out skip, checked ok"
	if s := strings.Join(got, ", "); s != want {
		t.Errorf("got %s\nwant %s", s, want)
	}
	list, _ := us.m.TokenList(context.Background())
	if len(us.m.View().Peers)+len(eu.m.View().Peers) != 0 || list[0].GetState() != "unused" {
		t.Errorf("changed: %v %v %v", describe(us.m.View()), describe(eu.m.View()), list)
	}
	if _, err := eu.join(token); err != nil {
		t.Errorf("join after check: %v", err)
	}
}

// TestJoinRefusals has one row for each way a token is misused; each has its own code, and nobody is known afterwards.
func TestJoinRefusals(t *testing.T) {
	tests := []struct {
		name  string
		setup func(t *testing.T, w *world) (joiner *cluster, token string)
		want  problem.Code
	}{
		{"used by another joiner", func(t *testing.T, w *world) (*cluster, string) {
			us := w.clusters["us-east"]
			token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
			if _, err := w.clusters["eu-west"].join(token); err != nil {
				t.Fatal(err)
			}
			us.m.Evict(context.Background(), "eu-west")
			thief := w.add("thief", "thief.acme")
			thief.change = func(c *federate.Config) { c.Cluster = "eu-west" }
			thief.start()
			return thief, token
		}, problem.TokenBound},
		{"used by a member that has left since", func(t *testing.T, w *world) (*cluster, string) {
			us, eu := w.clusters["us-east"], w.clusters["eu-west"]
			token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
			if _, err := eu.join(token); err != nil {
				t.Fatal(err)
			}
			must(t, eu.m.Leave(context.Background(), func(*controlpb.JoinProgress) {}))
			us.eventually("the member is gone", func(v *federate.View) bool { return v.ByCluster("eu-west") == nil })
			return eu, token
		}, problem.TokenExpired},
		{"expired", func(t *testing.T, w *world) (*cluster, string) {
			token := w.clusters["us-east"].issue(&controlpb.TokenIssueRequest{Cluster: "eu-west", TtlSeconds: 60})
			w.mu.Lock()
			w.skew["eu-west"], w.skew["us-east"] = 61*time.Second, 61*time.Second
			w.mu.Unlock()
			return w.clusters["eu-west"], token
		}, problem.TokenExpired},
		{"expired by the issuer's clock", func(t *testing.T, w *world) (*cluster, string) {
			token := w.clusters["us-east"].issue(&controlpb.TokenIssueRequest{Cluster: "eu-west", TtlSeconds: 10})
			w.mu.Lock()
			w.skew["us-east"] = 20 * time.Second
			w.mu.Unlock()
			return w.clusters["eu-west"], token
		}, problem.TokenExpired},
		{"revoked", func(t *testing.T, w *world) (*cluster, string) {
			us := w.clusters["us-east"]
			token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
			list, _ := us.m.TokenList(context.Background())
			must(t, us.m.TokenRevoke(context.Background(), list[0].GetId()))
			return w.clusters["eu-west"], token
		}, problem.TokenRevoked},
		{"truncated", func(t *testing.T, w *world) (*cluster, string) {
			token := w.clusters["us-east"].issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
			return w.clusters["eu-west"], token[:len(token)-9]
		}, problem.TokenMalformed},
		{"another federation", func(t *testing.T, w *world) (*cluster, string) {
			token := w.clusters["us-east"].issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
			w.clusters["eu-west"].kill()
			w.clusters["eu-west"].change = func(c *federate.Config) { c.Federation = "other" }
			w.clusters["eu-west"].start()
			return w.clusters["eu-west"], token
		}, problem.TokenWrongFederation},
		{"another cluster", func(t *testing.T, w *world) (*cluster, string) {
			return w.clusters["eu-west"], w.clusters["us-east"].issue(&controlpb.TokenIssueRequest{Cluster: "ap-south"})
		}, problem.TokenScope},
		{"unknown to the issuer", func(t *testing.T, w *world) (*cluster, string) {
			us := w.clusters["us-east"]
			token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
			list, _ := us.m.TokenList(context.Background())
			us.kill()
			must(t, us.dir.Remove("tokens/join-"+list[0].GetId()+".json"))
			us.start()
			us.waitGateway()
			return w.clusters["eu-west"], token
		}, problem.TokenUnknown},
		{"clocks apart", func(t *testing.T, w *world) (*cluster, string) {
			token := w.clusters["us-east"].issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
			w.mu.Lock()
			w.skew["eu-west"] = 45 * time.Second
			w.mu.Unlock()
			return w.clusters["eu-west"], token
		}, problem.ClockSkew},
		{"nobody there", func(t *testing.T, w *world) (*cluster, string) {
			token := w.clusters["us-east"].issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
			w.setCut("us-east", "eu-west", true)
			return w.clusters["eu-west"], token
		}, problem.GatewayNotReachable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "us-east", "eu-west")
			w.start()
			joiner, token := tt.setup(t, w)
			joiner.waitGateway()
			steps, err := joiner.join(token)
			if !problem.Is(err, tt.want) {
				t.Fatalf("got %v, want %s", err, tt.want)
			}
			if last := steps[len(steps)-1]; last.GetState() != "fail" || last.GetProblem().GetCode() != string(tt.want) || last.GetTitle() == "" {
				t.Errorf("last step %v", last)
			}
			if n := len(joiner.m.View().Peers); n != 0 {
				t.Errorf("the joiner knows %v", describe(joiner.m.View()))
			}
			if strings.Contains(fmt.Sprint(steps), strings.TrimSpace(token)[40:]) {
				t.Error("a part of the token was repeated")
			}
		})
	}
}

func TestUnfinishedJoinExpires(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	w.start()
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west", Approve: "manual"})
	if _, err := eu.join(token); !problem.Is(err, problem.AwaitingApproval) {
		t.Fatal(err)
	}
	w.mu.Lock()
	w.skew["eu-west"], w.skew["us-east"] = 24*time.Hour+time.Minute, 24*time.Hour+time.Minute
	w.mu.Unlock()
	none := func(v *federate.View) bool { return len(v.Peers) == 0 }
	us.eventually("nobody", none)
	eu.eventually("nobody", none)
	if _, err := eu.join(token); !problem.Is(err, problem.TokenExpired) {
		t.Errorf("got %v", err)
	}
}
