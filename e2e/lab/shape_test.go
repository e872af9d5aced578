// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

var epoch = time.Unix(1_000_000_000, 0)

// udp makes a datagram with a right checksum and n bytes of payload.
func udp(n int) []byte {
	pkt := make([]byte, 28+n)
	pkt[0], pkt[8], pkt[9] = 0x45, 64, protoUDP
	binary.BigEndian.PutUint16(pkt[2:], uint16(len(pkt)))
	copy(pkt[12:], []byte{198, 18, 1, 1, 198, 18, 2, 1})
	binary.BigEndian.PutUint16(pkt[24:], uint16(8+n))
	for i := range n {
		pkt[28+i] = byte(i)
	}
	fixChecksum(pkt)
	return pkt
}

func valid(pkt []byte) bool {
	again := bytes.Clone(pkt)
	fixChecksum(again)
	return bytes.Equal(again, pkt)
}

func one(s Shape) *direction { return &direction{shape: s, rng: rand.New(rand.NewPCG(1, 2))} }

func near(t *testing.T, what string, got, want, within float64) {
	t.Helper()
	if math.Abs(got-want) > within {
		t.Errorf("%s: %v, want %v ± %v", what, got, want, within)
	}
}

func TestShapeOfTime(t *testing.T) {
	d := one(Shape{Delay: 40 * time.Millisecond, Jitter: 10 * time.Millisecond})
	var last time.Time
	lo, hi := time.Hour, time.Duration(0)
	for i := range 5000 {
		now := epoch.Add(time.Duration(i) * 30 * time.Millisecond)
		out, _ := d.enter(now, udp(100))
		if len(out) != 1 || out[0].at.Before(last) {
			t.Fatalf("packet %d: %d deliveries, or out of order", i, len(out))
		}
		last = out[0].at
		lo, hi = min(lo, last.Sub(now)), max(hi, last.Sub(now))
	}
	if lo < 30*time.Millisecond || lo > 31*time.Millisecond || hi < 49*time.Millisecond || hi > 50*time.Millisecond {
		t.Errorf("delays from %v to %v, want 30 to 50 ms", lo, hi)
	}
}

func TestShapeOfRate(t *testing.T) {
	d := one(Shape{Rate: 8_000_000, Queue: 10_000}) // a byte a microsecond
	arrived, end := 0, epoch
	for range 20 { // 20,000 bytes at once: 10,000 fit, and one is on the wire
		if out, _ := d.enter(epoch, udp(972)); len(out) == 1 {
			arrived++
			end = out[0].at
		}
	}
	if arrived != 10 || end.Sub(epoch) != 10*time.Millisecond || d.count.QueueFull != 10 {
		t.Errorf("%d arrived until %v, %d dropped", arrived, end.Sub(epoch), d.count.QueueFull)
	}
	if out, _ := d.enter(epoch.Add(time.Second), udp(972)); out[0].at != epoch.Add(time.Second+time.Millisecond) {
		t.Errorf("an idle link sends at %v", out[0].at.Sub(epoch))
	}
}

func TestShapeOfChance(t *testing.T) {
	const n = 100_000
	d := one(Shape{Loss: 0.05, Duplicate: 0.02, Reorder: 0.03, Corrupt: 0.01, CorruptUnseen: 0.01, Delay: time.Millisecond})
	whole, broken, unseen := 0, 0, 0
	ref := udp(100)
	for range n {
		out, _ := d.enter(epoch, udp(100))
		for _, o := range out {
			switch {
			case bytes.Equal(o.pkt, ref):
				whole++
			case valid(o.pkt):
				unseen++
			default:
				broken++
			}
		}
	}
	c := d.count
	near(t, "lost", float64(c.Lost)/n, 0.05, 0.003)
	near(t, "duplicated", float64(c.Duplicated)/n, 0.02*0.95, 0.002)
	near(t, "reordered", float64(c.Reordered)/n, 0.03*0.95, 0.002)
	near(t, "found by the checksum", float64(broken)/n, 0.01*0.95, 0.002)
	near(t, "not found by it", float64(unseen)/n, 0.01*0.95, 0.002)
	if whole == 0 || c.Packets != n || c.Delivered+c.Lost != n {
		t.Errorf("counters %+v", c)
	}
}

// Bursts: losses come together, and their share is that of the bad state.
func TestShapeOfBursts(t *testing.T) {
	const n = 200_000
	d := one(Shape{Burst: Burst{Enter: 0.01, Leave: 0.25, Loss: 0.8}})
	pairs, lost, before := 0, 0, false
	for range n {
		out, _ := d.enter(epoch, udp(10))
		now := len(out) == 0
		if now {
			lost++
			if before {
				pairs++
			}
		}
		before = now
	}
	near(t, "share lost", float64(lost)/n, 0.01/(0.01+0.25)*0.8, 0.004)
	near(t, "a loss follows a loss", float64(pairs)/float64(lost), 0.75*0.8, 0.03)
}

func TestShapeFilters(t *testing.T) {
	for _, tt := range []struct {
		name  string
		shape Shape
		size  int
		pass  bool
		of    func(Counters) uint64
	}{
		{"fits the hole", Shape{MTU: 1280}, 1280 - 28, true, func(c Counters) uint64 { return c.Delivered }},
		{"vanishes in it", Shape{MTU: 1280}, 1281 - 28, false, func(c Counters) uint64 { return c.Hole }},
		{"dark", Shape{Down: true}, 10, false, func(c Counters) uint64 { return c.Dark }},
		{"no UDP", Shape{DropUDP: true}, 10, false, func(c Counters) uint64 { return c.Filtered }},
		{"no TCP", Shape{DropTCP: true}, 10, true, func(c Counters) uint64 { return c.Delivered }},
	} {
		d := one(tt.shape)
		out, answer := d.enter(epoch, udp(tt.size))
		if (len(out) == 1) != tt.pass || answer != nil || tt.of(d.count) != 1 {
			t.Errorf("%s: %d deliveries, counters %+v", tt.name, len(out), d.count)
		}
	}
	d := one(Shape{MTU: 1000, TooBig: true})
	_, answer := d.enter(epoch, udp(1200))
	if len(answer) != 56 || answer[20] != 3 || answer[21] != 4 || binary.BigEndian.Uint16(answer[26:]) != 1000 || checksum(answer[:20]) != 0 || checksum(answer[20:]) != 0 {
		t.Errorf("answer % x", answer)
	}
}
