// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"fmt"
	"time"

	"github.com/strait-mesh/strait/federation"
)

func (g *Group) done(l *Lease, o Outcome, err error) {
	g.mu.Lock()
	now := g.cfg.Now()
	if l.c != nil {
		l.c.inFlight--
	}
	if l.Key == "" { // a remote Choose whose dial failed
		g.mu.Unlock()
		if o != Neutral {
			g.failed(Want{}, asFailure(err))
		}
		return
	}
	b := g.bookLocked(l.Key)
	b.inFlight--
	var ejected federation.Reason
	wasEjected := b.ejected
	switch o {
	case OK:
		if l.Latency == 0 {
			l.Latency = now.Sub(l.start)
		}
		b.observe(now, l.Latency)
		b.streak, b.fails = 0, 0
	case ServerError, Reset:
		if o == Reset && l.c != nil && !l.c.Usable() {
			// The connection broke: that is one event, however many requests were on it.
			if l.c.broke {
				break
			}
			l.c.broke = true
		}
		b.streak++
		if b.streak >= g.cfg.Streak && !b.isEjected(now) && g.mayEjectLocked(now, l.Key) {
			why := fmt.Sprintf("%d server errors running", b.streak)
			b.eject(now, g.cfg.EjectFor, false, federation.OutlierEjected, why)
			ejected = federation.OutlierEjected
		}
	case Unreachable:
		g.mu.Unlock()
		f := asFailure(err)
		if f.Key == "" && !f.Cluster {
			f.Key = l.Key
		}
		g.failed(Want{Key: l.Key}, f)
		return
	case NoInstance:
		if !b.isEjected(now) {
			g.hardLocked(now, l.Key, federation.NoEndpoints, "no healthy instance behind it")
			ejected = federation.NoEndpoints
		}
	}
	changed := wasEjected != b.ejected
	g.mu.Unlock()
	if ejected != "" {
		g.cfg.Ejected(ejected)
	}
	if changed || ejected != "" {
		g.cfg.Changed()
	}
}

// mayEjectLocked: a streak never removes the last endpoint of the own cluster; handles may all go (the cluster is down then).
func (g *Group) mayEjectLocked(now time.Time, key string) bool {
	if g.cfg.Remote {
		return true
	}
	for _, e := range g.endpoints {
		if e.Key != key && !e.Draining && e.Weight > 0 && !g.bookLocked(e.Key).isEjected(now) {
			return true
		}
	}
	return false
}

// hardLocked ejects key until it is reached again: an own endpoint and a whole cluster are probed, a handle is timed.
func (g *Group) hardLocked(now time.Time, key string, reason federation.Reason, why string) {
	b := g.bookLocked(key)
	b.fails++
	pause := min(g.cfg.Retry<<min(b.fails-1, 10), g.cfg.EjectFor)
	if g.cfg.Remote && key != whole {
		b.eject(now, pause, false, reason, why)
		return
	}
	b.eject(now, pause, true, reason, why)
	if !g.probes[key] && !g.closed {
		g.probes[key] = true
		g.wg.Go(func() { g.probe(key) })
	}
}

func asFailure(err error) *Failure {
	var f *Failure
	if errors.As(err, &f) {
		c := *f
		return &c
	}
	if err == nil {
		err = errors.New("not reached")
	}
	return &Failure{Reason: federation.PeerUnreachable, Err: err}
}

// failed enters a failed dial.
func (g *Group) failed(w Want, f *Failure) {
	if f.Neutral {
		return
	}
	g.mu.Lock()
	key := f.Key
	switch {
	case f.Cluster:
		key = whole
	case key == "" && w.Key != "":
		key = w.Key
	}
	b := g.bookLocked(key)
	fresh := !b.isEjected(g.cfg.Now())
	if key == whole && !f.Cluster && g.cfg.Remote {
		// nobody said that the cluster is down: only a second failure in a row says so
		b.streak++
		fresh = fresh && b.streak >= 2
	}
	if fresh {
		g.hardLocked(g.cfg.Now(), key, f.Reason, f.Err.Error())
	}
	g.mu.Unlock()
	if fresh {
		g.cfg.Ejected(f.Reason)
		g.cfg.Changed()
	}
}

func (g *Group) reachedLocked(key string) (changed bool) {
	b := g.books[key]
	if b == nil {
		return false
	}
	b.streak, b.fails = 0, 0
	if b.ejected && b.hard {
		b.ejected, b.hard = false, false
		return true
	}
	return false
}

// Evidence returns what the group's experience says now.
func (g *Group) Evidence() Evidence {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.cfg.Now()
	e := Evidence{Active: !g.used.IsZero() && now.Sub(g.used) < time.Minute}
	if len(g.probes) > 0 {
		e.Active = true
	}
	if g.cfg.Remote {
		g.remoteEvidenceLocked(now, &e)
		return e
	}
	hard := 0
	for _, ep := range g.endpoints {
		if ep.Draining {
			continue
		}
		e.Candidates++
		b := g.books[ep.Key]
		if b == nil || !b.isEjected(now) {
			continue
		}
		e.Ejected += max(ep.Weight, 1)
		x := Ejection{Key: ep.Key, Reason: b.reason, Why: b.why}
		if b.hard {
			hard++
			e.Reason, e.Why = b.reason, b.why
		} else {
			x.Until = b.until
		}
		e.Ejections = append(e.Ejections, x)
	}
	if e.Candidates > 0 && hard == e.Candidates {
		e.Down, e.Until = true, now.Add(renewed)
	} else {
		e.Reason, e.Why = "", ""
	}
	return e
}

func (g *Group) remoteEvidenceLocked(now time.Time, e *Evidence) {
	for key, b := range g.books {
		if key == whole {
			continue
		}
		if now.Sub(b.seen) > 2*time.Minute && b.inFlight == 0 && len(g.conns[key]) == 0 {
			delete(g.books, key)
			continue
		}
		if !b.isEjected(now) && len(g.conns[key]) == 0 && b.inFlight == 0 {
			continue // was met once; nothing says that it is still there
		}
		e.Candidates++
		if b.ejected {
			e.Ejected++
			e.Ejections = append(e.Ejections, Ejection{Key: key, Reason: b.reason, Why: b.why, Until: b.until})
			if e.Until.IsZero() || b.until.Before(e.Until) {
				e.Until, e.Reason, e.Why = b.until, b.reason, b.why
			}
		}
	}
	e.Down = e.Candidates > 0 && e.Ejected == e.Candidates
	if b := g.books[whole]; b != nil && b.isEjected(now) {
		e.Down, e.Until, e.Reason, e.Why = true, now.Add(renewed), b.reason, b.why
	}
	if !e.Down {
		e.Until, e.Reason, e.Why = time.Time{}, "", ""
	}
}
