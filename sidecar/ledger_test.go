// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

// TestConnectionWhoseRootHasLeft: what was verified by a root that a rotation takes away ends after a grace, what was verified by a trust
// domain that has gone at once.
func TestConnectionWhoseRootHasLeft(t *testing.T) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "d"))
	must(err)
	td, err := spiffeid.ParseTrustDomain("us-east.acme")
	must(err)
	authority, err := ca.Create(dir, ca.Config{TrustDomain: td})
	must(err)
	bundles, err := trust.NewBundles(authority.Bundle())
	must(err)
	source := trust.NewSource(trust.SourceConfig{})
	source.SetBundles(bundles)
	id, err := authority.IssueKey(spiffeid.ControlPlane(td), time.Hour)
	must(err)
	now := time.Now()
	l := newLedger(source, func() time.Time { return now })
	ended := ""
	remove := l.enter(withdrawal.Subject{Peer: td, Identity: id.ID}, &trust.Peer{ID: id.ID, Chain: id.Chain}, func(reason string) { ended = reason })
	defer remove()
	judge := func(what string, wantEnded int, wantNext time.Duration) {
		t.Helper()
		source.SetBundles(source.Bundles().With(authority.Bundle()))
		if n, next := l.judgeChains(); n != wantEnded || next != wantNext {
			t.Errorf("%s: %d ended, look again in %v; want %d, %v", what, n, next, wantEnded, wantNext)
		}
	}
	judge("at the start", 0, 0)
	must(authority.Prepare())
	judge("prepared", 0, 0)
	must(authority.Activate())
	judge("activated", 0, 0)
	must(authority.Retire())
	judge("retired", 0, trust.RootGrace)
	now = now.Add(trust.RootGrace - time.Millisecond)
	judge("shortly before the end", 0, time.Millisecond)
	if ended != "" {
		t.Errorf("ended for %q", ended)
	}
	now = now.Add(time.Millisecond)
	judge("at the end", 1, 0)
	if ended == "" {
		t.Error("not ended")
	}

	fresh, err := authority.IssueKey(spiffeid.ControlPlane(td), time.Hour)
	must(err)
	defer l.enter(withdrawal.Subject{Peer: td, Identity: fresh.ID}, &trust.Peer{ID: fresh.ID, Chain: fresh.Chain}, func(string) {})()
	remove()
	source.SetBundles(source.Bundles().Without(td))
	if n, next := l.judgeChains(); n != 1 || next != 0 {
		t.Errorf("the trust domain is gone: %d ended, look again in %v", n, next)
	}
}
