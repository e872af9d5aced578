// SPDX-License-Identifier: Apache-2.0

package crowd_test

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/strait-mesh/strait/internal/crowd"
)

func addr(s string) net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(s), 1))
}

func TestOldestGivesWay(t *testing.T) {
	var cut []string
	gaveWay := 0
	c := crowd.New(3, func() { gaveWay++ })
	add := func(name, from string) func() { return c.Add(addr(from), func() { cut = append(cut, name) }) }
	want := func(names ...string) {
		t.Helper()
		if !slices.Equal(cut, names) || gaveWay != len(names) {
			t.Fatalf("cut %v, want %v; %d gave way", cut, names, gaveWay)
		}
	}
	add("a1", "192.0.2.1")
	doneA2 := add("a2", "192.0.2.1")
	add("a3", "192.0.2.1")
	want()
	add("b1", "192.0.2.2") // of another address: the crowd of the first gives way
	want("a1")
	add("a4", "192.0.2.1")
	want("a1", "a2")
	doneA2() // it has given way already
	if c.Len() != 3 {
		t.Fatalf("%d are there", c.Len())
	}
	add("a5", "192.0.2.1")
	want("a1", "a2", "a3")
	doneB2 := add("b2", "192.0.2.2") // both would have two: its own gives way
	want("a1", "a2", "a3", "b1")
	doneB2()
	doneB2()
	add("c1", "192.0.2.3")
	want("a1", "a2", "a3", "b1")
	add("b3", "192.0.2.2") // now the first address has the most
	want("a1", "a2", "a3", "b1", "a4")
	add("d1", "192.0.2.4") // one of each: somebody has to go, and the new one stays
	if len(cut) != 6 || slices.Contains(cut, "d1") || c.Len() != 3 {
		t.Fatalf("cut %v; %d are there", cut, c.Len())
	}
}

func TestClosed(t *testing.T) {
	c := crowd.New(2, nil)
	cut := 0
	c.Add(addr("192.0.2.1"), func() { cut++ })
	c.Close()
	if cut != 1 {
		t.Errorf("%d cut", cut)
	}
	c.Add(addr("192.0.2.1"), func() { cut++ })()
	if cut != 2 || c.Len() != 1 {
		t.Errorf("%d cut, %d there", cut, c.Len())
	}
}

func TestGroup(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		same bool
	}{
		{"192.0.2.1", "192.0.2.1", true}, {"192.0.2.1", "192.0.2.2", false}, {"192.0.2.1", "::ffff:192.0.2.1", true},
		{"2001:db8::1", "2001:db8::ffff:2", true}, {"2001:db8::1", "2001:db8:0:1::1", false}, {"fe80::1%eth0", "fe80::2%eth1", true},
	} {
		if got := crowd.Group(addr(tt.a)) == crowd.Group(addr(tt.b)); got != tt.same {
			t.Errorf("%s and %s: one party %v", tt.a, tt.b, got)
		}
	}
	if crowd.Group(&net.UnixAddr{}) != crowd.Group(nil) {
		t.Error("addresses without a number are not one party")
	}
}

func TestConcurrent(t *testing.T) {
	c := crowd.New(16, nil)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 500 {
				c.Add(addr("192.0.2.1"), func() {})()
			}
		})
	}
	wg.Wait()
	if c.Len() != 0 {
		t.Errorf("%d are left", c.Len())
	}
}
