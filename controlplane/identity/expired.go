// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"crypto/tls"
	"errors"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/register"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// authorizeExpired judges who may renew an identity that has ended: who may renew one that has not.
func authorizeExpired(td spiffeid.TrustDomain) trust.Authorize {
	return func(id spiffeid.ID) error {
		if err := trust.AuthorizeTrustDomain(td)(id); err != nil {
			return err
		}
		if KindOf(id)&callers[controlpb.Identity_Renew_FullMethodName] == 0 {
			return errors.New("neither workload nor gateway")
		}
		return nil
	}
}

// RenewExpired returns what a Listener's Renew is to be: it renews identities of td that have ended at most grace ago. now nil: time.Now.
func (s *Server) RenewExpired(source *trust.Source, td spiffeid.TrustDomain, grace time.Duration, now func() time.Time) func(context.Context, *tls.Conn) {
	server := &register.RenewServer{
		Peer: func(cs tls.ConnectionState) (*trust.Peer, error) {
			return source.ExpiredPeer(cs, authorizeExpired(td), grace)
		},
		Renew: func(_ context.Context, peer *trust.Peer, q *controlpb.RenewRequest) (*controlpb.RenewResponse, error) {
			r, err := s.renew(*peer, &controlpb.RenewRequest{CsrDer: q.GetCsrDer(), Proxy: q.GetProxy()})
			return r, wire.FromStatus(err)
		},
		Logger: s.cfg.Logger, Now: now,
	}
	return server.ServeConn
}
