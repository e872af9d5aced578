// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
)

// maxTokenFile bounds a token file in bytes.
const maxTokenFile = 64 << 10

func newTokenCmd(e *env) *cobra.Command {
	c := &cobra.Command{Use: "token", Short: "One-time join tokens", Example: "  strait token issue --cluster eu-west --out us-east.token\n  strait token list"}
	var req controlpb.TokenIssueRequest
	var out string
	var ttl time.Duration
	issue := &cobra.Command{Use: "issue", Short: "Issue a token with which one cluster may join", Args: cobra.NoArgs,
		Long: `Issue a token with which one cluster may join. It names this cluster's gateways and pins its trust bundle; it works for one joiner,
for 15 minutes unless --ttl says otherwise. The token is a secret: it is written to --out (0600), or to standard output.`,
		Example: "  strait token issue --cluster eu-west --out us-east.token\n  strait token issue --cluster eu-west --sameness shop --approve manual > us-east.token",
		RunE: func(cmd *cobra.Command, _ []string) error {
			req.TtlSeconds = int64(ttl / time.Second)
			return tokenIssueRun(cmd.Context(), e, &req, out)
		}}
	issue.Flags().StringVar(&req.Cluster, "cluster", "", "name that the joining cluster must have (required)")
	issue.Flags().DurationVar(&ttl, "ttl", 15*time.Minute, "how long the token can be redeemed")
	issue.Flags().StringSliceVar(&req.Sameness, "sameness", nil, "namespaces whose services of the joiner are the same as ours, or all")
	issue.Flags().StringVar(&req.Approve, "approve", "auto", "auto, or manual: an operator approves the joiner")
	issue.Flags().StringVar(&out, "out", "-", "file to write, or - for standard output")
	list := &cobra.Command{Use: "list", Short: "List tokens and what became of them", Args: cobra.NoArgs,
		Example: "  strait token list\n  strait token list -o json",
		RunE:    func(cmd *cobra.Command, _ []string) error { return tokenListRun(cmd.Context(), e) }}
	revoke := &cobra.Command{Use: "revoke ID", Short: "Revoke a token", Args: cobra.ExactArgs(1),
		Example: "  strait token revoke k3v9q2\n  strait token list -o name | xargs -n1 strait token revoke",
		RunE: func(cmd *cobra.Command, args []string) error {
			op, done, err := e.operator()
			if err != nil {
				return err
			}
			defer done()
			if _, err := op.TokenRevoke(cmd.Context(), &controlpb.TokenRevokeRequest{Id: args[0]}); err != nil {
				return e.callError(err)
			}
			fmt.Fprintf(e.out, "token %s revoked\n", args[0])
			return nil
		}}
	c.AddCommand(issue, list, revoke, newGatewayTokenCmd(e))
	return c
}

func newGatewayTokenCmd(e *env) *cobra.Command {
	var out string
	var ttl time.Duration
	c := &cobra.Command{Use: "gateway NAME", Short: "Issue a registration token for a further gateway of this cluster", Args: cobra.ExactArgs(1),
		Example: "  strait token gateway gateway-2 --out gateway-2.token\n  strait token gateway gateway-2 --ttl 1h --out gateway-2.token",
		RunE: func(cmd *cobra.Command, args []string) error {
			if out == "" {
				return problem.New(problem.Usage, "--out is missing").WithFix("strait token gateway %s --out FILE", args[0])
			}
			secret, err := reserveSecret(out, "--out")
			if err != nil {
				return err
			}
			defer secret.discard()
			op, done, err := e.operator()
			if err != nil {
				return err
			}
			defer done()
			r, err := op.GatewayToken(cmd.Context(), &controlpb.GatewayTokenRequest{Name: args[0], TtlSeconds: int64(ttl / time.Second)})
			if err != nil {
				return e.callError(err)
			}
			if err := secret.keep([]byte(strings.TrimRight(r.Token, "\n") + "\n")); err != nil {
				return err
			}
			fmt.Fprintln(e.out, out)
			e.progress("start it: strait gateway --data-dir DIR --token-file %s", out)
			return nil
		}}
	c.Flags().StringVar(&out, "out", "", "file for the token")
	c.Flags().DurationVar(&ttl, "ttl", 15*time.Minute, "how long the token can be redeemed")
	return c
}

func tokenIssueRun(ctx context.Context, e *env, req *controlpb.TokenIssueRequest, out string) error {
	var secret *secretFile
	if out != "-" {
		var err error
		if secret, err = reserveSecret(out, "--out"); err != nil {
			return err
		}
		defer secret.discard()
	}
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	req.Sameness = samenessOf(req.Sameness)
	r, err := op.TokenIssue(ctx, req)
	if err != nil {
		return e.callError(err)
	}
	left := time.Until(time.Unix(r.ExpiresUnix, 0)).Round(time.Second)
	if out == "-" {
		fmt.Fprintln(e.out, strings.TrimRight(r.Token, "\n"))
	} else {
		if err := secret.keep([]byte(strings.TrimRight(r.Token, "\n") + "\n")); err != nil {
			return err
		}
		fmt.Fprintf(e.out, "%s\n", out)
	}
	e.progress("token %s: for %s, one use, expires in %s. On the joining cluster: strait join FILE", r.Id, req.Cluster, left)
	if len(r.Addresses) == 0 {
		e.progress("%s warn  no gateway address is known yet; the token carries none (start the gateway with --advertise)", e.glyph("warn"))
	}
	return nil
}

func orAny(cluster string) string {
	if cluster == "" {
		return "any cluster"
	}
	return cluster
}

func samenessOf(list []string) []string {
	for i, n := range list {
		if n == "all" {
			list[i] = "*"
		}
	}
	return list
}

// secretFile is a file that only its owner may read. It is reserved before a secret is asked for, so that no secret is made
// that cannot be kept.
type secretFile struct {
	f    *os.File
	kept bool
}

// reserveSecret creates the file and refuses to overwrite one; flag is where its name came from.
func reserveSecret(name, flag string) (*secretFile, error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, problem.New(problem.Usage, "%v", err).WithWhy("secrets never overwrite a file").WithFix("choose another %s", flag)
	}
	return &secretFile{f: f}, nil
}

func (s *secretFile) keep(data []byte) error {
	s.kept = true
	if _, err := s.f.Write(data); err != nil {
		return errors.Join(err, s.f.Close())
	}
	return s.f.Close()
}

// discard removes the file unless the secret was kept.
func (s *secretFile) discard() {
	if s != nil && !s.kept {
		_ = s.f.Close()
		_ = os.Remove(s.f.Name())
	}
}

func tokenListRun(ctx context.Context, e *env) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	r, err := op.TokenList(ctx, &controlpb.TokenListRequest{})
	if err != nil {
		return e.callError(err)
	}
	t := &table{head: []string{"ID", "KIND", "CLUSTER", "STATE", "EXPIRES", "BOUND TO"}}
	for _, k := range r.Tokens {
		t.add(k.Id, k.Id, k.Kind, orAny(k.Cluster), k.State, time.Unix(k.ExpiresUnix, 0).UTC().Format(time.RFC3339), k.BoundTo)
	}
	return e.print("TokenList", r, t)
}

type joinOptions struct {
	token           string
	cluster, region string
	sameness        []string
	check           bool
}

func newJoinCmd(e *env) *cobra.Command {
	var o joinOptions
	c := &cobra.Command{Use: "join TOKEN-FILE|-", Short: "Join this cluster to a federation; waits for a proven two-way path", Args: cobra.ExactArgs(1),
		Long: `Join this cluster to the federation that issued the token. Each stage is printed when it has ended and is kept on disk: the command may
be run again after any interruption and goes on where it was. It returns 0 only after a probe has crossed the tunnel both ways.`,
		Example: "  strait join ./us-east.token\n  cat us-east.token | strait join - --sameness shop\n  strait join ./us-east.token --check",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.token = args[0]
			return joinRun(cmd.Context(), e, o)
		}}
	c.Flags().StringVar(&o.cluster, "cluster", "", "refuse unless this cluster has that name")
	c.Flags().StringVar(&o.region, "region", "", "refuse unless this cluster is in that region")
	c.Flags().StringSliceVar(&o.sameness, "sameness", nil, "namespaces whose services of the issuer are the same as ours, or all (default none)")
	c.Flags().BoolVar(&o.check, "check", false, "run every stage's probe and change nothing")
	return c
}

func (e *env) readSecret(name string) (string, error) {
	r := e.in
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return "", problem.New(problem.Usage, "%v", err).WithFix("give the file that strait token issue wrote, or - for standard input")
		}
		defer f.Close()
		r = f
	}
	data, err := io.ReadAll(io.LimitReader(r, maxTokenFile+1))
	if err != nil {
		return "", err
	}
	if len(data) > maxTokenFile {
		return "", problem.New(problem.TokenMalformed, "more than %d bytes", maxTokenFile)
	}
	return strings.TrimSpace(string(data)), nil
}

func joinRun(ctx context.Context, e *env, o joinOptions) error {
	token, err := e.readSecret(o.token)
	if err != nil {
		return err
	}
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	if o.cluster != "" || o.region != "" {
		st, err := op.Status(ctx, &controlpb.StatusRequest{})
		if err != nil {
			return e.callError(err)
		}
		if o.cluster != "" && o.cluster != st.Cluster || o.region != "" && o.region != st.Region {
			return problem.New(problem.Usage, "this control plane is %s in %s, not %s in %s", st.Cluster, st.Region, o.cluster, o.region).
				WithWhy("name and region are fixed at init").WithFix("strait context ls shows the clusters that this command line knows")
		}
	}
	stream, err := op.Join(ctx, &controlpb.JoinRequest{Token: token, Sameness: samenessOf(o.sameness), CheckOnly: o.check, TimeoutMs: e.timeout.Milliseconds()})
	if err != nil {
		return e.callError(err)
	}
	last, err := e.stages(stream.Recv)
	if problem.Is(err, problem.NoControlPlane) {
		return problem.From(err).WithFix("start it again, then run the same join: it goes on where it was").
			WithState("what was reached is on disk; nothing routes or trusts before the join is complete")
	}
	if err != nil {
		return err
	}
	if o.check {
		fmt.Fprintln(e.out, "every stage would pass; nothing was changed")
		return nil
	}
	st, err := op.Status(ctx, &controlpb.StatusRequest{})
	if err != nil {
		return e.callError(err)
	}
	return e.renderJoined(st, last)
}

func (e *env) renderJoined(st *controlpb.StatusResponse, last *controlpb.JoinProgress) error {
	m := last.GetMember()
	issuer := "the issuer"
	if m != nil {
		issuer = m.Cluster
	}
	if e.output != "table" && e.output != "wide" || e.jq != "" {
		return e.print("Member", m, &table{names: []string{issuer}})
	}
	fmt.Fprintf(e.out, "%s is a ready member of %s (%.1fs). Next: strait export SERVICE --to %s\n", st.Cluster, st.Federation, last.ElapsedSeconds, issuer)
	return nil
}

// stages prints progress until the stream ends. A message with a problem is the last one and becomes the command's error; so does an
// end that is not announced: success is only what was said to be done.
func (e *env) stages(recv func() (*controlpb.JoinProgress, error)) (*controlpb.JoinProgress, error) {
	last := &controlpb.JoinProgress{}
	for {
		p, err := recv()
		if errors.Is(err, io.EOF) && last.Done {
			return last, nil
		}
		if errors.Is(err, io.EOF) {
			return last, problem.New(problem.NoControlPlane, "the control plane ended the command before it was complete").Retry()
		}
		if err != nil {
			return last, e.callError(err)
		}
		last = p
		if p.Title != "" && (!p.Done || p.State != "ok") { // the last word is the command's result
			e.progress("  %s %-20s %s", e.glyph(p.State), p.Title, p.Detail)
		}
		if p.Problem != nil {
			return last, problemOf(p.Problem)
		}
	}
}

func problemOf(p *controlpb.Problem) error {
	err := problem.New(problem.Code(p.Code), "%s", p.What)
	err.Headline, err.Why, err.Fix, err.State = p.Title, p.Why, p.Fix, p.State
	err.Retryable, err.Cluster, err.Object, err.Field = p.Retryable, p.Cluster, p.Object, p.Field
	return err
}

func newLeaveCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "leave", Short: "Leave the federation cleanly: withdraw exports, drain, drop trust", Args: cobra.NoArgs,
		Example: "  strait leave --yes\n  strait leave --yes --timeout 30s",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := e.confirm("leaving cuts every call to and from the other members"); err != nil {
				return err
			}
			op, done, err := e.operator()
			if err != nil {
				return err
			}
			defer done()
			stream, err := op.Leave(cmd.Context(), &controlpb.LeaveRequest{TimeoutMs: e.timeout.Milliseconds()})
			if err != nil {
				return e.callError(err)
			}
			if _, err := e.stages(stream.Recv); err != nil {
				return err
			}
			fmt.Fprintln(e.out, "left the federation")
			return nil
		}}
}

func newMemberCmd(e *env) *cobra.Command {
	c := &cobra.Command{Use: "member", Short: "Manage member clusters", Example: "  strait member list\n  strait member describe eu-west"}
	c.AddCommand(
		&cobra.Command{Use: "list", Short: "List the members and how they are reached", Args: cobra.NoArgs,
			Example: "  strait member list\n  strait member list -o wide",
			RunE:    func(cmd *cobra.Command, _ []string) error { return memberListRun(cmd.Context(), e) }},
		&cobra.Command{Use: "describe CLUSTER", Short: "Show everything known of one member", Args: cobra.ExactArgs(1),
			Example: "  strait member describe eu-west\n  strait member describe eu-west -o json",
			RunE:    func(cmd *cobra.Command, args []string) error { return memberDescribeRun(cmd.Context(), e, args[0]) }},
		&cobra.Command{Use: "approve CLUSTER", Short: "Approve a joiner or a newcomer that was introduced", Args: cobra.ExactArgs(1),
			Example: "  strait member approve ap-south\n  strait member list -o json --jq '.members[] | select(.state==\"awaiting-approval\").cluster'",
			RunE: func(cmd *cobra.Command, args []string) error {
				return memberChange(cmd.Context(), e, args[0], "approved", func(op controlpb.OperatorClient, r *controlpb.MemberRequest) (*controlpb.Member, error) {
					return op.MemberApprove(cmd.Context(), r)
				})
			}},
		&cobra.Command{Use: "evict CLUSTER", Short: "Withdraw all trust in a member; takes effect within 5 seconds", Args: cobra.ExactArgs(1),
			Example: "  strait member evict ap-south --yes\n  strait member list",
			RunE: func(cmd *cobra.Command, args []string) error {
				if err := e.confirm("evicting " + args[0] + " cuts every connection to and from it"); err != nil {
					return err
				}
				return memberChange(cmd.Context(), e, args[0], "evicted", func(op controlpb.OperatorClient, r *controlpb.MemberRequest) (*controlpb.Member, error) {
					return op.MemberEvict(cmd.Context(), r)
				})
			}},
	)
	return c
}

func memberChange(_ context.Context, e *env, name, word string, call func(controlpb.OperatorClient, *controlpb.MemberRequest) (*controlpb.Member, error)) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	m, err := call(op, &controlpb.MemberRequest{Cluster: name})
	if err != nil {
		return e.callError(err)
	}
	t := &table{}
	t.add(name, fmt.Sprintf("member %s %s", name, word))
	return e.print("Member", m, t)
}

func memberListRun(ctx context.Context, e *env) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	r, err := op.MemberList(ctx, &controlpb.MemberListRequest{})
	if err != nil {
		return e.callError(err)
	}
	return e.renderMembers(r)
}

func (e *env) renderMembers(r *controlpb.MemberListResponse) error {
	t := &table{head: []string{"CLUSTER", "REGION", "STATE", "TUNNEL", "RTT", "CATALOG", "SAMENESS", "TRUST DOMAIN", "REASON"}, wide: 2}
	var unreachable []string
	for _, m := range r.Members {
		tunnel, rtt := bestTunnel(m)
		t.add(m.Cluster, m.Cluster, m.Region, m.State, tunnel, rtt, catalogText(m), samenessText(m), m.TrustDomain, m.Reason)
		if m.State == "unreachable" {
			unreachable = append(unreachable, m.Cluster)
		}
	}
	if err := e.print("MemberList", r, t); err != nil {
		return err
	}
	return e.partial(unreachable)
}

// partial ends a command that printed what it reached with the trailer and exit code of UX 1.1.
func (e *env) partial(unreachable []string) error {
	if len(unreachable) == 0 {
		return nil
	}
	fmt.Fprintf(e.err, "# unreachable: %s (%s)\n", strings.Join(unreachable, ", "), problem.ClusterUnreachable)
	return exitError(problem.ExitPartial)
}

func bestTunnel(m *controlpb.Member) (state, rtt string) {
	if m.State == "self" {
		return "-", "-"
	}
	state, rtt = "down", "-"
	for _, t := range m.Tunnels {
		if t.State == "up" {
			return "up " + t.Transport, fmt.Sprintf("%dms", int(t.RttSeconds*1000+0.5))
		}
		state = t.State
	}
	return state, rtt
}

func catalogText(m *controlpb.Member) string {
	switch {
	case m.State == "self":
		return "-"
	case m.CatalogAgeSeconds < 0 || m.CatalogSeq == 0:
		return "none yet"
	default:
		return fmt.Sprintf("%s, %d services, %ds old", m.Freshness, m.ServicesOfferedToUs, int(m.CatalogAgeSeconds))
	}
}

func samenessText(m *controlpb.Member) string {
	if m.State == "self" {
		return "-"
	}
	if len(m.Sameness) == 0 {
		return "none"
	}
	return strings.ReplaceAll(strings.Join(m.Sameness, ","), "*", "all")
}

func memberDescribeRun(ctx context.Context, e *env, name string) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	r, err := op.MemberList(ctx, &controlpb.MemberListRequest{})
	if err != nil {
		return e.callError(err)
	}
	for _, m := range r.Members {
		if m.Cluster == name {
			return e.print("Member", m, memberTable(m))
		}
	}
	return problem.New(problem.NotFound, "no member is called %s", name).WithFix("strait member list")
}

func memberTable(m *controlpb.Member) *table {
	t := &table{}
	row := func(label, format string, args ...any) { t.add(m.Cluster, label, fmt.Sprintf(format, args...)) }
	row("cluster", "%s (region %s)", m.Cluster, m.Region)
	row("trust domain", "%s", m.TrustDomain)
	row("bundle", "sha256 %s, root until %s", m.BundleSha256, time.Unix(m.RootNotAfterUnix, 0).UTC().Format("2006-01-02"))
	row("state", "%s %s", m.State, m.Reason)
	if m.IntroducedBy != "" {
		row("introduced by", "%s", m.IntroducedBy)
	}
	if len(m.Stages) > 0 {
		row("stages", "%s", strings.Join(m.Stages, ", "))
	}
	row("sameness", "%s", samenessText(m))
	row("catalog", "%s (epoch %d, seq %d)", catalogText(m), m.CatalogEpoch, m.CatalogSeq)
	if m.Conflict {
		row("conflict", "it signed two catalogs with the same number [%s]", problem.CatalogFork)
	}
	row("services", "%d offered to us, %d offered by us", m.ServicesOfferedToUs, m.ServicesOfferedByUs)
	for _, g := range m.Gateways {
		row("gateway", "%s at %s", g.Name, strings.Join(g.Addresses, ", "))
	}
	for _, k := range m.Tunnels {
		since := time.UnixMilli(k.SinceMs).UTC().Format(time.TimeOnly)
		row("tunnel", "%s %s to %s %s, rtt %.0fms, loss %.1f%%, %d streams, since %s %s",
			k.State, k.Transport, k.PeerGateway, k.Address, k.RttSeconds*1000, k.LossRatio*100, k.Streams, since, k.LastError)
	}
	return t
}
