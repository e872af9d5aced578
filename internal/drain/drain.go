// SPDX-License-Identifier: Apache-2.0

// Package drain ends a set of live things in two phases: first no new ones and a wait, then a cut of what is left.
//
// A Group may be used by any number of goroutines.
package drain

import (
	"context"
	"sync"
	"time"
)

// Group holds what is live. The zero value is ready.
type Group struct {
	mu      sync.Mutex
	live    map[*member]struct{}
	closed  bool
	emptied chan struct{} // closed when live becomes empty after closed
}

type member struct{ cut func() }

// Add enters something live, with how to cut it. It reports false once the group drains; then cut is not kept. The
// caller calls done exactly when the thing has ended.
func (g *Group) Add(cut func()) (done func(), ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, false
	}
	if g.live == nil {
		g.live = make(map[*member]struct{})
	}
	m := &member{cut: cut}
	g.live[m] = struct{}{}
	return func() { g.remove(m) }, true
}

func (g *Group) remove(m *member) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, ok := g.live[m]; !ok {
		return
	}
	delete(g.live, m)
	if g.closed && len(g.live) == 0 && g.emptied != nil {
		close(g.emptied)
		g.emptied = nil
	}
}

// Len is how many are live.
func (g *Group) Len() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.live)
}

// Close refuses new members from now on and returns a channel that is closed once none is left.
func (g *Group) Close() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	if g.emptied == nil {
		g.emptied = make(chan struct{})
		if len(g.live) == 0 {
			close(g.emptied)
			e := g.emptied
			g.emptied = nil
			return e
		}
	}
	return g.emptied
}

// Cut cuts everything that is live now and returns how many that were. It does not wait.
func (g *Group) Cut() int {
	g.mu.Lock()
	cuts := make([]func(), 0, len(g.live))
	for m := range g.live {
		cuts = append(cuts, m.cut)
	}
	g.mu.Unlock()
	for _, cut := range cuts {
		cut()
	}
	return len(cuts)
}

// Drain closes the group, waits until it is empty, at most grace and until ctx ends, cuts the rest and waits for those.
// It returns how many were cut.
func (g *Group) Drain(ctx context.Context, grace time.Duration) int {
	empty := g.Close()
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case <-empty:
		return 0
	case <-t.C:
	case <-ctx.Done():
	}
	n := g.Cut()
	<-empty
	return n
}
