// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/controlplane"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func newTrustCmd(e *env) *cobra.Command {
	c := &cobra.Command{Use: "trust", Short: "Certificates, bundles, expiry and rotation",
		Long: `Who vouches for this cluster's identities and for those of others: roots, issuers and JWT keys, their rotation, and what a certificate
or a server presents.`,
		Example: "  strait trust status\n  strait trust rotate prepare --wait"}
	c.AddCommand(newTrustStatusCmd(e), newTrustRootsCmd(e), newTrustRotateCmd(e), newTrustInspectCmd(e))
	c.AddCommand(withdrawTrustCmds(e)...)
	c.AddCommand(offlineTrustCmds(e)...)
	return c
}

func newTrustStatusCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "status", Short: "Show the phase of a rotation, who has taken it, and others' bundles", Args: cobra.NoArgs,
		Long: `Show this cluster's authorities, the phase of their rotation, and how far each member and each process has taken it; and the bundles of
other trust domains, with the time when they were last confirmed. Where nothing is under way, only those are listed who lack something;
-o wide lists all.`,
		Example: "  strait trust status\n  strait trust status -o wide\n  strait trust status -o json --jq .phase",
		RunE: func(cmd *cobra.Command, _ []string) error {
			op, done, err := e.operator()
			if err != nil {
				return err
			}
			defer done()
			r, err := op.TrustStatus(cmd.Context(), &controlpb.TrustStatusRequest{})
			if err != nil {
				return e.callError(err)
			}
			return e.renderTrustStatus(r)
		}}
}

func (e *env) renderTrustStatus(r *controlpb.TrustStatusResponse) error {
	if e.output != "table" && e.output != "wide" || e.jq != "" {
		t := &table{}
		for _, p := range r.Progress {
			t.names = append(t.names, p.Name)
		}
		return e.print("TrustStatus", r, t)
	}
	fmt.Fprintf(e.out, "%s   trust domain %s   bundle %d   phase %s%s\n", r.Cluster, r.TrustDomain, r.Sequence, r.Phase, e.sinceUnix(r.SinceUnix))
	if from := map[string]string{"external": "an external CA signs this cluster's issuer", "workload-api": "identities come from a SPIFFE Workload API"}[r.Source]; from != "" {
		fmt.Fprintln(e.out, from)
	}
	t := &table{head: []string{"AUTHORITY", "STATE", "ENDS", "KEY", "SHA-256"}}
	for _, a := range r.Authorities {
		t.add("", a.Kind, a.State, day(a.NotAfterUnix), orDash(a.Key), e.shortHash(a.Fingerprint))
	}
	e.block(t)
	e.renderProgress(r)
	t = &table{head: []string{"TRUSTED", "CLUSTER", "BUNDLE", "ROOTS", "ROOT ENDS", "CONFIRMED", "FROM"}}
	for _, b := range r.Bundles {
		roots, ends := 0, int64(0)
		for _, a := range b.Authorities {
			if a.Kind == "root" {
				roots++
				if ends == 0 || a.NotAfterUnix < ends {
					ends = a.NotAfterUnix
				}
			}
		}
		t.add("", b.TrustDomain, orDash(b.Cluster), fmt.Sprint(b.Sequence), fmt.Sprint(roots), day(ends), e.ago(b.UpdatedUnix), orDash(b.Source))
	}
	e.block(t)
	for _, b := range r.Bundles {
		if b.Error != "" {
			fmt.Fprintf(e.out, "%s warn  bundle of %s: %s\n", e.glyph("warn"), b.TrustDomain, b.Error)
		}
	}
	fmt.Fprintf(e.out, "\n%s\n", nextRotation(r))
	return nil
}

// block prints a table after an empty line, nothing when it has no rows.
func (e *env) block(t *table) {
	if len(t.rows) == 0 {
		return
	}
	rows := t.rows
	if !e.noHeaders {
		rows = append([][]string{t.head}, rows...)
	}
	fmt.Fprintln(e.out)
	writeColumns(e.out, rows, "")
}

// renderProgress lists members, processes and operators.
func (e *env) renderProgress(r *controlpb.TrustStatusResponse) {
	t := &table{head: []string{"WHO", "KIND", "STATE", "BUNDLE", "IDENTITY", "SEEN"}}
	for _, p := range r.Progress {
		lacks := lacking(r.Phase, p)
		if r.Phase == "steady" && e.output != "wide" && !lacks {
			continue
		}
		state := "ok"
		switch {
		case lacks && !p.Reachable && p.Kind != "operator":
			state = "away"
		case lacks:
			state = "wait"
		}
		glyph := e.glyph(map[string]string{"away": "fail"}[state])
		if state != "away" {
			glyph = e.glyph(state)
		}
		bundle, identity, seen := fmt.Sprint(p.Sequence), "renewed", "now"
		if p.Kind == "operator" {
			bundle = "-"
		} else if !p.Acknowledged {
			bundle += fmt.Sprintf(" of %d", r.Sequence)
		}
		switch {
		case p.Kind == "member" || r.Phase == "prepared":
			identity = "-"
		case !p.Renewed:
			identity = "old"
		}
		if !p.Reachable {
			seen = e.ago(p.LastSeenUnix)
		}
		t.add(p.Name, p.Name, p.Kind, glyph+" "+state, bundle, identity, seen)
	}
	e.block(t)
}

// lacking says whether a row has not taken what the phase brings.
func lacking(phase string, p *controlpb.RotationProgress) bool {
	return p.Kind != "operator" && !p.Acknowledged || phase != "prepared" && p.Kind != "member" && !p.Renewed
}

// nextRotation is what can be done now.
func nextRotation(r *controlpb.TrustStatusResponse) string {
	if r.Source != "strait" {
		return "next: roots are rotated where they come from"
	}
	step := map[string]string{"steady": "prepare", "prepared": "activate", "activated": "retire"}[r.Phase]
	if r.MayAdvance {
		return "next: strait trust rotate " + step + " (nobody would be left behind)"
	}
	return fmt.Sprintf("next: strait trust rotate %s --wait (%s)", step, rotationStage(r))
}

// rotationStage says in a line how far everybody is.
func rotationStage(r *controlpb.TrustStatusResponse) string {
	var members, processes, renewed, acked, ready, away int
	for _, p := range r.Progress {
		switch p.Kind {
		case "member":
			members++
			if p.Acknowledged {
				ready++
			}
		case "proxy":
			processes++
			if p.Acknowledged {
				acked++
			}
			if p.Renewed {
				renewed++
			}
			if !p.Reachable && lacking(r.Phase, p) {
				away++
			}
		}
	}
	text := fmt.Sprintf("bundle %d: %d of %d processes, %d of %d members", r.Sequence, acked, processes, ready, members)
	if r.Phase != "prepared" {
		text += fmt.Sprintf("; renewed: %d of %d processes", renewed, processes)
	}
	if away > 0 {
		text += fmt.Sprintf("; away: %d", away)
	}
	return text
}

func newTrustRootsCmd(e *env) *cobra.Command {
	var domain string
	c := &cobra.Command{Use: "roots", Short: "List the roots that this cluster trusts, its own and others'", Args: cobra.NoArgs,
		Long: `List the roots that this cluster trusts: its own, and those of other trust domains. With --pem the certificates of one trust domain are
printed; they are read from the data directory, or, of the own trust domain, from what strait access issue wrote.`,
		Example: "  strait trust roots\n  strait trust roots --pem eu-west.acme > eu-west.pem",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if domain != "" {
				return rootsPEM(e, domain)
			}
			op, done, err := e.operator()
			if err != nil {
				return err
			}
			defer done()
			r, err := op.TrustStatus(cmd.Context(), &controlpb.TrustStatusRequest{})
			if err != nil {
				return e.callError(err)
			}
			return e.renderRoots(r)
		}}
	c.Flags().StringVar(&domain, "pem", "", "print the root certificates of this trust domain")
	return c
}

// trustRoot is one row of strait trust roots.
type trustRoot struct {
	TrustDomain string    `json:"trustDomain"`
	Cluster     string    `json:"cluster,omitempty"`
	State       string    `json:"state"`
	Subject     string    `json:"subject"`
	SHA256      string    `json:"sha256"`
	NotBefore   time.Time `json:"notBefore"`
	NotAfter    time.Time `json:"notAfter"`
	Bundle      uint64    `json:"bundle"`
}

func (e *env) renderRoots(r *controlpb.TrustStatusResponse) error {
	var roots []trustRoot
	add := func(td, cluster string, sequence uint64, authorities []*controlpb.Authority) {
		for _, a := range authorities {
			if a.Kind == "root" {
				roots = append(roots, trustRoot{td, cluster, a.State, a.Subject, a.Fingerprint, time.Unix(a.NotBeforeUnix, 0).UTC(), time.Unix(a.NotAfterUnix, 0).UTC(), sequence})
			}
		}
	}
	add(r.TrustDomain, r.Cluster, r.Sequence, r.Authorities)
	for _, b := range r.Bundles {
		add(b.TrustDomain, b.Cluster, b.Sequence, b.Authorities)
	}
	t := &table{head: []string{"TRUST DOMAIN", "CLUSTER", "STATE", "SUBJECT", "ENDS", "SHA-256"}}
	for _, root := range roots {
		t.add(root.SHA256, root.TrustDomain, orDash(root.Cluster), root.State, root.Subject, day(root.NotAfter.Unix()), e.shortHash(root.SHA256))
	}
	return e.print("TrustRoots", map[string]any{"roots": roots}, t)
}

func rootsPEM(e *env, domain string) error {
	td, err := spiffeid.ParseTrustDomain(domain)
	if err != nil {
		return problem.New(problem.Usage, "--pem: %v", err)
	}
	bundles, err := e.trustedBundles()
	if err != nil {
		return err
	}
	b := bundles.Get(td)
	if b == nil {
		return problem.New(problem.NotFound, "no bundle of %s is trusted here", td).WithFix("strait trust roots lists whose there are")
	}
	for _, c := range b.Roots() {
		if err := pem.Encode(e.out, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
			return err
		}
	}
	return nil
}

// trustedBundles are the bundles that can be read here without asking anybody: those of the data directory, or the own one of an
// operator's directory.
func (e *env) trustedBundles() (*trust.Bundles, error) {
	c, err := e.current()
	if err != nil {
		return nil, err
	}
	if c.Server == "" {
		return controlplane.ReadBundles(c.DataDir)
	}
	identity, err := os.ReadFile(filepath.Join(c.Credential, "operator.pem"))
	if err != nil {
		return nil, problem.New(problem.ConfigInvalid, "operator certificate: %v", err)
	}
	id, err := trust.ParseIdentityPEM(identity)
	if err != nil {
		return nil, problem.New(problem.ConfigInvalid, "%s: %v", c.Credential, err)
	}
	jwks, err := os.ReadFile(filepath.Join(c.Credential, "bundle.json"))
	if err != nil {
		return nil, problem.New(problem.ConfigInvalid, "trust bundle: %v", err)
	}
	b, err := trust.ParseBundle(id.ID.TrustDomain(), jwks)
	if err != nil {
		return nil, problem.New(problem.ConfigInvalid, "%s/bundle.json: %v", c.Credential, err)
	}
	return trust.NewBundles(b)
}

type rotateOptions struct {
	action string
	root   string
	force  bool
	wait   bool
}

func newTrustRotateCmd(e *env) *cobra.Command {
	var o rotateOptions
	steps := []string{"prepare", "activate", "retire", "abort"}
	c := &cobra.Command{Use: "rotate prepare|activate|retire|abort", Short: "Replace this cluster's root, step by step, without an interruption",
		Args: cobra.MaximumNArgs(1), ValidArgs: steps,
		Long: `Replace this cluster's root, and with it its issuer and JWT key, without an interruption:

  prepare   make the next root and publish it; nothing is issued by it
  activate  issue by the next root, in a way that those verify who know only the old one; everybody renews within 30 s
  retire    take the old root out of the bundle
  abort     go back from what was only prepared

Activate is refused while a connected process has not taken the next root, retire while any member or any process that may still be used
has not, or holds an identity from before activate. With --wait a step that would be refused waits until it is possible, and a step that
was done waits until the next one is; one line is printed for each change. --force does it at once, and says who is left behind.`,
		Example: "  strait trust rotate prepare --wait\n  strait trust rotate activate --wait --timeout 5m\n  strait trust rotate retire --wait\n  strait trust rotate prepare --root-cert root.pem",
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			o.action = args[0]
			return rotateRun(cmd.Context(), e, o)
		}}
	c.Flags().BoolVar(&o.force, "force", false, "do it although some would be left behind; they are listed")
	c.Flags().BoolVar(&o.wait, "wait", false, "wait until the step is possible, and then until the next one is")
	c.Flags().StringVar(&o.root, "root-cert", "", "of prepare: certificate of a root whose key is kept elsewhere (PEM)")
	return c
}

// rotationPoll is how often progress is asked for.
const rotationPoll = 200 * time.Millisecond

func rotateRun(ctx context.Context, e *env, o rotateOptions) error {
	req := &controlpb.TrustRotateRequest{Action: o.action, Force: o.force}
	if o.root != "" {
		if o.action != "prepare" {
			return problem.New(problem.Usage, "--root-cert is for prepare")
		}
		data, err := os.ReadFile(o.root)
		if err != nil {
			return problem.New(problem.Usage, "--root-cert: %v", err)
		}
		req.RootPem = data
	}
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	r, err := e.takeStep(ctx, op, req, o.wait)
	if err != nil {
		return err
	}
	e.leftBehind(o.action, r)
	if o.wait {
		if r, err = e.awaitRotation(ctx, op, o.action); err != nil {
			return err
		}
	}
	if e.output != "table" && e.output != "wide" || e.jq != "" {
		return e.renderTrustStatus(r)
	}
	fmt.Fprintf(e.out, "%s: %s\n", r.Phase, rotated(o.action, r))
	if !o.wait {
		fmt.Fprintln(e.out, "progress: strait trust status")
	}
	return nil
}

// takeStep asks for the step, again and again while it is refused for somebody who lacks something, if wait.
func (e *env) takeStep(ctx context.Context, op controlpb.OperatorClient, req *controlpb.TrustRotateRequest, wait bool) (*controlpb.TrustStatusResponse, error) {
	tick := time.NewTicker(rotationPoll)
	defer tick.Stop()
	said := ""
	for {
		r, err := op.TrustRotate(ctx, req)
		if err == nil {
			return r, nil
		}
		if timedOut(ctx, err) && said != "" {
			return nil, unfinished(req.Action, said, e.timeout).WithState("nothing was changed; the phase is as before.")
		}
		err = e.callError(err)
		if !wait || !problem.Is(err, problem.RotationWaits) {
			return nil, err
		}
		if text := problem.From(err).What; text != said {
			said = text
			e.progress("  %s %s waits: %s", e.glyph("wait"), req.Action, strings.ReplaceAll(text, "\n", "\n      "))
		}
		select {
		case <-ctx.Done():
			return nil, unfinished(req.Action, said, e.timeout).WithState("nothing was changed; the phase is as before.")
		case <-tick.C:
		}
	}
}

// timedOut reports whether a call ended with the time that was given; the server may notice it before our own clock does.
func timedOut(ctx context.Context, err error) bool {
	return ctx.Err() != nil || status.Code(err) == codes.DeadlineExceeded
}

// awaitRotation waits until the next step is possible, and after retire and abort until everybody who is there has followed.
func (e *env) awaitRotation(ctx context.Context, op controlpb.OperatorClient, action string) (*controlpb.TrustStatusResponse, error) {
	tick := time.NewTicker(rotationPoll)
	defer tick.Stop()
	said := ""
	late := func() error {
		return unfinished(action, said, e.timeout).WithHeadline("%s is done, the step after it is not possible yet", action).
			WithState("the rotation goes on by itself.")
	}
	for {
		r, err := op.TrustStatus(ctx, &controlpb.TrustStatusRequest{})
		if err != nil && timedOut(ctx, err) && said != "" {
			return nil, late()
		}
		if err != nil {
			return nil, e.callError(err)
		}
		if text := rotationStage(r); text != said {
			said = text
			e.progress("  %s %s", e.glyph("wait"), text)
		}
		if followed(r) {
			e.progress("  %s %s", e.glyph("ok"), "everybody who is there has followed")
			return r, nil
		}
		select {
		case <-ctx.Done():
			return nil, late()
		case <-tick.C:
		}
	}
}

// followed says whether the next step is possible: in phase steady, whether everybody has followed who can be reached.
func followed(r *controlpb.TrustStatusResponse) bool {
	if r.Phase != "steady" {
		return r.MayAdvance
	}
	for _, p := range r.Progress {
		if p.Kind != "operator" && p.Reachable && lacking(r.Phase, p) {
			return false
		}
	}
	return true
}

func unfinished(action, what string, timeout time.Duration) *problem.Error {
	return problem.New(problem.RotationUnfinished, "%s", what).WithHeadline("%s is not possible yet, after %s", action, timeout)
}

// rotated says what a step has brought.
func rotated(action string, r *controlpb.TrustStatusResponse) string {
	switch action {
	case "prepare":
		return fmt.Sprintf("bundle %d has the next root; it signs nothing yet", r.Sequence)
	case "activate":
		return "the next root signs; who knows only the old one still verifies"
	case "retire":
		return fmt.Sprintf("bundle %d is without the old root; the rotation is complete", r.Sequence)
	}
	return fmt.Sprintf("bundle %d is without the root that was prepared", r.Sequence)
}

// leftBehind says who stops working, and what each of them must do.
func (e *env) leftBehind(action string, r *controlpb.TrustStatusResponse) {
	for _, p := range r.Progress {
		var text string
		switch {
		case action == "activate":
			text = fmt.Sprintf("has bundle %d, and knows only the old root: before retire it has to take bundle %d", p.Sequence, r.Sequence)
		case p.Kind == "member":
			text = fmt.Sprintf("has bundle %d of ours and refuses our identities until it joins again: strait token issue --cluster %s --out FILE, "+
				"and on that cluster strait join FILE", p.Sequence, p.Name)
		case p.Kind == "operator":
			text = "has a certificate of the old root: strait access issue " + p.Name + " --role ROLE"
		case !p.Acknowledged:
			text = "does not know the new root: it has to register again with a new token (" + tokenFor(p.Name) + ")"
		default:
			text = "holds an identity of the old root: others refuse it until it renews; when that fails, it has to register again (" + tokenFor(p.Name) + ")"
		}
		fmt.Fprintf(e.err, "%s warn  %s %s %s  [%s]\n", e.glyph("warn"), p.Kind, p.Name, text, problem.RotationWaits)
	}
}

// tokenFor is the command that makes a registration token for a process.
func tokenFor(process string) string {
	if strings.Contains(process, "/") {
		return "strait workload register, with --token-out"
	}
	return "strait token gateway " + process + " --out FILE"
}

func (e *env) sinceUnix(unix int64) string {
	if unix == 0 {
		return ""
	}
	t := time.Unix(unix, 0).UTC()
	return fmt.Sprintf(" since %s (%s)", t.Format("2006-01-02 15:04:05"), shortDuration(e.now().Sub(t)))
}

func (e *env) ago(unix int64) string {
	if unix == 0 {
		return "never"
	}
	return shortDuration(e.now().Sub(time.Unix(unix, 0))) + " ago"
}

func (e *env) shortHash(h string) string {
	if e.output == "wide" || len(h) < 16 {
		return h
	}
	return h[:16]
}

func day(unix int64) string {
	if unix == 0 {
		return "-"
	}
	return time.Unix(unix, 0).UTC().Format("2006-01-02")
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
