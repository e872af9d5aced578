// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"strings"
	"testing"

	"github.com/strait-mesh/strait/controlplane/controlpb"
)

// crossing is a trace like the one of UX 1.3: an attempt at home that fails, and one that crosses to eu-west.
func crossing() *controlpb.Trace {
	span := func(id, parent, kind, cluster, service string, start, end int64, attributes ...string) *controlpb.Span {
		s := &controlpb.Span{SpanId: id, ParentId: parent, Kind: kind, Cluster: cluster, Service: service, Name: "GET checkout",
			StartUnixNano: 1e9 + start*1e6, EndUnixNano: 1e9 + end*1e6, Attributes: map[string]string{}, Status: "unset"}
		for i := 0; i+1 < len(attributes); i += 2 {
			s.Attributes[attributes[i]] = attributes[i+1]
		}
		return s
	}
	const hop, dst, to, code = "strait.hop.kind", "strait.dst.service", "strait.dst.cluster", "http.response.status_code"
	first := span("b", "a", "client", "us-east", "web", 10, 35, hop, "sidecar_out", dst, "shop/checkout", to, "us-east", code, "503",
		"error.type", "upstream_reset", "strait.decision.reason", "local_ok")
	first.Status = "error"
	return &controlpb.Trace{Id: "4b1f92f3577b34da6a3ce929d0e0e473", Spans: []*controlpb.Span{
		span("a", "", "server", "us-east", "web", 0, 312, hop, "sidecar_out", dst, "shop/checkout", to, "eu-west", code, "200"),
		first,
		span("c", "a", "client", "us-east", "web", 40, 310, hop, "sidecar_out", dst, "shop/checkout", to, "eu-west", code, "200",
			"http.request.resend_count", "1", "strait.decision.reason", "below_min_healthy"),
		span("f", "c", "server", "eu-west", "checkout", 90, 270, hop, "sidecar_in", dst, "shop/checkout", to, "eu-west", code, "200"),
		span("d", "c", "internal", "us-east", "gateway-1", 41, 309, hop, "gateway_out", to, "eu-west", "strait.tunnel.wait_ms", "1.2",
			"strait.tunnel.transport", "quic", "strait.tunnel.id", "7", "strait.tunnel.rtt_ms", "80.1", "strait.tunnel.loss", "0"),
		span("e", "c", "internal", "eu-west", "gateway-2", 91, 269, hop, "gateway_in", to, "eu-west"),
		span("g", "f", "client", "eu-west", "checkout", 100, 261, hop, "sidecar_in", dst, "shop/checkout", to, "eu-west", code, "200"),
	}}
}

func TestWaterfall(t *testing.T) {
	want := strings.TrimPrefix(`
4b1f92f3577b34da GET checkout 200 312ms  web@us-east → checkout@eu-west   failover below_min_healthy, 1 retry
0        100       200      300ms
├────────────────────────────┤ us-east  web sidecar  SERVER
├─┤                            us-east  checkout attempt 1 503 upstream_reset
   ├────────────────────────┤  us-east  checkout attempt 2 → eu-west
   ├────────────────────────┤  us-east  gateway-1  queue 1ms
    ├──────────80──────────┤   tunnel   quic #7 rtt 80ms loss 0.0%
        ├───────────────┤      eu-west  gateway-2
        ├───────────────┤      eu-west  checkout sidecar
         ├──────────────┤      eu-west  checkout → app 161ms
`, "\n")
	if got := waterfall(crossing(), 30); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// A hop that sent nothing is said where it belongs, and the request's own time stays what it was.
func TestWaterfallMissingHop(t *testing.T) {
	tr := crossing()
	tr.Spans = append(tr.Spans[:3:3], tr.Spans[4]) // nothing of eu-west
	got := waterfall(tr, 30)
	for _, text := range []string{" 312ms ", "eu-west  gateway  no span came", "eu-west  sidecar  no span came"} {
		if !strings.Contains(got, text) {
			t.Errorf("lacks %q:\n%s", text, got)
		}
	}
	tr = crossing()
	tr.Spans[0].ParentId = "g"
	if got := waterfall(tr, 30); strings.Count(got, "├") != len(tr.Spans)+1 {
		t.Errorf("a ring of parents:\n%s", got)
	}
	if got := waterfall(&controlpb.Trace{Id: "4b1f"}, 30); !strings.HasPrefix(got, "4b1f") {
		t.Errorf("an empty trace: %q", got)
	}
}
