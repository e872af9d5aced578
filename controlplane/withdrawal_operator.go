// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/discovery"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/controlplane/identity"
	"github.com/strait-mesh/strait/controlplane/rotation"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	// confirmWait is how long a withdrawal waits for everybody to confirm it: what it promises.
	confirmWait = 5 * time.Second
	// confirmEvery is how often members are asked again meanwhile.
	confirmEvery = 250 * time.Millisecond
	// memberWait bounds one question to a member.
	memberWait = 2 * time.Second
	// maxReason bounds an operator's reason, in bytes.
	maxReason = 256
	// maxAsked bounds the identities in one question to a member.
	maxAsked = 500
)

// WorkloadEvict implements controlpb.OperatorServer.
func (o *operator) WorkloadEvict(ctx context.Context, req *controlpb.WorkloadEvictRequest) (*controlpb.WorkloadEvictResponse, error) {
	s, err := o.withdraw(ctx, req.SpiffeId, req.Reason, o.c.denied.Add)
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	return &controlpb.WorkloadEvictResponse{Confirmed: s.Confirmed, Unconfirmed: s.Unconfirmed}, nil
}

// TrustRevoke implements controlpb.OperatorServer.
func (o *operator) TrustRevoke(ctx context.Context, req *controlpb.TrustRevokeRequest) (*controlpb.WithdrawalStatus, error) {
	add := o.c.denied.Add
	if req.IssuedBeforeNow {
		add = o.c.denied.AddIssued
	}
	s, err := o.withdraw(ctx, req.SpiffeId, req.Reason, add)
	return s, wire.ToStatus(err)
}

func (o *operator) withdraw(ctx context.Context, text, reason string, add func(spiffeid.ID, string) error) (*controlpb.WithdrawalStatus, error) {
	id, err := o.subject(ctx, text)
	if err != nil {
		return nil, err
	}
	if reason == "" {
		reason = "withdrawn by an operator"
	}
	if len(reason) > maxReason {
		return nil, problem.New(problem.Usage, "the reason has %d bytes; at most %d", len(reason), maxReason)
	}
	// The list first, then the tokens: a registration in between finds the identity withdrawn, one afterwards its token revoked.
	if err := add(id, reason); err != nil {
		return nil, err
	}
	if err := o.c.tokens.RevokeFor(id); err != nil {
		return nil, err
	}
	o.c.log.Info("identity withdrawn", "id", id, "reason", reason)
	return o.awaitConfirmed(ctx, id), nil
}

// WorkloadReadmit implements controlpb.OperatorServer.
func (o *operator) WorkloadReadmit(ctx context.Context, req *controlpb.WorkloadReadmitRequest) (*controlpb.WithdrawalStatus, error) {
	id, err := o.subject(ctx, req.SpiffeId)
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	// Once more, before it is admitted: a token whose revocation an earlier failure has left out would be good again.
	if err := o.c.tokens.RevokeFor(id); err != nil {
		return nil, wire.ToStatus(err)
	}
	err = o.c.denied.Readmit(id)
	if errors.Is(err, identity.ErrNotWithdrawn) {
		err = problem.New(problem.NotFound, "%s is not withdrawn", id).WithFix("strait trust withdrawals lists those that are")
	}
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	o.c.log.Info("identity readmitted", "id", id)
	o.awaitIssuable(ctx, id)
	return o.awaitConfirmed(ctx, id), nil
}

// awaitIssuable waits for the second from which a readmitted identity may be issued again: at most one, unless the clock was set back.
func (o *operator) awaitIssuable(ctx context.Context, id spiffeid.ID) {
	d, _ := o.c.denied.Find(id)
	t := time.NewTimer(min(d.IssuedBefore.Sub(o.c.now()), 2*time.Second))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// Withdrawals implements controlpb.OperatorServer.
func (o *operator) Withdrawals(ctx context.Context, _ *controlpb.WithdrawalsRequest) (*controlpb.WithdrawalsResponse, error) {
	all := o.c.denied.All()
	ids := make([]spiffeid.ID, 0, len(all))
	for id := range all {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b spiffeid.ID) int {
		return cmp.Or(all[b].At.Compare(all[a].At), cmp.Compare(a.String(), b.String())) // newest first
	})
	return &controlpb.WithdrawalsResponse{Withdrawals: o.c.withdrawals(ctx, ids)}, nil
}

// subject judges whether a caller may withdraw or readmit an identity. Workloads are an operator's matter, gateways and operators an
// admin's, and the control plane's own identities nobody's: nothing could be said to a proxy any more.
func (o *operator) subject(ctx context.Context, text string) (spiffeid.ID, error) {
	id, err := spiffeid.Parse(text)
	if err != nil {
		return id, problem.New(problem.Usage, "%v", err)
	}
	if id.TrustDomain() != o.c.self.trustDomain {
		return id, problem.New(problem.Usage, "%s is not of this cluster's trust domain %s", id, o.c.self.trustDomain).
			WithFix("withdraw it on its own cluster, or all trust in that member: strait member evict")
	}
	kind := identity.KindOf(id)
	if kind&(identity.Workload|identity.Gateway|identity.Operator) == 0 {
		return id, problem.New(problem.Usage, "%s is neither a workload nor a gateway nor an operator", id)
	}
	caller, err := identity.IDFromContext(ctx)
	if err != nil || kind == identity.Workload {
		return id, nil // the local socket is admin; who may call at all may do it with a workload
	}
	if name, _ := caller.Operator(); o.c.roles.of(name, o.c.now()) < roleAdmin {
		return id, problem.New(problem.AccessDenied, "%s may withdraw workloads only", caller)
	}
	return id, nil
}

// awaitConfirmed waits until everybody has confirmed what the list says of an identity, at most confirmWait.
func (o *operator) awaitConfirmed(ctx context.Context, id spiffeid.ID) *controlpb.WithdrawalStatus {
	wait, cancel := context.WithTimeout(ctx, confirmWait)
	defer cancel()
	var last *controlpb.WithdrawalStatus
	for {
		changed := o.c.discovery.Changed()
		s := o.c.withdrawals(wait, []spiffeid.ID{id})[0]
		switch {
		case len(s.Unconfirmed) == 0:
			return s
		case wait.Err() != nil && last != nil:
			return last // members had no time to answer this one
		case wait.Err() != nil:
			return s
		}
		last = s
		t := time.NewTimer(confirmEvery)
		select {
		case <-wait.Done():
		case <-changed:
		case <-t.C:
		}
		t.Stop()
	}
}

// withdrawals says of each identity how far its withdrawal, or its readmission, has got.
func (c *ControlPlane) withdrawals(ctx context.Context, ids []spiffeid.ID) []*controlpb.WithdrawalStatus {
	out := make([]*controlpb.WithdrawalStatus, len(ids))
	asked := make([]askedDenial, len(ids))
	processes := c.processes()
	for i, id := range ids {
		d, _ := c.denied.Find(id)
		s := &controlpb.WithdrawalStatus{SpiffeId: id.String(), Reason: d.Reason, AtUnix: d.At.Unix()}
		asked[i] = askedDenial{ID: id.String()}
		if !d.IssuedBefore.IsZero() {
			s.IssuedBeforeUnix, asked[i].IssuedBefore = d.IssuedBefore.Unix(), d.IssuedBefore.UnixMilli()
		}
		acked := c.confirmedBy(asked[i])
		for _, p := range processes {
			if acked[p.Name] {
				s.Confirmed++
			} else {
				s.Unconfirmed = append(s.Unconfirmed, p.Name+" ("+lastSeen(p)+")")
			}
		}
		out[i] = s
	}
	for member, lacks := range c.askMembers(ctx, asked) {
		for i, text := range lacks {
			if text != "" {
				out[i].Unconfirmed = append(out[i].Unconfirmed, "member "+member+" ("+text+")")
			}
		}
	}
	for _, s := range out {
		slices.Sort(s.Unconfirmed)
	}
	return out
}

// processes are those of this cluster that hold a valid identity, connected or not.
func (c *ControlPlane) processes() []rotation.Row {
	return slices.DeleteFunc(c.rotation.Report(c.situation()), func(r rotation.Row) bool { return r.Kind != rotation.Proxy })
}

func lastSeen(p rotation.Row) string {
	switch {
	case p.Reachable:
		return "connected, has not answered"
	case p.LastSeen.IsZero():
		return "not seen yet"
	}
	return "last seen " + p.LastSeen.UTC().Format(time.RFC3339)
}

// confirmedBy names the processes that have put a withdrawal in force. None has while another version of it is published.
func (c *ControlPlane) confirmedBy(want askedDenial) map[string]bool {
	body, holders := c.discovery.Holders(controlpb.TypeDenied, want.ID)
	var d controlpb.Denied
	if body == nil || proto.Unmarshal(body, &d) != nil || d.IssuedBeforeMs != want.IssuedBefore {
		return nil
	}
	newest := map[string]discovery.Holder{} // a process may be back while its old stream still stands
	for _, h := range holders {
		if !h.Since.Before(newest[h.Node].Since) {
			newest[h.Node] = h
		}
	}
	acked := make(map[string]bool, len(newest))
	for name, h := range newest {
		acked[name] = h.Acked
	}
	return acked
}

// withdrawnQuery is the question to a member how far withdrawals of ours have got there.
const withdrawnQuery = "withdrawn"

type askedDenial struct {
	ID           string `json:"id"`
	IssuedBefore int64  `json:"issued_before_ms,omitempty"`
}

// answeredDenial is how many of a member's processes have put a withdrawal in force, and how many have not. A member tells
// others no names.
type answeredDenial struct {
	Known       bool `json:"known"` // its control plane has heard of it
	Unconfirmed int  `json:"unconfirmed,omitempty"`
}

// handleWithdrawn answers withdrawnQuery, about identities of the asking trust domain only.
func (c *ControlPlane) handleWithdrawn(_ context.Context, from spiffeid.TrustDomain, body []byte) ([]byte, error) {
	var q []askedDenial
	if err := json.Unmarshal(body, &q); err != nil || len(q) > maxAsked {
		return nil, problem.New(problem.Usage, "malformed query")
	}
	processes := c.processes()
	out := make([]answeredDenial, len(q))
	for i, d := range q {
		id, err := spiffeid.Parse(d.ID)
		if err != nil || id.TrustDomain() != from {
			return nil, problem.New(problem.Usage, "not an identity of %s", from)
		}
		acked := c.confirmedBy(d)
		out[i].Known = acked != nil
		for _, p := range processes {
			if !acked[p.Name] {
				out[i].Unconfirmed++
			}
		}
	}
	return json.Marshal(out)
}

// askMembers asks every member that trusts us, and says by cluster what each identity lacks there; empty: nothing.
func (c *ControlPlane) askMembers(ctx context.Context, asked []askedDenial) map[string][]string {
	var mu sync.Mutex
	var wg sync.WaitGroup
	out := map[string][]string{}
	for _, p := range c.federate.View().Peers {
		if !p.Trusted() {
			continue
		}
		wg.Go(func() {
			lacks := c.askMember(ctx, p, asked)
			mu.Lock()
			defer mu.Unlock()
			out[p.Cluster.String()] = lacks
		})
	}
	wg.Wait()
	return out
}

func (c *ControlPlane) askMember(ctx context.Context, p *federate.Peer, asked []askedDenial) []string {
	ctx, cancel := context.WithTimeout(ctx, memberWait)
	defer cancel()
	lacks := make([]string, 0, len(asked))
	for part := range slices.Chunk(asked, maxAsked) {
		answers, err := c.askWithdrawn(ctx, p, part)
		for i := range part {
			switch {
			case err != nil:
				lacks = append(lacks, "unreachable")
			case !answers[i].Known:
				lacks = append(lacks, "has not heard of it")
			case answers[i].Unconfirmed > 0:
				lacks = append(lacks, fmt.Sprintf("%d of its processes have not confirmed", answers[i].Unconfirmed))
			default:
				lacks = append(lacks, "")
			}
		}
	}
	return lacks
}

func (c *ControlPlane) askWithdrawn(ctx context.Context, p *federate.Peer, asked []askedDenial) ([]answeredDenial, error) {
	q, err := json.Marshal(asked)
	if err != nil {
		return nil, err
	}
	reply, err := c.federate.Ask(ctx, p.TrustDomain, withdrawnQuery, q)
	if err != nil {
		return nil, err
	}
	var answers []answeredDenial
	if err := json.Unmarshal(reply.Body, &answers); err != nil || len(answers) != len(asked) {
		return nil, fmt.Errorf("malformed answer of %s", p.Cluster)
	}
	return answers, nil
}
