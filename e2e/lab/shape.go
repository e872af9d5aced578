// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"encoding/binary"
	"math/rand/v2"
	"time"
)

// Shape is what one direction of a path does to packets. The zero value delivers everything at once. Shares are 0 to 1.
type Shape struct {
	Delay  time.Duration // one way
	Jitter time.Duration // uniform, ±; the order stays
	Loss   float64       // of independent packets
	Burst  Burst
	// Reorder is the share of packets that overtake: they skip delay and queue.
	Reorder   float64
	Duplicate float64
	// Corrupt is the share of packets with one bit flipped that the receiving kernel's checksum finds; CorruptUnseen the share where the
	// checksum was made to fit again, as faulty middle boxes do.
	Corrupt       float64
	CorruptUnseen float64
	Rate          int64 // bit/s of IP packets; 0: unlimited
	Queue         int   // bytes that wait for the rate; 0: 100 ms of it, at least 64 KiB; what does not fit is dropped
	MTU           int   // larger packets vanish, as in a black hole; 0: no limit
	TooBig        bool  // the black hole answers with ICMP "fragmentation needed" instead
	DropUDP       bool
	DropTCP       bool
	Down          bool // everything vanishes
}

// Burst is loss as Gilbert and Elliott describe it: a good and a bad state, changed by chance at each packet.
type Burst struct {
	Enter float64 // good → bad
	Leave float64 // bad → good
	Loss  float64 // while bad
}

// Counters count packets of one direction since the lab began.
type Counters struct {
	Packets, Bytes                        uint64 // that came in
	Lost, QueueFull, Hole, Filtered, Dark uint64 // by why they were dropped
	Delivered, Duplicated, Reordered, Bad uint64
	Transports                            [256]uint64 // packets that came in, by IP protocol
}

// direction is one direction of a path: a pure function of time, packets and its source of chance. Not for concurrent use.
type direction struct {
	shape Shape
	rng   *rand.Rand
	bad   bool      // Burst's state
	free  time.Time // when the rate has sent what it took
	last  time.Time // of the newest delivery in order
	count Counters
}

// delivery is a packet on its way.
type delivery struct {
	at  time.Time
	pkt []byte
}

// Numbers of the IP protocols.
const (
	protoICMP = 1
	protoTCP  = 6
	protoUDP  = 17
)

// enter takes a packet, which it may change, and says when copies of it arrive. answer is a packet to the sender, if any.
func (d *direction) enter(now time.Time, pkt []byte) (out []delivery, answer []byte) {
	s, c := &d.shape, &d.count
	proto := pkt[9]
	c.Packets++
	c.Bytes += uint64(len(pkt))
	c.Transports[proto]++
	switch {
	case s.Down:
		c.Dark++
		return nil, nil
	case s.DropUDP && proto == protoUDP, s.DropTCP && proto == protoTCP:
		c.Filtered++
		return nil, nil
	case s.MTU > 0 && len(pkt) > s.MTU:
		c.Hole++
		if s.TooBig {
			answer = tooBig(pkt, s.MTU)
		}
		return nil, answer
	case d.lost():
		c.Lost++
		return nil, nil
	}
	at, ok := d.schedule(now, len(pkt))
	if !ok {
		c.QueueFull++
		return nil, nil
	}
	if d.chance(s.Reorder) {
		c.Reordered++
		at = now
	}
	if d.chance(s.Corrupt) {
		c.Bad++
		d.flip(pkt)
	} else if d.chance(s.CorruptUnseen) {
		c.Bad++
		d.flip(pkt)
		fixChecksum(pkt)
	}
	c.Delivered++
	out = append(out, delivery{at, pkt})
	if d.chance(s.Duplicate) {
		c.Duplicated++
		out = append(out, delivery{at, append([]byte(nil), pkt...)})
	}
	return out, nil
}

func (d *direction) chance(p float64) bool { return p > 0 && d.rng.Float64() < p }

func (d *direction) lost() bool {
	b := d.shape.Burst
	if b.Enter > 0 {
		if d.bad {
			d.bad = !d.chance(b.Leave)
		} else {
			d.bad = d.chance(b.Enter)
		}
		if d.bad && d.chance(b.Loss) {
			return true
		}
	}
	return d.chance(d.shape.Loss)
}

// schedule is when a packet arrives: after what waits for the rate, its own time on the wire, and the delay. It never overtakes.
func (d *direction) schedule(now time.Time, size int) (at time.Time, ok bool) {
	s := &d.shape
	at = now
	if s.Rate > 0 {
		if d.free.Before(now) {
			d.free = now
		}
		queue := s.Queue
		if queue == 0 {
			queue = max(int(s.Rate/8/10), 64<<10)
		}
		waiting := int64(d.free.Sub(now).Seconds() * float64(s.Rate) / 8)
		if waiting+int64(size) > int64(queue) {
			return at, false
		}
		d.free = d.free.Add(time.Duration(float64(size) * 8 / float64(s.Rate) * float64(time.Second)))
		at = d.free
	}
	at = at.Add(s.Delay)
	if s.Jitter > 0 {
		at = at.Add(time.Duration((d.rng.Float64()*2 - 1) * float64(s.Jitter)))
	}
	if at.Before(d.last) {
		at = d.last
	}
	d.last = at
	return at, true
}

// flip changes one bit behind the headers.
func (d *direction) flip(pkt []byte) {
	from := payloadOffset(pkt)
	if from >= len(pkt) {
		return
	}
	i := from + d.rng.IntN(len(pkt)-from)
	pkt[i] ^= 1 << d.rng.IntN(8)
}

func ipHeader(pkt []byte) int { return int(pkt[0]&0x0f) * 4 }

func payloadOffset(pkt []byte) int {
	h := ipHeader(pkt)
	switch pkt[9] {
	case protoUDP:
		return h + 8
	case protoTCP:
		if len(pkt) > h+12 {
			return h + int(pkt[h+12]>>4)*4
		}
	}
	return len(pkt)
}

// fixChecksum makes the transport's checksum fit.
func fixChecksum(pkt []byte) {
	h := ipHeader(pkt)
	var field int
	switch pkt[9] {
	case protoUDP:
		field = h + 6
	case protoTCP:
		field = h + 16
	default:
		return
	}
	if len(pkt) < field+2 {
		return
	}
	pkt[field], pkt[field+1] = 0, 0
	pseudo := make([]byte, 0, 12)
	pseudo = append(pseudo, pkt[12:20]...)
	pseudo = append(pseudo, 0, pkt[9])
	pseudo = binary.BigEndian.AppendUint16(pseudo, uint16(len(pkt)-h))
	binary.BigEndian.PutUint16(pkt[field:], checksum(pseudo, pkt[h:]))
}

// checksum is RFC 1071's over the parts, of which only the last may have an odd length.
func checksum(parts ...[]byte) uint16 {
	var sum uint32
	for _, p := range parts {
		for ; len(p) > 1; p = p[2:] {
			sum += uint32(p[0])<<8 | uint32(p[1])
		}
		if len(p) == 1 {
			sum += uint32(p[0]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// tooBig is the ICMP message "fragmentation needed and DF set" (RFC 792, RFC 1191) about pkt, from its destination's address: a
// router on the way would answer from its own, which nobody checks.
func tooBig(pkt []byte, mtu int) []byte {
	const ip, icmp = 20, 8
	quoted := pkt[:min(len(pkt), ipHeader(pkt)+8)]
	m := make([]byte, ip+icmp, ip+icmp+len(quoted))
	m = append(m, quoted...)
	m[0], m[8], m[9] = 0x45, 64, protoICMP
	binary.BigEndian.PutUint16(m[2:], uint16(len(m)))
	copy(m[12:16], pkt[16:20])
	copy(m[16:20], pkt[12:16])
	binary.BigEndian.PutUint16(m[10:], checksum(m[:ip]))
	m[ip], m[ip+1] = 3, 4
	binary.BigEndian.PutUint16(m[ip+6:], uint16(mtu))
	binary.BigEndian.PutUint16(m[ip+2:], checksum(m[ip:]))
	return m
}
