// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"crypto/x509"
	"sync"
	"time"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

// ledger is the withdrawal registry with the certificate chains beside it, so that a change of bundles judges what was
// verified against the old ones.
type ledger struct {
	registry *withdrawal.Registry
	source   *trust.Source
	now      func() time.Time

	mu   sync.Mutex
	live map[*ledgerEntry]struct{}
}

type ledgerEntry struct {
	chain []*x509.Certificate
	end   func(reason string)
	// of judgeChains alone:
	verified *trust.Bundle // that it held by when last looked at
	until    time.Time     // its root has left that: when it ends
}

func newLedger(source *trust.Source, now func() time.Time) *ledger {
	return &ledger{
		registry: withdrawal.New(withdrawal.Config{Now: now}), source: source, now: now,
		live: map[*ledgerEntry]struct{}{},
	}
}

// enter registers something whose trust can be withdrawn.
func (l *ledger) enter(s withdrawal.Subject, peer *trust.Peer, end func(reason string)) (remove func()) {
	e := &ledgerEntry{chain: peer.Chain, end: end, verified: l.source.Bundles().Get(peer.ID.TrustDomain())}
	leave := l.registry.Add(s, end)
	l.mu.Lock()
	l.live[e] = struct{}{}
	l.mu.Unlock()
	return func() {
		leave()
		l.mu.Lock()
		delete(l.live, e)
		l.mu.Unlock()
	}
}

// judgeChains verifies every chain against the present bundles and ends what fails. Where only the root has left the bundle, the end
// comes after trust.RootGrace: next is how long it is until then, 0 when nothing waits for its end.
func (l *ledger) judgeChains() (ended int, next time.Duration) {
	bundles, now := l.source.Bundles(), l.now()
	l.mu.Lock()
	all := make([]*ledgerEntry, 0, len(l.live))
	for e := range l.live {
		all = append(all, e)
	}
	l.mu.Unlock()
	verdicts := map[string]error{} // pooled connections share few leaves
	for _, e := range all {
		if len(e.chain) == 0 {
			continue
		}
		err, judged := verdicts[string(e.chain[0].Raw)]
		if !judged {
			_, err = trust.Verify(e.chain, bundles, now)
			verdicts[string(e.chain[0].Raw)] = err
		}
		rootless := bundles.LostRoot(e.verified, err)
		switch {
		case err == nil:
			e.until = time.Time{}
			if e.verified != nil {
				e.verified = bundles.Get(e.verified.TrustDomain())
			}
			continue
		case rootless && e.until.IsZero():
			e.until = now.Add(trust.RootGrace)
		}
		if left := e.until.Sub(now); rootless && left > 0 {
			if next == 0 || left < next {
				next = left
			}
			continue
		}
		e.end("trust in its domain has changed")
		ended++
	}
	return ended, next
}

func (l *ledger) run(ctx context.Context) error { return l.registry.Run(ctx) }
