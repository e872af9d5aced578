// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/register"
)

const (
	// redeemedFile names the token that the present identity goes back to.
	redeemedFile = "identity/redeemed"
	// freshEvery is how often the token file is looked at.
	freshEvery = 2 * time.Second
)

// A token file that holds another token than was redeemed is an order to register again: an identity that was withdrawn and readmitted
// comes back that way, although the one at hand seems good for hours yet.

// tokenID is the id of the token in the token file; empty: there is none, or it cannot be read.
func (c *Client) tokenID() string {
	if c.cfg.TokenFile == "" {
		return ""
	}
	text, err := os.ReadFile(c.cfg.TokenFile)
	if err != nil {
		return ""
	}
	token, err := register.ParseToken(string(text))
	if err != nil {
		return ""
	}
	return token.ID
}

// openFresh reads which token was redeemed. Where that was not written down, it was the one that is there.
func (c *Client) openFresh() error {
	data, err := c.cfg.DataDir.ReadFile(redeemedFile)
	if errors.Is(err, fs.ErrNotExist) {
		if id := c.tokenID(); id != "" {
			return c.redeemed(id)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	id := strings.TrimSpace(string(data))
	c.lastToken.Store(&id)
	return nil
}

// redeemed notes that a token is not to be tried again.
func (c *Client) redeemed(id string) error {
	c.lastToken.Store(&id)
	if err := c.cfg.DataDir.WriteFile(redeemedFile, []byte(id+"\n")); err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	return nil
}

// hasFreshToken reports whether there is a token that was not tried yet.
func (c *Client) hasFreshToken() bool {
	id, last := c.tokenID(), c.lastToken.Load()
	return id != "" && (last == nil || id != *last)
}

// registerFresh registers with a token that was not tried yet; false: there is none, or it did not help. A refused one is not tried
// again, one that met no control plane is.
func (c *Client) registerFresh(ctx context.Context) bool {
	if !c.hasFreshToken() {
		return false
	}
	id := c.tokenID()
	err := c.register(ctx)
	if err == nil {
		c.conn.ResetConnectBackoff() // it was refused with the identity of before
		return true
	}
	if ctx.Err() != nil {
		return false
	}
	c.log.Warn("not registered with the new token", "id", c.Info().ID, "err", err)
	if p := (*problem.Error)(nil); errors.As(err, &p) && !p.Retryable {
		if err := c.redeemed(id); err != nil {
			c.log.Warn("refused token not noted", "err", err)
		}
	}
	return false
}

// freshLoop wakes the renewal when there is a new token.
func (c *Client) freshLoop(ctx context.Context) {
	t := time.NewTicker(freshEvery)
	defer t.Stop()
	for {
		if c.hasFreshToken() {
			kick(c.ended)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}
