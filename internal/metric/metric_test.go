// SPDX-License-Identifier: Apache-2.0

package metric_test

import (
	"fmt"
	"io"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/internal/metric"
)

func scrape(t *testing.T, r *metric.Registry, accept string) string {
	t.Helper()
	req := httptest.NewRequest("GET", "/metrics", nil)
	req.Header.Set("Accept", accept)
	w := httptest.NewRecorder()
	r.Handler().ServeHTTP(w, req)
	body, err := io.ReadAll(w.Body)
	if err != nil || w.Code != 200 {
		t.Fatalf("status %d, %v: %s", w.Code, err, body)
	}
	return string(body)
}

// TestLabelAttack (T24): 100,000 distinct values cost a bounded number of series, lose no count, and say so.
func TestLabelAttack(t *testing.T) {
	r := metric.New(metric.Config{})
	c := r.Counter("strait_test_total", "Test.", "peer", "code")
	h := r.Histogram("strait_test_seconds", "Test.", metric.Latency, "peer")
	g := r.Gauge("strait_test", "Test.", "peer")
	var all sync.WaitGroup
	for worker := range 4 {
		all.Go(func() {
			for i := range 25_000 {
				peer := fmt.Sprintf("%d-%d", worker, i)
				c.With(peer, "200").Inc()
				h.With(peer).Observe(1)
				g.With(peer).Set(1)
			}
		})
	}
	all.Wait()
	text := scrape(t, r, "")
	sum, series := 0.0, 0
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "strait_test_total{") {
			var n float64
			fmt.Sscan(line[strings.LastIndex(line, " ")+1:], &n)
			sum += n
			series++
		}
	}
	if series != 2000 || sum != 100_000 {
		t.Errorf("%d series with %v counts, want 2000 with 100000", series, sum)
	}
	if n := strings.Count(text, "strait_test_seconds_count{"); n != 500 {
		t.Errorf("%d histogram series, want 500", n)
	}
	if !strings.Contains(text, `strait_test_total{code="_overflow",peer="_overflow"} 98001`) || !strings.Contains(text, `strait_series_dropped_total{metric="strait_test_total"} 98001`) {
		t.Error("what was folded is not counted")
	}
}

// TestLabelValues (T24): no value of a label can break the page or join two series.
func TestLabelValues(t *testing.T) {
	r := metric.New(metric.Config{})
	c := r.Counter("strait_test_total", "Test.", "a", "b")
	c.With("x\n\"\\}", "\x00\xff\xfe").Inc()
	c.With(strings.Repeat("long", 1000), "").Inc()
	c.With("p", "q").Inc()
	c.With("p\xffq", "").Inc()
	text := scrape(t, r, "")
	if n := strings.Count(text, "\nstrait_test_total{"); n != 4 {
		t.Errorf("%d series, want 4:\n%s", n, text)
	}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "strait_test_total") && len(line) > 400 {
			t.Errorf("a line of %d bytes", len(line))
		}
	}
}

func TestGaugeForget(t *testing.T) {
	r := metric.New(metric.Config{Series: 3})
	g := r.Gauge("strait_test", "Test.", "peer")
	for i := range 100 {
		g.With(fmt.Sprint(i)).Inc()
		g.Forget(fmt.Sprint(i))
	}
	g.Forget("never")
	if text := scrape(t, r, ""); strings.Contains(text, "strait_test{") {
		t.Errorf("left:\n%s", text)
	}
}

func TestRequests(t *testing.T) {
	r := metric.New(metric.Config{Const: map[string]string{"cluster": "us-east"}, Version: "v0.1.0", Role: "sidecar"})
	m := metric.NewRequests(r)
	m.Observe(metric.Request{Reporter: metric.Source, SrcService: "shop/web", SrcCluster: "us-east", DstService: "shop/checkout", DstCluster: "eu-west",
		Protocol: "h2", Code: 200, GRPCCode: -1, Reason: "local_ok", Scope: "local", MTLS: true, Duration: 30 * time.Millisecond, TTFB: 20 * time.Millisecond, Trace: "4b1f92ab3577b34da6a3ce929d0e0e47"})
	for i := range 3000 {
		m.Observe(metric.Request{Reporter: metric.Destination, Code: i, GRPCCode: i, Failure: true})
	}
	m.Retry(metric.RetryUsed, "shop/checkout", "eu-west")
	m.Bytes("sent", "h2", "us-east", "eu-west", 42)
	m.Bytes("sent", "h2", "us-east", "eu-west", -1)
	m.Access("shop/p", "deny", "shop/checkout", "eu-west")
	done := m.Open("inbound", "h2", "eu-west", "us-east")
	text := scrape(t, r, "application/openmetrics-text")
	for _, want := range []string{
		`strait_requests_total{classification="success",cluster="us-east",code="200",dst_cluster="eu-west",dst_service="shop/checkout",grpc_code="",mtls="true",protocol="h2",reason="local_ok",reporter="source",route="other",scope="local",src_cluster="us-east",src_service="shop/web"} 1.0`,
		`# {trace_id="4b1f92ab3577b34da6a3ce929d0e0e47"} 0.03`, `strait_retries_total{cluster="us-east",dst_cluster="eu-west",result="used",service="shop/checkout"} 1.0`,
		`strait_bytes_total{cluster="us-east",direction="sent",dst_cluster="eu-west",protocol="h2",src_cluster="us-east"} 42.0`,
		`strait_authz_total{action="deny",cluster="us-east",dst_service="shop/checkout",policy="shop/p",src_cluster="eu-west"} 1.0`,
		`strait_connections_active{cluster="us-east",direction="inbound",dst_cluster="us-east",protocol="h2",src_cluster="eu-west"} 1.0`,
		`strait_build_info{cluster="us-east",role="sidecar",version="v0.1.0"} 1.0`, `code="other"`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s", want)
		}
	}
	if n := strings.Count(text, "strait_requests_total{"); n > 600 {
		t.Errorf("%d series from status codes", n)
	}
	done("end")
	if text := scrape(t, r, ""); !strings.Contains(text, `close_reason="end"`) {
		t.Error("the end of a connection is not counted")
	}
}

// TestNil: without a registry everything is a no-op.
func TestNil(t *testing.T) {
	var r *metric.Registry
	r.Counter("a", "").With().Inc()
	r.Gauge("b", "").With().Set(1)
	r.Gauge("b", "").Forget()
	r.Histogram("c", "", nil).With().ObserveTrace(1, "x")
	r.GaugeFunc("d", "", nil)
	metric.NewRequests(r).Observe(metric.Request{})
	var m *metric.Requests
	m.Observe(metric.Request{})
	m.Retry("a", "b", "c")
	m.Bytes("a", "b", "c", "d", 1)
	m.Access("a", "b", "c", "d")
	m.Open("a", "b", "c", "d")("end")
}
