// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"strings"
	"time"

	"google.golang.org/grpc"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	identityFile = "identity/svid.pem"
	infoFile     = "identity/info.json"

	renewTimeout    = 10 * time.Second
	maxRenewBackoff = time.Minute
	// expiredBackoff bounds the wait between attempts once the identity has ended: nothing works until one succeeds.
	expiredBackoff = 3 * time.Second
)

// storedInfo is identity/info.json.
type storedInfo struct {
	Info
	Obtained  time.Time
	Addresses []string // of the control plane, as the token named them
}

// loadOrRegister puts identity and own bundle in force: from disk, else by the registration token.
func (c *Client) loadOrRegister(ctx context.Context) error {
	err := c.loadIdentity()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return c.registerUntil(ctx)
	case err != nil:
		return err
	}
	if err := c.openFresh(); err != nil {
		return err
	}
	if c.expired() && c.cfg.TokenFile != "" {
		// The present identity is of no use, a fresh token may be. Without one the snapshot is still worth opening.
		if err := c.register(ctx); err != nil {
			c.log.Warn("identity expired and not registered again", "id", c.info.ID, "err", err)
		}
	}
	return nil
}

func (c *Client) loadIdentity() error {
	data, err := c.cfg.DataDir.ReadFile(infoFile)
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	var stored storedInfo
	if err := json.Unmarshal(data, &stored); err != nil {
		return fmt.Errorf("identity: %s: %w", infoFile, err)
	}
	if data, err = c.cfg.DataDir.ReadFile(identityFile); err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	id, err := trust.ParseIdentityPEM(data)
	if err != nil {
		return err
	}
	if data, err = c.cfg.DataDir.ReadFile(bundleFile(id.ID.TrustDomain())); err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	bundle, err := trust.ParseBundle(id.ID.TrustDomain(), data)
	if err != nil {
		return err
	}
	stored.ID, stored.TrustDomain = id.ID, id.ID.TrustDomain()
	if err := c.cfg.accepts(stored.Info); err != nil {
		return err
	}
	c.info, c.obtained = stored.Info, stored.Obtained
	if len(c.addresses) == 0 {
		c.addresses = stored.Addresses
	}
	c.source.SetBundles(c.source.Bundles().With(bundle))
	c.source.SetIdentity(id)
	return nil
}

// accepts refuses an identity that is not that of the proxy configured.
func (cfg Config) accepts(info Info) error {
	wrong := func(why string) error {
		return problem.New(problem.ConfigInvalid, "the identity %s is not that of %s %s: %s", info.ID, cfg.Role, cfg.Name, why).
			WithFix("use another --data-dir, or the name that this one was registered for (%s)", info.Name)
	}
	if info.Name != cfg.Name {
		return wrong("it was registered as " + info.Name)
	}
	switch cfg.Role {
	case Gateway:
		if name, ok := info.ID.Gateway(); !ok || name != cfg.Name {
			return wrong("it names another gateway or none")
		}
	case Sidecar:
		if ns, _, ok := info.ID.Workload(); !ok || !strings.HasPrefix(cfg.Name, ns+"/") {
			return wrong("it names no workload of that namespace")
		}
	}
	return nil
}

// obtain puts an identity that was just issued in force and on disk. Key and chain are one file, so that a crash leaves the
// previous pair or the new one.
func (c *Client) obtain(info Info, id *trust.Identity) error {
	data, err := id.MarshalPEM()
	if err != nil {
		return err
	}
	now := c.cfg.Now()
	described, err := json.Marshal(storedInfo{info, now, c.addresses})
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	if err := c.cfg.DataDir.WriteFile(identityFile, data); err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	if err := c.cfg.DataDir.WriteFile(infoFile, described); err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	before := c.source.Identity()
	c.identityMu.Lock()
	c.info, c.obtained = info, now
	c.identityMu.Unlock()
	c.source.SetIdentity(id)
	if before != nil && before.ID != id.ID {
		c.wires.cut()
	}
	return nil
}

// renewLoop renews in time, and keeps trying when it fails.
func (c *Client) renewLoop(ctx context.Context) {
	var r recall
	for ctx.Err() == nil {
		c.waitRenewal(ctx, &r)
		c.renewUntil(ctx)
	}
}

// untilRenewal is the time left until the next renewal: RenewEvery ±10 % after the last one.
func (c *Client) untilRenewal() time.Duration {
	every := c.cfg.RenewEvery
	wait := every - every/10 + mathrand.N(every/5+1)
	c.identityMu.Lock()
	age := c.cfg.Now().Sub(c.obtained)
	c.identityMu.Unlock()
	if c.expired() { // no time to lose, but not all proxies in the same moment
		return mathrand.N(min(every/20, time.Second) + 1)
	}
	if age < 0 { // the clock went back
		age = wait
	}
	return max(wait-age, mathrand.N(every/20+1)) // overdue after a long stop: not all proxies in the same moment
}

// renewUntil tries until it succeeds or ctx ends.
func (c *Client) renewUntil(ctx context.Context) {
	backoff := min(time.Second, c.cfg.RenewEvery/10)
	for n := 1; ctx.Err() == nil; n++ {
		err := c.attempt(ctx)
		if ctx.Err() == nil {
			c.renewedMetric(err)
		}
		if err == nil {
			if n > 1 {
				c.log.Info("identity renewed again", "id", c.Info().ID, "attempts", n)
			}
			return
		}
		if ctx.Err() != nil {
			return
		}
		c.health.failed(err)
		if n&(n-1) == 0 { // 1, 2, 4, … so that a day without control plane does not fill a disk
			c.log.Warn("identity not renewed", "id", c.Info().ID, "attempts", n, "not_after", c.Status().NotAfter, "err", err)
		}
		limit := maxRenewBackoff
		if c.expired() {
			limit = expiredBackoff
		}
		backoff = min(backoff, limit)
		sleep(ctx, backoff/2+mathrand.N(backoff/2+1))
		backoff *= 2
	}
}

// renew asks for an SVID for a fresh key.
func (c *Client) renew(ctx context.Context) error {
	key, csr, err := newKey()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	r, err := controlpb.NewIdentityClient(c.conn).Renew(ctx, &controlpb.RenewRequest{CsrDer: csr, Proxy: c.cfg.Name}, grpc.WaitForReady(!c.expired()))
	if err != nil {
		return fmt.Errorf("renew identity: %w", wire.FromStatus(err))
	}
	return c.take(r, key)
}

// take puts what the control plane has issued for key in force, if it holds.
func (c *Client) take(r *controlpb.RenewResponse, key *ecdsa.PrivateKey) error {
	bundle, err := trust.ParseBundle(c.info.TrustDomain, r.GetBundleJwks())
	if err != nil {
		return fmt.Errorf("renew identity: %w", err)
	}
	if err := c.bundles.setOwn(bundle); err != nil && !errors.Is(err, trust.ErrRollback) { // the one in force judges what was issued
		return fmt.Errorf("renew identity: %w", err)
	}
	id, err := c.checked(r.GetChainDer(), key, c.info.ID)
	if err != nil {
		return fmt.Errorf("renew identity: %w", err)
	}
	return c.obtain(c.Info(), id)
}

// checked makes an identity of what was issued, if it is what was asked for and holds against the own bundle.
func (c *Client) checked(chainDER [][]byte, key *ecdsa.PrivateKey, want spiffeid.ID) (*trust.Identity, error) {
	id, err := trust.NewIdentity(chainDER, key)
	if err != nil {
		return nil, err
	}
	if id.ID != want {
		return nil, fmt.Errorf("the identity issued is %s, not %s", id.ID, want)
	}
	if _, err := c.source.Verify(id.Chain); err != nil {
		return nil, err
	}
	return id, nil
}

func newKey() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("new key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("new key: %w", err)
	}
	return key, csr, nil
}
