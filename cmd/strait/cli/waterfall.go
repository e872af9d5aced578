// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/span"
)

// traceHead is what the first line of a trace says.
type traceHead struct {
	start, end          int64
	request, path, note string
}

// summarize looks at the first span of a trace, its attempts, and what befell the calls below.
func summarize(t *controlpb.Trace) traceHead {
	var h traceHead
	if len(t.Spans) == 0 {
		return h
	}
	rows := ordered(t)
	root := rows[0].span
	h.start, h.end = root.StartUnixNano, root.EndUnixNano
	retries, failover, dst := 0, "", ""
	for _, r := range rows {
		s := r.span
		if s == nil {
			continue
		}
		if s.Cluster == root.Cluster { // other clusters have clocks of their own
			h.end = max(h.end, s.EndUnixNano)
		}
		if n, err := strconv.Atoi(s.Attributes[span.HTTPResendCount]); err == nil {
			retries = max(retries, n)
		}
		if reason := s.Attributes[span.DecisionReason]; isFailover(reason) && failover == "" {
			failover = reason
		}
		if s.ParentId == root.SpanId && s.Kind == "client" {
			dst = serviceOf(s) + "@" + s.Attributes[span.DstCluster]
		}
	}
	h.request = strings.TrimSpace(root.Name + " " + root.Attributes[span.HTTPStatus])
	h.path = root.Service + "@" + root.Cluster
	if dst != "" {
		h.path += " → " + dst
	}
	var notes []string
	if failover != "" {
		notes = append(notes, "failover "+failover)
	}
	if retries > 0 {
		notes = append(notes, fmt.Sprintf("%d %s", retries, plural(retries, "retry", "retries")))
	}
	h.note = strings.Join(notes, ", ")
	return h
}

// isFailover reports whether a call went elsewhere than it would on a good day.
func isFailover(reason string) bool {
	switch federation.Reason(reason) {
	case "", federation.LocalOK, federation.PriorityOK, federation.RouteSplit, federation.HeaderOverride, federation.SessionSticky:
		return false
	}
	return true
}

// serviceOf is the name of the service that a span calls.
func serviceOf(s *controlpb.Span) string {
	name := s.Attributes[span.DstService]
	return name[strings.LastIndexByte(name, '/')+1:]
}

func plural(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}

// row is one line of a drawing: a span, or the place where one is missing.
type row struct {
	span    *controlpb.Span
	missing string // cluster and hop whose span did not come
}

// canvas turns times into bars.
type canvas struct {
	start, total int64
	width        int
}

func (c canvas) cell(at int64) int {
	return min(max(int((at-c.start)*int64(c.width)/c.total), 0), c.width)
}

// bar spans the cells of a time, at least two; a label stands in the middle where there is room.
func (c canvas) bar(from, to int64, inset int, label string) string {
	a, b := c.cell(from)+inset, c.cell(to)-inset
	b = min(max(b, a+2), c.width)
	a = min(a, b-2)
	inner := []rune(strings.Repeat("─", b-a-2))
	if n := utf8.RuneCountInString(label); n > 0 && n+4 <= len(inner) {
		copy(inner[(len(inner)-n)/2:], []rune(label))
	}
	text := strings.Repeat(" ", a) + "├" + string(inner) + "┤"
	return text + strings.Repeat(" ", c.width+1-utf8.RuneCountInString(text))
}

// waterfall draws one trace, a bar of at most width cells per span, children below and after their parents.
func waterfall(t *controlpb.Trace, width int) string {
	h := summarize(t)
	c := canvas{h.start, max(h.end-h.start, 1), width}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %sms  %s", short(t.Id), h.request, ms(h.end-h.start), h.path)
	if h.note != "" {
		fmt.Fprintf(&b, "   %s", h.note)
	}
	b.WriteByte('\n')
	b.WriteString(c.axis())
	rows := ordered(t)
	names := 0
	for _, r := range rows {
		if r.span != nil {
			names = max(names, utf8.RuneCountInString(r.span.Cluster))
		}
	}
	line := func(bar, cluster, text string) {
		fmt.Fprintf(&b, "%s%s\n", bar, strings.TrimRight(fmt.Sprintf("%-*s  %s", names, cluster, text), " "))
	}
	for _, r := range rows {
		if r.span == nil {
			cluster, hop, _ := strings.Cut(r.missing, " ")
			line(strings.Repeat(" ", width+1), cluster, hop+"  no span came: a lost marker, a restarted process, or "+cluster+" was not reached")
			continue
		}
		s := r.span
		line(c.bar(s.StartUnixNano, s.EndUnixNano, 0, ""), s.Cluster, describe(s))
		if s.Attributes[span.HopKind] == span.GatewayOut {
			rtt := whole(s.Attributes[span.TunnelRTT])
			line(c.bar(s.StartUnixNano, s.EndUnixNano, 1, rtt), "tunnel", tunnelText(s, rtt))
		}
	}
	return b.String()
}

// axis labels at most five even steps; the last one says the unit.
func (c canvas) axis() string {
	unit := int64(1_000_000)
	for step := 0; c.total/unit > 4; step++ {
		unit = unit * []int64{2, 5, 4}[step%3] / []int64{1, 2, 2}[step%3] // 1, 2, 5, 10, 20, 50 …
	}
	line := []rune(strings.Repeat(" ", c.width+12))
	for at := int64(0); at <= c.total; at += unit {
		label := strconv.FormatInt(at/1_000_000, 10)
		if at+unit > c.total {
			label += "ms"
		}
		copy(line[c.cell(c.start+at):], []rune(label))
	}
	return strings.TrimRight(string(line), " ") + "\n"
}

// describe is the text beside a bar: who, and what is special about it.
func describe(s *controlpb.Span) string {
	a := s.Attributes
	var parts []string
	add := func(text string) {
		if text != "" {
			parts = append(parts, text)
		}
	}
	switch {
	case a[span.HopKind] == span.GatewayOut || a[span.HopKind] == span.GatewayIn:
		add(s.Service)
		if v := whole(a[span.TunnelWait]); v != "" && v != "0" {
			add(" queue " + v + "ms")
		}
		if s.Status == "error" {
			add(a[span.ErrorType])
		}
	case s.Kind == "client" && a[span.HopKind] == span.SidecarIn:
		add(serviceOf(s) + " → app " + ms(s.EndUnixNano-s.StartUnixNano) + "ms")
		add(outcome(s))
	case s.Kind == "client":
		n, _ := strconv.Atoi(a[span.HTTPResendCount])
		add(fmt.Sprintf("%s attempt %d", serviceOf(s), n+1))
		if d := a[span.DstCluster]; d != "" && d != s.Cluster {
			add("→ " + d)
		}
		add(outcome(s))
	case s.Kind == "server":
		add(s.Service + " sidecar")
		if a[span.HopKind] == span.SidecarOut {
			add(" SERVER")
		}
		add(outcome(s))
	default:
		add(s.Service)
		add(s.Name)
		add(outcome(s))
	}
	return strings.Join(parts, " ")
}

func tunnelText(s *controlpb.Span, rtt string) string {
	a := s.Attributes
	text := a[span.TunnelTransport]
	if id := a[span.TunnelID]; id != "" {
		text += " #" + id
	}
	if rtt != "" {
		text += " rtt " + rtt + "ms"
	}
	if v, err := strconv.ParseFloat(a[span.TunnelLoss], 64); err == nil {
		text += fmt.Sprintf(" loss %.1f%%", v*100)
	}
	return text
}

// whole rounds a decimal attribute.
func whole(v string) string {
	f, err := strconv.ParseFloat(v, 64)
	if err != nil {
		return ""
	}
	return strconv.FormatFloat(f, 'f', 0, 64)
}

// outcome is what went wrong, if anything: the status, and the word for it.
func outcome(s *controlpb.Span) string {
	code := s.Attributes[span.HTTPStatus]
	word := s.Attributes[span.ErrorType]
	switch {
	case s.Status != "error" && (code == "" || code[0] < '4'):
		return ""
	case word == code:
		word = ""
	}
	return strings.TrimSpace(code + " " + word)
}

// hopRank orders what one attempt crossed as the request met it: clocks of different clusters do not tell.
func hopRank(s *controlpb.Span) int {
	switch s.Attributes[span.HopKind] {
	case span.GatewayOut:
		return 1
	case span.GatewayIn:
		return 2
	case span.SidecarIn:
		return 3
	}
	return 0
}

// ordered sorts spans so that children follow their parent in the order of the request's way, and marks where a hop of an answered
// attempt between clusters has sent no span.
func ordered(t *controlpb.Trace) []row {
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
	var out []row
	seen := map[string]bool{}
	var walk func(parent *controlpb.Span, id string)
	walk = func(parent *controlpb.Span, id string) {
		children := byParent[id]
		slices.SortStableFunc(children, func(a, b *controlpb.Span) int {
			return cmp.Or(cmp.Compare(hopRank(a), hopRank(b)), cmp.Compare(a.StartUnixNano, b.StartUnixNano))
		})
		gaps := missing(parent, children)
		for rank := range 4 {
			for _, c := range children {
				if hopRank(c) != rank || seen[c.SpanId] {
					continue
				}
				seen[c.SpanId] = true
				out = append(out, row{span: c})
				walk(c, c.SpanId)
			}
			if g, ok := gaps[rank]; ok {
				out = append(out, row{missing: g})
			}
		}
	}
	walk(nil, "")
	for _, s := range t.Spans { // parents that form a ring: nobody honest sends that
		if !seen[s.SpanId] {
			seen[s.SpanId] = true
			out = append(out, row{span: s})
		}
	}
	return out
}

// missing names the hops of an answered attempt between clusters that sent no span, by rank.
func missing(attempt *controlpb.Span, children []*controlpb.Span) map[int]string {
	if attempt == nil || attempt.Kind != "client" || attempt.Attributes[span.HopKind] != span.SidecarOut ||
		attempt.Attributes[span.HTTPStatus] == "" || attempt.Attributes[span.DstCluster] == attempt.Cluster {
		return nil
	}
	far := attempt.Attributes[span.DstCluster]
	gaps := map[int]string{1: attempt.Cluster + " gateway", 2: far + " gateway", 3: far + " sidecar"}
	for _, c := range children {
		delete(gaps, hopRank(c))
	}
	return gaps
}
