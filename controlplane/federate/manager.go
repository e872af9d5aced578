// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"context"
	"errors"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

var errNotYet = errors.New("federate: not yet")

// Manager is the control plane's side of the federation.
type Manager struct {
	controlpb.UnimplementedGatewaysServer
}

// New reads what the data directory holds. It starts nothing.
func New(cfg Config) (*Manager, error) { return nil, errNotYet }

// Run does the background work until ctx ends.
func (m *Manager) Run(ctx context.Context) error { return errNotYet }

// View returns the newest snapshot; never nil.
func (m *Manager) View() *View { return nil }

// Changed returns a channel that is closed at the next change of View.
func (m *Manager) Changed() <-chan struct{} { return nil }

// SetOffers replaces what each consumer is offered: entry bodies by catalog key ("svc/<ns>/<name>" → controlpb.CatalogService,
// deterministically marshalled). Consumers that are not in the map are offered nothing. Own gateway records are added here.
func (m *Manager) SetOffers(offers map[spiffeid.TrustDomain]map[string][]byte) {}

// Handler answers a peer's query. An error that is a *problem.Error keeps its code.
type Handler func(ctx context.Context, from spiffeid.TrustDomain, body []byte) ([]byte, error)

// Handle registers the handler of a method; built in are probe, probe-back, head-of, introduce and leave. Only ready peers reach it.
func (m *Manager) Handle(method string, h Handler) {}

// Reply is a peer's answer.
type Reply struct {
	Body      []byte
	Elapsed   float64 // seconds, as the gateway measured
	Transport string
	Gateway   string // own, that carried it
}

// Ask asks a peer's control plane through the tunnel. Without a live tunnel: STR-2101.
func (m *Manager) Ask(ctx context.Context, td spiffeid.TrustDomain, method string, body []byte) (*Reply, error) {
	return nil, errNotYet
}

// Join joins the token's issuer, or resumes that, and calls progress after each stage, from one goroutine. The error is also in the
// last progress message.
func (m *Manager) Join(ctx context.Context, token string, sameness []string, checkOnly bool, progress func(*controlpb.JoinProgress)) error {
	return errNotYet
}

// TokenIssue makes a join token.
func (m *Manager) TokenIssue(ctx context.Context, req *controlpb.TokenIssueRequest) (*controlpb.TokenIssueResponse, error) {
	return nil, errNotYet
}

// TokenList lists join tokens, newest first.
func (m *Manager) TokenList(ctx context.Context) ([]*controlpb.TokenInfo, error) {
	return nil, errNotYet
}

// TokenRevoke ends a token that is not used up.
func (m *Manager) TokenRevoke(ctx context.Context, id string) error { return errNotYet }

// Approve lets an awaiting peer in.
func (m *Manager) Approve(ctx context.Context, cluster federation.ClusterName) (*controlpb.Member, error) {
	return nil, errNotYet
}

// Evict withdraws a peer at once and keeps its name reserved.
func (m *Manager) Evict(ctx context.Context, cluster federation.ClusterName) (*controlpb.Member, error) {
	return nil, errNotYet
}

// Leave tells every peer and drops them all.
func (m *Manager) Leave(ctx context.Context, progress func(*controlpb.JoinProgress)) error {
	return errNotYet
}

// SetSameness replaces the namespaces in which a peer's services are the same as ours; AllNamespaces for all.
func (m *Manager) SetSameness(td spiffeid.TrustDomain, namespaces []string) error { return errNotYet }

// Members lists the own cluster first, then the peers.
func (v *View) Members() []*controlpb.Member { return nil }
