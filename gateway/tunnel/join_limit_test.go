// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/strait-mesh/strait/internal/crowd"
)

// TestJoinLimit: one address cannot use up the joins that there are for all, and what is refused costs others nothing.
func TestJoinLimit(t *testing.T) {
	party := func(s string) netip.Prefix {
		return crowd.Group(net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(s), 7)))
	}
	now := time.Date(2026, 9, 1, 12, 0, 0, 0, time.UTC)
	var l joinLimiter
	admitted := func(n int, from func(int) string) (got int) {
		for i := range n {
			if l.admit(party(from(i)), now) {
				got++
			}
		}
		return got
	}
	loud := func(int) string { return "192.0.2.1" }
	site := func(i int) string { return netip.AddrFrom16([16]byte{0x20, 1, 13: 7, 15: byte(i)}).String() } // addresses of one /64
	if got := admitted(1000, loud); got != joinOne {
		t.Errorf("one address got %d of %d", got, joinBurst)
	}
	if got := admitted(200, site); got != joinOne {
		t.Errorf("one site got %d of %d", got, joinBurst)
	}
	if got := admitted(20, func(i int) string { return netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}).String() }); got != joinBurst-2*joinOne {
		t.Errorf("others got %d of what was left", got)
	}
	now = now.Add(time.Second)
	if got := admitted(1000, loud); got != joinRateOne {
		t.Errorf("a second later one address got %d", got)
	}
	if !l.admit(party("203.0.113.9"), now) {
		t.Error("a second later there is nothing for another one")
	}
	for i := range 3 * maxJoinAddresses {
		l.admit(party(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}).String()), now)
	}
	if len(l.each) > maxJoinAddresses {
		t.Errorf("%d addresses are kept", len(l.each))
	}
}
