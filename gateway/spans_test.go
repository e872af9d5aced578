// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/gateway"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/span"
)

// TestSpansAtBothGateways: one for making the connection, and one for each request that a marker tells of.
func TestSpansAtBothGateways(t *testing.T) {
	var recorders []*span.Recorder
	_, west, web, _ := pair(t, func(c *gateway.Config) {
		c.Recorder = span.NewRecorder(span.Config{})
		recorders = append(recorders, c.Recorder)
	})
	web.awaitPeer(west, tunnel.QUIC)
	if _, _, err := web.call(west, "checkout"); err != nil {
		t.Fatal(err)
	}
	second := "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	for _, end := range []bool{false, true} {
		b := must(proto.Marshal(&controlpb.ToGateway{Message: &controlpb.ToGateway_Marker{Marker: &controlpb.TraceMarker{
			Connection: web.counter, Offset: 100, Traceparent: second, End: end}}}))
		if err := tunnel.WriteFrame(web.conn, b); err != nil {
			t.Fatal(err)
		}
	}
	for i, hop := range []string{"gateway_in", "gateway_out"} { // west starts first
		found := map[string]bool{}
		within(t, 5*time.Second, hop+" spans of both traces", func() bool {
			data := recorders[i].Take(100)
			for _, r := range data.GetResourceSpans() {
				for _, ss := range r.ScopeSpans {
					for _, s := range ss.Spans {
						text := s.String()
						if s.Name == "tunnel us-east→eu-west" && strings.Contains(text, hop) && strings.Contains(text, "quic") && len(s.ParentSpanId) == 8 {
							found[hex.EncodeToString(s.TraceId)] = true
						}
					}
				}
			}
			return found["4bf92f3577b34da6a3ce929d0e0e4736"] && found["0af7651916cd43dd8448eb211c80319c"] && len(found) == 2
		})
	}
}
