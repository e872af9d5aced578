// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/endpoint"
)

// openEndpoint takes the identity from the Workload API, and waits for it until ctx ends.
func (c *Client) openEndpoint(ctx context.Context) (err error) {
	if c.cfg.TokenFile != "" {
		return problem.New(problem.Usage, "two origins for one identity: the registration token %s and the Workload API at %s", c.cfg.TokenFile, c.cfg.WorkloadAPI).
			WithFix("leave --token-file out, or unset %s", endpoint.SocketEnv)
	}
	if c.cfg.Self.Cluster == "" || c.cfg.Self.Federation == "" {
		return errors.New("control plane client: with a Workload API, the names of cluster and federation are required")
	}
	want := endpoint.Gateway(c.cfg.Name)
	if c.cfg.Role == Sidecar {
		namespace, _, _ := strings.Cut(c.cfg.Name, "/")
		want = endpoint.Workload(namespace, c.cfg.ServiceAccount)
	}
	c.endpoint, err = endpoint.Open(ctx, endpoint.Config{
		Socket: c.cfg.WorkloadAPI, Wants: []endpoint.Want{want}, Source: c.source, Dir: c.cfg.DataDir, Now: c.cfg.Now, Logger: c.log,
	})
	if err != nil {
		return err
	}
	id := c.source.Identity().ID
	c.info = Info{
		Name: c.cfg.Name, ID: id, TrustDomain: id.TrustDomain(), Cluster: c.cfg.Self.Cluster, Federation: c.cfg.Self.Federation, Locality: c.cfg.Self.Locality,
	}
	c.obtained = c.cfg.Now()
	if err := c.cfg.accepts(c.info); err != nil {
		return errors.Join(err, c.endpoint.Close())
	}
	return nil
}

// endpointError is what Status says of the Workload API.
func (c *Client) endpointError() error {
	s := c.endpoint.Status()
	if s.LastError == nil {
		return nil
	}
	return fmt.Errorf("workload API at %s: %w", s.Socket, s.LastError)
}

// endpointLoop takes the place of the renewal loop: the Workload API renews by itself.
func (c *Client) endpointLoop(ctx context.Context) {
	for {
		changed := c.endpoint.Changed()
		c.identityMu.Lock()
		c.obtained = c.endpoint.Status().Updated
		if id := c.source.Identity().ID; id != c.info.ID {
			c.log.Info("another identity is in use", "id", id, "before", c.info.ID)
			c.info.ID = id
		}
		c.identityMu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}
