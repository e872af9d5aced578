// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"sort"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
)

func newTraceCmd(e *env) *cobra.Command {
	var slow, failed, failover bool
	var limit uint32
	c := &cobra.Command{Use: "trace [ID]", Short: "Show recent cross-cluster traces", Args: cobra.MaximumNArgs(1),
		Long: `Show recent traces, or one by its id. Spans stay in the cluster they belong to; every member is asked for its own. One trace is drawn as
a waterfall; several are listed unless -o waterfall asks for drawings.`,
		Example: "  strait trace --failover -o waterfall\n  strait trace 4b1f2c",
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &controlpb.TraceRequest{Limit: limit}
			if len(args) == 1 {
				req.Id = args[0]
			}
			for word, set := range map[string]bool{"slow": slow, "errors": failed, "failover": failover} {
				if !set {
					continue
				}
				if req.Filter != "" {
					return problem.New(problem.Usage, "--slow, --errors and --failover exclude each other")
				}
				req.Filter = word
			}
			return traceRun(cmd.Context(), e, req)
		}}
	c.Flags().BoolVar(&slow, "slow", false, "the slowest")
	c.Flags().BoolVar(&failed, "errors", false, "those with an error")
	c.Flags().BoolVar(&failover, "failover", false, "those that failed over or were retried")
	c.Flags().Uint32Var(&limit, "limit", 10, "how many traces at most")
	return c
}

func traceRun(ctx context.Context, e *env, req *controlpb.TraceRequest) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	r, err := op.Trace(ctx, req)
	if err != nil {
		return e.callError(err)
	}
	if req.Id != "" && len(r.Traces) == 0 {
		return problem.New(problem.TraceNotFound, "no member keeps a trace that begins with %s", req.Id)
	}
	switch {
	case e.jq != "" || e.output == "json" || e.output == "yaml" || e.output == "jsonl":
		err = e.print("TraceList", r, nil)
	case e.output == "waterfall" || req.Id != "":
		for i, t := range r.Traces {
			if i > 0 {
				fmt.Fprintln(e.out)
			}
			fmt.Fprint(e.out, waterfall(t, 30))
		}
	default:
		t := &table{head: []string{"TRACE", "START", "DURATION", "REQUEST", "PATH", "NOTE"}}
		for _, tr := range r.Traces {
			h := summarize(tr)
			t.add(tr.Id, short(tr.Id), time.Unix(0, h.start).UTC().Format("15:04:05.000"), ms(h.end-h.start)+"ms", h.request, h.path, h.note)
		}
		err = e.print("TraceList", r, t)
	}
	if err != nil {
		return err
	}
	return e.partial(r.Unreachable)
}

func short(id string) string {
	if len(id) > 16 {
		return id[:16]
	}
	return id
}

func ms(nanos int64) string { return strconv.FormatInt((nanos+500_000)/1_000_000, 10) }

// traceHead is what the first line of a trace says.
type traceHead struct {
	start, end          int64
	request, path, note string
}

func summarize(t *controlpb.Trace) traceHead {
	var h traceHead
	if len(t.Spans) == 0 {
		return h
	}
	root := t.Spans[0]
	h.start, h.end = t.Spans[0].StartUnixNano, t.Spans[0].EndUnixNano
	retries := 0
	reason, dst := "", ""
	for _, s := range t.Spans {
		if s.StartUnixNano < h.start {
			h.start, root = s.StartUnixNano, s
		}
		h.end = max(h.end, s.EndUnixNano)
		if n, err := strconv.Atoi(s.Attributes["http.request.resend_count"]); err == nil {
			retries = max(retries, n)
		}
		if r := s.Attributes["strait.decision.reason"]; r != "" {
			reason = r
			dst = s.Attributes["service.peer.name"] + "@" + s.Attributes["strait.dst.cluster"]
		}
	}
	h.request = strings.TrimSpace(root.Name + " " + root.Attributes["http.response.status_code"])
	h.path = root.Service + "@" + root.Cluster
	if dst != "" {
		h.path += " → " + dst
	}
	switch reason {
	case "", "local_ok", "priority_ok":
	default:
		h.note = "failover " + reason
	}
	if retries > 0 {
		if h.note != "" {
			h.note += ", "
		}
		h.note += fmt.Sprintf("%d %s", retries, plural(retries, "retry", "retries"))
	}
	return h
}

func plural(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}

// waterfall draws one trace, a bar of at most width cells per span, children below and after their parents.
func waterfall(t *controlpb.Trace, width int) string {
	h := summarize(t)
	total := max(h.end-h.start, 1)
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %sms  %s", short(t.Id), h.request, ms(total), h.path)
	if h.note != "" {
		fmt.Fprintf(&b, "  %s", h.note)
	}
	b.WriteByte('\n')
	b.WriteString(axis(total, width))
	cell := func(at int64) int { return int((at - h.start) * int64(width) / total) }
	gaps := missingHops(t)
	for _, s := range ordered(t) {
		from, to := cell(s.StartUnixNano), cell(s.EndUnixNano)
		to = min(max(to, from+2), width)
		from = min(from, to-2)
		bar := strings.Repeat(" ", from) + "├" + strings.Repeat("─", to-from-2) + "┤"
		bar += strings.Repeat(" ", width+1-utf8.RuneCountInString(bar))
		fmt.Fprintf(&b, "%s%s\n", bar, strings.TrimRight(fmt.Sprintf("%-10s %s", s.Cluster, describe(s)), " "))
	}
	for _, g := range gaps {
		fmt.Fprintf(&b, "%s%s\n", strings.Repeat(" ", width+1), g)
	}
	return b.String()
}

func axis(total int64, width int) string {
	unit := int64(1_000_000)
	for total/unit > 4 {
		switch {
		case total/(unit*2) <= 4:
			unit *= 2
		case total/(unit*5) <= 4:
			unit *= 5
		default:
			unit *= 10
		}
	}
	line := []rune(strings.Repeat(" ", width+8))
	for at := int64(0); at <= total; at += unit {
		label := []rune(strconv.FormatInt(at/1_000_000, 10))
		copy(line[int(at*int64(width)/total):], label)
	}
	return strings.TrimRight(string(line), " ") + "\n"
}

// describe is the text beside a bar: who, and what is special about it.
func describe(s *controlpb.Span) string {
	a := s.Attributes
	switch a["strait.hop.kind"] {
	case "gateway_out", "gateway_in":
		text := s.Service
		if v := a["strait.tunnel.transport"]; v != "" {
			text += "  tunnel " + v
		}
		if v := a["strait.tunnel.rtt_ms"]; v != "" {
			text += " rtt " + v + "ms"
		}
		if v := a["strait.tunnel.wait_ms"]; v != "" {
			text += "  queue " + v + "ms"
		}
		return text
	}
	switch s.Kind {
	case "client":
		n, _ := strconv.Atoi(a["http.request.resend_count"])
		text := fmt.Sprintf("%s attempt %d", a["service.peer.name"], n+1)
		if d := a["strait.dst.cluster"]; d != "" && d != s.Cluster {
			text += " → " + d
		}
		return strings.TrimSpace(text + " " + outcome(s))
	case "server":
		return strings.TrimSpace(s.Service + " sidecar  SERVER " + outcome(s))
	}
	return strings.TrimSpace(s.Service + " " + s.Name + " " + outcome(s))
}

func outcome(s *controlpb.Span) string {
	code := s.Attributes["http.response.status_code"]
	if s.Status != "error" {
		if code != "" && code[0] >= '4' {
			return code
		}
		return ""
	}
	return strings.TrimSpace(code + " " + s.Attributes["error.type"])
}

// ordered sorts spans so that children follow their parent, earliest first.
func ordered(t *controlpb.Trace) []*controlpb.Span {
	byParent := map[string][]*controlpb.Span{}
	known := map[string]bool{}
	for _, s := range t.Spans {
		known[s.SpanId] = true
	}
	for _, s := range t.Spans {
		p := s.ParentId
		if !known[p] {
			p = ""
		}
		byParent[p] = append(byParent[p], s)
	}
	var out []*controlpb.Span
	seen := map[string]bool{}
	var walk func(string)
	walk = func(parent string) {
		children := byParent[parent]
		sort.SliceStable(children, func(i, j int) bool { return children[i].StartUnixNano < children[j].StartUnixNano })
		for _, c := range children {
			if seen[c.SpanId] {
				continue
			}
			seen[c.SpanId] = true
			out = append(out, c)
			walk(c.SpanId)
		}
	}
	walk("")
	return out
}

// missingHops labels gaps in the hop numbers that travel in tracestate.
func missingHops(t *controlpb.Trace) []string {
	seen, top := map[int]bool{}, -1
	for _, s := range t.Spans {
		if n, err := strconv.Atoi(s.Attributes["strait.hop.index"]); err == nil {
			seen[n] = true
			top = max(top, n)
		}
	}
	var gaps []string
	for i := 0; i < top; i++ {
		if !seen[i] {
			gaps = append(gaps, fmt.Sprintf("hop %d missing: its process exported no span, or its cluster was not reached", i))
		}
	}
	return gaps
}
