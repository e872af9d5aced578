// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// domain is a cluster with a CA.
type domain struct {
	name string
	td   spiffeid.TrustDomain
	ca   *ca.CA
}

func newDomain(t *testing.T, name string) *domain {
	t.Helper()
	dir := must(datadir.Create(t.TempDir() + "/d"))
	t.Cleanup(func() { dir.Close() })
	d := &domain{name: name, td: must(spiffeid.ParseTrustDomain(name + ".acme"))}
	d.ca = must(ca.Create(dir, ca.Config{TrustDomain: d.td}))
	return d
}

func (d *domain) source(id spiffeid.ID, others ...*domain) *trust.Source {
	s := trust.NewSource(trust.SourceConfig{})
	s.SetIdentity(must(d.ca.IssueKey(id, time.Hour)))
	list := []*trust.Bundle{d.ca.Bundle()}
	for _, o := range others {
		list = append(list, o.ca.Bundle())
	}
	s.SetBundles(must(trust.NewBundles(list...)))
	return s
}

// end is a running endpoint.
type end struct {
	*Endpoint
	d    *domain
	stop func()
}

func (d *domain) run(t *testing.T, cfg Config, others ...*domain) *end {
	t.Helper()
	if cfg.Listen == "" {
		cfg.Listen = "127.0.0.1:0"
	}
	cfg.Name, cfg.Cluster = "gw-1", d.name
	if cfg.HeadStart == 0 {
		cfg.HeadStart = 10 * time.Second // no TCP because this machine is busy
	}
	if cfg.Source == nil {
		cfg.Source = d.source(must(spiffeid.Gateway(d.td, "gw-1")), others...)
	}
	e := must(Listen(cfg))
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = e.Run(ctx) })
	stop := sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(stop)
	return &end{e, d, stop}
}

func (e *end) peers(others ...*end) {
	var list []Peer
	for _, o := range others {
		list = append(list, Peer{TrustDomain: o.d.td, Cluster: o.d.name, Ready: true,
			Gateways: []Gateway{{Name: "gw-1", Addresses: []string{o.Addr().String()}}}})
	}
	e.SetPeers(list)
}

// await waits until cond holds, looking again at each change of the endpoint.
func (e *end) await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	limit := time.After(10 * time.Second)
	for {
		changed := e.Changed()
		if cond() {
			return
		}
		select {
		case <-changed:
		case <-time.After(100 * time.Millisecond): // figures change without a signal
		case <-limit:
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

func (e *end) up(o *end) *Session {
	s := e.Pick(o.d.td)
	if s == nil || s.State() != StateUp {
		return nil
	}
	return s
}

// TestBothDialOneStays has both ends dial at once, again and again: one session remains.
func TestBothDialOneStays(t *testing.T) {
	a, b := newDomain(t, "aa"), newDomain(t, "bb")
	x, y := a.run(t, Config{Dialable: true}, b), b.run(t, Config{}, a) // y does not wait: the storm's worst case
	y.peers(x)
	x.peers(y)
	x.await(t, "a session", func() bool { return x.up(y) != nil })
	one := func(e *end, o *end) func() bool {
		return func() bool { s := e.Sessions(); return len(s) == 1 && e.up(o) != nil }
	}
	x.await(t, "exactly one session at x", one(x, y))
	y.await(t, "exactly one session at y", one(y, x))
	if s := x.up(y); s.Gateway() != "gw-1" || s.Peer() != b.td || s.Transport() != QUIC {
		t.Errorf("session with %s of %s over %s", s.Gateway(), s.Peer(), s.Transport())
	}
}

func TestDeadPeerIsNoticedAndDialledAgain(t *testing.T) {
	for _, udp := range []bool{true, false} {
		t.Run(map[bool]string{true: QUIC, false: TCP}[udp], func(t *testing.T) {
			a, b := newDomain(t, "aa"), newDomain(t, "bb")
			x, y := a.run(t, Config{DisableUDP: !udp}, b), b.run(t, Config{DisableUDP: !udp}, a)
			y.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: true}})
			x.peers(y)
			x.await(t, "a session", func() bool { return x.up(y) != nil })
			first, addr := x.up(y), y.Addr().String()
			y.stop()
			select {
			case <-first.Done():
			case <-time.After(5 * time.Second):
				t.Fatal("the session of a stopped peer stands")
			}
			again := b.run(t, Config{Listen: addr, DisableUDP: !udp}, a)
			again.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: true}})
			x.await(t, "a new session", func() bool { s := x.up(again); return s != nil && s != first })
			x.await(t, "a round-trip time", func() bool { s := x.up(again); return s != nil && s.RTT() > 0 })
		})
	}
}

// TestWhoMayHaveASession dials with every identity that must not get in, over both transports.
func TestWhoMayHaveASession(t *testing.T) {
	a, b, evil := newDomain(t, "aa"), newDomain(t, "bb"), newDomain(t, "evil")
	forger := newDomain(t, "aa") // another CA that claims to be aa
	for _, udp := range []bool{true, false} {
		y := b.run(t, Config{DisableUDP: !udp}, a, evil) // has evil's bundle, but no such peer
		y.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: true}})
		for name, source := range map[string]*trust.Source{
			"gateway of a cluster that is no peer": evil.source(must(spiffeid.Gateway(evil.td, "gw-1")), b),
			"workload of a peer":                   a.source(must(spiffeid.Workload(a.td, "shop", "web")), b),
			"control plane of a peer":              a.source(spiffeid.ControlPlane(a.td), b),
			"gateway under a forged root":          forger.source(must(spiffeid.Gateway(forger.td, "gw-1")), b),
			"own gateway":                          b.source(must(spiffeid.Gateway(b.td, "gw-1"))),
		} {
			x := a.run(t, Config{DisableUDP: !udp, Source: source})
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			x.SetPeers([]Peer{{TrustDomain: b.td, Cluster: "bb"}})
			if s, err := x.race(ctx, b.td, []string{y.Addr().String()}); err == nil {
				t.Errorf("%s: got a session", name)
				s.discard()
			}
			cancel()
			x.stop()
		}
		if n := len(y.Sessions()); n != 0 {
			t.Errorf("%d sessions", n)
		}
		// The dialler judges as well: the server must be of the trust domain it dialled for.
		x := a.run(t, Config{DisableUDP: !udp}, b, evil)
		if s, err := x.race(t.Context(), evil.td, []string{y.Addr().String()}); err == nil {
			t.Error("a session with a gateway of another trust domain")
			s.discard()
		}
	}
}

// TestSessionEndsWithTheRootItWasVerifiedBy: a trust domain may leave and come back under another root between two snapshots.
func TestSessionEndsWithTheRootItWasVerifiedBy(t *testing.T) {
	a, b := newDomain(t, "aa"), newDomain(t, "bb")
	other := newDomain(t, "aa") // the same trust domain, another root
	x, y := a.run(t, Config{}, b), b.run(t, Config{}, a)
	y.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: true}})
	x.peers(y)
	y.await(t, "a session", func() bool { return y.up(x) != nil })
	y.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: true, Gateways: []Gateway{{Name: "gw-9"}}}})
	if y.up(x) == nil {
		t.Error("ended while its root stands")
	}
	y.cfg.Source.SetBundles(must(trust.NewBundles(b.ca.Bundle(), other.ca.Bundle())))
	y.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: true}})
	y.await(t, "the session has ended", func() bool { return len(y.Sessions()) == 0 })
}

// TestOnePeersLinksAreBounded: a peer that opens session after session is refused, and may come back when some have ended.
func TestOnePeersLinksAreBounded(t *testing.T) {
	a, b := newDomain(t, "aa"), newDomain(t, "bb")
	for _, udp := range []bool{true, false} {
		y := b.run(t, Config{DisableUDP: !udp}, a)
		y.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: true}})
		x := a.run(t, Config{DisableUDP: !udp}, b)
		if !y.countLink(a.td, maxLinks-1) { // as if they were open; a session takes two more
			t.Fatal("refused below the bound")
		}
		if s, err := x.race(t.Context(), b.td, []string{y.Addr().String()}); err == nil {
			t.Error("a session beyond the bound")
			s.discard()
		}
		y.countLink(a.td, 1-maxLinks)
		s, err := x.race(t.Context(), b.td, []string{y.Addr().String()})
		if err != nil {
			t.Fatal(err)
		}
		y.await(t, "the session is there", func() bool { return len(y.Sessions()) == 1 })
		s.discard()
		y.await(t, "nothing is counted any more", func() bool {
			y.mu.Lock()
			defer y.mu.Unlock()
			return len(y.accepted) == 0
		})
	}
}

// TestStreamsEndAsTheyWereEnded: an end is an end, a reset a reset, and a dead session no clean end.
func TestStreamsEndAsTheyWereEnded(t *testing.T) {
	for _, udp := range []bool{true, false} {
		a, b := newDomain(t, "aa"), newDomain(t, "bb")
		ends := make(chan error, 8)
		x := a.run(t, Config{DisableUDP: !udp}, b)
		y := b.run(t, Config{DisableUDP: !udp, Stream: func(_ context.Context, s *Session, st Stream, _ Header) {
			_ = st.SetReadDeadline(time.Time{})
			_ = s.Reply(st, preface.Status{})
			_, err := io.Copy(io.Discard, st)
			ends <- err
			_ = st.CloseWrite()
			st.Close()
		}}, a)
		y.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: true}})
		x.peers(y)
		x.await(t, "a session", func() bool { return x.up(y) != nil })
		s := x.up(y)
		open := func() *Outgoing {
			o, err := s.Open(t.Context(), fullHeader(), []byte("first"))
			if err != nil {
				t.Fatal(err)
			}
			return o
		}
		o := open()
		if err := o.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if err := <-ends; err != nil {
			t.Errorf("udp %v: an end came as %v", udp, err)
		}
		if _, err := o.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("udp %v: the other end's end came as %v", udp, err)
		}
		o.Close()
		o = open()
		o.Reset()
		if err := <-ends; err == nil {
			t.Errorf("udp %v: a reset came as an end", udp)
		}
		o = open()
		s.End(errors.New("test"))
		if err := <-ends; err == nil {
			t.Errorf("udp %v: a broken session came as an end", udp)
		}
		if _, err := o.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("udp %v: a broken session came as %v", udp, err)
		}
		o.Reset()
	}
}

// TestSlowReaderDoesNotStopOthers has one stream read nothing while another passes (F27).
func TestSlowReaderDoesNotStopOthers(t *testing.T) {
	for _, udp := range []bool{true, false} {
		a, b := newDomain(t, "aa"), newDomain(t, "bb")
		x := a.run(t, Config{DisableUDP: !udp}, b)
		y := b.run(t, Config{DisableUDP: !udp, Stream: func(ctx context.Context, s *Session, st Stream, h Header) {
			_ = st.SetReadDeadline(time.Time{})
			_ = s.Reply(st, preface.Status{})
			if h.Port == "slow" {
				<-ctx.Done()
				return
			}
			_, _ = io.Copy(st, st)
			st.Close()
		}}, a)
		y.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: true}})
		x.peers(y)
		x.await(t, "a session", func() bool { return x.up(y) != nil })
		s := x.up(y)
		slow, err := s.Open(t.Context(), Header{Port: "slow"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		_ = slow.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		n, err := io.Copy(slow, io.LimitReader(neverEnding{}, 64<<20))
		if err == nil || n > 8*streamWindow {
			t.Errorf("udp %v: %d bytes were taken for a reader that reads nothing, %v", udp, n, err)
		}
		o, err := s.Open(t.Context(), Header{Port: "echo"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		_ = o.SetDeadline(time.Now().Add(5 * time.Second))
		go func() { _, _ = io.CopyN(o, neverEnding{}, 1<<20); _ = o.CloseWrite() }()
		if n, err := io.Copy(io.Discard, o); n != 1<<20 || err != nil {
			t.Errorf("udp %v: beside it %d bytes passed, %v", udp, n, err)
		}
		o.Close()
		slow.Reset()
	}
}

type neverEnding struct{}

func (neverEnding) Read(b []byte) (int, error) { return len(b), nil }

func TestGossipCrosses(t *testing.T) {
	for _, udp := range []bool{true, false} {
		a, b := newDomain(t, "aa"), newDomain(t, "bb")
		type packet struct{ from, body string }
		packets, streams := make(chan packet, 16), make(chan packet, 1)
		x := a.run(t, Config{DisableUDP: !udp}, b)
		y := b.run(t, Config{DisableUDP: !udp,
			Packet: func(from string, b []byte) { packets <- packet{from, string(b)} },
			Gossip: func(from string, c net.Conn) {
				b, _ := io.ReadAll(c)
				streams <- packet{from, string(b)}
				_, _ = c.Write([]byte("pong"))
				c.Close()
			}}, a)
		y.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: true}})
		x.peers(y)
		x.await(t, "a session", func() bool { return x.up(y) != nil })
		y.await(t, "a session", func() bool { return y.up(x) != nil })
		link := x.Gossip()
		if got := link.Peers(); len(got) != 1 || got[0] != "gw-1.bb" {
			t.Fatalf("peers %v", got)
		}
		for _, body := range []string{"small", strings.Repeat("l", 20000)} {
			if err := link.SendDatagram("gw-1.bb", []byte(body)); err != nil {
				t.Fatal(err)
			}
			if p := <-packets; p.from != "gw-1.aa" || p.body != body {
				t.Errorf("udp %v: %d bytes from %q", udp, len(p.body), p.from)
			}
		}
		if err := link.SendDatagram("gw-9.bb", []byte("x")); err == nil {
			t.Error("a packet to nobody was sent")
		}
		c, err := link.OpenStream(t.Context(), "gw-1.bb")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte("ping"))
		_ = c.(interface{ CloseWrite() error }).CloseWrite()
		if p := <-streams; p.from != "gw-1.aa" || p.body != "ping" {
			t.Errorf("stream %+v", p)
		}
		if b, err := io.ReadAll(c); string(b) != "pong" || err != nil {
			t.Errorf("answer %q, %v", b, err)
		}
		c.Close()
		y.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: false}})
		if got := y.Gossip().Peers(); len(got) != 0 {
			t.Errorf("gossip with a peer that is joining: %v", got)
		}
	}
}

func TestJoinConversation(t *testing.T) {
	a, b := newDomain(t, "aa"), newDomain(t, "bb") // b knows nothing of a
	for _, udp := range []bool{true, false} {
		got := make(chan error, 1)
		var exporter []byte
		y := b.run(t, Config{DisableUDP: !udp, Join: func(_ context.Context, c *JoinConn) {
			exporter, _ = c.Exporter()
			f, err := c.ReadFrame()
			if err == nil && len(c.State.PeerCertificates) == 0 {
				err = errors.New("no client certificate")
			}
			if err == nil {
				err = c.WriteFrame(append([]byte("re: "), f...))
			}
			got <- err
		}})
		x := a.run(t, Config{DisableUDP: !udp})
		pinned := func(pin [32]byte, name string) *tls.Config {
			id := must(spiffeid.Gateway(b.td, name))
			return trust.PinnedClientTLS(pin, x.cfg.Source, nil, trust.TLSOptions{Authorize: trust.AuthorizeID(id), ALPN: []string{ALPNJoin}}, nil)
		}
		addrs := []string{y.Addr().String()}
		c, err := x.DialJoin(t.Context(), addrs, pinned(b.ca.Bundle().Hash(), "gw-1"))
		if err != nil {
			t.Fatal(err)
		}
		if err := c.WriteFrame([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if f, err := c.ReadFrame(); err != nil || string(f) != "re: hello" {
			t.Errorf("udp %v: %q, %v", udp, f, err)
		}
		if err := <-got; err != nil {
			t.Error(err)
		}
		if e, err := c.Exporter(); err != nil || string(e) != string(exporter) {
			t.Error("the exporters differ")
		}
		c.Close()
		for name, config := range map[string]*tls.Config{
			"another pin":     pinned(a.ca.Bundle().Hash(), "gw-1"),
			"another gateway": pinned(b.ca.Bundle().Hash(), "gw-2"),
		} {
			if c, err := x.DialJoin(t.Context(), addrs, config); err == nil {
				t.Errorf("%s: connected", name)
				c.Close()
			} else if v := new(trust.VerifyError); !errors.As(err, &v) {
				t.Errorf("%s: %v", name, err)
			}
		}
		x.stop()
		y.stop()
	}
}
