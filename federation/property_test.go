// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"slices"
	"sort"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/strait-mesh/strait/federation"
)

var epoch = time.Date(2026, 11, 22, 14, 0, 0, 0, time.UTC)

var clusterNames = []federation.ClusterName{"us-east", "eu-west", "ap-south", "us-west", "sa-east"}

func drawHealth(t *rapid.T, label string) federation.Health {
	n := func(l string) uint32 {
		return uint32(rapid.SampledFrom([]int{0, 0, 1, 2, 3, 4, 5, 6, 7, 10, 100}).Draw(t, label+l))
	}
	return federation.Health{Healthy: n(".healthy"), Unhealthy: n(".unhealthy"), Unknown: n(".unknown")}
}

func drawMember(t *rapid.T, c federation.ClusterName) federation.Member {
	l := string(c)
	chance := func(label string, percent int) bool {
		return rapid.IntRange(0, 99).Draw(t, l+"."+label) >= 100-percent
	}
	m := federation.Member{
		Cluster: c, Local: c == "us-east", Same: c == "us-east" || !chance("foreign", 10),
		Region: rapid.SampledFrom([]string{"", "us", "eu"}).Draw(t, l+".region"), Health: drawHealth(t, l),
		Freshness: rapid.SampledFrom([]federation.Freshness{1, 1, 1, 2, 3}).Draw(t, l+".fresh"),
		Drained:   chance("drained", 8), LocallyDrained: chance("locally", 5),
	}
	if chance("tunnel", 80) {
		m.Tunnel = federation.Tunnel{Known: true, Up: !chance("down", 15), Suspect: chance("suspect", 10), Transport: "quic",
			RTT:  time.Duration(rapid.IntRange(0, 200).Draw(t, l+".rtt")) * time.Millisecond,
			Loss: rapid.SampledFrom([]float64{0, 0, 0.01, 0.03, 0.06}).Draw(t, l+".loss")}
	}
	if chance("observed", 15) {
		m.Observed = federation.Observed{Ejected: uint32(rapid.IntRange(0, 5).Draw(t, l+".ejected")), Down: chance("obsdown", 40)}
	}
	return m
}

func drawPolicy(t *rapid.T) federation.Policy {
	p := federation.DefaultPolicy()
	p.MinEndpoints = uint32(rapid.IntRange(0, 3).Draw(t, "min"))
	p.ReturnAfter = time.Duration(rapid.IntRange(-1, 120).Draw(t, "after")) * time.Second
	p.Ramp = time.Duration(rapid.IntRange(-1, 60).Draw(t, "ramp")) * time.Second
	if !rapid.Bool().Draw(t, "explicit") {
		return p
	}
	left := rapid.Permutation(clusterNames).Draw(t, "order")
	for i := 0; len(left) > 0 && i < 3; i++ {
		n := rapid.IntRange(1, min(2, len(left))).Draw(t, fmt.Sprintf("tier%d", i))
		tier := federation.Tier{Clusters: slices.Clone(left[:n]), Weights: map[federation.ClusterName]uint32{}}
		for j, c := range tier.Clusters {
			tier.Weights[c] = uint32(rapid.SampledFrom([]int{0, 1, 20, 80}).Draw(t, fmt.Sprintf("weight%d", i)))
			if c == "us-east" && rapid.Bool().Draw(t, "word") {
				tier.Weights[federation.OwnCluster] = tier.Weights[c]
				delete(tier.Weights, c)
				tier.Clusters[j] = federation.OwnCluster
			}
		}
		left = left[n:]
		p.Tiers = append(p.Tiers, tier)
	}
	if rapid.Bool().Draw(t, "any") {
		p.Tiers = append(p.Tiers, federation.Tier{Any: true, Except: []federation.ClusterName{"sa-east"}})
	}
	return p
}

func drawInputs(t *rapid.T) federation.Inputs {
	in := federation.Inputs{
		Service: federation.ServiceName{Namespace: "shop", Name: "checkout"}, Caller: rapid.SampledFrom([]string{"", "shop/web"}).Draw(t, "caller"),
		Cluster: "us-east", Locality: federation.Locality{Region: "us"}, Policy: drawPolicy(t),
	}
	for _, c := range clusterNames {
		if rapid.IntRange(0, 9).Draw(t, string(c)+".present") > 1 {
			in.Members = append(in.Members, drawMember(t, c))
		}
	}
	return in
}

// drawWalk makes a state by walking Step through random inputs under one policy.
func drawWalk(t *rapid.T) (time.Time, federation.State, federation.Inputs) {
	in := drawInputs(t)
	var st federation.State
	now := epoch
	for range rapid.IntRange(0, 8).Draw(t, "steps") {
		st, _ = federation.Step(now, st, in)
		now = now.Add(time.Duration(rapid.IntRange(0, 200).Draw(t, "advance")) * time.Second)
		for i := range in.Members {
			if rapid.Bool().Draw(t, "changes") {
				in.Members[i] = drawMember(t, in.Members[i].Cluster)
			}
		}
	}
	return now, st, in
}

func sum(d federation.Decision) (total float64) {
	for _, s := range d.Shares() {
		total += s
	}
	return total
}

func TestStepInvariants(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now, st, in := drawWalk(t)
		before := st.Digest()
		st1, d1 := federation.Step(now, st, in)
		if st.Digest() != before {
			t.Fatal("the state given in was changed")
		}

		total := sum(d1)
		if math.Abs(total-1) > 1e-6 && total != 0 {
			t.Fatalf("shares sum to %v: %+v", total, d1)
		}
		seen := map[federation.ClusterName]bool{}
		for i, tier := range d1.Tiers {
			for _, m := range tier.Members {
				checkMember(t, m, i)
				if seen[m.Cluster] {
					t.Fatalf("%s twice", m.Cluster)
				}
				seen[m.Cluster] = true
			}
		}
		for _, m := range d1.Exclusions {
			if m.Share != 0 || m.State != federation.StateExcluded || !m.Reason.Valid() {
				t.Fatalf("exclusion %+v", m)
			}
			seen[m.Cluster] = true
		}
		for _, m := range in.Members {
			if !seen[m.Cluster] {
				t.Fatalf("%s is nowhere in %+v", m.Cluster, d1)
			}
			if (m.Drained || m.LocallyDrained || (!m.Local && !m.Same)) && d1.Shares()[m.Cluster] != 0 {
				t.Fatalf("%+v has a share", m)
			}
			if !m.Local && m.Tunnel.Known && !m.Tunnel.Up && d1.Shares()[m.Cluster] != 0 {
				t.Fatalf("%+v is unreachable and has a share", m)
			}
		}
		if !d1.Reason.Valid() || (total == 0) != (d1.ActiveTier < 0) {
			t.Fatalf("reason %q, active tier %d, sum %v", d1.Reason, d1.ActiveTier, total)
		}
		if !d1.Wake.IsZero() && !d1.Wake.After(now) {
			t.Fatalf("wakes in the past: %v at %v", d1.Wake, now)
		}

		st2, d2 := federation.Step(now, st1, in)
		if !reflect.DeepEqual(st1, st2) || !reflect.DeepEqual(d1, d2) {
			t.Fatalf("not idempotent at one instant:\n%+v\n%+v\n%+v\n%+v", st1, st2, d1, d2)
		}
		shuffled := in
		shuffled.Members = rapid.Permutation(in.Members).Draw(t, "permutation")
		st3, d3 := federation.Step(now, st, shuffled)
		if st3.Digest() != st1.Digest() || !reflect.DeepEqual(d1, d3) {
			t.Fatal("depends on the order of members")
		}
		b, err := json.Marshal(st1)
		if err != nil {
			t.Fatal(err)
		}
		back, err := federation.ParseState(b)
		if err != nil || back.Digest() != st1.Digest() {
			t.Fatalf("state through JSON: %v\n%s", err, b)
		}
		later := now.Add(30 * time.Second)
		_, da := federation.Step(later, st1, in)
		_, db := federation.Step(later, back, in)
		if !reflect.DeepEqual(da, db) {
			t.Fatalf("a state through JSON decides otherwise:\n%+v\n%+v", da, db)
		}
	})
}

func checkMember(t *rapid.T, m federation.MemberDecision, tier int) {
	if m.Share < 0 || m.Share > 1+1e-9 || !m.Reason.Valid() || m.Because == "" {
		t.Fatalf("tier %d: %+v", tier, m)
	}
	switch m.State {
	case federation.StateActive, federation.StateRamp:
	case federation.StateStandby, federation.StateTripped, federation.StateHold, federation.StateExcluded:
		if m.Share != 0 {
			t.Fatalf("tier %d: %s with a share: %+v", tier, m.State, m)
		}
	default:
		t.Fatalf("tier %d: %+v", tier, m)
	}
	if m.State == federation.StateActive && m.Share == 0 {
		t.Fatalf("tier %d: active without a share: %+v", tier, m)
	}
}

// TestStepMonotone: from the same memory, a member that is healthier never gets less. (Without last resort, where the least bad
// place is sought and a healthier instance elsewhere may be it.)
func TestStepMonotone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now, st, in := drawWalk(t)
		if len(in.Members) == 0 {
			return
		}
		i := rapid.IntRange(0, len(in.Members)-1).Draw(t, "which")
		c := in.Members[i].Cluster
		if in.Members[i].Health.Unhealthy == 0 {
			return
		}
		better := in
		better.Members = slices.Clone(in.Members)
		n := uint32(rapid.IntRange(1, int(in.Members[i].Health.Unhealthy)).Draw(t, "heals"))
		better.Members[i].Health.Healthy += n
		better.Members[i].Health.Unhealthy -= n
		_, d1 := federation.Step(now, st, in)
		_, d2 := federation.Step(now, st, better)
		if d1.Reason == federation.PanicAllUnhealthy || d2.Reason == federation.PanicAllUnhealthy {
			return
		}
		if a, b := d1.Shares()[c], d2.Shares()[c]; b < a-1e-9 {
			t.Fatalf("%s is healthier and gets %v instead of %v\n%+v\n%+v", c, b, a, d1, d2)
		}
	})
}

// TestFreshStepIsNaive checks the shares of a first decision against a model that is written to be obviously right.
func TestFreshStepIsNaive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := drawInputs(t)
		_, d := federation.Step(epoch, federation.State{}, in)
		got, want := d.Shares(), naiveShares(in)
		for _, c := range clusterNames {
			if math.Abs(got[c]-want[c]) > 1e-6 {
				t.Fatalf("%s gets %v, naively %v\n%+v\nall: %v\nnaive: %v", c, got[c], want[c], in, got, want)
			}
		}
	})
}

type naive struct {
	m      federation.Member
	h      federation.Health
	weight float64
	keep   float64 // how much of its due it takes
	rank   int     // for the last resort
}

func naiveShares(in federation.Inputs) map[federation.ClusterName]float64 {
	p := in.Policy.WithDefaults()
	tiers := naiveTiers(in, p)
	shares := map[federation.ClusterName]float64{}
	demand := 1.0
	for _, tier := range tiers {
		var weights, strong, homeless float64
		for _, n := range tier {
			if n.keep > 0 {
				weights += n.weight
			}
			if n.keep == 1 {
				strong += n.weight
			}
		}
		for _, n := range tier {
			if n.keep > 0 {
				due := demand * n.weight / weights
				shares[n.m.Cluster] += due * n.keep
				homeless += due * (1 - n.keep)
			}
		}
		for _, n := range tier {
			if n.keep == 1 {
				shares[n.m.Cluster] += homeless * n.weight / strong
			}
		}
		if strong > 0 {
			demand = 0
		} else if weights > 0 {
			demand = homeless
		}
	}
	placed := 0.0
	for _, s := range shares {
		placed += s
	}
	if placed > 0 {
		for c := range shares {
			shares[c] /= placed
		}
		return shares
	}
	for rank := 1; rank <= 5; rank++ {
		chosen := map[federation.ClusterName]float64{}
		total := 0.0
		for _, tier := range tiers {
			for _, n := range tier {
				if n.rank == rank && rank == 2 {
					chosen[n.m.Cluster] = float64(n.h.Healthy + n.h.Unknown)
				} else if n.rank == rank {
					chosen[n.m.Cluster] = n.weight
				}
			}
			if rank != 2 && len(chosen) > 0 {
				break
			}
		}
		for _, s := range chosen {
			total += s
		}
		for c := range chosen {
			chosen[c] /= total
		}
		if total > 0 {
			return chosen
		}
	}
	return nil
}

// naiveTiers orders the members and judges each.
func naiveTiers(in federation.Inputs, p federation.Policy) (tiers [][]naive) {
	all := map[federation.ClusterName]naive{}
	for _, m := range in.Members {
		n := naiveJudge(m, p)
		n.weight = 1
		all[m.Cluster] = n
	}
	var near []federation.ClusterName
	for c := range all {
		near = append(near, c)
	}
	sort.Slice(near, func(i, j int) bool {
		a, b := all[near[i]].m, all[near[j]].m
		key := func(m federation.Member) string {
			rtt := m.Tunnel.RTT
			if rtt == 0 || m.Local {
				rtt = 999 * time.Hour
			}
			return fmt.Sprintf("%v %v %020d %s", !m.Local, m.Region != "us", rtt, m.Cluster)
		}
		return key(a) < key(b)
	})
	taken := map[federation.ClusterName]bool{}
	if len(p.Tiers) == 0 {
		for _, c := range near {
			tiers = append(tiers, []naive{all[c]})
		}
		return tiers
	}
	for _, t := range p.Tiers {
		for _, c := range t.Clusters {
			if c == federation.OwnCluster {
				c = "us-east"
			}
			taken[c] = true
		}
	}
	for _, t := range p.Tiers {
		var tier []naive
		for _, c := range t.Clusters {
			w := t.Weights[c]
			if c == federation.OwnCluster {
				c = "us-east"
			}
			if n, ok := all[c]; ok {
				n.weight = max(float64(w), 1)
				tier = append(tier, n)
			}
		}
		tiers = append(tiers, tier)
		if t.Any {
			for _, c := range near {
				if !taken[c] && !slices.Contains(t.Except, c) {
					tiers = append(tiers, []naive{all[c]})
				}
			}
		}
	}
	return tiers
}

// naiveJudge: keep as the design says it, rank from 1 (least bad) to 5, 0 for hopeless.
func naiveJudge(m federation.Member, p federation.Policy) naive {
	n := naive{m: m, h: m.Health}
	for range m.Observed.Ejected { // one by one, healthy ones first
		switch {
		case n.h.Healthy > 0:
			n.h.Healthy--
			n.h.Unhealthy++
		case n.h.Unknown > 0:
			n.h.Unknown--
			n.h.Unhealthy++
		}
	}
	total := n.h.Healthy + n.h.Unhealthy + n.h.Unknown
	usable := n.h.Healthy + n.h.Unknown
	remote := !m.Local
	pick := func(rank int) int {
		if usable == 0 {
			return 5
		}
		return rank
	}
	switch {
	case remote && !m.Same, m.Drained, m.LocallyDrained:
	case remote && m.Tunnel.Known && !m.Tunnel.Up:
	case remote && m.Tunnel.Known && m.Tunnel.Suspect:
		if total > 0 {
			n.rank = pick(3)
		}
	case remote && m.Freshness == federation.Withdrawn && !m.Tunnel.Known:
	case m.Observed.Down:
		if total > 0 {
			n.rank = 4
		}
	case total == 0:
	case remote && m.Tunnel.Known && m.Tunnel.Loss > 0.05:
		n.rank = pick(1)
	case n.h.Healthy+n.h.Unhealthy > 0 && 2*n.h.Healthy < n.h.Healthy+n.h.Unhealthy, usable < p.MinEndpoints:
		n.rank = pick(2)
	case n.h.Healthy+n.h.Unhealthy == 0:
		n.keep = 1
	default:
		h := float64(n.h.Healthy) / float64(n.h.Healthy+n.h.Unhealthy)
		n.keep = min(1, h/0.7)
		if h >= 0.7 {
			n.keep = 1
		}
	}
	return n
}

// TestTimelineIsNaive runs a home and one fallback second by second against a model that counts seconds.
func TestTimelineIsNaive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		after := rapid.IntRange(1, 20).Draw(t, "after")
		interval := rapid.IntRange(1, 5).Draw(t, "interval")
		in := federation.Inputs{Cluster: "us-east", Policy: federation.DefaultPolicy(), Members: []federation.Member{
			{Cluster: "us-east", Local: true, Same: true},
			{Cluster: "eu-west", Same: true, Health: federation.Health{Healthy: 1}, Tunnel: federation.Tunnel{Known: true, Up: true}},
		}}
		in.Policy.ReturnAfter = time.Duration(after) * time.Second
		in.Policy.Ramp = time.Duration(3*interval) * time.Second
		n := ticker{mode: "home", after: after, interval: interval, back: -1}
		var st federation.State
		now := epoch
		var trace string
		for range rapid.IntRange(1, 12).Draw(t, "spells") {
			// 50..69 % is left out: there the fallback has a life of its own.
			percent := rapid.OneOf(rapid.SampledFrom([]int{0, 49, 70, 74, 75, 100, 100, 100})).Draw(t, "percent")
			up := rapid.IntRange(0, 5).Draw(t, "up") > 0
			in.Members[0].Health = federation.Health{Healthy: uint32(percent), Unhealthy: uint32(100 - percent)}
			in.Members[1].Tunnel.Up = up
			for range rapid.SampledFrom([]int{1, 2, 3, 5, 20, 60, 700}).Draw(t, "seconds") {
				var d federation.Decision
				st, d = federation.Step(now, st, in)
				want := n.tick(percent, up)
				trace += fmt.Sprintf("%s %d%% %v: %v %s\n", now.Sub(epoch), percent, up, want, n.mode)
				if got := d.Shares()["us-east"]; math.Abs(got-want) > 1e-9 {
					t.Fatalf("home gets %v, naively %v\n%s%+v", got, want, trace, d)
				}
				now = now.Add(time.Second)
			}
		}
	})
}

type ticker struct {
	mode            string
	after, interval int
	waited, needed  int
	step, onStep    int
	spoiled         bool
	relapses        int
	alone           bool
	back            int // seconds since traffic came back, -1 = it never left or is away
}

// tick is one second; it returns the home's share.
func (n *ticker) tick(percent int, fallback bool) float64 {
	if n.back >= 0 {
		n.back++
	}
	n.waited++
	n.onStep++
	if percent < 50 {
		if n.mode == "home" || n.mode == "ramp" {
			if n.back >= 0 && n.back <= 600 {
				n.relapses = min(n.relapses+1, 5)
			} else {
				n.relapses = 0
			}
			n.back = -1
		}
		n.mode = "away"
	} else if !fallback || n.alone { // alone until now: who becomes fit together with the fallback is already there
		if n.mode != "home" {
			n.back = 0
		}
		n.mode = "home"
	}
	n.alone = !fallback
	if n.mode == "wait" && percent < 75 {
		n.mode = "away"
	}
	if n.mode == "away" && percent >= 75 {
		n.mode, n.waited, n.needed = "wait", 0, n.after
		for range n.relapses {
			n.needed *= 2
		}
	}
	if n.mode == "wait" && n.waited >= n.needed {
		n.mode, n.step, n.onStep, n.spoiled, n.back = "ramp", 0, 0, false, 0
	}
	if n.mode == "ramp" {
		switch {
		case percent < 75 && (!n.spoiled || n.onStep >= n.interval):
			n.step, n.onStep, n.spoiled = max(0, n.step-1), 0, true
		case percent >= 75 && n.spoiled:
			n.onStep, n.spoiled = 0, false
		case percent >= 75 && n.onStep >= n.interval:
			n.step, n.onStep = n.step+1, 0
		}
		if n.step == 3 {
			n.mode = "home"
		}
	}
	switch {
	case !fallback || n.mode == "home":
		return 1
	case n.mode == "ramp":
		return []float64{0.10, 0.25, 0.50}[n.step]
	}
	return 0
}
