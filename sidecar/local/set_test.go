// SPDX-License-Identifier: Apache-2.0

package local_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/sidecar/local"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type authority struct {
	t  testing.TB
	td spiffeid.TrustDomain
	ca *ca.CA
}

func newAuthority(t testing.TB) *authority {
	td, err := spiffeid.ParseTrustDomain("us-east.acme")
	check(t, err)
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "data"))
	check(t, err)
	t.Cleanup(func() { dir.Close() })
	c, err := ca.Create(dir, ca.Config{TrustDomain: td})
	check(t, err)
	return &authority{t, td, c}
}

func (a *authority) source(id spiffeid.ID, ttl time.Duration) *trust.Source {
	s := trust.NewSource(trust.SourceConfig{})
	identity, err := a.ca.IssueKey(id, ttl)
	check(a.t, err)
	s.SetIdentity(identity)
	bundles, err := trust.NewBundles(a.ca.Bundle())
	check(a.t, err)
	s.SetBundles(bundles)
	return s
}

func (a *authority) gateway(name string) spiffeid.ID {
	id, err := spiffeid.Gateway(a.td, name)
	check(a.t, err)
	return id
}

func (a *authority) workload() *trust.Source {
	id, err := spiffeid.Workload(a.td, "shop", "web")
	check(a.t, err)
	return a.source(id, time.Hour)
}

// peer is a gateway whose sessions the test drives by hand.
type peer struct {
	net.Listener
	wg    sync.WaitGroup
	conns chan *tls.Conn // greeted
	mu    sync.Mutex
	all   []net.Conn
}

func newPeer(t testing.TB, src *trust.Source) *peer {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	p := &peer{Listener: l, conns: make(chan *tls.Conn, 100)}
	cfg := src.ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{preface.ALPN}})
	p.wg.Go(func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			p.mu.Lock()
			p.all = append(p.all, raw)
			p.mu.Unlock()
			p.wg.Go(func() { p.greet(tls.Server(raw, cfg)) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.mu.Lock()
		for _, c := range p.all {
			c.Close()
		}
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

func (p *peer) greet(c *tls.Conn) {
	var m controlpb.ToGateway
	if c.Handshake() != nil || local.ReadFrame(c, &m) != nil {
		c.Close()
		return
	}
	send(c, &controlpb.ToSidecar{Message: &controlpb.ToSidecar_Welcome{Welcome: &controlpb.LocalWelcome{
		WireVersion: 1, SessionId: bytes.Repeat([]byte{7}, 16), Gateway: "gateway-1",
	}}})
	p.conns <- c
}

func send(c net.Conn, m *controlpb.ToSidecar) { _ = local.WriteFrame(c, m) }

func run(t testing.TB, s *local.Set) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
}

func await[T any](t testing.TB, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(10 * time.Second):
		t.Fatalf("not seen: %s", what)
		panic("unreachable")
	}
}

func TestSessionLife(t *testing.T) {
	a := newAuthority(t)
	p := newPeer(t, a.source(a.gateway("gateway-1"), time.Hour))
	changed, notices := make(chan struct{}, 1), make(chan local.Notice, 10)
	s := local.New(local.Config{
		Source: a.workload(), Ping: 50 * time.Millisecond, Dead: time.Second,
		Hello: func() *controlpb.LocalHello { return &controlpb.LocalHello{Proxy: "shop/web"} },
		Changed: func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		},
		Notice: func(n local.Notice) { notices <- n },
	})
	run(t, s)
	s.SetGateways([]local.Gateway{{Name: "gateway-1", Address: p.Addr().String(), ID: a.gateway("gateway-1")}})
	c := await(t, p.conns, "a session")
	until := func(what string, cond func() bool) {
		t.Helper()
		for !cond() {
			await(t, changed, what)
		}
	}
	until("live", func() bool { return len(s.Sessions()) == 1 })
	session := s.Sessions()[0]
	want, err := preface.KeyFrom(c.ConnectionState())
	check(t, err)
	if !bytes.Equal(session.Key(), want) || session.ID()[0] != 7 {
		t.Error("key or id are not what the gateway has")
	}
	if first, second := session.NextCounter(), session.NextCounter(); first == second {
		t.Error("a counter was given twice")
	}

	send(c, &controlpb.ToSidecar{Message: &controlpb.ToSidecar_Peers{Peers: &controlpb.PeersStatus{Peers: []*controlpb.PeerStatus{
		{TrustDomain: "eu-west.acme", State: "up", RttSeconds: 0.08}, {TrustDomain: "NONSENSE", State: "up"}, {TrustDomain: "ap-south.acme", State: "suspect"},
	}}}})
	eu, err := spiffeid.ParseTrustDomain("eu-west.acme")
	check(t, err)
	until("peers", func() bool { return len(s.Tunnels()) == 2 })
	if got := s.Tunnels()[eu]; !got.Up || got.RTT != 80*time.Millisecond || !s.Known() {
		t.Errorf("tunnel %+v", got)
	}

	send(c, &controlpb.ToSidecar{Message: &controlpb.ToSidecar_Withdraw{Withdraw: &controlpb.WithdrawNotice{Connections: []uint64{3}, Reason: "r"}}})
	if n := await(t, notices, "withdrawal"); !n.Withdrawn || n.Connections[0] != 3 || n.Session != session {
		t.Errorf("notice %+v", n)
	}
	send(c, &controlpb.ToSidecar{Message: &controlpb.ToSidecar_Drain{Drain: &controlpb.DrainNotice{TrustDomain: "eu-west.acme"}}})
	if n := await(t, notices, "far drain"); n.Withdrawn || n.Peer != eu {
		t.Errorf("notice %+v", n)
	}

	// The gateway falls silent without closing anything: it is dead after Dead, and is dialled again.
	began := time.Now()
	await(t, session.Done(), "the end of a silent session")
	if d := time.Since(began); d > 3*time.Second {
		t.Errorf("a silent gateway was noticed after %v", d)
	}
	if n := await(t, notices, "what ran through it"); n.Session != session || n.Withdrawn {
		t.Errorf("notice %+v", n)
	}
	await(t, p.conns, "the next session")
	until("live again", func() bool { l := s.Sessions(); return len(l) == 1 && l[0] != session })
	s.SetGateways(nil)
	until("gone", func() bool { return len(s.Sessions()) == 0 })
}

func TestOnlyTheNamedGateway(t *testing.T) {
	a := newAuthority(t)
	p := newPeer(t, a.source(a.gateway("gateway-2"), time.Hour))
	s := local.New(local.Config{Source: a.workload()})
	run(t, s)
	s.SetGateways([]local.Gateway{{Name: "gateway-1", Address: p.Addr().String(), ID: a.gateway("gateway-1")}})
	select {
	case <-p.conns:
		t.Error("a session with another gateway")
	case <-time.After(500 * time.Millisecond):
	}
	if len(s.Sessions()) != 0 {
		t.Error("it counts as live")
	}
}

// TestSessionIsRenewed: at half of its certificate's life a session is replaced, and the old one stays for what runs through it.
func TestSessionIsRenewed(t *testing.T) {
	a := newAuthority(t)
	p := newPeer(t, a.source(a.gateway("gateway-1"), 4*time.Second))
	notices := make(chan local.Notice, 10)
	s := local.New(local.Config{Source: a.workload(), Dead: 10 * time.Second, Notice: func(n local.Notice) { notices <- n }})
	run(t, s)
	s.SetGateways([]local.Gateway{{Name: "gateway-1", Address: p.Addr().String(), ID: a.gateway("gateway-1")}})
	await(t, p.conns, "a session")
	await(t, p.conns, "the next one")
	n := await(t, notices, "the old one is retired")
	select {
	case <-n.Session.Done():
		t.Error("the old session was cut")
	default:
	}
}

func TestFrames(t *testing.T) {
	var b bytes.Buffer
	big := &controlpb.ToGateway{Message: &controlpb.ToGateway_Marker{Marker: &controlpb.TraceMarker{Traceparent: string(make([]byte, local.MaxFrame))}}}
	if err := local.WriteFrame(&b, big); err == nil || b.Len() > 0 {
		t.Error("a frame above the limit was written")
	}
	head := binary.BigEndian.AppendUint32(nil, local.MaxFrame+1)
	if err := local.ReadFrame(bytes.NewReader(head), &controlpb.ToSidecar{}); err == nil {
		t.Error("a frame above the limit was read")
	}
}

func FuzzReadFrame(f *testing.F) {
	var b bytes.Buffer
	check(f, local.WriteFrame(&b, &controlpb.ToSidecar{Message: &controlpb.ToSidecar_Peers{Peers: &controlpb.PeersStatus{
		Peers: []*controlpb.PeerStatus{{TrustDomain: "eu-west.acme", State: "up"}},
	}}}))
	f.Add(b.Bytes())
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1})
	f.Add([]byte{0, 0, 0, 2, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		var m controlpb.ToSidecar
		if local.ReadFrame(bytes.NewReader(b), &m) != nil {
			return
		}
		var out bytes.Buffer
		check(t, local.WriteFrame(&out, &m))
	})
}
