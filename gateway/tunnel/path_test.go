// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/strait-mesh/strait/internal/relay"
)

// path is a way to an endpoint, UDP and TCP on one port, that can be cut silently.
type path struct {
	udp    net.PacketConn
	tcp    net.Listener
	target string
	noUDP  atomic.Bool
	widest atomic.Int64 // larger datagrams are swallowed, counted with 28 bytes of headers; 0: none
	wg     sync.WaitGroup

	mu   sync.Mutex
	back map[string]net.Conn // by source: the socket towards the target
}

func newPath(t *testing.T, target string) *path {
	t.Helper()
	p := &path{target: target, back: map[string]net.Conn{}}
	p.tcp = must(net.Listen("tcp", "127.0.0.1:0"))
	p.udp = must(net.ListenPacket("udp", p.tcp.Addr().String()))
	p.wg.Go(p.forwardUDP)
	p.wg.Go(p.forwardTCP)
	t.Cleanup(func() {
		p.udp.Close()
		p.tcp.Close()
		p.mu.Lock()
		for _, c := range p.back {
			c.Close()
		}
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

func (p *path) forwardUDP() {
	b := make([]byte, 2048)
	for {
		n, from, err := p.udp.ReadFrom(b)
		if err != nil {
			return
		}
		if p.swallows(n) {
			continue
		}
		p.mu.Lock()
		c := p.back[from.String()]
		if c == nil {
			c = must(net.Dial("udp", p.target))
			p.back[from.String()] = c
			p.wg.Go(func() { p.answerUDP(c, from) })
		}
		p.mu.Unlock()
		_, _ = c.Write(b[:n])
	}
}

func (p *path) swallows(n int) bool {
	w := p.widest.Load()
	return p.noUDP.Load() || w > 0 && int64(n)+28 > w
}

func (p *path) answerUDP(c net.Conn, to net.Addr) {
	b := make([]byte, 2048)
	for {
		n, err := c.Read(b)
		if err != nil {
			return
		}
		if !p.swallows(n) {
			_, _ = p.udp.WriteTo(b[:n], to)
		}
	}
}

func (p *path) forwardTCP() {
	for {
		c, err := p.tcp.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() {
			d, err := net.Dial("tcp", p.target)
			if err != nil {
				c.Close()
				return
			}
			relay.Pair(relay.Wrap(c), relay.Wrap(d), nil)
		})
	}
}

// TestUDPDiesMidLife has UDP swallowed under a live session: at most 3 s until a TCP session carries (F8).
func TestUDPDiesMidLife(t *testing.T) {
	a, b := newDomain(t, "aa"), newDomain(t, "bb")
	x, y := a.run(t, Config{HeadStart: tcpHeadStart}, b), b.run(t, Config{}, a)
	way := newPath(t, y.Addr().String())
	defer x.stop() // before the path waits for its connections
	defer y.stop()
	y.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: true}})
	x.SetPeers([]Peer{{TrustDomain: b.td, Cluster: "bb", Ready: true, Gateways: []Gateway{{Name: "gw-1", Addresses: []string{way.tcp.Addr().String()}}}}})
	x.await(t, "a session over QUIC", func() bool { s := x.up(y); return s != nil && s.Transport() == QUIC && s.RTT() > 0 })
	first := x.up(y)
	way.noUDP.Store(true)
	began := time.Now()
	x.await(t, "a session over TCP", func() bool { s := x.up(y); return s != nil && s.Transport() == TCP })
	took := time.Since(began)
	t.Logf("on TCP after %v", took)
	if took > 3*time.Second {
		t.Errorf("took %v", took)
	}
	select {
	case <-first.Done():
	case <-time.After(6 * time.Second):
		t.Error("the dead session stands")
	}
}
