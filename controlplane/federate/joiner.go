// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/federation/join"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Stages of a join as JoinProgress names them, in order.
const (
	stageToken    = "token"
	stageClock    = "clock"
	stageReach    = "reach"
	stageIdentity = "identity"
	stageTrust    = "trust"
	stageApproved = "approved"
	stageCatalog  = "catalog"
	stageProbeIn  = "probe-in"  // the issuer's probe of us
	stageProbeOut = "probe-out" // ours of the issuer
)

var stageTitles = map[string]string{
	stageToken: "token valid", stageClock: "clock skew", stageReach: "reach gateway", stageIdentity: "identity",
	stageTrust: "trust exchanged", stageApproved: "approved", stageCatalog: "catalog",
}

const (
	defaultJoinTime = 60 * time.Second
	gatewayWait     = 3 * time.Second  // for a first gateway of our own to link
	gatewayReturn   = 12 * time.Second // for one that is known: its longest pause between attempts, and a handshake
)

// joinRun is one run of the join command.
type joinRun struct {
	m        *Manager
	tok      *join.Token
	sameness []string
	check    bool
	progress func(*controlpb.JoinProgress)
	began    time.Time
	stage    string // under way
}

// Join joins the token's issuer, or resumes that, and calls progress after each stage, from the calling goroutine. The last message
// is done, or has the problem that is also returned. Without a deadline in ctx it ends after 60 s. checkOnly tries every stage that
// changes nothing on either side. It may be killed after any stage and run again.
func (m *Manager) Join(ctx context.Context, token string, sameness []string, checkOnly bool, progress func(*controlpb.JoinProgress)) error {
	j := &joinRun{m: m, check: checkOnly, progress: progress, began: m.now(), stage: stageToken}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, defaultJoinTime)
		defer cancel()
	}
	err := j.run(ctx, token, sameness)
	if err == nil {
		return nil
	}
	p := j.problem(ctx, err)
	state := "fail"
	if p.Code == problem.AwaitingApproval {
		state = "wait"
	}
	progress(&controlpb.JoinProgress{
		Stage: j.stage, State: state, Title: j.title(), Detail: p.What, Problem: wire.ProblemToProto(p), ElapsedSeconds: j.elapsed(),
	})
	return p
}

func (j *joinRun) elapsed() float64 { return j.m.now().Sub(j.began).Seconds() }

func (j *joinRun) title() string {
	switch j.stage {
	case stageProbeIn:
		return fmt.Sprintf("probe %s→%s", j.tok.Cluster, j.m.cfg.Cluster)
	case stageProbeOut:
		return fmt.Sprintf("probe %s→%s", j.m.cfg.Cluster, j.tok.Cluster)
	}
	return stageTitles[j.stage]
}

// ok reports the stage under way as done and goes on to the next.
func (j *joinRun) ok(next, format string, args ...any) {
	j.report("ok", next, fmt.Sprintf(format, args...))
}

func (j *joinRun) report(state, next, detail string) {
	j.progress(&controlpb.JoinProgress{Stage: j.stage, State: state, Title: j.title(), Detail: detail, ElapsedSeconds: j.elapsed()})
	j.stage = next
}

func (j *joinRun) run(ctx context.Context, text string, sameness []string) error {
	if !j.m.joining.TryLock() {
		return problem.New(problem.Usage, "another join is under way").WithWhy("one at a time").Retry()
	}
	defer j.m.joining.Unlock()
	if err := j.token(text, sameness); err != nil {
		return err
	}
	c, err := j.reach(ctx)
	if err != nil {
		return err
	}
	defer c.close()
	verdict, err := j.converse(ctx, c)
	if err != nil {
		return err
	}
	if verdict.Outcome == join.Checked {
		j.checked(verdict)
		return nil
	}
	if verdict.Outcome == join.Awaiting {
		return problem.New(problem.AwaitingApproval, "an operator of %s has to approve %s", j.tok.Cluster, j.m.cfg.Cluster).
			WithFix("on %s:  strait member approve %s", j.tok.Cluster, j.m.cfg.Cluster).WithFix("then run the same join again").
			WithState("%s is known there and trusted by nobody yet; it may be resumed for %s", j.m.cfg.Cluster, join.Short(verdict.Expires.Sub(j.m.now())))
	}
	if verdict.Approve == string(join.ApproveAuto) {
		j.ok(stageCatalog, "auto (token scope: approve=auto)")
	} else {
		j.ok(stageCatalog, "by an operator of %s (token scope: approve=%s)", j.tok.Cluster, verdict.Approve)
	}
	theirs, err := j.m.swapCatalogs(ctx, c, j.tok.TrustDomain)
	if err != nil {
		return err
	}
	c.close()
	j.m.mu.Lock()
	ours := services(j.m.offers[j.tok.TrustDomain])
	j.m.mu.Unlock()
	j.ok(stageProbeIn, "%d %s offered to us, %d ours exported yet", theirs.GetServices(), plural(theirs.GetServices(), "service"), ours)
	if err := j.probes(ctx); err != nil {
		return err
	}
	j.progress(&controlpb.JoinProgress{
		Stage: "ready", State: "ok", Done: true, ElapsedSeconds: j.elapsed(), Member: j.m.member(j.tok.Cluster),
		Title:  fmt.Sprintf("%s is a ready member of %s", j.m.cfg.Cluster, j.m.cfg.Federation),
		Detail: fmt.Sprintf("Next: strait export SERVICE --to %s", j.tok.Cluster),
	})
	return nil
}

func plural(n uint32, word string) string {
	if n == 1 {
		return word
	}
	return word + "s"
}

// token judges the token by itself, and by what is known here.
func (j *joinRun) token(text string, sameness []string) error {
	m := j.m
	const unchanged = "nothing was changed on either side"
	tok, err := join.ParseToken(text)
	if err != nil {
		return err
	}
	j.tok = tok
	if j.sameness, err = parseSameness(sameness); err != nil {
		return err
	}
	if tok.Federation != m.cfg.Federation {
		return problem.New(problem.TokenWrongFederation, "the token is for the federation %s; this cluster was initialised for %s", tok.Federation, m.cfg.Federation).
			WithState(unchanged)
	}
	if tok.TrustDomain == m.cfg.TrustDomain {
		return problem.New(problem.TokenScope, "the token was issued by this cluster itself").WithFix("run strait join on %s", tok.AllowedCluster).WithState(unchanged)
	}
	if tok.AllowedCluster != m.cfg.Cluster {
		return problem.New(problem.TokenScope, "the token is for the cluster %s; this one is %s", tok.AllowedCluster, m.cfg.Cluster).WithState(unchanged)
	}
	now := m.now()
	resume, err := m.tokenKnown(tok, now)
	if err != nil {
		return err
	}
	life := "expires in " + join.Short(tok.Expires.Sub(now))
	if resume {
		life = "resumed"
	}
	j.ok(stageReach, "federation %s, issued by %s %s ago, single use, %s", tok.Federation, tok.Cluster, join.Short(now.Sub(tok.Issued)), life)
	return nil
}

// tokenKnown judges a token by what is known here and reports whether a join with it is being resumed.
func (m *Manager) tokenKnown(tok *join.Token, now time.Time) (resume bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.peers[tok.TrustDomain]
	resume = p != nil && p.rec.Role == roleJoiner && p.rec.TokenID == tok.ID
	if !resume && !now.Before(tok.Expires) {
		return false, problem.New(problem.TokenExpired, "the token expired %s ago", join.Short(now.Sub(tok.Expires))).
			WithFix("on %s:  strait token issue --cluster %s", tok.Cluster, m.cfg.Cluster).WithState("nothing was changed on either side")
	}
	same := pinned(tok.BundleHash)
	if p != nil && p.bundle != nil {
		same = func(*peer) bool { return true } // judged by what its gateway proves, before anything is said
	}
	return resume, m.nameFreeLocked(tok.TrustDomain, tok.Cluster, tok.BundleHash, same, now)
}

// reach opens a conversation through one of our gateways.
func (j *joinRun) reach(ctx context.Context) (*conv, error) {
	links := j.m.allLinks()
	if len(links) == 0 {
		links = j.awaitGateway(ctx)
	}
	if len(links) == 0 {
		return nil, problem.New(problem.NoGateway, "%s has no gateway that is connected to its control plane", j.m.cfg.Cluster).
			WithState("nothing was changed on either side; the token is still valid for %s", j.validFor()).Retry()
	}
	var err error
	for _, l := range links {
		var c *conv
		if c, err = l.dial(ctx, joinDial(j.tok.Gateways, j.tok.BundleHash)); err == nil {
			return c, nil
		}
		var refused *errOpen
		if !errors.As(err, &refused) || problem.Code(refused.code) != problem.GatewayNotReachable {
			break // another gateway of ours would see the same
		}
	}
	var refused *errOpen
	switch {
	case errors.As(err, &refused) && problem.Code(refused.code) == problem.IdentityMismatch:
		j.stage = stageIdentity
		return nil, problem.New(problem.IdentityMismatch, "%s", printable(refused.message)).
			WithState("nothing was changed on either side; the token is still valid for %s", j.validFor())
	case errors.As(err, &refused):
		return nil, j.unreachable(printable(refused.message))
	case ctx.Err() != nil:
		return nil, j.unreachable("no answer from " + strings.Join(j.tok.Addresses(), ", "))
	}
	return nil, j.unreachable(err.Error())
}

func (j *joinRun) awaitGateway(ctx context.Context) []*link {
	wait := gatewayWait
	if len(j.m.View().Gateways) > 0 {
		wait = gatewayReturn
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		changed := j.m.Changed()
		if links := j.m.allLinks(); len(links) > 0 {
			return links
		}
		select {
		case <-changed:
		case <-timer.C:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

func (j *joinRun) validFor() string { return join.Short(j.tok.Expires.Sub(j.m.now())) }

func (j *joinRun) unreachable(what string) *problem.Error {
	m, addresses := j.m, j.tok.Addresses()
	listed := fmt.Sprintf("the token lists %d addresses for %s and nothing answers there", len(addresses), j.tok.Cluster)
	if len(addresses) == 1 {
		listed = fmt.Sprintf("the token lists one address for %s and nothing listens there", j.tok.Cluster)
	}
	p := problem.New(problem.GatewayNotReachable, "%s", what).
		WithHeadline("%s could not join federation %s: gateway not reachable", m.cfg.Cluster, m.cfg.Federation).
		WithWhy("%s (or a firewall drops it)", listed).
		WithFix("on %s:  strait edit federation   (spec.gatewayAddresses)   then re-issue the token", j.tok.Cluster)
	if len(addresses) > 0 {
		p = p.WithFix("from here:   strait netcheck %s        to test again", addresses[0])
	}
	return p.WithState("nothing was changed on either side; the token is still valid for %s.", j.validFor()).Retry()
}

// converse proves both sides and writes the peer's record.
func (j *joinRun) converse(ctx context.Context, c *conv) (*join.Verdict, error) {
	m := j.m
	o := c.opened
	d, err := join.NewDialler(join.DiallerConfig{
		Self: m.self(), Token: j.tok, JoinerKey: m.joinKey, CheckOnly: j.check, Opened: o, Now: m.now,
	})
	if err != nil {
		j.stage = stageIdentity
		return nil, err
	}
	other, verdict, skew, err := m.greet(ctx, c, d, func(skew time.Duration, serr error) error {
		j.stage = stageClock
		if serr != nil {
			return serr
		}
		if err := m.knownAs(j.tok.TrustDomain, d.Bundle(), d.Chain()); err != nil {
			j.stage = stageIdentity
			return err
		}
		j.ok(stageReach, "%+.2fs (limit %s)", skew.Seconds(), join.Short(join.MaxSkew))
		j.ok(stageIdentity, "%s", reached(o))
		j.ok(stageTrust, "%s proved %s, fingerprint %s matches token", j.tok.Cluster, d.GatewayID(), join.Fingerprint(j.tok.BundleHash))
		return nil
	})
	if err != nil {
		return nil, err
	}
	if verdict.Outcome == join.Checked {
		return verdict, nil
	}
	if err := j.record(other, verdict); err != nil {
		return nil, err
	}
	j.ok(stageApproved, "roots: %s, %s; name scope %s", rootEnd(j.tok.Cluster.String(), other.Bundle),
		rootEnd(m.cfg.Cluster.String(), m.cfg.Bundle()), m.cfg.TrustDomain)
	m.log.Info("trust exchanged", "cluster", other.Cluster.String(), "peer", other.TrustDomain.String(), "outcome", string(verdict.Outcome), "skew", skew.String())
	return verdict, nil
}

func reached(o *controlpb.JoinOpened) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s  rtt %s", o.GetTransport(), o.GetAddress(), millis(o.GetRttSeconds()))
	if o.GetMtu() > 0 {
		fmt.Fprintf(&b, "  mtu %d", o.GetMtu())
	}
	switch {
	case o.GetTransport() == "quic" && o.GetTcpOk():
		b.WriteString("  (tcp fallback also open)")
	case o.GetTransport() == "quic":
		b.WriteString("  (tcp fallback not open)")
	case o.GetTransport() == "tcp" && !o.GetUdpOk():
		b.WriteString("  (udp does not pass)")
	}
	return b.String()
}

func millis(seconds float64) string { return fmt.Sprintf("%.0fms", seconds*1000) }

func rootEnd(cluster string, b *trust.Bundle) string {
	return fmt.Sprintf("%s (exp %s)", cluster, b.NotAfter().UTC().Format("2006-01"))
}

// record writes the issuer as a peer: joining once approved, else awaiting its operator.
func (j *joinRun) record(other *join.Counterpart, verdict *join.Verdict) error {
	m := j.m
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	if err := m.nameFreeLocked(other.TrustDomain, other.Cluster, other.Bundle.Hash(), m.proves(other), now); err != nil {
		return err
	}
	if err := m.dropNamesakesLocked(other.TrustDomain, other.Cluster); err != nil {
		return err
	}
	m.forgetForeignHeadLocked(other.TrustDomain, other.Bundle)
	return m.updateLocked(other.TrustDomain, func(r *record) error {
		if r.State != StateReady {
			first := r.Role != roleJoiner || r.TokenID != j.tok.ID || r.State == StateEvicted
			if first {
				*r = record{TrustDomain: other.TrustDomain, State: StateAwaiting, Since: now}
			}
			if verdict.Outcome == join.Approved {
				r.setState(StateJoining, now)
			}
			r.Expires = now.Add(min(m.cfg.JoinExpiry, max(verdict.Expires.Sub(now), time.Minute)))
			r.Role, r.TokenID = roleJoiner, j.tok.ID
		}
		if len(j.sameness) > 0 {
			r.Sameness = j.sameness
		}
		for _, s := range []string{stageToken, stageClock, stageReach, stageIdentity} {
			r.stage(s)
		}
		m.fill(r, other)
		return nil
	})
}

func (j *joinRun) checked(v *join.Verdict) {
	j.report("skip", stageApproved, "--check changes nothing")
	if v.Approve == string(join.ApproveAuto) {
		j.ok(stageCatalog, "would be: auto (token scope: approve=auto)")
	} else {
		j.ok(stageCatalog, "would wait for an operator of %s (token scope: approve=%s)", j.tok.Cluster, v.Approve)
	}
	j.report("skip", stageProbeIn, "not before trust is exchanged")
	j.report("skip", stageProbeOut, "not before trust is exchanged")
	j.report("skip", stageProbeOut, "not before trust is exchanged")
	j.progress(&controlpb.JoinProgress{
		Stage: "checked", State: "ok", Done: true, ElapsedSeconds: j.elapsed(),
		Title: fmt.Sprintf("%s can join %s", j.m.cfg.Cluster, j.m.cfg.Federation), Detail: "nothing was changed on either side",
	})
}

// greet runs a dialler's conversation up to the verdict. clock is told the skew before the proof is sent.
func (m *Manager) greet(ctx context.Context, c *conv, d *join.Dialler, clock func(time.Duration, error) error) (*join.Counterpart, *join.Verdict, time.Duration, error) {
	hello, err := d.Hello()
	if err != nil {
		return nil, nil, 0, err
	}
	if err := c.send(ctx, hello); err != nil {
		return nil, nil, 0, err
	}
	frame, err := receive(ctx, c)
	if err != nil {
		return nil, nil, 0, err
	}
	proof, skew, err := d.Challenge(frame)
	if clock != nil && (err == nil || problem.Is(err, problem.ClockSkew)) {
		err = clock(skew, err)
	}
	if err != nil {
		return nil, nil, 0, err
	}
	if err := c.send(ctx, proof); err != nil {
		return nil, nil, 0, err
	}
	if frame, err = receive(ctx, c); err != nil {
		return nil, nil, 0, err
	}
	other, verdict, err := d.Verdict(frame)
	return other, verdict, skew, err
}

// swapCatalogs exchanges catalogs as the dialler.
func (m *Manager) swapCatalogs(ctx context.Context, c *conv, td spiffeid.TrustDomain) (*controlpb.JoinCatalog, error) {
	if err := m.sendCatalog(ctx, c, td); err != nil {
		return nil, err
	}
	frame, err := receive(ctx, c)
	if err != nil {
		return nil, err
	}
	theirs, err := join.ParseCatalogFrame(frame)
	if err != nil {
		return nil, err
	}
	return theirs, m.takeCatalog(td, theirs)
}

// problem is what the user sees of err.
func (j *joinRun) problem(ctx context.Context, err error) *problem.Error {
	var p *problem.Error
	if errors.As(err, &p) {
		return p
	}
	var refused *errOpen
	interrupted := errors.Is(err, io.EOF) || errors.Is(err, errLinkEnded) || errors.As(err, &refused) || ctx.Err() != nil ||
		errors.Is(err, context.DeadlineExceeded)
	if !interrupted {
		return problem.From(err)
	}
	what := "the conversation ended before it was complete"
	if refused != nil {
		what = printable(refused.message)
	}
	p = problem.New(problem.GatewayNotReachable, "%s: %s", j.stage, what).
		WithHeadline("%s could not join federation %s: the other side went away", j.m.cfg.Cluster, j.m.cfg.Federation).
		WithWhy("a control plane or a gateway of either side stopped, or took longer than the timeout").
		WithFix("run the same join again; it resumes").Retry().Wrap(err)
	if j.tok == nil {
		return p
	}
	if v := j.m.View().Peer(j.tok.TrustDomain); v != nil && slices.Contains(v.Stages, stageTrust) {
		return p.WithState("%s and %s are joining: nothing routes or trusts yet", j.m.cfg.Cluster, j.tok.Cluster)
	}
	return p.WithState("nothing routes or trusts; the token is still valid for %s", j.validFor())
}
