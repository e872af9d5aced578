// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
)

type traceSpan struct {
	SpanId, ParentId, Name, Kind, Cluster, Service, Status string
	StartUnixNano, EndUnixNano                             string
	Attributes                                             map[string]string
}

func (s traceSpan) hop() string { return s.Attributes["strait.hop.kind"] }

func (s traceSpan) String() string {
	return fmt.Sprintf("%s %s@%s %s %s ← %s %v", s.Kind, s.Service, s.Cluster, s.Name, s.SpanId, s.ParentId, s.Attributes)
}

type traceList struct {
	Traces []struct {
		Id    string
		Spans []traceSpan
	}
	Unreachable []string
}

// TestTrace: one request makes one trace with spans of the client's sidecar, both gateways and the server's sidecar, and strait trace
// draws it.
func TestTrace(t *testing.T) {
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west"}, RTT: map[string]time.Duration{"us-east-eu-west": 80 * time.Millisecond}})
	f.Up("shop")
	us, eu := f.Clusters["us-east"], f.Clusters["eu-west"]

	var mu sync.Mutex
	var seen []string // traceparents that the application in eu-west saw
	answer := func(name string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			seen = append(seen, r.Header.Get("traceparent"))
			mu.Unlock()
			if r.URL.Path == "/broken" {
				http.Error(w, "broken", http.StatusInternalServerError)
				return
			}
			fmt.Fprintln(w, name)
		}
	}
	far, near := newBackend(t, "eu-west"), newBackend(t, "us-east")
	far.handle, near.handle = answer("eu-west"), answer("us-east")
	eu.StartSidecar("checkout", eu.Register(harness.Workload{Name: "checkout-1", Service: "checkout", Address: far.addr, Token: true}), nil)
	us.StartSidecar("checkout", us.Register(harness.Workload{Name: "checkout-1", Service: "checkout", Address: near.addr, Token: true}), nil)
	eu.CLI("export", "shop/checkout", "--to", "us-east")
	web := us.StartSidecar("web", us.Register(harness.Workload{Name: "web", Service: "web", Token: true}), []string{"shop/checkout:http", "shop/checkout:http@eu-west"})
	local, pinned := "http://"+web.Upstreams[0], "http://"+web.Upstreams[1]
	reaches(t, local+"/", "us-east")
	reaches(t, pinned+"/", "eu-west")

	// One call under a trace of ours.
	const id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	tracedGet(t, pinned+"/cart", id, parent, http.StatusOK)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("in eu-west: %s", eu.Try("trace", id, "-o", "json").Out)
		}
	})
	trace := waitTrace(t, us, id, func(spans []traceSpan) error {
		for _, hop := range []string{"gateway_out", "gateway_in"} {
			if !slices.ContainsFunc(spans, func(s traceSpan) bool { return s.hop() == hop }) {
				return fmt.Errorf("no span of %s", hop)
			}
		}
		for _, c := range []string{"us-east", "eu-west"} {
			for _, kind := range []string{"server", "client"} {
				if !slices.ContainsFunc(spans, func(s traceSpan) bool {
					return s.Cluster == c && s.Kind == kind && !strings.HasPrefix(s.hop(), "gateway")
				}) {
					return fmt.Errorf("no %s span of a sidecar in %s", kind, c)
				}
			}
		}
		return nil
	})
	want := "server us-east(client us-east(gateway_in eu-west gateway_out us-east server eu-west(client eu-west)))"
	if got := tree(t, trace, parent); got != want {
		t.Errorf("the spans form %s, want %s:\n%v", got, want, trace)
	}
	mu.Lock()
	last := seen[len(seen)-1]
	mu.Unlock()
	if f := strings.Split(last, "-"); len(f) != 4 || f[1] != id || !slices.ContainsFunc(trace, func(s traceSpan) bool { return s.SpanId == f[2] && s.Cluster == "eu-west" }) {
		t.Errorf("the application saw traceparent %q: not one of a span of its sidecar", last)
	}
	drawing := us.CLI("trace", id)
	t.Logf("\n%s", drawing)
	for _, text := range []string{"GET checkout 200", "web@us-east → checkout@eu-west", "web sidecar  SERVER", "checkout attempt 1 → eu-west", "gateway-1", "tunnel   quic #", "rtt 8", "checkout → app", "├", "┤"} {
		if !strings.Contains(drawing, text) {
			t.Errorf("the drawing lacks %q", text)
		}
	}
	if strings.Contains(drawing, "no span came") {
		t.Error("the drawing says that a hop is missing")
	}

	// From the other side the same trace.
	if other := eu.CLI("trace", id); strings.Count(other, "├") != strings.Count(drawing, "├") {
		t.Errorf("drawn in eu-west:\n%s", other)
	}

	// An error.
	const broken = "5bf92f3577b34da6a3ce929d0e0e4736"
	tracedGet(t, pinned+"/broken", broken, parent, http.StatusInternalServerError)
	waitTrace(t, us, broken, func(spans []traceSpan) error { return atLeast(spans, 6) })
	listed(t, us, "--errors", broken, id)
	t.Logf("\n%s", us.CLI("trace", broken))

	// A failover.
	near.stop()
	reaches(t, local+"/", "eu-west")
	const failover = "6bf92f3577b34da6a3ce929d0e0e4736"
	tracedGet(t, local+"/pay", failover, parent, http.StatusOK)
	waitTrace(t, us, failover, func(spans []traceSpan) error { return atLeast(spans, 6) })
	listed(t, us, "--failover", failover, id)
	t.Logf("\n%s\n%s", us.CLI("trace"), us.CLI("trace", "--failover", "-o", "waterfall", "--limit", "2"))
	if out := us.CLI("trace", failover[:8]); !strings.Contains(out, "failover ") {
		t.Errorf("the drawing of a failover does not say so:\n%s", out)
	}
	if r := us.Try("trace", "ffffffffffffffff"); r.Code != 5 || !strings.Contains(r.Err, "[STR-") {
		t.Errorf("an unknown trace: exit %d %s", r.Code, r.Err)
	}
}

func atLeast(spans []traceSpan, n int) error {
	if len(spans) < n {
		return fmt.Errorf("%d spans", len(spans))
	}
	return nil
}

func tracedGet(t *testing.T, url, id, parent string, want int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("traceparent", "00-"+id+"-"+parent+"-01")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != want {
		t.Fatalf("GET %s: %s", url, resp.Status)
	}
}

// waitTrace waits until strait trace shows a trace as ok wants it: proxies hand spans in once a second or so.
func waitTrace(t *testing.T, c *harness.Cluster, id string, ok func([]traceSpan) error) []traceSpan {
	t.Helper()
	var spans []traceSpan
	harness.Eventually(t, 20*time.Second, "the spans of "+id, func() error {
		r := c.Try("trace", id, "-o", "json")
		if r.Code != 0 {
			return fmt.Errorf("exit %d: %s", r.Code, r.Err)
		}
		var list traceList
		c.JSON(&list, "trace", id)
		if len(list.Traces) != 1 {
			return fmt.Errorf("%d traces", len(list.Traces))
		}
		spans = list.Traces[0].Spans
		if err := ok(spans); err != nil {
			return fmt.Errorf("%w in %v", err, spans)
		}
		return nil
	})
	return spans
}

// tree writes the spans below a parent: "<kind or hop> <cluster>", and in brackets what is below each.
func tree(t *testing.T, spans []traceSpan, parent string) string {
	t.Helper()
	var out []string
	for _, s := range spans {
		if s.ParentId != parent {
			continue
		}
		name := s.Kind
		if strings.HasPrefix(s.hop(), "gateway") {
			name = s.hop()
		}
		start, _ := strconv.ParseInt(s.StartUnixNano, 10, 64)
		if end, _ := strconv.ParseInt(s.EndUnixNano, 10, 64); end < start || start == 0 {
			t.Errorf("%v ends before it begins", s)
		}
		name += " " + s.Cluster
		if below := tree(t, spans, s.SpanId); below != "" {
			name += "(" + below + ")"
		}
		out = append(out, name)
	}
	slices.Sort(out) // what one attempt crossed begins nearly at once
	return strings.Join(out, " ")
}

// listed checks that a filter lists one trace and not another.
func listed(t *testing.T, c *harness.Cluster, filter, id, without string) {
	t.Helper()
	var list traceList
	c.JSON(&list, "trace", filter, "--limit", "50")
	has := func(id string) bool {
		return slices.ContainsFunc(list.Traces, func(tr struct {
			Id    string
			Spans []traceSpan
		}) bool {
			return tr.Id == id
		})
	}
	if !has(id) || has(without) {
		t.Errorf("trace %s: lists %s: %v; lists %s: %v", filter, id, has(id), without, has(without))
	}
}
