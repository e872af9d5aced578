// SPDX-License-Identifier: Apache-2.0

package register

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	defaultRate  = 20 // exchanges a second, of everybody
	burstSeconds = 10
	perAddress   = 10 // one address gets the tenth part
	maxAddresses = 4096
)

// limiter is one token bucket for everybody and one for each address, so that one address cannot use up all.
type limiter struct {
	mu   sync.Mutex
	all  bucket
	each map[netip.Addr]*bucket
}

type bucket struct {
	level  float64
	filled time.Time
}

// fill tops the bucket up; it starts full.
func (b *bucket) fill(now time.Time, rate float64) {
	most := rate * burstSeconds
	switch {
	case b.filled.IsZero():
		b.level = most
	case now.After(b.filled):
		b.level = min(most, b.level+now.Sub(b.filled).Seconds()*rate)
	}
	b.filled = now
}

func (l *limiter) admit(from net.Addr, now time.Time, rate float64) bool {
	if rate <= 0 {
		rate = defaultRate
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all.fill(now, rate)
	one := l.bucketLocked(from)
	one.fill(now, rate/perAddress)
	if l.all.level < 1 || one.level < 1 {
		return false
	}
	l.all.level--
	one.level--
	return true
}

func (l *limiter) bucketLocked(from net.Addr) *bucket {
	var addr netip.Addr // addresses of other kinds share one bucket
	if tcp, ok := from.(*net.TCPAddr); ok {
		addr = tcp.AddrPort().Addr().Unmap().WithZone("")
		if addr.Is6() { // a site has a /64
			if p, err := addr.Prefix(64); err == nil {
				addr = p.Addr()
			}
		}
	}
	b := l.each[addr]
	if b == nil {
		if l.each == nil || len(l.each) >= maxAddresses {
			l.each = map[netip.Addr]*bucket{} // forget: the bucket of all still holds
		}
		b = &bucket{}
		l.each[addr] = b
	}
	return b
}
