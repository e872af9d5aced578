// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/trust"
)

// RequestIdentity asks for an identity of a new key, with the ID of this proxy, for the application behind it. It is handed to the
// caller alone: the proxy's own identity, and what is on disk, stay as they are. It fails fast while the control plane is away.
func (c *Client) RequestIdentity(ctx context.Context) (*trust.Identity, error) {
	id, err := c.requestIdentity(ctx)
	if err != nil {
		return nil, fmt.Errorf("request identity for the application: %w", err)
	}
	return id, nil
}

func (c *Client) requestIdentity(ctx context.Context) (*trust.Identity, error) {
	if c.cfg.Role != Sidecar {
		return nil, errors.New("only sidecars stand for an application")
	}
	key, csr, err := newKey()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	r, err := controlpb.NewIdentityClient(c.conn).Renew(ctx, &controlpb.RenewRequest{CsrDer: csr, Proxy: c.cfg.Name, Application: true})
	if err != nil {
		return nil, wire.FromStatus(err)
	}
	// As for the own identity: what was issued may hold against roots that discovery has not brought yet.
	bundle, err := trust.ParseBundle(c.Info().TrustDomain, r.GetBundleJwks())
	if err != nil {
		return nil, err
	}
	if err := c.bundles.setOwn(bundle); err != nil && !errors.Is(err, trust.ErrRollback) {
		return nil, err
	}
	return c.checked(r.GetChainDer(), key, c.Info().ID)
}

// RequestJWT asks for a JWT-SVID with the ID of this proxy, for the application behind it. It fails fast while the control plane
// is away.
func (c *Client) RequestJWT(ctx context.Context, audience []string) (token string, notAfter time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	r, err := controlpb.NewIdentityClient(c.conn).IssueJWT(ctx, &controlpb.IssueJWTRequest{Audience: audience})
	if err != nil {
		return "", time.Time{}, fmt.Errorf("request token for the application: %w", wire.FromStatus(err))
	}
	if r.GetToken() == "" || r.GetNotAfterUnix() <= 0 {
		return "", time.Time{}, errors.New("request token for the application: the control plane returned none")
	}
	return r.GetToken(), time.Unix(r.GetNotAfterUnix(), 0), nil
}
