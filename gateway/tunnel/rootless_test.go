// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestRootIsReplacedUnderASession rotates the root of either end of a session, the one that dialled it and the one that accepted it: when
// the old root leaves the bundles another session is there before the old one ends, which it does, and both ends say so to whoever
// has streams on it.
func TestRootIsReplacedUnderASession(t *testing.T) {
	for _, transport := range []string{QUIC, TCP} {
		for _, dialler := range []bool{true, false} {
			name := transport + " of the accepting end"
			if dialler {
				name = transport + " of the dialling end"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				rotateUnder(t, transport, dialler)
			})
		}
	}
}

func rotateUnder(t *testing.T, transport string, dialler bool) {
	a, b := newDomain(t, "aa"), newDomain(t, "bb")
	var told [2]atomic.Int32
	config := func(n int) Config {
		return Config{DisableUDP: transport == TCP, Draining: func(*Session, time.Duration) { told[n].Add(1) }}
	}
	x, y := a.run(t, config(0), b), b.run(t, config(1), a)
	y.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: true}}) // x dials
	x.peers(y)
	x.await(t, "a session", func() bool { return x.up(y) != nil })
	y.await(t, "a session", func() bool { return y.up(x) != nil })
	first := x.up(y).ID()

	rotating, renewing := b, y
	if dialler {
		rotating, renewing = a, x
	}
	follow := func() {
		t.Helper()
		for _, e := range []*end{x, y} {
			e.cfg.Source.SetBundles(e.cfg.Source.Bundles().With(rotating.ca.Bundle()))
			e.Judge()
		}
	}
	check(t, rotating.ca.Prepare())
	follow()
	check(t, rotating.ca.Activate())
	renewing.cfg.Source.SetIdentity(must(rotating.ca.IssueKey(must(spiffeid.Gateway(rotating.td, "gw-1")), time.Hour)))
	follow()
	if x.up(y) == nil || x.up(y).ID() != first {
		t.Error("the session is another one although every root stands")
	}
	check(t, rotating.ca.Retire())
	retired := time.Now()
	follow()
	usable := func() {
		if x.Pick(b.td) == nil || y.Pick(a.td) == nil {
			t.Fatal("there is no session to use")
		}
	}
	x.await(t, "another session", func() bool { usable(); return x.up(y).ID() != first })
	for _, e := range []*end{x, y} {
		e.await(t, "only that is left", func() bool { usable(); return len(e.Sessions()) == 1 && e.Sessions()[0].ID() != first })
	}
	if took := time.Since(retired); took > 5*time.Second {
		t.Errorf("the old session stood for %v", took)
	}
	if told[0].Load() != 1 || told[1].Load() != 1 {
		t.Errorf("streams were told %d and %d times", told[0].Load(), told[1].Load())
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestLostRootIsNotAnotherDomain: a bundle that shares no root with the one before says nothing for what that one verified.
func TestLostRootIsNotAnotherDomain(t *testing.T) {
	a, other := newDomain(t, "aa"), newDomain(t, "aa")
	id := must(spiffeid.Gateway(a.td, "gw-1"))
	chain := must(a.ca.IssueKey(id, time.Hour)).Chain
	before := a.ca.Bundle()
	both := must(before.WithRoots(append(before.Roots(), other.ca.Bundle().Roots()...)))
	for name, c := range map[string]struct {
		before, now *trust.Bundle
		want        bool
	}{
		"its root stands":      {before, before, false},
		"its root has left":    {both, other.ca.Bundle().WithSequence(9), true},
		"all roots are others": {before, other.ca.Bundle(), false},
		"no roots are left":    {both, must(both.WithRoots(nil)), false},
	} {
		bundles := must(trust.NewBundles(c.now))
		_, err := trust.Verify(chain, bundles, time.Now())
		if got := bundles.LostRoot(c.before, err); got != c.want {
			t.Errorf("%s: %v (%v)", name, got, err)
		}
	}
	none := must(trust.NewBundles())
	if _, err := trust.Verify(chain, none, time.Now()); none.LostRoot(both, err) || none.LostRoot(nil, err) {
		t.Error("the trust domain is gone")
	}
}
