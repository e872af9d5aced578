// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"fmt"
	"math"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/strait-mesh/strait/federation"
)

func TestDealerFollowsShares(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		shares := map[federation.ClusterName]float64{}
		total := 0.0
		for _, c := range clusterNames[:rapid.IntRange(1, len(clusterNames)).Draw(t, "n")] {
			shares[c] = rapid.Float64Range(0.001, 1).Draw(t, string(c))
			total += shares[c]
		}
		d := federation.NewDealer()
		d.Update(shares)
		const n = 6000
		got := map[federation.ClusterName]int{}
		for range n {
			c, ok := d.Next(nil)
			if !ok {
				t.Fatal("nothing dealt")
			}
			got[c]++
		}
		for c, s := range shares {
			if diff := math.Abs(float64(got[c])/n - s/total); diff > 0.005 {
				t.Fatalf("%s: %d of %d dealt, its share is %v", c, got[c], n, s/total)
			}
		}
	})
}

// TestDealerFollowsStep: whatever Step decides, 6,000 calls come out as it says.
func TestDealerFollowsStep(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now, st, in := drawWalk(t)
		_, dec := federation.Step(now, st, in)
		d := federation.NewDealer()
		d.Update(dec.Shares())
		got := map[federation.ClusterName]int{}
		for range 6000 {
			if c, ok := d.Next(nil); ok {
				got[c]++
			}
		}
		for _, c := range clusterNames {
			if diff := math.Abs(float64(got[c])/6000 - dec.Shares()[c]); diff > 0.005 {
				t.Fatalf("%s: %d of 6000, decided %v", c, got[c], dec.Shares()[c])
			}
		}
	})
}

func TestDealerIsSmooth(t *testing.T) {
	d := federation.NewDealer()
	d.Update(map[federation.ClusterName]float64{"a": 0.5, "b": 0.25, "c": 0.25})
	var order string
	for range 8 {
		c, _ := d.Next(nil)
		order += string(c)
	}
	if order != "abcaabca" {
		t.Errorf("dealt %s", order)
	}
	if c, ok := d.Next(func(c federation.ClusterName) bool { return c != "b" }); !ok || c != "b" {
		t.Errorf("avoiding all but b deals %q, %v", c, ok)
	}
	if c, ok := d.Next(func(federation.ClusterName) bool { return true }); ok {
		t.Errorf("avoiding all deals %q", c)
	}
	d.Update(map[federation.ClusterName]float64{"a": 0, "b": math.NaN()})
	if c, ok := d.Next(nil); ok {
		t.Errorf("without shares %q is dealt", c)
	}
	d.Update(nil)
	if _, ok := d.Next(nil); ok {
		t.Error("without shares something is dealt")
	}
}

// TestDealerKeepsItsPlace: updating the same shares before every call must not favour anybody.
func TestDealerKeepsItsPlace(t *testing.T) {
	d := federation.NewDealer()
	got := map[federation.ClusterName]int{}
	for range 1000 {
		d.Update(map[federation.ClusterName]float64{"a": 0.9, "b": 0.1})
		c, _ := d.Next(nil)
		got[c]++
	}
	if got["b"] < 99 || got["b"] > 101 {
		t.Errorf("b got %d of 1000, its share is 10 %%", got["b"])
	}
}

func ExampleStep() {
	in := federation.Inputs{
		Service: federation.ServiceName{Namespace: "shop", Name: "checkout"}, Cluster: "us-east", Policy: federation.DefaultPolicy(),
		Members: []federation.Member{
			{Cluster: "us-east", Local: true, Same: true, Health: federation.Health{Healthy: 4}, Observed: federation.Observed{Ejected: 3, Why: "5xx streak"}},
			{Cluster: "eu-west", Same: true, Health: federation.Health{Healthy: 6},
				Tunnel: federation.Tunnel{Known: true, Up: true, RTT: 80 * time.Millisecond, Transport: "quic"}},
			{Cluster: "ap-south", Same: true, Health: federation.Health{Healthy: 2},
				Tunnel: federation.Tunnel{Known: true, Up: true, RTT: 198 * time.Millisecond, Transport: "quic"}},
		},
	}
	_, d := federation.Step(time.Unix(0, 0), federation.State{}, in)
	fmt.Println(d.Reason)
	for i, t := range d.Tiers {
		for _, m := range t.Members {
			fmt.Printf("%d %-8s %d/%d %4.0f%% %s: %s\n", i, m.Cluster, m.Healthy, m.Total, m.Share*100, m.State, m.Because)
		}
	}
	fmt.Println("RETURNS to", d.Returns)
	// Output:
	// below_min_healthy
	// 0 us-east  1/4    0% tripped: 1 of 4 healthy = 25% < trip 50%; 3 ejected: 5xx streak (outlier)
	// 1 eu-west  6/6  100% active: tunnel us-east→eu-west quic rtt 80ms loss 0.0%
	// 2 ap-south 2/2    0% standby: not needed
	// RETURNS to tier 0 when ≥75% healthy for 2m0s (now 25%)
}

func TestDecisionHelpers(t *testing.T) {
	in := federation.Inputs{Cluster: "us-east", Policy: federation.DefaultPolicy(), Members: []federation.Member{
		{Cluster: "us-east", Local: true, Same: true, Health: federation.Health{Healthy: 1, Unhealthy: 3}},
		{Cluster: "eu-west", Same: true, Health: federation.Health{Healthy: 6}, Tunnel: federation.Tunnel{Known: true, Up: true, RTT: 80 * time.Millisecond}},
		{Cluster: "ap-south", Same: true, Health: federation.Health{Healthy: 2}, Tunnel: federation.Tunnel{Known: true, Up: true, RTT: 190 * time.Millisecond}},
		{Cluster: "evil", Health: federation.Health{Healthy: 2}},
	}}
	st, d := federation.Step(epoch, federation.State{}, in)
	if got := fmt.Sprint(d.Candidates()); got != "[us-east 1/4 tripped eu-west 6/6 active ap-south 2/2 standby]" {
		t.Errorf("candidates %s", got)
	}
	if m, tier, ok := d.Fallback(func(c federation.ClusterName) bool { return c == "eu-west" }); !ok || m.Cluster != "ap-south" || tier != 2 {
		t.Errorf("fallback %v %d %v", m, tier, ok)
	}
	if m, tier, ok := d.Member("evil"); !ok || tier != -1 || m.Reason != federation.NotGranted {
		t.Errorf("evil is %+v in tier %d", m, tier)
	}
	in.Members[1].Tunnel.RTT = 81 * time.Millisecond
	in.Members[1].Tunnel.Loss = 0.001
	st2, d2 := federation.Step(epoch.Add(time.Second), st, in)
	if d2.Digest() != d.Digest() || st2.Digest() != st.Digest() {
		t.Error("a jittering tunnel changes the digest")
	}
	in.Members[1].Health.Unhealthy = 1
	if _, d3 := federation.Step(epoch.Add(time.Second), st, in); d3.Digest() == d.Digest() {
		t.Error("changed health does not change the decision's digest")
	}
}

// TestRecompute: what was reported, at the millisecond it was reported with, gives the same decision again.
func TestRecompute(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now, st, in := drawWalk(t)
		now = now.Add(time.Duration(rapid.IntRange(0, 999_999_999).Draw(t, "nanoseconds")))
		st, d := federation.Step(now, st, in)
		if _, again := federation.Step(now.Truncate(time.Millisecond), st, in); !reflect.DeepEqual(d, again) {
			t.Fatalf("decided\n%+v\nrecomputed\n%+v", d, again)
		}
	})
}

func TestJitterBounds(t *testing.T) {
	in := federation.Inputs{Cluster: "us-east", Policy: federation.DefaultPolicy(), Members: []federation.Member{
		{Cluster: "us-east", Local: true, Same: true, Health: federation.Health{Unhealthy: 1}}, {Cluster: "eu-west", Same: true, Health: federation.Health{Healthy: 1}},
	}}
	lo, hi := time.Hour, time.Duration(0)
	for i := range 1000 {
		in.Caller = fmt.Sprintf("shop/web-%d", i)
		in.Members[0].Health = federation.Health{Unhealthy: 1}
		st, _ := federation.Step(epoch, federation.State{}, in)
		in.Members[0].Health = federation.Health{Healthy: 1}
		_, d := federation.Step(epoch, st, in)
		hold := d.Wake.Sub(epoch)
		lo, hi = min(lo, hold), max(hi, hold)
	}
	if lo < 96*time.Second || hi > 144*time.Second || hi-lo < 40*time.Second {
		t.Errorf("hold-downs of 1000 callers lie between %v and %v, want ±20 %% of 2m", lo, hi)
	}
}

func TestParseStateRefuses(t *testing.T) {
	for _, bad := range []string{"", "[]", `{"version":99}`, `{"members":{"UPPER":{}}}`, string(make([]byte, federation.MaxStateSize+1))} {
		if _, err := federation.ParseState([]byte(bad)); err == nil {
			t.Errorf("%.40q was accepted", bad)
		}
	}
}

// FuzzStep: whatever state or inputs are reported, Step answers.
func FuzzStep(f *testing.F) {
	f.Add([]byte(`{"version":1,"members":{"us-east":{"phase":"ramp","step":-9,"retrips":99}}}`), []byte(`{"cluster":"us-east","policy":{},"members":[{"cluster":"us-east","local":true,"health":{"healthy":1}}]}`), int64(0))
	f.Add([]byte(`{}`), []byte(`{"policy":{"tiers":[{"clusters":["local","a"],"weights":{"a":4294967295}},{"any":true}]},"members":[{"cluster":"a","same":true,"health":{"healthy":4294967295,"unhealthy":4294967295}}]}`), int64(1<<62))
	f.Fuzz(func(t *testing.T, state, inputs []byte, sec int64) {
		st, in, ok := fuzzed(state, inputs)
		if !ok {
			return
		}
		_, d := federation.Step(time.Unix(sec%(1<<40), 0), st, in)
		if s := sum(d); s != 0 && math.Abs(s-1) > 1e-6 {
			t.Errorf("shares sum to %v", s)
		}
	})
}

// BenchmarkStep is one decision over three clusters, in the steady state. It runs when something changes, never per call.
func BenchmarkStep(b *testing.B) {
	in := federation.Inputs{Cluster: "us-east", Policy: federation.DefaultPolicy(), Members: []federation.Member{
		{Cluster: "us-east", Local: true, Same: true, Health: federation.Health{Healthy: 4}},
		{Cluster: "eu-west", Same: true, Health: federation.Health{Healthy: 6}, Tunnel: federation.Tunnel{Known: true, Up: true, RTT: 80 * time.Millisecond}},
		{Cluster: "ap-south", Same: true, Health: federation.Health{Healthy: 2}, Tunnel: federation.Tunnel{Known: true, Up: true, RTT: 190 * time.Millisecond}},
	}}
	var st federation.State
	b.ReportAllocs()
	for b.Loop() {
		st, _ = federation.Step(epoch, st, in)
	}
}

// BenchmarkDeal is one call dealt among three clusters: this is on the path of every call.
func BenchmarkDeal(b *testing.B) {
	d := federation.NewDealer()
	d.Update(map[federation.ClusterName]float64{"us-east": 0.7, "eu-west": 0.2, "ap-south": 0.1})
	b.ReportAllocs()
	for b.Loop() {
		d.Next(nil)
	}
}
