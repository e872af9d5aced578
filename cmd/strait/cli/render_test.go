// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/cmd/strait/cli"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
)

// at is the present of every rendering: 14:08:24 UTC, 6m13s after the switch of the sample.
var at = time.Date(2026, 11, 22, 14, 8, 24, 0, time.UTC)

func equal(t *testing.T, what, got, want string) {
	t.Helper()
	want = strings.TrimPrefix(want, "\n")
	if got != want {
		t.Errorf("%s:\n%s\nwant:\n%s", what, got, want)
	}
}

func sampleWhy() *controlpb.WhyResponse {
	return &controlpb.WhyResponse{
		Service: &controlpb.ServiceRef{Namespace: "shop", Name: "checkout"}, Cluster: "us-east",
		Policy: "shop/checkout", PolicyGeneration: 7, Acked: 12, Subscribed: 12,
		Groups: []*controlpb.WhyGroup{{Callers: []string{"shop/web"}, Recomputed: "agrees", Decision: &controlpb.DecisionReport{
			Reason: "below_min_healthy", ActiveTier: 1, SinceMs: at.Add(-6*time.Minute - 13*time.Second).UnixMilli(),
			Tiers: []*controlpb.TierReport{
				{Tier: 0, Members: []*controlpb.MemberReport{{Cluster: "us-east", Healthy: 1, Total: 4, State: "tripped", Reason: "below_min_healthy",
					Because: "1 of 4 healthy = 25% < trip 50%; 3 ejected: 5xx streak (outlier)"}}},
				{Tier: 1, Members: []*controlpb.MemberReport{{Cluster: "eu-west", Healthy: 6, Total: 6, Share: 1, State: "active",
					Because: "tunnel us-east→eu-west quic rtt 80ms loss 0.0%"}}},
				{Tier: 2, Members: []*controlpb.MemberReport{{Cluster: "ap-south", Healthy: 2, Total: 2, State: "standby", Because: "not needed"}}},
			},
			Returns: "to tier 0 when ≥75% healthy for 2m0s (now 25%)",
		}}},
		Notes: []string{"Check the cause: strait trace --failover"},
	}
}

func TestWhySample(t *testing.T) {
	r := cli.NewRendering(at, "table", false)
	r.Why(sampleWhy())
	equal(t, "why", r.Out.String(), `
shop/checkout from us-east/web    policy FailoverPolicy shop/checkout (gen 7, acked 12/12 proxies)
NOW  eu-west 100%   reason below_min_healthy   since 14:02:11 (6m13s)
TIER  CLUSTER   HEALTHY  SHARE  STATE       BECAUSE
  0   us-east   1/4      0%     tripped     1 of 4 healthy = 25% < trip 50%; 3 ejected: 5xx streak (outlier)
  1   eu-west   6/6      100%   active      tunnel us-east→eu-west quic rtt 80ms loss 0.0%
  2   ap-south  2/2      0%     standby     not needed
RETURNS to tier 0 when ≥75% healthy for 2m0s (now 25%)
Check the cause: strait trace --failover
`)
}

// Several groups of callers, a caller that went silent, a split, an ejection, and an answer that does not recompute.
func TestWhyGroups(t *testing.T) {
	w := sampleWhy()
	w.Policy, w.Notes = "", nil
	w.Groups[0].Callers = []string{"shop/a", "shop/b", "shop/c", "shop/d", "shop/e"}
	w.Groups[0].Recomputed = "eu-west 80%, ap-south 20%"
	d := w.Groups[0].Decision
	d.Returns = ""
	d.Tiers[1].Members[0].Share = 0.8
	d.Tiers[1].Members = append(d.Tiers[1].Members, &controlpb.MemberReport{Cluster: "ap-south", Healthy: 2, Total: 2, Share: 0.2, State: "active", Reason: "route_split"})
	d.Tiers = d.Tiers[:2]
	d.Ejections = []*controlpb.EjectionReport{
		{Cluster: "us-east", Instance: "checkout-3", Reason: "5xx streak", UntilMs: at.Add(30 * time.Second).UnixMilli()},
		{Cluster: "us-east", Instance: "shop/checkout", Reason: "upstream_reset"},
	}
	w.Groups = append(w.Groups, &controlpb.WhyGroup{Callers: []string{"shop/web", "jobs/batch"}, Recomputed: "agrees", Decision: &controlpb.DecisionReport{
		Reason: "no_endpoints", SinceMs: at.Add(-3*time.Hour - 12*time.Minute).UnixMilli(),
	}})
	w.Silent = []string{"web-3: not reported since 14:02:11"}
	r := cli.NewRendering(at, "table", true)
	r.Why(w)
	equal(t, "why", r.Out.String(), `
shop/checkout from us-east: 5 callers (a, b, c, …)    policy the default policy
NOW  eu-west 80%, ap-south 20%   reason below_min_healthy   since 14:02:11 (6m13s)
TIER  CLUSTER   HEALTHY  SHARE  STATE       BECAUSE
  0   us-east   1/4      0%     tripped     1 of 4 healthy = 25% < trip 50%; 3 ejected: 5xx streak (outlier)
  1   eu-west   6/6      80%    active      tunnel us-east→eu-west quic rtt 80ms loss 0.0%
  1   ap-south  2/2      20%    active      route_split
EJECTED us-east checkout-3: 5xx streak until 14:08:54
EJECTED us-east shop/checkout: upstream_reset until it is reached again
! warn  recomputing from the reported inputs gives another answer: eu-west 80%, ap-south 20%

shop/checkout from us-east: web, jobs/batch    policy the default policy
NOW  nowhere   reason no_endpoints   since 10:56:24 (3h12m)
TIER  CLUSTER  HEALTHY  SHARE  STATE       BECAUSE
! warn  web-3: not reported since 14:02:11
`)
}

func sampleCheck() *controlpb.CheckResponse {
	r := &controlpb.CheckResponse{Items: []*controlpb.CheckItem{
		{Group: "tunnels", State: "ok", Text: "us-east ⇄ eu-west    quic, rtt 80ms, loss 0.0%, 2 gateways each side"},
		{Group: "tunnels", State: "fail", Text: "us-east ⇄ ap-south   down 4m12s: tls: peer certificate not yet valid", Code: "STR-5203",
			Why: "ap-south clock is 12m10s behind (10m is the most)", Fix: "enable NTP on ap-south-gw-1"},
		{Group: "trust", State: "warn", Text: "root of ap-south expires in 12d (horizon 14d)", Code: "STR-5101",
			Fix: "strait trust rotate --cluster ap-south   (overlap 7d, no restarts)"},
		{Group: "failover", State: "skip", Text: "2 checks that need us-east ⇄ ap-south"},
	}}
	return r
}

// columns replaces runs of blanks before a code or an exit by one: the samples of the specification do not align them.
var columns = regexp.MustCompile(` +(\[STR-|exit )`)

func TestCheckSample(t *testing.T) {
	r := cli.NewRendering(at, "table", false)
	if code := r.Check(sampleCheck(), "warning"); code != problem.ExitCheckFailed {
		t.Errorf("exit %d, want 6: one check failed", code)
	}
	equal(t, "check", columns.ReplaceAllString(r.Out.String(), " $1"), `
tunnels
  ✓ us-east ⇄ eu-west    quic, rtt 80ms, loss 0.0%, 2 gateways each side
  ✗ us-east ⇄ ap-south   down 4m12s: tls: peer certificate not yet valid [STR-5203]
      why  ap-south clock is 12m10s behind (10m is the most)   fix  enable NTP on ap-south-gw-1
trust
  ! root of ap-south expires in 12d (horizon 14d) [STR-5101]
      fix  strait trust rotate --cluster ap-south   (overlap 7d, no restarts)
failover
  - skip 2 checks that need us-east ⇄ ap-south
1 ok, 1 warn, 1 fail, 1 skip exit 6
`)
}

func TestCheckExitCodes(t *testing.T) {
	items := func(states ...string) *controlpb.CheckResponse {
		r := &controlpb.CheckResponse{}
		for _, s := range states {
			r.Items = append(r.Items, &controlpb.CheckItem{Group: "g", State: s, Text: "text"})
		}
		return r
	}
	for _, c := range []struct {
		states []string
		failOn string
		want   int
	}{
		{[]string{"ok", "skip"}, "warning", problem.ExitOK},
		{[]string{"ok", "warn"}, "error", problem.ExitOK},
		{[]string{"ok", "warn"}, "warning", problem.ExitWarnings},
		{[]string{"warn", "fail"}, "error", problem.ExitCheckFailed},
		{[]string{"warn", "fail"}, "warning", problem.ExitCheckFailed},
		{nil, "warning", problem.ExitOK},
	} {
		for _, format := range []string{"table", "json"} {
			r := cli.NewRendering(at, format, false)
			if got := r.Check(items(c.states...), c.failOn); got != c.want {
				t.Errorf("%v with --fail-on=%s -o %s: exit %d, want %d", c.states, c.failOn, format, got, c.want)
			}
		}
	}
}

func sampleMembers() []*controlpb.Member {
	return []*controlpb.Member{
		{Cluster: "us-east", Region: "us-east-1", State: "self", TrustDomain: "us-east.acme"},
		{Cluster: "eu-west", Region: "eu-west-1", State: "ready", TrustDomain: "eu-west.acme", Sameness: []string{"*"}, CatalogSeq: 9, CatalogEpoch: 1,
			CatalogAgeSeconds: 12, Freshness: "fresh", ServicesOfferedToUs: 3, ServicesOfferedByUs: 1,
			RootNotAfterUnix: time.Date(2036, 11, 19, 0, 0, 0, 0, time.UTC).Unix(), BundleSha256: "4f9a21",
			Gateways: []*controlpb.GatewayRecord{{Name: "gateway-1", Addresses: []string{"198.51.100.4:7443"}}},
			Tunnels: []*controlpb.Tunnel{{State: "suspect", Transport: "tcp", PeerGateway: "gateway-1", Address: "198.51.100.4:7443", SinceMs: at.UnixMilli(), LastError: "no pong for 450ms"},
				{State: "up", Transport: "quic", RttSeconds: 0.0801, PeerGateway: "gateway-1", Address: "198.51.100.4:7443",
					LossRatio: 0.001, Streams: 4, SinceMs: at.UnixMilli()}}},
		{Cluster: "ap-south", Region: "ap-south-1", State: "unreachable", TrustDomain: "ap-south.acme", Sameness: []string{"shop", "jobs"}, CatalogAgeSeconds: -1,
			Reason: "peer_unreachable", Tunnels: []*controlpb.Tunnel{{State: "down", LastError: "timeout"}}},
	}
}

// A member that cannot be reached stays in the table, is named on standard error, and the command ends with 10.
func TestMemberList(t *testing.T) {
	r := cli.NewRendering(at, "table", false)
	err := r.MemberList(&controlpb.MemberListResponse{Members: sampleMembers()})
	if code := r.Report(err); code != problem.ExitPartial {
		t.Errorf("exit %d, want 10", code)
	}
	equal(t, "member list", r.Out.String(), `
CLUSTER   REGION      STATE        TUNNEL   RTT   CATALOG                     SAMENESS
us-east   us-east-1   self         -        -     -                           -
eu-west   eu-west-1   ready        up quic  80ms  fresh, 3 services, 12s old  all
ap-south  ap-south-1  unreachable  down     -     none yet                    shop,jobs
`)
	equal(t, "stderr", r.Err.String(), "# unreachable: ap-south (STR-2101)\n")

	wide := cli.NewRendering(at, "wide", false)
	_ = wide.MemberList(&controlpb.MemberListResponse{Members: sampleMembers()})
	if !strings.Contains(wide.Out.String(), "TRUST DOMAIN") || !strings.Contains(wide.Out.String(), "ap-south.acme  peer_unreachable") {
		t.Errorf("-o wide lacks columns:\n%s", wide.Out.String())
	}
	names := cli.NewRendering(at, "name", false)
	_ = names.MemberList(&controlpb.MemberListResponse{Members: sampleMembers()})
	equal(t, "-o name", names.Out.String(), "us-east\neu-west\nap-south\n")
	doc := cli.NewRendering(at, "json", false)
	_ = doc.MemberList(&controlpb.MemberListResponse{Members: sampleMembers()})
	var parsed struct {
		APIVersion, Kind string
		Members          []map[string]any
	}
	if err := json.Unmarshal(doc.Out.Bytes(), &parsed); err != nil || parsed.APIVersion != "cli.strait.dev/v1" || parsed.Kind != "MemberList" || len(parsed.Members) != 3 {
		t.Errorf("-o json: %v %+v", err, parsed)
	}
}

func TestMemberDescribe(t *testing.T) {
	r := cli.NewRendering(at, "table", false)
	if err := r.Member(sampleMembers()[1]); err != nil {
		t.Fatal(err)
	}
	equal(t, "member describe", r.Out.String(), `
cluster       eu-west (region eu-west-1)
trust domain  eu-west.acme
bundle        sha256 4f9a21, root until 2036-11-19
state         ready
sameness      all
catalog       fresh, 3 services, 12s old (epoch 1, seq 9)
services      3 offered to us, 1 offered by us
gateway       gateway-1 at 198.51.100.4:7443
tunnel        suspect tcp to gateway-1 198.51.100.4:7443, rtt 0ms, loss 0.0%, 0 streams, since 14:08:24 no pong for 450ms
tunnel        up quic to gateway-1 198.51.100.4:7443, rtt 80ms, loss 0.1%, 4 streams, since 14:08:24
`)
}

func TestStatus(t *testing.T) {
	r := cli.NewRendering(at, "table", false)
	err := r.Status(&controlpb.StatusResponse{
		Federation: "acme", Cluster: "us-east", Region: "us-east-1", TrustDomain: "us-east.acme", Version: "v0.1.0", Members: sampleMembers()[:2],
		Gateways: []*controlpb.Gateway{{}}, Proxies: 3, ProxiesAcked: 2, Revision: 41,
		Services: []*controlpb.ServiceSummary{
			{Service: &controlpb.ServiceRef{Namespace: "shop", Name: "checkout"}, Active: "eu-west 100%", Reason: "below_min_healthy", Providers: []*controlpb.ServiceProvider{
				{Cluster: "us-east", Health: &controlpb.HealthCounts{Healthy: 1, Unhealthy: 2, Unknown: 1}}, {Cluster: "eu-west", Health: &controlpb.HealthCounts{Healthy: 6}}}},
			{Service: &controlpb.ServiceRef{Namespace: "shop", Name: "web"}, Active: "-", Reason: "no caller here"},
		},
		Warnings: []*controlpb.Warning{{Severity: "warn", Text: "shop/checkout goes to eu-west 100%", Code: "STR-4108", Why: "below_min_healthy", Fix: "strait why shop/checkout"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "status", r.Out.String(), `
us-east in federation acme (region us-east-1, trust domain us-east.acme, v0.1.0)
1 gateway, 3 proxies, 2 of 3 acknowledged revision 41

CLUSTER  STATE  TUNNEL   RTT   CATALOG
us-east  self   -        -     -
eu-west  ready  up quic  80ms  fresh, 3 services, 12s old

SERVICE        HEALTH                    TRAFFIC GOES TO  REASON
shop/checkout  us-east 1/4, eu-west 6/6  eu-west 100%     below_min_healthy
shop/web       -                         -                no caller here
! warn  shop/checkout goes to eu-west 100%  [STR-4108]
    why  below_min_healthy   fix  strait why shop/checkout
`)
}

// replay is a stream of join's progress.
func replay(list ...*controlpb.JoinProgress) func() (*controlpb.JoinProgress, error) {
	return func() (*controlpb.JoinProgress, error) {
		if len(list) == 0 {
			return nil, io.EOF
		}
		p := list[0]
		list = list[1:]
		return p, nil
	}
}

func TestJoinSample(t *testing.T) {
	r := cli.NewRendering(at, "table", false)
	last, err := r.Stages(replay(
		&controlpb.JoinProgress{State: "ok", Title: "token valid", Detail: "federation acme, issued by us-east 2m ago, single use, expires in 13m"},
		&controlpb.JoinProgress{State: "ok", Title: "clock skew", Detail: "+0.02s (limit 30s)"},
		&controlpb.JoinProgress{State: "ok", Title: "reach gateway", Detail: "quic 198.51.100.4:7443  rtt 78ms  mtu 1350  (tcp fallback also open)"},
		&controlpb.JoinProgress{State: "ok", Title: "probe us-east→eu-west", Detail: "200 in 81ms"},
		&controlpb.JoinProgress{Done: true, ElapsedSeconds: 3.42, Member: &controlpb.Member{Cluster: "us-east"}},
	))
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "stages", r.Err.String(), `
  ✓ token valid          federation acme, issued by us-east 2m ago, single use, expires in 13m
  ✓ clock skew           +0.02s (limit 30s)
  ✓ reach gateway        quic 198.51.100.4:7443  rtt 78ms  mtu 1350  (tcp fallback also open)
  ✓ probe us-east→eu-west 200 in 81ms
`)
	if r.Out.Len() != 0 {
		t.Errorf("stages are progress, yet standard output has %q", r.Out.String())
	}
	if err := r.Joined(&controlpb.StatusResponse{Cluster: "eu-west", Federation: "acme"}, last); err != nil {
		t.Fatal(err)
	}
	equal(t, "result", r.Out.String(), "eu-west is a ready member of acme (3.4s). Next: strait export SERVICE --to us-east\n")
}

func TestJoinFailureSample(t *testing.T) {
	r := cli.NewRendering(at, "table", true)
	_, err := r.Stages(replay(
		&controlpb.JoinProgress{State: "ok", Title: "token valid", Detail: "federation acme"},
		&controlpb.JoinProgress{State: "fail", Title: "reach gateway", Detail: "no answer", Done: true, Problem: &controlpb.Problem{
			Code: "STR-2104", Title: "eu-west could not join federation acme: gateway not reachable",
			What:  "quic 203.0.113.7:7443 no answer in 5s; tcp 203.0.113.7:7443 connection refused",
			Why:   "the token lists one address for us-east and nothing listens there (or a firewall drops it)",
			Fix:   []string{"on us-east: start the gateway with --advertise, then issue a token again", "from here: run the same join again"},
			State: "nothing was changed on either side; the token is still valid for 11m.",
		}},
	))
	if code := r.Report(err); code != problem.ExitFailed {
		t.Errorf("exit %d, want 1", code)
	}
	equal(t, "stderr", r.Err.String(), `
  + token valid          federation acme
  x reach gateway        no answer
error: eu-west could not join federation acme: gateway not reachable                       [STR-2104]
  what  quic 203.0.113.7:7443 no answer in 5s; tcp 203.0.113.7:7443 connection refused
  why   the token lists one address for us-east and nothing listens there (or a firewall drops it)
  fix   on us-east: start the gateway with --advertise, then issue a token again
        from here: run the same join again
  state nothing was changed on either side; the token is still valid for 11m. More: strait explain STR-2104
`)
}

// An error that no package gave a code reaches the user as STR-9001, never bare.
func TestReportOfABareError(t *testing.T) {
	for format, want := range map[string]string{"table": "[STR-9001]", "json": `"code": "STR-9001"`, "yaml": "code: STR-9001", "jsonl": `"code":"STR-9001"`} {
		r := cli.NewRendering(at, format, false)
		if code := r.Report(fmt.Errorf("disk on fire")); code != problem.ExitFailed || !strings.Contains(r.Err.String(), want) || !strings.Contains(r.Err.String(), "disk on fire") {
			t.Errorf("-o %s: exit %d\n%s", format, code, r.Err.String())
		}
	}
}
