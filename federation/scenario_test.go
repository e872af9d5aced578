// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/federation"
)

var update = flag.Bool("update", false, "write what the scenarios print into their files")

// TestScenarios runs testdata/*.txt. A file is a prose header (lines with #), then blocks of commands, each followed by "----"
// and what they print, and ended by an empty line.
//
//	own C [region=R]            the caller's cluster
//	caller NAME                 seeds the jitter (none: no jitter)
//	policy k=v …                trip spill min loss return after ramp name
//	tier C[:W] … | any [except=C]
//	set C k=v …                 a member: local same health=H/T[+U] region rtt loss tunnel=up|suspect|down fresh drained
//	                            locally-drained ejected down=REASON:DURATION why
//	remove C
//	clock +D                    set the clock forward or back, without a step
//	step [+D]                   advance, decide, print
//	run D                       advance by D along the wake-ups and print each change
//	restart                     the state goes through JSON
//	forget                      the state is lost
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("scenarios: %v, %v", files, err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			w := newWorld(t)
			var out strings.Builder
			for block := range strings.SplitSeq(strings.TrimRight(string(b), "\n"), "\n\n") {
				commands, want, ok := strings.Cut(block, "\n----")
				if !ok && !strings.HasPrefix(block, "#") {
					t.Fatalf("block without ----:\n%s", block)
				}
				if !ok {
					out.WriteString(block + "\n\n")
					continue
				}
				w.out.Reset()
				for line := range strings.SplitSeq(commands, "\n") {
					if !strings.HasPrefix(line, "#") {
						w.exec(line)
					}
				}
				got := strings.TrimRight(w.out.String(), "\n")
				if got != strings.Trim(want, "\n") && !*update {
					t.Errorf("%s\n---- got\n%s\n---- want%s", commands, got, want)
				}
				out.WriteString(strings.TrimRight(commands+"\n----\n"+got, "\n") + "\n\n")
			}
			if *update {
				if err := os.WriteFile(f, []byte(strings.TrimRight(out.String(), "\n")+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

type world struct {
	t     *testing.T
	start time.Time
	now   time.Time
	in    federation.Inputs
	st    federation.State
	last  string
	out   strings.Builder
}

func newWorld(t *testing.T) *world {
	start := time.Date(2026, 11, 22, 14, 0, 0, 0, time.UTC)
	return &world{t: t, start: start, now: start, in: federation.Inputs{
		Service: federation.ServiceName{Namespace: "shop", Name: "checkout"}, Policy: federation.DefaultPolicy(),
	}}
}

func (w *world) exec(line string) {
	f := strings.Fields(line)
	if len(f) == 0 {
		return
	}
	switch f[0] {
	case "own":
		w.in.Cluster = federation.ClusterName(f[1])
		for _, a := range f[2:] {
			w.in.Locality.Region = strings.TrimPrefix(a, "region=")
		}
	case "caller":
		w.in.Caller = f[1]
	case "policy":
		w.policy(f[1:])
	case "tier":
		w.tier(f[1:])
	case "set":
		w.set(federation.ClusterName(f[1]), f[2:])
	case "remove":
		w.in.Members = slicesDelete(w.in.Members, federation.ClusterName(f[1]))
	case "clock":
		w.now = w.now.Add(w.duration(f[1]))
	case "step":
		if len(f) > 1 {
			w.now = w.now.Add(w.duration(f[1]))
		}
		w.print(w.step())
	case "run":
		w.run(w.duration(f[1]))
	case "restart":
		b, err := json.Marshal(w.st)
		if err != nil {
			w.t.Fatal(err)
		}
		if w.st, err = federation.ParseState(b); err != nil {
			w.t.Fatal(err)
		}
	case "forget":
		w.st = federation.State{}
	default:
		w.t.Fatalf("unknown command %q", line)
	}
}

func slicesDelete(l []federation.Member, c federation.ClusterName) (out []federation.Member) {
	for _, m := range l {
		if m.Cluster != c {
			out = append(out, m)
		}
	}
	return out
}

// step runs Step twice: the second time must change nothing.
func (w *world) step() federation.Decision {
	st, d := federation.Step(w.now, w.st, w.in)
	again, d2 := federation.Step(w.now, st, w.in)
	if !reflect.DeepEqual(st, again) || !reflect.DeepEqual(d, d2) {
		w.t.Errorf("at %s: a second step at the same instant changes something:\n%+v\n%+v\n%+v\n%+v", w.now.Sub(w.start), st, again, d, d2)
	}
	w.st = st
	return d
}

func (w *world) run(d time.Duration) {
	end := w.now.Add(d)
	for {
		dec := w.step()
		if g := dec.Digest(); g != w.last {
			w.print(dec)
		}
		if dec.Wake.IsZero() || dec.Wake.After(end) {
			break
		}
		w.now = dec.Wake
	}
	w.now = end
}

func (w *world) print(d federation.Decision) {
	w.last = d.Digest()
	fmt.Fprintf(&w.out, "%s: %s since %s\n", w.now.Sub(w.start), d.Reason, d.Since.Sub(w.start))
	line := func(tier string, m federation.MemberDecision) {
		fmt.Fprintf(&w.out, "  %s %s %d/%d %s %s %s: %s\n", tier, m.Cluster, m.Healthy, m.Total,
			strconv.FormatFloat(m.Share*100, 'f', -1, 32)+"%", m.State, m.Reason, m.Because)
	}
	for i, t := range d.Tiers {
		for _, m := range t.Members {
			line(strconv.Itoa(i), m)
		}
	}
	for _, m := range d.Exclusions {
		line("-", m)
	}
	if d.Returns != "" {
		fmt.Fprintf(&w.out, "  returns %s\n", d.Returns)
	}
}

func (w *world) policy(args []string) {
	p := &w.in.Policy
	for _, a := range args {
		k, v, _ := strings.Cut(a, "=")
		switch k {
		case "trip":
			p.TripPercent = w.number(v)
		case "spill":
			p.SpillBelowPercent = w.number(v)
		case "min":
			p.MinEndpoints = uint32(w.number(v))
		case "loss":
			p.TunnelLossPercent = w.number(v)
		case "return":
			p.ReturnPercent = w.number(v)
		case "after":
			p.ReturnAfter = w.duration(v)
		case "ramp":
			p.Ramp = w.duration(v)
		case "name":
			p.Name = v
		default:
			w.t.Fatalf("policy: unknown %q", a)
		}
	}
	if err := p.Validate(); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) tier(args []string) {
	var t federation.Tier
	for _, a := range args {
		if a == "any" {
			t.Any = true
			continue
		}
		if c, ok := strings.CutPrefix(a, "except="); ok {
			t.Except = append(t.Except, federation.ClusterName(c))
			continue
		}
		c, weight, weighted := strings.Cut(a, ":")
		t.Clusters = append(t.Clusters, federation.ClusterName(c))
		if weighted {
			if t.Weights == nil {
				t.Weights = map[federation.ClusterName]uint32{}
			}
			t.Weights[federation.ClusterName(c)] = uint32(w.number(weight))
		}
	}
	w.in.Policy.Tiers = append(w.in.Policy.Tiers, t)
	if err := w.in.Policy.Validate(); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) set(c federation.ClusterName, args []string) {
	var m *federation.Member
	for i := range w.in.Members {
		if w.in.Members[i].Cluster == c {
			m = &w.in.Members[i]
		}
	}
	if m == nil {
		w.in.Members = append(w.in.Members, federation.Member{Cluster: c})
		m = &w.in.Members[len(w.in.Members)-1]
	}
	for i, a := range args {
		k, v, _ := strings.Cut(a, "=")
		switch k {
		case "local":
			m.Local, m.Same = true, true
		case "same":
			m.Same = v != "no"
		case "region":
			m.Region = v
		case "health":
			m.Health = w.health(v)
		case "rtt":
			m.Tunnel.RTT, m.Tunnel.Known, m.Tunnel.Up, m.Tunnel.Transport = w.duration(v), true, true, "quic"
		case "loss":
			m.Tunnel.Loss = w.number(v) / 100
		case "tunnel":
			m.Tunnel.Known, m.Tunnel.Up, m.Tunnel.Suspect = true, v != "down", v == "suspect"
		case "fresh":
			if err := m.Freshness.UnmarshalText([]byte(v)); err != nil {
				w.t.Fatal(err)
			}
		case "drained":
			m.Drained, m.DrainReason = v != "no", strings.TrimPrefix(v, "no")
		case "locally-drained":
			m.LocallyDrained = v != "no"
		case "ejected":
			m.Observed.Ejected = uint32(w.number(v))
		case "down":
			reason, d, _ := strings.Cut(v, ":")
			m.Observed.Down, m.Observed.Reason, m.Observed.Until = true, federation.Reason(reason), w.now.Add(w.duration(d))
		case "why":
			m.Observed.Why = strings.Join(append([]string{v}, args[i+1:]...), " ")
			return
		default:
			w.t.Fatalf("set: unknown %q", a)
		}
	}
}

// health reads "healthy/judged" or "healthy/judged+unknown".
func (w *world) health(s string) federation.Health {
	s, unknown, _ := strings.Cut(s, "+")
	healthy, judged, _ := strings.Cut(s, "/")
	h := federation.Health{Healthy: uint32(w.number(healthy))}
	h.Unhealthy = uint32(w.number(judged)) - h.Healthy
	if unknown != "" {
		h.Unknown = uint32(w.number(unknown))
	}
	return h
}

func (w *world) duration(s string) time.Duration {
	d, err := time.ParseDuration(strings.TrimPrefix(s, "+"))
	if err != nil {
		w.t.Fatal(err)
	}
	return d
}

func (w *world) number(s string) float64 {
	v, err := strconv.ParseFloat(s, 64)
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

// fuzzed reads a state and inputs as they come from a report.
func fuzzed(state, inputs []byte) (federation.State, federation.Inputs, bool) {
	st, err := federation.ParseState(state)
	if err != nil {
		return st, federation.Inputs{}, false
	}
	in, err := federation.ParseInputs(inputs)
	return st, in, err == nil
}
