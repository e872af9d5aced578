// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
)

// shop is three clusters in each of which checkout runs, one sidecar in front of its instances, and a client in us-east.
type shop struct {
	f        *harness.Federation
	canary   *harness.Canary
	url      string
	apps     map[string][]*backend
	sidecars map[string]*harness.Sidecar
}

// shares of requests by cluster.
type shares map[string]float64

func (s shares) String() string {
	var parts []string
	for _, c := range slices.Sorted(maps.Keys(s)) {
		if s[c] > 0 {
			parts = append(parts, fmt.Sprintf("%s %.1f%%", c, s[c]*100))
		}
	}
	return strings.Join(parts, ", ")
}

// differ is the greatest difference of a share.
func (s shares) differ(o shares) float64 {
	d := 0.0
	for _, c := range []string{"us-east", "eu-west", "ap-south"} {
		d = max(d, math.Abs(s[c]-o[c]))
	}
	return d
}

func newShop(t *testing.T) *shop {
	t.Helper()
	f := harness.New(t, harness.Options{RTT: map[string]time.Duration{
		"us-east-eu-west": 20 * time.Millisecond, "us-east-ap-south": 50 * time.Millisecond, "eu-west-ap-south": 40 * time.Millisecond,
	}})
	f.Up("shop")
	s := &shop{f: f, canary: harness.NewCanary(t), apps: map[string][]*backend{}, sidecars: map[string]*harness.Sidecar{}}
	for cluster, instances := range map[string]int{"us-east": 8, "eu-west": 2, "ap-south": 2} {
		c := f.Clusters[cluster]
		token := ""
		for i := range instances {
			b := newBackend(t, fmt.Sprintf("%s/checkout-%d", cluster, i+1))
			s.apps[cluster] = append(s.apps[cluster], b)
			w := harness.Workload{Name: fmt.Sprintf("checkout-%d", i+1), Service: "checkout", Address: b.addr, Token: i == 0}
			if file := c.Register(w); i == 0 {
				token = file
			}
		}
		s.sidecars[cluster] = c.StartSidecar("checkout", token, nil)
		c.CLI("export", "shop/checkout", "--to", "*")
	}
	us := f.Clusters["us-east"]
	web := us.StartSidecar("web", us.Register(harness.Workload{Name: "web", Service: "web", Token: true}), []string{"shop/checkout:http"})
	s.url = "http://" + web.Upstreams[0] + "/"
	reaches(t, s.url, "us-east/")
	return s
}

// policy sets the order in which clusters serve us-east, with short times.
func (s *shop) policy(order string) {
	s.f.T.Helper()
	s.f.Clusters["us-east"].CLI("failover", "set", "shop/checkout", "--order", order, "--return-after", returnAfter.String(), "--ramp", ramp.String())
}

// applications starts or ends all instances in a cluster.
func (s *shop) applications(t *testing.T, cluster string, run bool) {
	t.Helper()
	for _, b := range s.apps[cluster] {
		b.stop()
		if run {
			b.start(t)
		}
	}
}

func (s *shop) why() string { return s.f.Clusters["us-east"].CLI("why", "shop/checkout") }

// decision is what why -o json says of a caller.
type decision struct {
	shares shares
	states map[string]bool // "<cluster> <state>"
	steady bool            // nobody is on the way back
}

// reported is what why says that the one caller decided.
func (s *shop) reported() (decision, error) {
	var doc struct {
		Groups []struct {
			Callers    []string
			Recomputed string
			Decision   struct {
				Reason string
				Tiers  []struct {
					Members []struct {
						Cluster, State string
						Share          float64
					}
				}
			}
		}
	}
	text := s.f.Clusters["us-east"].CLI("why", "shop/checkout", "-o", "json")
	d := decision{shares: shares{}, states: map[string]bool{}, steady: true}
	if err := json.Unmarshal([]byte(text), &doc); err != nil {
		return d, fmt.Errorf("why -o json: %w\n%s", err, text)
	}
	if len(doc.Groups) != 1 || !slices.Equal(doc.Groups[0].Callers, []string{"shop/web"}) {
		return d, fmt.Errorf("why should name one caller:\n%s", text)
	}
	g := doc.Groups[0]
	if g.Recomputed != "agrees" {
		s.f.T.Errorf("recomputing what was reported gives %q:\n%s", g.Recomputed, text)
	}
	for _, tier := range g.Decision.Tiers {
		for _, m := range tier.Members {
			d.shares[m.Cluster] += m.Share
			d.states[m.Cluster+" "+m.State] = true
			d.steady = d.steady && m.State != "hold" && m.State != "ramp"
		}
	}
	return d, nil
}

// settle waits until why reports these shares in a steady state, and returns the states that it reported on the way.
func (s *shop) settle(t *testing.T, want shares) (seen map[string]bool) {
	t.Helper()
	const every = 200 * time.Millisecond // each look is a process
	seen = map[string]bool{}
	var looked time.Time
	var err error
	harness.Eventually(t, time.Minute, "traffic to go to "+want.String(), func() error {
		if time.Since(looked) < every {
			return err
		}
		looked = time.Now()
		var d decision
		if d, err = s.reported(); err != nil {
			return err
		}
		maps.Copy(seen, d.states)
		if !d.steady || d.shares.differ(want) > 0.001 {
			err = fmt.Errorf("it goes to %v\n%s", d.shares, s.why())
		}
		return err
	})
	return seen
}

// steady waits for shares and counts whether requests go there, without any failure.
func (s *shop) steady(t *testing.T, what string, want shares) {
	t.Helper()
	s.conclusive(t, func() []finding {
		s.settle(t, want)
		return s.count(t, what)
	})
}

// finding is something that was not as promised, and when.
type finding struct {
	from, to time.Time
	err      error
}

// failed is the finding of one call; what the host did in the second before it counts too.
func failed(c call, when string) finding {
	return finding{c.at.Add(-time.Second), c.at.Add(c.took), fmt.Errorf("at %s (%s) after %v: %d %.300q %w", c.at.Format("15:04:05.000"), when,
		c.took.Round(time.Millisecond), c.status, c.body, c.err)}
}

// conclusive runs a scenario and fails with what it finds. Findings from a time at which the host stalled mean nothing: when there
// are no others the scenario runs again, at most twice.
func (s *shop) conclusive(t *testing.T, scenario func() []finding) {
	t.Helper()
	for attempt := range 3 {
		found := scenario()
		if len(found) == 0 {
			return
		}
		sure, text := 0, ""
		for i, f := range found {
			worst := s.canary.Between(f.from, f.to)
			if worst < harness.Stalled {
				sure++
			}
			if i < 10 {
				text += fmt.Sprintf("\n  %v (the host stalled for %v at most)", f.err, worst.Round(time.Millisecond))
			}
		}
		if sure > 0 {
			t.Fatalf("%d findings, %d of them while the host was healthy:%s\n%s", len(found), sure, text, s.why())
		}
		t.Logf("attempt %d is inconclusive: %d findings, all while the host stalled:%s", attempt+1, len(found), text)
	}
	t.Fatal("three attempts were inconclusive: this host is too busy to say")
}

// count sends requests until the callees have counted 6,000 and compares with the shares that why prints before and after.
func (s *shop) count(t *testing.T, what string) (found []finding) {
	t.Helper()
	const wanted, tolerance = 6000, 0.02
	start := time.Now()
	report := func(format string, args ...any) {
		found = append(found, finding{start, time.Now(), fmt.Errorf(what+": "+format, args...)})
	}
	before, err := s.reported()
	if err != nil {
		report("%w", err)
		return found
	}
	from := s.served()
	calls := burst(t, s.url, wanted)
	measured, total := shares{}, 0.0
	for c, n := range s.served() {
		measured[c] = n - from[c]
		total += measured[c]
	}
	for c := range measured {
		measured[c] /= total
	}
	after, err := s.reported()
	if err != nil {
		report("%w", err)
		return found
	}
	for _, c := range calls {
		if !c.ok() {
			found = append(found, failed(c, what+", while counting"))
		}
	}
	if total < wanted {
		report("only %.0f requests were counted", total)
	}
	if before.shares.differ(after.shares) > 0.001 {
		report("the state was not steady: why said %v, then %v", before.shares, after.shares)
	}
	if measured.differ(after.shares) > tolerance {
		report("why says %v, the callees counted %v of %.0f", after.shares, measured, total)
	}
	t.Logf("%s: why says %v, measured %v over %.0f requests in %v", what, after.shares, measured, total, time.Since(start).Round(100*time.Millisecond))
	return found
}

// served is how many requests each cluster's instances have had.
func (s *shop) served() shares {
	sum := shares{}
	for c, apps := range s.apps {
		for _, b := range apps {
			sum[c] += float64(b.served.Load())
		}
	}
	return sum
}

// burst sends n requests, 64 at a time and at most 1,000 a second.
func burst(t *testing.T, url string, n int) []call {
	t.Helper()
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	defer client.CloseIdleConnections()
	calls := make([]call, n)
	var next atomic.Int64
	var wg sync.WaitGroup
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for range 64 {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				<-tick.C
				c := call{at: time.Now()}
				c.body, c.status, c.err = get(t.Context(), client, url)
				c.took = time.Since(c.at)
				calls[i] = c
			}
		})
	}
	wg.Wait()
	return calls
}

// issued waits until n requests that were issued at or after from have ended.
func issued(t *testing.T, l *load, from time.Time, n int) {
	t.Helper()
	within := max(0, time.Until(from)) + time.Duration(n)*time.Second/rate + 30*time.Second
	harness.Eventually(t, within, fmt.Sprintf("%d more requests", n), func() error {
		if got := len(l.since(from)); got < n {
			return fmt.Errorf("%d", got)
		}
		return nil
	})
}

// end stops a load and waits for what is under way.
func (l *load) end() {
	l.stop()
	<-l.done
}
