// SPDX-License-Identifier: Apache-2.0

package crowd

import (
	"container/list"
	"net"
	"net/netip"
	"sync"
)

// Crowd is a bounded number of connections. Make it with New.
type Crowd struct {
	most int
	left func()

	mu     sync.Mutex
	closed bool
	n      int
	groups map[netip.Prefix]*list.List // of *member, oldest first; none is empty
}

type member struct {
	group netip.Prefix
	e     *list.Element // nil once it has left
	cut   func()
}

// New makes an empty crowd of at most that many. gaveWay, if it is not nil, hears of each one that was cut off for another; it must
// not block.
func New(most int, gaveWay func()) *Crowd {
	if gaveWay == nil {
		gaveWay = func() {}
	}
	return &Crowd{most: most, left: gaveWay, groups: map[netip.Prefix]*list.List{}}
}

// Add counts a connection from an address until done is called, which is idempotent; if there are too many, cut of another one is
// called. In a closed crowd it is its own. cut must not block, and may be called after done has begun.
func (c *Crowd) Add(from net.Addr, cut func()) (done func()) {
	m := &member{group: Group(from), cut: cut}
	c.mu.Lock()
	victim := c.addLocked(m)
	c.mu.Unlock()
	if victim != nil {
		victim.cut()
		if victim != m {
			c.left()
		}
	}
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.removeLocked(m)
	}
}

// addLocked returns who has to go.
func (c *Crowd) addLocked(m *member) (victim *member) {
	if c.closed {
		return m
	}
	if c.n >= c.most {
		victim = c.victimLocked(m.group)
		c.removeLocked(victim)
	}
	g := c.groups[m.group]
	if g == nil {
		g = list.New()
		c.groups[m.group] = g
	}
	m.e = g.PushBack(m)
	c.n++
	return victim
}

// victimLocked is the oldest of the address that would have the most with the new one; among several, of the new one's own.
func (c *Crowd) victimLocked(arriving netip.Prefix) *member {
	var largest *list.List
	most := 0
	for p, g := range c.groups {
		n := 2 * g.Len()
		if p == arriving {
			n += 3
		}
		if n > most {
			largest, most = g, n
		}
	}
	return largest.Front().Value.(*member)
}

func (c *Crowd) removeLocked(m *member) {
	g := c.groups[m.group]
	if m.e == nil || g == nil {
		return
	}
	g.Remove(m.e)
	m.e = nil
	c.n--
	if g.Len() == 0 {
		delete(c.groups, m.group)
	}
}

// Len is how many there are.
func (c *Crowd) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

// Close cuts all of them off, and whoever comes afterwards.
func (c *Crowd) Close() {
	c.mu.Lock()
	c.closed = true
	var all []*member
	for _, g := range c.groups {
		for e := g.Front(); e != nil; e = e.Next() {
			all = append(all, e.Value.(*member))
		}
	}
	c.mu.Unlock()
	for _, m := range all {
		m.cut()
	}
}

// Group is the address as one party: a /32, or a /64. Addresses of other kinds, such as those of unix sockets, are all one.
func Group(from net.Addr) netip.Prefix {
	var addr netip.Addr
	switch a := from.(type) {
	case *net.TCPAddr:
		addr = a.AddrPort().Addr()
	case *net.UDPAddr:
		addr = a.AddrPort().Addr()
	}
	addr = addr.Unmap().WithZone("")
	bits := 64
	if addr.Is4() {
		bits = 32
	}
	p, err := addr.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}
