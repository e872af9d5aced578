// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"math"
	"testing"

	"github.com/strait-mesh/strait/controlplane/controlpb"
)

func TestMembersSpansAreBelievedWithinReason(t *testing.T) {
	from, to := extent(&controlpb.Trace{Spans: []*controlpb.Span{{StartUnixNano: 3e18, EndUnixNano: 3e18 + 5e6}, {StartUnixNano: 3e18 - 1e6, EndUnixNano: 3e18}}})
	if from != 3e18-1e6 || to != 3e18+5e6 {
		t.Fatalf("extent %d to %d", from, to)
	}
	theirs := []*controlpb.Span{
		{SpanId: "1", StartUnixNano: 3e18 + 1e6, EndUnixNano: 3e18 + 2e6, Name: "GET \x1b[2Jcheckout", Attributes: map[string]string{"error.type": "a\nb"}},
		{SpanId: "2", StartUnixNano: math.MinInt64, EndUnixNano: math.MaxInt64},
		{SpanId: "3", StartUnixNano: 3e18 + 2e6, EndUnixNano: 3e18 + 1e6},
	}
	for range 2 * maxForeignSpans {
		theirs = append(theirs, &controlpb.Span{StartUnixNano: 3e18, EndUnixNano: 3e18})
	}
	got := believable(theirs, from, to)
	if len(got) != maxForeignSpans || got[0].Name != "GET  [2Jcheckout" || got[0].Attributes["error.type"] != "a b" || got[1].SpanId != "" {
		t.Errorf("%d spans, the first %v, then %v", len(got), got[0], got[1])
	}
}
