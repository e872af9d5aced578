// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"os"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/register"
)

// registeringFile keeps the key of a registration under way. A token is bound to the first key that it is redeemed with, so
// after a crash or a lost answer only the same key can finish.
const registeringFile = "identity/registering.json"

type registering struct {
	TokenID string
	Key     []byte // PKCS #8
}

// registerUntil registers, waiting for a control plane that does not answer. A refusal is final.
func (c *Client) registerUntil(ctx context.Context) error {
	if c.cfg.TokenFile == "" {
		return problem.New(problem.RegistrationRefused, "%s %s has no identity yet, and no registration token was given", c.cfg.Role, c.cfg.Name).
			WithWhy("the first identity is obtained with a one-time token").
			WithFix("issue one on the control plane's side and pass its file with --token-file")
	}
	backoff := minReconnect
	for {
		err := c.register(ctx)
		var p *problem.Error
		if err == nil || errors.As(err, &p) && !p.Retryable {
			return err
		}
		if ctx.Err() != nil {
			return errors.Join(ctx.Err(), err)
		}
		c.log.Info("registration will be tried again", "err", err)
		sleep(ctx, backoff/2+mathrand.N(backoff))
		backoff = min(2*backoff, maxReconnect)
	}
}

// register redeems the token for a first identity, or for one in place of an expired one.
func (c *Client) register(ctx context.Context) error {
	text, err := os.ReadFile(c.cfg.TokenFile)
	if err != nil {
		return problem.New(problem.RegistrationRefused, "the token file cannot be read").WithWhy("%v", err).Wrap(err)
	}
	token, err := register.ParseToken(string(text))
	if err != nil {
		return err
	}
	key, err := c.registrationKey(token.ID)
	if err != nil {
		return fmt.Errorf("register: %w", err)
	}
	r, err := register.Register(ctx, register.ClientConfig{
		Token: token, Addresses: c.cfg.ControlPlane, Key: key, Dial: c.cfg.Dial, Now: c.cfg.Now,
	})
	if err != nil {
		return err
	}
	info := Info{
		Name: r.Name, ID: r.Identity.ID, TrustDomain: r.Identity.ID.TrustDomain(),
		Locality: federation.Locality{Region: r.Region, Zone: r.Zone},
	}
	if info.Cluster, err = federation.ParseClusterName(r.Cluster); err != nil {
		return fmt.Errorf("register: %w", err)
	}
	if info.Federation, err = federation.ParseFederationName(r.Federation); err != nil {
		return fmt.Errorf("register: %w", err)
	}
	if err := c.cfg.accepts(info); err != nil {
		return err
	}
	if len(c.addresses) == 0 {
		c.addresses = token.Addresses
	}
	if err := newBundleKeeper(c.source, info.TrustDomain, c.cfg.DataDir).setOwn(r.Bundle); err != nil {
		return fmt.Errorf("register: %w", err)
	}
	if err := c.obtain(info, r.Identity); err != nil {
		return fmt.Errorf("register: %w", err)
	}
	if err := c.redeemed(token.ID); err != nil {
		return err
	}
	if err := c.cfg.DataDir.Remove(registeringFile); err != nil {
		c.log.Warn("leftover of the registration not removed", "err", err)
	}
	c.log.Info("registered", "id", info.ID)
	return nil
}

// registrationKey returns the key to redeem a token with: the one of an earlier attempt, or a new one that is on disk.
func (c *Client) registrationKey(tokenID string) (*ecdsa.PrivateKey, error) {
	var attempt registering
	data, err := c.cfg.DataDir.ReadFile(registeringFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err == nil && json.Unmarshal(data, &attempt) == nil && attempt.TokenID == tokenID {
		if key, err := x509.ParsePKCS8PrivateKey(attempt.Key); err == nil {
			if key, ok := key.(*ecdsa.PrivateKey); ok {
				return key, nil
			}
		}
	}
	key, _, err := newKey()
	if err != nil {
		return nil, err
	}
	attempt = registering{TokenID: tokenID}
	if attempt.Key, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		return nil, err
	}
	if data, err = json.Marshal(attempt); err != nil {
		return nil, err
	}
	return key, c.cfg.DataDir.WriteFile(registeringFile, data)
}
