// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
)

func dailyCommands(e *env) []*cobra.Command {
	return []*cobra.Command{newStatusCmd(e), newWhyCmd(e), newCheckCmd(e), newPingCmd(e), newTraceCmd(e), newExplainCmd(e)}
}

func newStatusCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "status", Short: "One page: clusters, tunnels, services failing over, trust, warnings", Args: cobra.NoArgs,
		Example: "  strait status\n  strait status -o json --jq .members[].state",
		RunE:    func(cmd *cobra.Command, _ []string) error { return statusRun(cmd.Context(), e) }}
}

func statusRun(ctx context.Context, e *env) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	st, err := op.Status(ctx, &controlpb.StatusRequest{})
	if err != nil {
		return e.callError(err)
	}
	if e.output != "table" && e.output != "wide" || e.jq != "" {
		return e.print("Status", st, &table{names: []string{st.Cluster}})
	}
	return e.renderStatus(st)
}

func (e *env) renderStatus(st *controlpb.StatusResponse) error {
	fmt.Fprintf(e.out, "%s in federation %s (region %s, trust domain %s, %s)\n", st.Cluster, st.Federation, st.Region, st.TrustDomain, st.Version)
	fmt.Fprintf(e.out, "%d %s, %d %s, %d of %d acknowledged revision %d\n\n", len(st.Gateways), plural(len(st.Gateways), "gateway", "gateways"),
		st.Proxies, plural(int(st.Proxies), "proxy", "proxies"), st.ProxiesAcked, st.Proxies, st.Revision)
	rows := [][]string{{"CLUSTER", "STATE", "TUNNEL", "RTT", "CATALOG"}}
	var unreachable []string
	for _, m := range st.Members {
		tunnel, rtt := bestTunnel(m)
		rows = append(rows, []string{m.Cluster, m.State, tunnel, rtt, catalogText(m)})
		if m.State == "unreachable" {
			unreachable = append(unreachable, m.Cluster)
		}
	}
	writeColumns(e.out, rows, "")
	fmt.Fprintln(e.out)
	rows = [][]string{{"SERVICE", "HEALTH", "TRAFFIC GOES TO", "REASON"}}
	for _, s := range st.Services {
		rows = append(rows, []string{refText(s.Service), healthText(s), s.Active, s.Reason})
	}
	if len(rows) > 1 {
		writeColumns(e.out, rows, "")
	} else {
		fmt.Fprintln(e.out, "no services yet: strait workload register NAMESPACE/NAME --address HOST --port http=8080")
	}
	for _, w := range st.Warnings {
		fmt.Fprintf(e.out, "%s %s  %s  [%s]\n", e.glyph(w.Severity), w.Severity, w.Text, w.Code)
		if w.Fix != "" {
			fmt.Fprintf(e.out, "    why  %s   fix  %s\n", w.Why, w.Fix)
		}
	}
	return e.partial(unreachable)
}

func refText(r *controlpb.ServiceRef) string { return r.GetNamespace() + "/" + r.GetName() }

// healthText is "us-east 1/4, eu-west 6/6": healthy of all instances, per provider.
func healthText(s *controlpb.ServiceSummary) string {
	var parts []string
	for _, p := range s.Providers {
		parts = append(parts, fmt.Sprintf("%s %d/%d", p.Cluster, p.Health.GetHealthy(), p.Health.GetHealthy()+p.Health.GetUnhealthy()+p.Health.GetUnknown()))
	}
	if len(parts) == 0 {
		return "-"
	}
	return strings.Join(parts, ", ")
}

func newWhyCmd(e *env) *cobra.Command {
	var from string
	c := &cobra.Command{Use: "why SERVICE", Short: "Explain where traffic goes and why", Args: cobra.ExactArgs(1),
		Long: `Explain where the traffic of a service goes now, and why: what the callers' sidecars reported that they decided, grouped, and checked by
running the same decision over the inputs that they reported.`,
		Example: "  strait why checkout\n  strait why shop/checkout --from us-east/web",
		RunE: func(cmd *cobra.Command, args []string) error {
			return whyRun(cmd.Context(), e, args[0], from)
		}}
	c.Flags().StringVar(&from, "from", "", "caller: [CLUSTER/]WORKLOAD (default: all callers of this cluster)")
	return c
}

func whyRun(ctx context.Context, e *env, service, from string) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	name, err := e.serviceName(ctx, op, service)
	if err != nil {
		return err
	}
	w, err := op.Why(ctx, &controlpb.WhyRequest{Service: name, From: from})
	if err != nil {
		return e.callError(err)
	}
	if e.output != "table" && e.output != "wide" || e.jq != "" {
		return e.print("Why", w, &table{names: []string{name}})
	}
	e.renderWhy(w)
	return nil
}

// serviceName resolves a bare name: the context's namespace, else the unique match (DESIGN 13).
func (e *env) serviceName(ctx context.Context, op controlpb.OperatorClient, name string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	ns := e.namespace
	if ns == "" {
		if c, err := e.current(); err == nil {
			ns = c.Namespace
		}
	}
	if ns != "" {
		return ns + "/" + name, nil
	}
	list, err := op.ServiceList(ctx, &controlpb.ServiceListRequest{Name: name})
	if err != nil {
		return "", e.callError(err)
	}
	matches := e.writtenServices(ctx, name)
	for _, s := range list.Services {
		if full := refText(s.Service); s.Service.GetName() == name && !slices.Contains(matches, full) {
			matches = append(matches, full)
		}
	}
	slices.Sort(matches)
	switch len(matches) {
	case 1:
		return matches[0], nil
	case 0:
		return "", problem.New(problem.UnknownService, "no service is called %s", name)
	default:
		return "", problem.New(problem.AmbiguousName, "%s may be %s", name, strings.Join(matches, ", "))
	}
}

// writtenServices are the services of that name in the configuration: one that was written a moment ago is there before it is
// compiled. A context without the configuration API has none.
func (e *env) writtenServices(ctx context.Context, name string) []string {
	d, err := e.dynamic()
	if err != nil {
		return nil
	}
	k, err := kindOf("Service")
	if err != nil {
		return nil
	}
	list, err := k.in(d, "").List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
	if err != nil {
		return nil
	}
	var matches []string
	for _, s := range list.Items {
		if s.GetName() == name {
			matches = append(matches, s.GetNamespace()+"/"+name)
		}
	}
	return matches
}

func (e *env) renderWhy(w *controlpb.WhyResponse) {
	for i, g := range w.Groups {
		d := g.Decision
		policy := "the default policy"
		if w.Policy != "" {
			policy = fmt.Sprintf("FailoverPolicy %s (gen %d, acked %d/%d proxies)", w.Policy, w.PolicyGeneration, w.Acked, w.Subscribed)
		}
		if i > 0 {
			fmt.Fprintln(e.out)
		}
		fmt.Fprintf(e.out, "%s from %s    policy %s\n", refText(w.Service), callersText(w.Cluster, w.Service.GetNamespace(), g.Callers), policy)
		since := time.UnixMilli(d.SinceMs)
		fmt.Fprintf(e.out, "NOW  %s   reason %s   since %s (%s)\n", sharesText(d), d.Reason, since.UTC().Format(time.TimeOnly), shortDuration(e.now().Sub(since)))
		rows := [][]string{{"TIER", "CLUSTER", "HEALTHY", "SHARE", "STATE     ", "BECAUSE"}}
		for _, t := range d.Tiers {
			for _, m := range t.Members {
				because := m.Because
				if because == "" {
					because = m.Reason
				}
				tier := fmt.Sprintf("  %d", t.Tier)
				if t.Tier < 0 {
					tier = "  -"
				}
				rows = append(rows, []string{tier, m.Cluster, fmt.Sprintf("%d/%d", m.Healthy, m.Total), fmt.Sprintf("%.0f%%", m.Share*100), m.State, because})
			}
		}
		writeColumns(e.out, rows, "")
		if d.Returns != "" {
			fmt.Fprintf(e.out, "RETURNS to %s\n", strings.TrimPrefix(d.Returns, "to "))
		}
		for _, x := range d.Ejections {
			until := "it is reached again"
			if x.UntilMs != 0 {
				until = time.UnixMilli(x.UntilMs).UTC().Format(time.TimeOnly)
			}
			fmt.Fprintf(e.out, "EJECTED %s %s: %s until %s\n", x.Cluster, x.Instance, x.Reason, until)
		}
		if g.Recomputed != "" && g.Recomputed != "agrees" {
			fmt.Fprintf(e.out, "%s warn  recomputing from the reported inputs gives another answer: %s\n", e.glyph("warn"), g.Recomputed)
		}
	}
	for _, s := range w.Silent {
		fmt.Fprintf(e.out, "%s warn  %s\n", e.glyph("warn"), s)
	}
	for _, n := range w.Notes {
		fmt.Fprintln(e.out, n)
	}
}

// callersText is "us-east/web" for one caller of the service's own namespace, and a list for several.
func callersText(cluster, namespace string, callers []string) string {
	short := make([]string, len(callers))
	for i, c := range callers {
		short[i] = strings.TrimPrefix(c, namespace+"/")
	}
	callers = short
	if len(callers) == 1 {
		return cluster + "/" + callers[0]
	}
	if len(callers) > 4 {
		return fmt.Sprintf("%s: %d callers (%s, …)", cluster, len(callers), strings.Join(callers[:3], ", "))
	}
	return fmt.Sprintf("%s: %s", cluster, strings.Join(callers, ", "))
}

func sharesText(d *controlpb.DecisionReport) string {
	var parts []string
	for _, t := range d.Tiers {
		for _, m := range t.Members {
			if m.Share > 0 {
				parts = append(parts, fmt.Sprintf("%s %.0f%%", m.Cluster, m.Share*100))
			}
		}
	}
	if len(parts) == 0 {
		return "nowhere"
	}
	return strings.Join(parts, ", ")
}

// shortDuration is "6m13s", "2s", "3h12m".
func shortDuration(d time.Duration) string {
	if d < 0 {
		d = 0
	}
	if d >= time.Hour {
		return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
	}
	return d.Round(time.Second).String()
}

type checkOptions struct {
	failOn     string
	horizon    time.Duration
	federation bool
	dataplane  bool
}

func newCheckCmd(e *env) *cobra.Command {
	var o checkOptions
	c := &cobra.Command{Use: "check", Short: "Run health checks with fixes", Args: cobra.NoArgs,
		Example: "  strait check\n  strait check --federation --fail-on=warning --cert-horizon 14d",
		RunE:    func(cmd *cobra.Command, _ []string) error { return checkRun(cmd.Context(), e, o) }}
	c.Flags().StringVar(&o.failOn, "fail-on", "error", "error, or warning: exit 7 when there are only warnings")
	c.Flags().Var(days{&o.horizon}, "cert-horizon", "warn of certificates that end within this time (like 14d or 36h)")
	o.horizon = 14 * 24 * time.Hour
	c.Flags().BoolVar(&o.federation, "federation", false, "tunnels, trust and catalogs only")
	c.Flags().BoolVar(&o.dataplane, "dataplane", false, "proxies and failover only")
	return c
}

func checkRun(ctx context.Context, e *env, o checkOptions) error {
	if o.failOn != "error" && o.failOn != "warning" {
		return problem.New(problem.Usage, "--fail-on=%s: want error or warning", o.failOn)
	}
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	req := &controlpb.CheckRequest{CertHorizonSeconds: int64(o.horizon / time.Second)}
	if o.federation {
		req.Groups = append(req.Groups, "join", "tunnels", "trust", "catalogs")
	}
	if o.dataplane {
		req.Groups = append(req.Groups, "proxies", "failover")
	}
	r, err := op.Check(ctx, req)
	if err != nil {
		return e.callError(err)
	}
	return e.reportCheck(r, o.failOn)
}

// reportCheck prints the items and ends the command with the code that they and --fail-on ask for.
func (e *env) reportCheck(r *controlpb.CheckResponse, failOn string) error {
	count := map[string]int{}
	for _, it := range r.Items {
		count[it.State]++
	}
	code := problem.ExitOK
	switch {
	case count["fail"] > 0:
		code = problem.ExitCheckFailed
	case count["warn"] > 0 && failOn == "warning":
		code = problem.ExitWarnings
	}
	if e.output != "table" && e.output != "wide" || e.jq != "" {
		if err := e.print("CheckReport", r, &table{}); err != nil {
			return err
		}
	} else {
		e.renderCheck(r, count, code)
	}
	if code != problem.ExitOK {
		return exitError(code)
	}
	return nil
}

func (e *env) renderCheck(r *controlpb.CheckResponse, count map[string]int, code int) {
	group := ""
	for _, it := range r.Items {
		if it.Group != group {
			group = it.Group
			fmt.Fprintln(e.out, group)
		}
		word := ""
		if it.State == "skip" {
			word = "skip "
		}
		line := fmt.Sprintf("  %s %s%s", e.glyph(it.State), word, it.Text)
		if it.Code != "" && it.State != "ok" {
			line = fmt.Sprintf("%-86s [%s]", line, it.Code)
		}
		fmt.Fprintln(e.out, line)
		if it.State == "fail" || it.State == "warn" {
			var parts []string
			if it.Why != "" {
				parts = append(parts, "why  "+it.Why)
			}
			if it.Fix != "" {
				parts = append(parts, "fix  "+it.Fix)
			}
			if len(parts) > 0 {
				fmt.Fprintf(e.out, "      %s\n", strings.Join(parts, "   "))
			}
		}
	}
	summary := fmt.Sprintf("%d ok, %d warn, %d fail, %d skip", count["ok"], count["warn"], count["fail"], count["skip"])
	if code != 0 {
		summary = fmt.Sprintf("%-86s exit %d", summary, code)
	}
	fmt.Fprintln(e.out, summary)
}

// days is a duration flag that also understands "14d".
type days struct{ d *time.Duration }

func (f days) String() string {
	if f.d == nil {
		return ""
	}
	return f.d.String()
}
func (f days) Type() string { return "duration" }
func (f days) Set(s string) error {
	if n, ok := strings.CutSuffix(s, "d"); ok {
		var whole int
		if _, err := fmt.Sscanf(n, "%d", &whole); err != nil || fmt.Sprint(whole) != n || whole < 0 {
			return fmt.Errorf("%q is no number of days", s)
		}
		*f.d = time.Duration(whole) * 24 * time.Hour
		return nil
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("%q is no duration (like 14d or 36h)", s)
	}
	*f.d = d
	return nil
}

func newPingCmd(e *env) *cobra.Command {
	var count uint32
	var interval time.Duration
	c := &cobra.Command{Use: "ping CLUSTER", Short: "Probe through the real tunnel; shows path, transport, RTT, loss", Args: cobra.ExactArgs(1),
		Example: "  strait ping eu-west\n  strait ping eu-west -c 10",
		RunE: func(cmd *cobra.Command, args []string) error {
			return pingRun(cmd.Context(), e, &controlpb.PingRequest{Target: args[0], Count: count, IntervalMs: interval.Milliseconds()})
		}}
	c.Flags().Uint32VarP(&count, "count", "c", 4, "number of probes")
	c.Flags().DurationVar(&interval, "interval", 200*time.Millisecond, "time between probes")
	return c
}

func pingRun(ctx context.Context, e *env, req *controlpb.PingRequest) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	stream, err := op.Ping(ctx, req)
	if err != nil {
		return e.callError(err)
	}
	var replies []*controlpb.PingReply
	lost := 0
	var last *controlpb.PingReply
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return e.callError(err)
		}
		replies = append(replies, r)
		if r.ErrorCode != "" {
			lost++
			last = r
		}
		if e.output == "table" || e.output == "wide" {
			if r.ErrorCode != "" {
				fmt.Fprintf(e.out, "%s seq=%d  %s  [%s]\n", r.Path, r.Seq, r.ErrorMessage, r.ErrorCode)
			} else {
				fmt.Fprintf(e.out, "%s seq=%d  %s via %s  time=%.1fms  loss %.1f%%\n", r.Path, r.Seq, r.Transport, r.Gateway, r.RttSeconds*1000, r.LossRatio*100)
			}
		}
	}
	if e.output != "table" && e.output != "wide" {
		if err := e.print("PingReport", map[string]any{"replies": replies}, &table{names: []string{req.Target}}); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(e.out, "%d probes, %d answered\n", len(replies), len(replies)-lost)
	}
	if len(replies) > 0 && lost == len(replies) {
		return problem.New(problem.ClusterUnreachable, "%s answered none of %d probes: %s", req.Target, len(replies), last.ErrorMessage).WithCluster(req.Target)
	}
	return nil
}
