// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"context"
	mathrand "math/rand/v2"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust"
)

// maxRecall bounds how long a recalled identity waits for its renewal, and so how many proxies a second ask for theirs.
const maxRecall = 30 * time.Second

// recall remembers how often an identity was renewed for one and the same recall. Once is enough, or twice when both fall into
// one second, which is what certificates count in; a control plane whose clock went back would otherwise be asked for ever.
type recall struct {
	before int64 // of the recall, Unix milliseconds
	tries  int
}

// watchRecall wakes the renewal when the control plane recalls identities.
func (c *Client) watchRecall(ch Change) error {
	if ch.TypeURL == controlpb.TypeBundle && ch.Name == c.bundles.own.String() {
		kick(c.recall)
	}
	return nil
}

// recalled says whether the control plane wants the identity in use renewed, and by which time: it was issued before that. It
// asks what the snapshot says, too, so that a restart forgets no recall.
func (c *Client) recalled() (before int64, ok bool) {
	msg, state := c.store.get(controlpb.TypeBundle, c.bundles.own.String())
	id := c.source.Identity()
	if state != Known || id == nil {
		return 0, false
	}
	before = msg.(*controlpb.Bundle).GetRenewIssuedBeforeMs()
	return before, before > 0 && trust.Issued(id.Chain[0]).UnixMilli() < before
}

// waitRenewal waits until the identity is due: at its time, or a moment after it was recalled, not all proxies in the same one.
func (c *Client) waitRenewal(ctx context.Context, r *recall) {
	due := time.NewTimer(c.untilRenewal())
	defer due.Stop()
	var hurry <-chan time.Time
	for {
		if before, ok := c.recalled(); ok && hurry == nil {
			t := time.NewTimer(r.wait(before, min(maxRecall, c.cfg.RenewEvery/4)))
			defer t.Stop()
			hurry = t.C
		}
		select {
		case <-ctx.Done():
			return
		case <-due.C:
			return
		case <-hurry:
			return
		case <-c.ended:
			if c.expired() || c.hasFreshToken() {
				return
			}
		case <-c.recall:
		}
	}
}

// wait draws the time to wait for a renewal, up to limit, and longer each time that the same recall asks for another one.
func (r *recall) wait(before int64, limit time.Duration) time.Duration {
	if r.before != before {
		*r = recall{before: before}
	}
	wait := mathrand.N(limit+1) + limit*time.Duration(1<<min(r.tries, 16)-1)
	r.tries++
	return wait
}
