// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/rotation"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
)

// TrustStatus implements controlpb.OperatorServer.
func (o *operator) TrustStatus(context.Context, *controlpb.TrustStatusRequest) (*controlpb.TrustStatusResponse, error) {
	return o.c.trustStatus(), nil
}

func (c *ControlPlane) trustStatus() *controlpb.TrustStatusResponse {
	c.noteAcknowledged()
	s := c.situation()
	rows := c.rotation.Report(s)
	own := c.issuer.Bundle()
	sum := own.Hash()
	r := &controlpb.TrustStatusResponse{
		Cluster: c.facts.Cluster, TrustDomain: c.facts.TrustDomain, Phase: s.Phase, Sequence: s.Sequence, BundleSha256: hex.EncodeToString(sum[:]),
		Source: "workload-api", Authorities: authoritiesOf(own), Progress: progressOf(rows), Bundles: c.trustedBundles(),
		MayAdvance: len(rotation.Waiting(rows)) == 0,
	}
	if c.ca == nil {
		return r
	}
	state := c.ca.State()
	r.Source, r.SinceUnix, r.Authorities = "strait", unix(state.Since), nil
	if state.External {
		r.Source = "external"
	}
	for _, a := range state.Authorities {
		r.Authorities = append(r.Authorities, authorityMessage(a))
	}
	return r
}

func authorityMessage(a ca.Authority) *controlpb.Authority {
	m := &controlpb.Authority{
		Kind: a.Kind, State: a.State, Fingerprint: a.KeyID, Key: a.Key, NotBeforeUnix: unix(a.NotBefore), NotAfterUnix: unix(a.NotAfter),
	}
	if a.Cert != nil {
		m.Fingerprint, m.Subject = fingerprint(a.Cert), a.Cert.Subject.CommonName
	}
	return m
}

// authoritiesOf lists what a bundle holds.
func authoritiesOf(b *trust.Bundle) []*controlpb.Authority {
	var out []*controlpb.Authority
	for _, c := range b.Roots() {
		out = append(out, &controlpb.Authority{
			Kind: "root", State: "active", Fingerprint: fingerprint(c), Subject: c.Subject.CommonName, NotBeforeUnix: unix(c.NotBefore), NotAfterUnix: unix(c.NotAfter),
		})
	}
	for _, k := range b.JWTKeys() {
		out = append(out, &controlpb.Authority{Kind: "jwt", State: "active", Fingerprint: k.ID})
	}
	return out
}

func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// unix is a time as the messages carry it; 0 is none.
func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func progressOf(rows []rotation.Row) []*controlpb.RotationProgress {
	out := make([]*controlpb.RotationProgress, 0, len(rows))
	for _, r := range rows {
		out = append(out, &controlpb.RotationProgress{
			Kind: string(r.Kind), Name: r.Name, Sequence: r.Sequence, Acknowledged: r.Acknowledged, Renewed: r.Renewed,
			LastSeenUnix: unix(r.LastSeen), Reachable: r.Reachable,
		})
	}
	return out
}

// trustedBundles are the bundles of other members, and of followed trust domains.
func (c *ControlPlane) trustedBundles() []*controlpb.TrustedBundle {
	out := c.followedBundles()
	for _, p := range c.federate.View().Peers {
		if !p.Trusted() || p.Bundle == nil {
			continue
		}
		sum := p.Bundle.Hash()
		out = append(out, &controlpb.TrustedBundle{
			TrustDomain: p.TrustDomain.String(), Cluster: p.Cluster.String(), Sequence: p.Bundle.Sequence(), Sha256: hex.EncodeToString(sum[:]),
			Authorities: authoritiesOf(p.Bundle), UpdatedUnix: unix(p.BundleUpdated), Source: p.BundleSource, Error: p.BundleError,
		})
	}
	return out
}

// rotationSteps says from which phase each step leads; the step is done already in the phase that it leads to.
var rotationSteps = map[string]struct{ from, to string }{
	"prepare":  {rotation.Steady, rotation.Prepared},
	"activate": {rotation.Prepared, rotation.Activated},
	"retire":   {rotation.Activated, rotation.Steady},
	"abort":    {rotation.Prepared, rotation.Steady},
}

// TrustRotate implements controlpb.OperatorServer. The progress of its answer lists whom the step has left behind: whom --force has
// broken, and after retire the operators whose certificates are of the old root.
func (o *operator) TrustRotate(ctx context.Context, req *controlpb.TrustRotateRequest) (*controlpb.TrustStatusResponse, error) {
	c := o.c
	c.rotation.step.Lock()
	defer c.rotation.step.Unlock()
	left, err := c.rotate(req)
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	r := c.trustStatus()
	r.Progress = progressOf(left)
	c.log.Warn("rotation of the root", "step", req.Action, "force", req.Force, "phase", r.Phase, "sequence", r.Sequence, "left_behind", len(left))
	return r, nil
}

func (c *ControlPlane) rotate(req *controlpb.TrustRotateRequest) (left []rotation.Row, err error) {
	step, ok := rotationSteps[req.Action]
	if !ok {
		return nil, problem.New(problem.Usage, "%q is no step of a rotation", req.Action).WithFix("strait trust rotate prepare|activate|retire|abort")
	}
	if c.ca == nil {
		return nil, problem.New(problem.IdentitiesElsewhere, "the root of %s is not this control plane's to rotate", c.facts.TrustDomain)
	}
	if c.ca.State().External {
		return nil, problem.New(problem.RotationElsewhere, "the root of %s is an external CA's", c.facts.TrustDomain)
	}
	s := c.situation()
	switch {
	case s.Phase == step.to && req.Action != "retire" && req.Action != "abort" && len(req.RootPem) == 0: // with a root, the CA compares it
		return nil, nil // done before: a command whose answer was lost may be repeated
	case s.Phase != step.from && !(s.Phase == step.to && len(req.RootPem) > 0):
		return nil, problem.New(problem.RotationPhase, "%s is for phase %s; the phase is %s", req.Action, step.from, s.Phase).
			WithFix("%s", nextStep[s.Phase])
	}
	c.noteAcknowledged()
	rows := c.rotation.Report(s)
	waiting := rotation.Waiting(rows)
	if len(waiting) > 0 && !req.Force && (req.Action == "activate" || req.Action == "retire") {
		return nil, refuseStep(req.Action, waiting)
	}
	if err := c.takeStep(req.Action, req.RootPem); err != nil {
		return nil, err
	}
	switch req.Action {
	case "activate":
		return waiting, nil
	case "retire":
		return rotation.Broken(rows), nil
	}
	return nil, nil
}

var nextStep = map[string]string{
	rotation.Steady:    "strait trust rotate prepare begins a rotation",
	rotation.Prepared:  "strait trust rotate activate goes on, strait trust rotate abort goes back",
	rotation.Activated: "strait trust rotate retire ends the rotation",
}

// refuseStep says who is waited for, and what can be done about each kind.
func refuseStep(action string, waiting []rotation.Row) error {
	members, away := 0, false
	for _, r := range waiting {
		if r.Kind == rotation.Member {
			members++
		} else if !r.Reachable {
			away = true
		}
	}
	var who []string
	if members > 0 {
		who = append(who, count(members, "member"))
	}
	if n := len(waiting) - members; n == 1 {
		who = append(who, "1 process")
	} else if n > 1 {
		who = append(who, fmt.Sprintf("%d processes", n))
	}
	p := problem.New(problem.RotationWaits, "%s", describeWaiting(waiting)).WithHeadline("%s waits for %s", action, strings.Join(who, " and ")).
		WithFix("strait trust rotate %s --wait waits for them; strait trust status shows the progress", action)
	if members > 0 {
		p = p.WithFix("a member that is unreachable: heal it, or let it go: strait member evict CLUSTER")
	}
	if away {
		p = p.WithFix("a process that is gone for good: wait until its identity has ended, or withdraw it: strait workload evict ID")
	}
	return p.WithFix("strait trust rotate %s --force leaves them behind", action).Retry()
}
