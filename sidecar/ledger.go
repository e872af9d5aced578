// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"crypto/x509"
	"errors"
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
	until time.Time // its root has left the bundle: when it ends; of judgeChains alone
}

func newLedger(source *trust.Source, now func() time.Time) *ledger {
	return &ledger{
		registry: withdrawal.New(withdrawal.Config{Now: now}), source: source, now: now,
		live: map[*ledgerEntry]struct{}{},
	}
}

// enter registers something whose trust can be withdrawn.
func (l *ledger) enter(s withdrawal.Subject, peer *trust.Peer, end func(reason string)) (remove func()) {
	e := &ledgerEntry{chain: peer.Chain, end: end}
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
	verdicts := map[string]verdict{} // pooled connections share few leaves
	for _, e := range all {
		if len(e.chain) == 0 {
			continue
		}
		v, judged := verdicts[string(e.chain[0].Raw)]
		if !judged {
			v = judgeChain(e.chain, bundles, now)
			verdicts[string(e.chain[0].Raw)] = v
		}
		switch {
		case v == holds:
			e.until = time.Time{}
			continue
		case v == lostRoot && e.until.IsZero():
			e.until = now.Add(trust.RootGrace)
		}
		if left := e.until.Sub(now); v == lostRoot && left > 0 {
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

type verdict int

const (
	holds verdict = iota
	lostRoot
	refused
)

func judgeChain(chain []*x509.Certificate, bundles *trust.Bundles, now time.Time) verdict {
	_, err := trust.Verify(chain, bundles, now)
	if err == nil {
		return holds
	}
	var v *trust.VerifyError
	if errors.As(err, &v) && bundles.LostRoot(v.ID.TrustDomain(), err) {
		return lostRoot
	}
	return refused
}

func (l *ledger) run(ctx context.Context) error { return l.registry.Run(ctx) }
