// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/discovery"
	"github.com/strait-mesh/strait/controlplane/identity"
	"github.com/strait-mesh/strait/controlplane/rotation"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// rotationState is what the control plane itself has followed of its CA.
type rotationState struct {
	*rotation.Tracker

	// who is there, what they have acknowledged, and what members say: methods of the control plane, but for tests
	connected func() map[string]spiffeid.ID
	holders   func() (body []byte, list []discovery.Holder)
	members   func() []rotation.MemberState

	step sync.Mutex // one step of a rotation at a time

	mu       sync.Mutex
	followed authorityMark
}

// authorityMark tells one state of the CA from another.
type authorityMark struct {
	bundle *trust.Bundle
	recall time.Time
	issuer string
}

func (c *ControlPlane) openRotation() (err error) {
	c.rotation.connected, c.rotation.members = c.connected, c.memberStates
	c.rotation.holders = func() ([]byte, []discovery.Holder) {
		return c.discovery.Holders(controlpb.TypeBundle, c.self.trustDomain.String())
	}
	c.rotation.Tracker, err = rotation.Open(rotation.Config{Dir: c.dir, Now: c.now, Logger: c.log})
	return err
}

// authorityChanged is closed at the next change of the CA, or of what the Workload API says.
func (c *ControlPlane) authorityChanged() <-chan struct{} {
	if c.ca == nil {
		return c.elsewhere.Changed()
	}
	return c.ca.Changed()
}

// recall is when identities were last recalled: those issued before are to be renewed now.
func (c *ControlPlane) recall() time.Time {
	if c.ca == nil {
		return time.Time{}
	}
	return c.ca.State().RenewIssuedBefore
}

// followAuthority puts in force here what the CA has become: the bundle, and identities of the issuer that it has now.
func (c *ControlPlane) followAuthority() error {
	if c.ca == nil {
		c.followElsewhere()
		return nil
	}
	c.rotation.mu.Lock()
	defer c.rotation.mu.Unlock()
	state := c.ca.State()
	mark := authorityMark{bundle: c.ca.Bundle(), recall: state.RenewIssuedBefore}
	for _, a := range state.Authorities {
		if a.Kind == "issuer" && a.State == "active" {
			mark.issuer = a.KeyID
		}
	}
	if mark == c.rotation.followed {
		return nil
	}
	c.source.SetBundles(c.source.Bundles().With(mark.bundle))
	if err := c.issueOwn(); err != nil {
		return err
	}
	c.rotation.followed = mark
	c.log.Info("own identities renewed for the CA", "phase", state.Phase, "sequence", mark.bundle.Sequence())
	return nil
}

const (
	// followPause gathers acknowledgements: so long after the first, whatever else comes.
	followPause = 50 * time.Millisecond
	// followEvery is how often processes that are connected are noted although nothing changes, and a failure is tried again.
	followEvery = 10 * time.Second
)

// rotationLoop follows the CA, and notes who acknowledges what.
func (c *ControlPlane) rotationLoop(ctx context.Context) error {
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		authority, acked := c.authorityChanged(), c.discovery.Changed()
		if err := c.followAuthority(); err != nil {
			c.log.Error("own identity not renewed", "err", err)
		}
		c.noteAcknowledged()
		select {
		case <-ctx.Done():
			return nil
		case <-authority:
			continue
		case <-acked:
		case <-tick.C:
		}
		pause.Reset(followPause)
		select {
		case <-ctx.Done():
			return nil
		case <-pause.C:
		}
	}
}

// noteAcknowledged notes who is connected, and who has put which bundle of the own trust domain in force.
func (c *ControlPlane) noteAcknowledged() {
	for name, id := range c.rotation.connected() {
		c.rotation.Seen(name, id)
	}
	body, holders := c.rotation.holders()
	b := &controlpb.Bundle{}
	if body == nil || proto.Unmarshal(body, b) != nil {
		return
	}
	for _, h := range holders {
		if h.Acked {
			c.rotation.Acknowledged(h.Node, h.Peer, b.GetSequence())
		}
	}
}

// connected are the processes of this cluster that are there: by a discovery stream, a session or a gateway's link.
func (c *ControlPlane) connected() map[string]spiffeid.ID {
	out := map[string]spiffeid.ID{}
	for name, s := range c.sessions.View().Sessions {
		if s.Live {
			out[name] = s.ID
		}
	}
	for _, g := range c.federate.View().Gateways {
		if g.Connected {
			out[g.Name] = g.ID
		}
	}
	for _, s := range c.discovery.Subscribers() {
		if s.Node != "" {
			out[s.Node] = s.Peer
		}
	}
	return out
}

// verifyNode judges the name that a process gives itself in discovery, and notes which identity it came with.
func (c *ControlPlane) verifyNode(ctx context.Context, peer spiffeid.ID, node *controlpb.Node) error {
	if err := discovery.RoleVerifyNode(c.owner)(ctx, peer, node); err != nil {
		return err
	}
	if p, ok := identity.PeerFromContext(ctx); ok && len(p.Chain) > 0 {
		c.rotation.Issued(node.GetId(), peer, false, rotation.Identity{Issued: trust.Issued(p.Chain[0]), NotAfter: p.NotAfter})
	}
	return nil
}

// renewed notes an identity that was issued to a process. One that gives itself a name that is not its own is nobody: its identity
// counts when it next connects.
func (c *ControlPlane) renewed(r identity.Renewal) {
	if discovery.RoleVerifyNode(c.owner)(context.Background(), r.ID, &controlpb.Node{Id: r.Proxy}) != nil {
		return
	}
	c.rotation.Issued(r.Proxy, r.ID, r.Application, rotation.Identity{Issued: r.Issued, NotAfter: r.NotAfter, Issuer: r.Issuer})
}

// situation gathers what a report is made of.
func (c *ControlPlane) situation() rotation.Situation {
	s := rotation.Situation{Phase: rotation.Steady, Sequence: c.issuer.Bundle().Sequence(), Connected: c.rotation.connected(), Members: c.rotation.members(), Withdrawn: c.withdrawnIssued}
	if c.ca != nil {
		state := c.ca.State()
		s.Phase, s.RenewIssuedBefore = state.Phase, state.RenewIssuedBefore
	}
	return s
}

// memberStates is what other members have said of our bundle.
func (c *ControlPlane) memberStates() (out []rotation.MemberState) {
	for _, p := range c.federate.View().Peers {
		if p.Trusted() {
			out = append(out, rotation.MemberState{Cluster: p.Cluster.String(), Seen: p.SeenOurs, Reachable: p.TunnelUp, LastSeen: p.BundleUpdated})
		}
	}
	return out
}

// renewOwn renews the control plane's own identities at their time, never between a step of the CA and what follows it.
func (c *ControlPlane) renewOwn() error {
	c.rotation.mu.Lock()
	defer c.rotation.mu.Unlock()
	return c.issueOwn()
}

// tokenSigner signs JWT-SVIDs with the CA, and notes how long those of a key last that the next retire takes away.
type tokenSigner struct{ c *ControlPlane }

// SignJWT implements identity.JWTSigner.
func (s tokenSigner) SignJWT(id spiffeid.ID, audience []string) (string, time.Time, error) {
	old := s.c.ca.State().Phase != rotation.Activated
	token, notAfter, err := s.c.ca.SignJWT(id, audience)
	if err == nil && old {
		s.c.rotation.TokenIssued(notAfter)
	}
	return token, notAfter, err
}

// withdrawnIssued says whether an identity issued at a time was withdrawn.
func (c *ControlPlane) withdrawnIssued(id spiffeid.ID, issued time.Time) bool {
	_, denied := c.denied.Denied(id, issued)
	return denied
}

// takeStep does one step of a rotation with the CA and follows it.
func (c *ControlPlane) takeStep(action string, rootPEM []byte) error {
	steps := map[string]func() error{"prepare": c.ca.Prepare, "activate": c.ca.Activate, "retire": c.ca.Retire, "abort": c.ca.Abort}
	if len(rootPEM) > 0 {
		steps["prepare"] = func() error { return c.ca.PrepareRoot(rootPEM) }
	}
	if err := steps[action](); err != nil {
		return err
	}
	return c.followAuthority()
}

// describeWaiting says who is waited for, in one text of a bounded length.
func describeWaiting(rows []rotation.Row) string {
	const most = 8
	var parts []string
	for i, r := range rows {
		if i == most {
			parts = append(parts, "and "+fmt.Sprintf("%d more", len(rows)-most))
			break
		}
		parts = append(parts, string(r.Kind)+" "+r.Name+" "+r.Lacks)
	}
	return strings.Join(parts, "\n")
}
