// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"time"
)

// regrow is the pause before a remote group looks for another instance again after meeting only known ones.
const regrow = 10 * time.Second

// dialLocked starts a dial to key (whole for a remote group) unless one is under way. Waiters share its result, and none of
// them can cancel it for the others. With avoid a remote dial asks for an instance that is neither pooled nor ejected.
func (g *Group) dialLocked(key string, avoid bool) *dial {
	if d := g.dials[key]; d != nil {
		return d
	}
	d := &dial{done: make(chan struct{})}
	w := Want{Key: key}
	if g.cfg.Remote && avoid {
		now := g.cfg.Now()
		for k := range g.conns {
			w.Avoid = append(w.Avoid, k)
		}
		for k, b := range g.books {
			if k != whole && b.isEjected(now) && !slices.Contains(w.Avoid, k) {
				w.Avoid = append(w.Avoid, k)
			}
		}
	}
	g.dials[key] = d
	g.wg.Go(func() { g.runDial(w, d) })
	return d
}

func (g *Group) runDial(w Want, d *dial) {
	ctx, cancel := context.WithTimeout(g.ctx, g.cfg.DialTimeout)
	defer cancel()
	c, key, err := g.cfg.Dial(ctx, w)
	if err != nil {
		if g.ctx.Err() == nil {
			g.failed(w, asFailure(err))
		}
		g.mu.Lock()
		if g.cfg.Remote && len(g.conns) > 0 {
			// a failed attempt to grow: what is there goes on, and the next attempt waits
			g.growAfter = g.cfg.Now().Add(regrow)
		}
		g.mu.Unlock()
	} else {
		err = g.adopt(key, c)
	}
	g.mu.Lock()
	delete(g.dials, w.Key)
	d.err = err
	g.mu.Unlock()
	close(d.done)
}

// adopt puts c into the pool.
func (g *Group) adopt(key string, c Conn) error {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		c.Close()
		return errClosed
	}
	changed := g.reachedLocked(whole)
	if g.cfg.Remote && len(g.conns[key]) > 0 {
		// The same instance again although it was to be avoided: there are no others now. Keep the connection only where
		// the ones to that instance cannot take work.
		g.growAfter = g.cfg.Now().Add(regrow)
		if g.leastLocked(g.conns[key]) != nil {
			g.mu.Unlock()
			c.Close()
			return nil
		}
	}
	if g.cfg.Remote {
		b := g.bookLocked(key)
		b.fails = 0
	} else {
		changed = g.reachedLocked(key) || changed
	}
	p := &pooled{Conn: c, key: key}
	g.conns[key] = append(g.conns[key], p)
	g.all[p] = struct{}{}
	g.wg.Go(func() { g.watch(p) })
	g.mu.Unlock()
	if changed {
		g.cfg.Changed()
	}
	return nil
}

// watch removes p when it has ended.
func (g *Group) watch(p *pooled) {
	<-p.Done()
	p.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.all, p)
	g.conns[p.key] = slices.DeleteFunc(g.conns[p.key], func(o *pooled) bool { return o == p })
	if len(g.conns[p.key]) == 0 {
		delete(g.conns, p.key)
	}
	g.growAfter = time.Time{}
}

// probe dials key until it is reached, so that no call has to find out.
func (g *Group) probe(key string) {
	pause := g.cfg.Retry
	timer := time.NewTimer(jitter(pause))
	defer timer.Stop()
	for {
		select {
		case <-g.ctx.Done():
			return
		case <-timer.C:
		}
		if g.probeOver(key) {
			return
		}
		ctx, cancel := context.WithTimeout(g.ctx, g.cfg.DialTimeout)
		c, got, err := g.cfg.Dial(ctx, Want{Key: key})
		cancel()
		if err == nil {
			g.mu.Lock()
			delete(g.probes, key)
			changed := g.reachedLocked(key)
			g.mu.Unlock()
			if c != nil && g.adopt(got, c) != nil {
				return
			}
			if changed {
				g.cfg.Changed()
			}
			return
		}
		var f *Failure
		if errors.As(err, &f) && g.cfg.Remote && !f.Cluster && f.Key != "" {
			g.failed(Want{}, f) // this handle failed; the cluster answered
		}
		g.cfg.Changed() // evidence is renewed
		pause = min(2*pause, 5*time.Second, g.cfg.EjectFor)
		timer.Reset(jitter(pause))
	}
}

// probeOver ends the probe of what is no longer ejected, or no longer there.
func (g *Group) probeOver(key string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	b := g.books[key]
	known := g.cfg.Remote || slices.ContainsFunc(g.endpoints, func(e Endpoint) bool { return e.Key == key })
	if b != nil && b.ejected && b.hard && known {
		return false
	}
	delete(g.probes, key)
	return true
}

func jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64()))
}
