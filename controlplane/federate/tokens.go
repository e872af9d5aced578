// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"context"
	"slices"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/federation/join"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TokenIssue makes a join token for one cluster. Without a gateway that others can reach: STR-2105.
func (m *Manager) TokenIssue(_ context.Context, req *controlpb.TokenIssueRequest) (*controlpb.TokenIssueResponse, error) {
	cluster, err := federation.ParseClusterName(req.GetCluster())
	if err != nil {
		return nil, problem.New(problem.Usage, "%v", err).WithWhy("a token is for one cluster").WithFix("strait token issue --cluster NAME")
	}
	if cluster == m.cfg.Cluster {
		return nil, problem.New(problem.Usage, "%s is this cluster itself", cluster).WithFix("name the cluster that is to join")
	}
	sameness, err := parseSameness(req.GetSameness())
	if err != nil {
		return nil, err
	}
	bundle := m.cfg.Bundle()
	if bundle == nil {
		return nil, problem.New(problem.Internal, "this cluster has no trust bundle yet").Retry()
	}
	gateways, err := m.tokenGateways()
	if err != nil {
		return nil, err
	}
	tok, err := m.tokens.Issue(join.Token{
		Federation: m.cfg.Federation, Cluster: m.cfg.Cluster, TrustDomain: m.cfg.TrustDomain, Gateways: gateways,
		BundleHash: bundle.Hash(), AllowedCluster: cluster, Approve: join.Approve(req.GetApprove()),
	}, sameness, time.Duration(req.GetTtlSeconds())*time.Second)
	if err != nil {
		return nil, err
	}
	text, err := tok.Text()
	if err != nil {
		return nil, err
	}
	m.log.Info("join token issued", "token", tok.ID, "cluster", cluster.String(), "approve", string(tok.Approve))
	return &controlpb.TokenIssueResponse{Token: text, Id: tok.ID, ExpiresUnix: tok.Expires.Unix(), Addresses: tok.Addresses()}, nil
}

// tokenGateways are the own gateways that a joiner can dial: at most 16, 8 addresses each.
func (m *Manager) tokenGateways() ([]join.TokenGateway, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []join.TokenGateway
	for _, r := range m.ownRecordsLocked() {
		id, err := spiffeid.Gateway(m.cfg.TrustDomain, r.GetName())
		if err != nil || len(r.GetAddresses()) == 0 || len(out) == 16 {
			continue
		}
		out = append(out, join.TokenGateway{ID: id, Addresses: r.GetAddresses()[:min(8, len(r.GetAddresses()))]})
	}
	if len(out) > 0 {
		return out, nil
	}
	p := problem.New(problem.NoGateway, "no gateway of %s says where others reach it", m.cfg.Cluster).
		WithState("no token was issued")
	if len(m.gateways) > 0 {
		p = p.WithWhy("a gateway runs, but it advertises no address").
			WithFix("strait gateway --advertise HOST:PORT, or spec.gatewayAddresses of the Federation")
	}
	return nil, p
}

// TokenList lists join tokens, newest first.
func (m *Manager) TokenList(context.Context) ([]*controlpb.TokenInfo, error) {
	var out []*controlpb.TokenInfo
	now := m.now()
	for _, r := range m.tokens.List() {
		info := &controlpb.TokenInfo{
			Id: r.ID, Cluster: r.AllowedCluster.String(), ExpiresUnix: r.Expires.Unix(), State: string(r.State(now)), Kind: "join",
			Sameness: slices.Clone(r.Sameness), Approve: string(r.Approve),
		}
		if r.IsBound() {
			info.BoundTo = r.Binding.TrustDomain.String()
			info.ExpiresUnix = r.BoundAt.Add(join.Resume).Unix()
		}
		out = append(out, info)
	}
	return out, nil
}

// TokenRevoke ends a token that is not used up; a join that it had begun ends with it.
func (m *Manager) TokenRevoke(_ context.Context, id string) error {
	if err := m.tokens.Revoke(id); err != nil {
		return err
	}
	m.log.Info("join token revoked", "token", id)
	m.mu.Lock()
	defer m.mu.Unlock()
	for td, p := range m.peers {
		if p.rec.TokenID == id && p.rec.Role == roleIssuer && unfinished(p.rec.State) {
			return m.removeLocked(td)
		}
	}
	return nil
}
