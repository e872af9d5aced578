// SPDX-License-Identifier: Apache-2.0

package span_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/strait-mesh/strait/internal/span"
)

const parent = "00-4b1f92ab3577b34da6a3ce929d0e0e47-00f067aa0ba902b7-01"

func TestParseTraceparent(t *testing.T) {
	good := map[string]bool{
		parent: true, strings.TrimSuffix(parent, "1") + "0": false, strings.TrimSuffix(parent, "01") + "ff": true,
		"01" + parent[2:]: true, "fe" + parent[2:] + "-what-the-future-brings": true,
	}
	for in, sampled := range good {
		c, err := span.ParseTraceparent(in)
		if err != nil || c.Sampled != sampled || c.Trace.String() != "4b1f92ab3577b34da6a3ce929d0e0e47" || c.Span.String() != "00f067aa0ba902b7" {
			t.Errorf("%q: %+v, %v", in, c, err)
		}
	}
	for _, bad := range []string{
		"", "00", parent[:54], parent + "-", parent + "-x", parent + "0", "ff" + parent[2:], strings.ToUpper(parent), "00-" + strings.Repeat("0", 32) + parent[35:],
		parent[:36] + strings.Repeat("0", 16) + "-01", strings.ReplaceAll(parent, "-", "_"), "0g" + parent[2:], parent[:3] + "x" + parent[4:], parent[:53] + "0x",
		"01" + parent[2:] + "x", " " + parent[:54],
	} {
		if c, err := span.ParseTraceparent(bad); err == nil {
			t.Errorf("%q: accepted as %+v", bad, c)
		}
	}
}

func TestTracestate(t *testing.T) {
	c, _ := span.ParseTraceparent(parent)
	rows := []struct {
		in, out string
		hop     int
		cluster string
		retries int // -1: none
	}{
		{"", "", 0, "", -1},
		{"strait=hop:2;c:us-east", "strait=hop:2;c:us-east", 2, "us-east", -1},
		{"a=1,strait=hop:2;c:us-east;r:3,b=2", "strait=hop:2;c:us-east;r:3,a=1,b=2", 2, "us-east", 3},
		{"a=1, ,b=2 ", "a=1,b=2", 0, "", -1},
		{"strait=hop:300;c:NOT;new:x;r:0", "strait=hop:0;r:0", 0, "", 0},
		{"strait=hop:1,strait=hop:2", "strait=hop:1", 1, "", -1},
		{"a=1,=x", "", 0, "", -1},
		{"a=1,b", "", 0, "", -1},
		{"UPPER=1", "", 0, "", -1},
		{"a=" + strings.Repeat("x", 257), "", 0, "", -1},
		{"t@v=1,x/y*z-_=~!", "t@v=1,x/y*z-_=~!", 0, "", -1},
	}
	for _, row := range rows {
		got := c.WithTracestate(row.in)
		n, ok := got.Retries()
		if !ok {
			n = -1
		}
		if got.Tracestate() != row.out || got.Hop != row.hop || got.Cluster != row.cluster || n != row.retries {
			t.Errorf("%q: %q, hop %d of %q, retries %d", row.in, got.Tracestate(), got.Hop, got.Cluster, n)
		}
	}
	var many []string
	for i := range 32 {
		many = append(many, "k"+strings.Repeat("a", i)+"=1")
	}
	got := c.WithTracestate(strings.Join(many, ",")).WithHop(1, "x")
	if members := strings.Split(got.Tracestate(), ","); len(members) > 32 || len(got.Tracestate()) > 600 || members[0] != "strait=hop:1;c:x" || members[1] != "k=1" {
		t.Errorf("%d members: %s", len(members), got.Tracestate())
	}
}

func TestExtractInject(t *testing.T) {
	h := http.Header{}
	h.Set("traceparent", parent)
	h.Add("tracestate", "a=1")
	h.Add("tracestate", "strait=hop:4;c:eu-west,b=2")
	c, ok := span.Extract(h)
	if !ok || c.Hop != 4 || c.Cluster != "eu-west" {
		t.Fatalf("%+v, %v", c, ok)
	}
	c.WithHop(5, "us-east").WithRetries(2).Inject(h)
	if h.Get("traceparent") != parent || len(h["Tracestate"]) != 1 || h.Get("tracestate") != "strait=hop:5;c:us-east;r:2,a=1,b=2" {
		t.Errorf("injected %v", h)
	}
	h.Add("traceparent", parent)
	if _, ok := span.Extract(h); ok {
		t.Error("two traceparents were accepted")
	}
	(span.Context{}).Inject(h)
	if len(h["Traceparent"]) != 2 {
		t.Error("an invalid context was written")
	}
}

func FuzzTraceparent(f *testing.F) {
	f.Add(parent, "a=1,strait=hop:2;c:us-east;r:3")
	f.Add("cc"+parent[2:]+"-more", "a=1")
	f.Add("", ",,,=")
	f.Fuzz(func(t *testing.T, traceparent, tracestate string) {
		c, ok := span.Extract(http.Header{"Traceparent": {traceparent}, "Tracestate": {tracestate}})
		if !ok {
			return
		}
		h := http.Header{}
		c.Inject(h)
		again, ok := span.Extract(h)
		if !ok || again != c {
			t.Fatalf("%q, %q: %+v becomes %+v by %v", traceparent, tracestate, c, again, h)
		}
		if s := h.Get("Tracestate"); len(s) > 512+100 || strings.Count(s, ",") > 31 || strings.ContainsAny(s, "\r\n\x00") {
			t.Errorf("tracestate %q", s)
		}
	})
}
