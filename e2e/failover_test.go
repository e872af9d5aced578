// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
)

const (
	// noticed: of requests issued this long after an event or later, none may fail.
	noticed = 2 * time.Second
	// watched is how many requests are judged after that, before shares are counted and the way back begins.
	watched = 600
	rate    = 200 // requests a second

	returnAfter = 2 * time.Second
	ramp        = 4 * time.Second
)

// TestFailover takes away what serves 200 requests a second, in every way named by promise P2, and brings it back, while
// counting at the callees whether traffic goes where why says.
func TestFailover(t *testing.T) {
	s := newShop(t)
	s.policy("local,eu-west,any")
	s.steady(t, "at home", shares{"us-east": 1})

	t.Run("Spill", func(t *testing.T) {
		defer s.applications(t, "us-east", true)
		for _, b := range s.apps["us-east"][5:] {
			b.stop()
		}
		// 5 of 8 are 62.5 %: below 70 % a place keeps 62.5/70 of its due.
		s.steady(t, "5 of 8 healthy", shares{"us-east": 62.5 / 70, "eu-west": 1 - 62.5/70})
		s.explains(t, `NOW  us-east 89%, eu-west 11%   reason spill_capacity   since \d\d:\d\d:\d\d \(\d+s\)`,
			`  0   us-east +5/8 +89% +active +5 of 8 healthy = 6[23]% < 70%: keeps 89%, the rest spills`,
			`Cost of being here: \+\dms rtt, 11% of requests cross-region`)
	})
	t.Run("LocalApplications", func(t *testing.T) {
		s.outage(t, outage{
			home: "us-east", next: "eu-west",
			take: func(t *testing.T) { s.applications(t, "us-east", false) },
			give: func(t *testing.T) { s.applications(t, "us-east", true) },
			why: []string{
				`  0   us-east +0/8 +0% +tripped +\S.*`,
				`RETURNS to tier 0 when .*≥75% healthy for \d+s.*`,
			},
		})
	})
	t.Run("LocalApplicationsAndSidecar", func(t *testing.T) {
		s.outage(t, outage{
			home: "us-east", next: "eu-west",
			take: func(t *testing.T) {
				s.sidecars["us-east"].Kill()
				s.applications(t, "us-east", false)
			},
			give: func(t *testing.T) {
				s.applications(t, "us-east", true)
				s.sidecars["us-east"].Restart()
			},
			why: []string{`  0   us-east +\d/8 +0% +(tripped|excluded) +\S.*`, `RETURNS to tier 0 when .*≥75% healthy for \d+s.*`},
		})
	})
	t.Run("LocalSidecarPaused", func(t *testing.T) {
		s.outage(t, outage{
			home: "us-east", next: "eu-west", counted: true,
			take: func(t *testing.T) { s.sidecars["us-east"].Signal(syscall.SIGSTOP) },
			give: func(t *testing.T) { s.sidecars["us-east"].Signal(syscall.SIGCONT) },
			why:  []string{`  0   us-east +\d/8 +0% +(tripped|excluded) +\S.*`, `RETURNS to tier 0 when .*≥75% healthy for \d+s.*`},
		})
	})
	t.Run("WholeCluster", func(t *testing.T) {
		defer s.applications(t, "us-east", true)
		s.applications(t, "us-east", false)
		s.wholeCluster(t)
	})
	t.Run("Weights", func(t *testing.T) {
		s.policy("eu-west=80+ap-south=20,any")
		s.steady(t, "weights", shares{"eu-west": 0.8, "ap-south": 0.2})
		s.explains(t, `NOW  eu-west 80%, ap-south 20%   reason priority_ok   since \d\d:\d\d:\d\d \(\d+s\)`,
			`  0   eu-west +2/2 +80% +active +tunnel us-east→eu-west (quic|tcp) rtt \d+ms loss \d+\.\d%`)
	})
}

// wholeCluster takes all of eu-west away in three ways, while it serves because us-east does not.
func (s *shop) wholeCluster(t *testing.T) {
	eu := s.f.Clusters["eu-west"]
	each := func(do func(p *harness.Process)) {
		for _, p := range eu.Processes() {
			do(p)
		}
	}
	gone := []string{`  1   eu-west +\d/\d +0% +excluded +tunnel us-east→eu-west is down`, `RETURNS to tier 0 when .*≥75% healthy for \d+s.*`}
	t.Run("Killed", func(t *testing.T) {
		s.outage(t, outage{
			home: "eu-west", next: "ap-south", why: gone,
			take: func(t *testing.T) {
				each((*harness.Process).Kill)
				s.applications(t, "eu-west", false)
			},
			give: func(t *testing.T) {
				s.applications(t, "eu-west", true)
				eu.ControlPlane.Start()
				eu.ControlPlane.Addrs()
				eu.RestartGateway(eu.Gateways[0])
				s.sidecars["eu-west"].Restart()
			},
		})
	})
	t.Run("Paused", func(t *testing.T) {
		s.outage(t, outage{
			home: "eu-west", next: "ap-south", why: gone,
			take: func(*testing.T) { each(func(p *harness.Process) { p.Signal(syscall.SIGSTOP) }) },
			give: func(*testing.T) { each(func(p *harness.Process) { p.Signal(syscall.SIGCONT) }) },
		})
	})
	t.Run("CutOff", func(t *testing.T) {
		s.outage(t, outage{
			home: "eu-west", next: "ap-south", why: gone,
			take: func(*testing.T) { s.f.Cut("eu-west", true) },
			give: func(*testing.T) { s.f.Cut("eu-west", false) },
		})
	})
}

// outage is one thing that is taken away and given back.
type outage struct {
	home, next string // where traffic is with it and without it
	take, give func(*testing.T)
	why        []string // lines that why must print meanwhile, as patterns
	counted    bool     // this steady state was counted before
}

// outage takes something away under load, counts where traffic goes, gives it back, and judges all that.
func (s *shop) outage(t *testing.T, o outage) {
	t.Helper()
	s.conclusive(t, func() []finding { return s.judge(t, o) })
}

// judge returns what was not as promised.
func (s *shop) judge(t *testing.T, o outage) []finding {
	t.Helper()
	s.settle(t, shares{o.home: 1})
	l := startLoad(t, s.url, rate)
	defer l.end()
	issued(t, l, time.Now(), rate/2)
	before := time.Now()
	var give sync.Once
	back := func() time.Time {
		now := time.Now()
		give.Do(func() { o.give(t) })
		return now
	}
	defer back()
	o.take(t)
	event := time.Now()
	issued(t, l, event.Add(noticed), watched)
	s.settle(t, shares{o.next: 1})
	s.explains(t, append(o.why, `NOW  `+o.next+` 100%   reason \w+   since \d\d:\d\d:\d\d \(\d+s\)`,
		`Cost of being here: \+\d\dms rtt, 100% of requests cross-region`, `Check the cause: strait trace --failover`)...)
	t.Logf("without it:\n%s", s.why())
	var found []finding
	if !o.counted {
		found = s.count(t, "without it")
	}

	given := back()
	seen := s.settle(t, shares{o.home: 1})
	issued(t, l, time.Now(), rate)
	l.end()

	early := l.since(before)
	n, text := failures(early)
	worst := time.Duration(0)
	for _, c := range early {
		if c.at.Sub(event) >= noticed {
			worst = max(worst, c.took)
		}
	}
	t.Logf("%d requests, %d failed, all told; slowest issued %v after the event or later: %v%s", len(early), n, noticed, worst.Round(time.Millisecond), text)
	for _, c := range l.since(time.Time{}) {
		switch healthy := c.at.Add(c.took).Before(before); {
		case c.ok():
		case healthy:
			found = append(found, failed(c, "before anything was taken away"))
		case c.at.Sub(event) >= noticed:
			found = append(found, failed(c, fmt.Sprintf("%v after the event; given back %v after it", c.at.Sub(event), given.Sub(event))))
		}
	}
	for _, state := range []string{"hold", "ramp"} {
		if !seen[o.home+" "+state] {
			found = append(found, finding{given, time.Now(), fmt.Errorf("why never said %s while traffic went back to %s; it said %v",
				state, o.home, slices.Sorted(maps.Keys(seen)))})
		}
	}
	return append(found, s.steps(t, l, o.home, given)...)
}

// steps judges how traffic came back to home: not before the hold, then 10, 25, 50 and 100 %.
func (s *shop) steps(t *testing.T, l *load, home string, back time.Time) []finding {
	var first time.Time
	calls := l.since(back)
	for _, c := range calls {
		if s.at(c) == home && (first.IsZero() || c.at.Before(first)) {
			first = c.at
		}
	}
	if first.IsZero() {
		return []finding{{back, time.Now(), errors.New("no traffic came back")}}
	}
	var found []finding
	if held := first.Sub(back); held < returnAfter*8/10 {
		found = append(found, finding{back, first, fmt.Errorf("traffic came back to %s after %v, before the hold-down of %v ±20%% was over", home, held, returnAfter)})
	}
	const edge = 150 * time.Millisecond
	text := ""
	for i, want := range []float64{0.10, 0.25, 0.50, 1} {
		from, to := first.Add(time.Duration(i)*ramp/3+edge), first.Add(time.Duration(i+1)*ramp/3-edge)
		if i == 3 {
			to = time.Now()
		}
		n, there := 0, 0
		for _, c := range calls {
			if c.at.After(from) && c.at.Before(to) {
				if n++; s.at(c) == home {
					there++
				}
			}
		}
		got := float64(there) / float64(max(n, 1))
		text += fmt.Sprintf("  %.0f%% of %d", got*100, n)
		if math.Abs(got-want) > 0.06 {
			found = append(found, finding{first, to, fmt.Errorf("step %d of the return to %s took %.1f%% of %d requests, want %.0f%%", i+1, home, got*100, n, want*100)})
		}
	}
	t.Logf("back after %v, then in steps of%s", first.Sub(back).Round(time.Millisecond), text)
	return found
}

// at is the cluster that answered c.
func (*shop) at(c call) string {
	if !c.ok() {
		return ""
	}
	name, _, _ := strings.Cut(c.body, "/")
	return name
}

// explains waits until why prints the lines, which are patterns of whole lines.
func (s *shop) explains(t *testing.T, lines ...string) {
	t.Helper()
	head := []string{
		`shop/checkout from us-east/web    policy FailoverPolicy shop/checkout \(gen \d+, acked \d+/\d+ proxies\)`,
		`TIER +CLUSTER +HEALTHY +SHARE +STATE +BECAUSE`,
	}
	harness.Eventually(t, 10*time.Second, "why to explain", func() error {
		text := s.why()
		for _, l := range append(head, lines...) {
			if !regexp.MustCompile(`(?m)^` + l + `$`).MatchString(text) {
				return fmt.Errorf("no line like %q in\n%s", l, text)
			}
		}
		if strings.Contains(text, "another answer") {
			return fmt.Errorf("recomputing disagrees:\n%s", text)
		}
		return nil
	})
}
