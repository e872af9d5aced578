// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/quic-go/quic-go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/gateway"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// fakeControlPlane is the other end of the link: it keeps what gateways say, and says what the test wants.
type fakeControlPlane struct {
	controlpb.UnimplementedGatewaysServer
	t      *testing.T
	c      *cluster
	srv    *grpc.Server
	say    chan *controlpb.ControlMessage
	answer func(*controlpb.Query) *controlpb.Answer

	mu    sync.Mutex
	heard []*controlpb.GatewayMessage
	news  chan struct{}
}

// controlPlane gives the cluster's gateway a control plane to link to. Call it before start.
func (c *cluster) controlPlane() *fakeControlPlane {
	c.t.Helper()
	f := &fakeControlPlane{t: c.t, c: c, srv: grpc.NewServer(), say: make(chan *controlpb.ControlMessage, 16), news: make(chan struct{})}
	controlpb.RegisterGatewaysServer(f.srv, f)
	ln := bufconn.Listen(1 << 20)
	go func() { _ = f.srv.Serve(ln) }()
	conn := must(grpc.NewClient("passthrough:///cp", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return ln.DialContext(ctx) })))
	c.t.Cleanup(func() { conn.Close(); f.srv.Stop() })
	c.client.conn = conn
	return f
}

func (f *fakeControlPlane) Link(s grpc.BidiStreamingServer[controlpb.GatewayMessage, controlpb.ControlMessage]) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(s.Context())
	defer cancel()
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case m := <-f.say:
				_ = s.Send(m)
			}
		}
	})
	for {
		m, err := s.Recv()
		if err != nil {
			return nil
		}
		if q := m.GetQuery(); q != nil && f.answer != nil {
			if a := f.answer(q); a != nil {
				a.Id = q.Id
				f.say <- &controlpb.ControlMessage{Message: &controlpb.ControlMessage_Answer{Answer: a}}
			}
		}
		f.mu.Lock()
		f.heard = append(f.heard, m)
		close(f.news)
		f.news = make(chan struct{})
		f.mu.Unlock()
	}
}

// hear waits for a message that satisfies want, among those heard so far or to come, and takes it out.
func (f *fakeControlPlane) hear(what string, want func(*controlpb.GatewayMessage) bool) *controlpb.GatewayMessage {
	f.t.Helper()
	limit := time.After(10 * time.Second)
	for {
		f.mu.Lock()
		news := f.news
		for i, m := range f.heard {
			if want(m) {
				f.heard = append(f.heard[:i:i], f.heard[i+1:]...)
				f.mu.Unlock()
				return m
			}
		}
		f.mu.Unlock()
		select {
		case <-news:
		case <-limit:
			f.t.Fatalf("control plane of %s never heard: %s", f.c.name, what)
		}
	}
}

func (f *fakeControlPlane) hearTunnel(state, transport string) {
	f.t.Helper()
	f.hear("a tunnel "+state, func(m *controlpb.GatewayMessage) bool {
		for _, t := range m.GetTunnels().GetTunnels() {
			if t.State == state && t.Transport == transport {
				return true
			}
		}
		return false
	})
}

func TestLinkReportsTheGatewayAndItsTunnels(t *testing.T) {
	east, west := newCluster(t, "us-east"), newCluster(t, "eu-west")
	cp := east.controlPlane()
	west.start()
	east.start(func(c *gateway.Config) { c.Advertise = []string{"192.0.2.1:7443"} })
	h := cp.hear("hello", func(m *controlpb.GatewayMessage) bool { return m.GetHello() != nil }).GetHello()
	if h.Name != "gw-1" || h.LocalAddress != east.addrs.Local || len(h.Advertise) != 1 || h.Zone != "z" {
		t.Errorf("hello %v", h)
	}
	west.knows(east)
	east.knows(west, west.addrs.Listen)
	cp.hearTunnel("up", tunnel.QUIC)
	if err := west.stop(); err != nil {
		t.Error(err)
	}
	cp.hearTunnel("down", "")
}

func TestQueriesCrossBothWays(t *testing.T) {
	east, west := newCluster(t, "us-east"), newCluster(t, "eu-west")
	cpe, cpw := east.controlPlane(), west.controlPlane()
	cpw.answer = func(q *controlpb.Query) *controlpb.Answer {
		if q.PeerTrustDomain != east.td.String() {
			return &controlpb.Answer{ErrorCode: "STR-5201"}
		}
		return &controlpb.Answer{Body: append([]byte(q.Method+":"), q.Body...)}
	}
	west.start()
	east.start()
	cpw.hear("hello", func(m *controlpb.GatewayMessage) bool { return m.GetHello() != nil })
	west.knows(east)
	east.knows(west, west.addrs.Listen)
	ask := func(id uint64, td string, body []byte, timeout int64) *controlpb.Answer {
		cpe.say <- &controlpb.ControlMessage{Message: &controlpb.ControlMessage_Query{Query: &controlpb.Query{Id: id, PeerTrustDomain: td,
			Method: "probe", Body: body, TimeoutMs: timeout}}}
		return cpe.hear("answer", func(m *controlpb.GatewayMessage) bool { return m.GetAnswer().GetId() == id }).GetAnswer()
	}
	big := bytes.Repeat([]byte("b"), 256<<10)
	if a := ask(1, west.td.String(), big, 5000); a.ErrorCode != "" || !bytes.Equal(a.Body, append([]byte("probe:"), big...)) || a.Transport != tunnel.QUIC || a.ElapsedSeconds <= 0 {
		t.Errorf("answer %q %q, %d bytes over %q", a.ErrorCode, a.ErrorMessage, len(a.Body), a.Transport)
	}
	if a := ask(2, "nowhere.acme", nil, 300); a.ErrorCode != "STR-2101" {
		t.Errorf("unknown peer: %v", a)
	}
	cpw.answer = nil
	if a := ask(3, west.td.String(), nil, 300); a.ErrorCode == "" {
		t.Errorf("a control plane that says nothing: %v", a)
	}
}

func TestCatalogReachesThePeersControlPlane(t *testing.T) {
	east, west := newCluster(t, "us-east"), newCluster(t, "eu-west")
	cpe, cpw := east.controlPlane(), west.controlPlane()
	dir := must(datadir.Create(t.TempDir() + "/gw"))
	defer dir.Close()
	west.start(func(c *gateway.Config) { c.DataDir = dir })
	east.start()
	west.knows(east)
	east.knows(west, west.addrs.Listen)
	signer := must(west.ca.IssueKey(spiffeid.CatalogSigner(west.td), time.Hour))
	origin := must(catalog.NewOrigin(catalog.OriginConfig{Self: west.td, Signer: func() *trust.Identity { return signer },
		Epoch: func(_ context.Context, least uint64) (uint64, error) { return max(1, least), nil }}))
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = origin.Run(ctx) })
	defer wg.Wait()
	defer cancel()

	var epoch, seq uint64
	offer := func(entries map[string][]byte) {
		t.Helper()
		changed := origin.Changed()
		if err := origin.Set(east.td, entries); err != nil {
			t.Fatal(err)
		}
		<-changed
		u := origin.Update(east.td, epoch, seq)
		h := must(catalog.ParseHead(u.Head.Head))
		epoch, seq = h.Epoch, h.Seq
		cpw.say <- &controlpb.ControlMessage{Message: &controlpb.ControlMessage_Offer{Offer: &controlpb.Offer{
			ConsumerTrustDomain: east.td.String(), Update: u}}}
	}
	hear := func(key string, body []byte) {
		t.Helper()
		m := cpe.hear("catalog with "+key, func(m *controlpb.GatewayMessage) bool {
			for _, e := range m.GetCatalog().GetUpdate().GetEntries() {
				if e.Key == key && bytes.Equal(e.Body, body) {
					return true
				}
			}
			return false
		})
		if _, err := catalog.VerifyHead(m.GetCatalog().Update.Head, east.client.source.Bundles(), west.td, east.td, time.Now()); err != nil {
			t.Error(err)
		}
	}
	offer(map[string][]byte{"svc/shop/checkout": []byte("v1")})
	hear("svc/shop/checkout", []byte("v1"))
	offer(map[string][]byte{"svc/shop/checkout": []byte("v1"), "svc/shop/catalog": []byte("v2")})
	hear("svc/shop/catalog", []byte("v2"))

	// A control plane that lost what it had asks for everything again.
	cpe.say <- &controlpb.ControlMessage{Message: &controlpb.ControlMessage_Mark{Mark: &controlpb.CatalogMark{
		OriginTrustDomain: west.td.String(), Resync: true}}}
	hear("svc/shop/checkout", []byte("v1"))

	// A gateway that starts without its control plane serves what it kept.
	cpw.srv.Stop()
	if err := west.stop(); err != nil {
		t.Error(err)
	}
	west.client.conn = nil
	west.start(func(c *gateway.Config) { c.DataDir = dir })
	cpe.say <- &controlpb.ControlMessage{Message: &controlpb.ControlMessage_Mark{Mark: &controlpb.CatalogMark{
		OriginTrustDomain: west.td.String(), Resync: true}}}
	east.knows(west, west.addrs.Listen)
	hear("svc/shop/catalog", []byte("v2"))
}

func TestJoinConversationsAreRelayed(t *testing.T) {
	east, west := newCluster(t, "us-east"), newCluster(t, "eu-west") // they do not know each other
	cpe, cpw := east.controlPlane(), west.controlPlane()
	west.start()
	east.start()
	for _, cp := range []*fakeControlPlane{cpe, cpw} {
		cp.hear("hello", func(m *controlpb.GatewayMessage) bool { return m.GetHello() != nil })
	}
	pin := west.ca.Bundle().Hash()
	dial := func(id uint64, pin [32]byte) {
		cpe.say <- &controlpb.ControlMessage{Message: &controlpb.ControlMessage_JoinDial{JoinDial: &controlpb.JoinDial{Id: id,
			Addresses: []string{west.addrs.Listen}, GatewayIds: []string{west.client.info.ID.String()}, BundleSha256: pin[:], TimeoutMs: 5000}}}
	}
	frame := func(cp *fakeControlPlane, what string, want func(*controlpb.JoinFrame) bool) *controlpb.JoinFrame {
		t.Helper()
		return cp.hear(what, func(m *controlpb.GatewayMessage) bool { return m.GetJoin() != nil && want(m.GetJoin()) }).GetJoin()
	}
	opened := func(f *controlpb.JoinFrame) bool { return f.Opened != nil }
	say := func(cp *fakeControlPlane, f *controlpb.JoinFrame) {
		cp.say <- &controlpb.ControlMessage{Message: &controlpb.ControlMessage_Join{Join: f}}
	}
	dial(7, pin)
	e := frame(cpe, "opened at the dialler", opened)
	if e.Id != 7 || e.Inbound || len(e.Opened.Exporter) != 32 || e.Opened.Transport != tunnel.QUIC || len(e.Opened.PeerChainDer) == 0 {
		t.Errorf("dialler: %v", e)
	}
	if b, err := trust.ParseBundle(west.td, e.Opened.PeerBundleJwks); err != nil || b.Hash() != pin {
		t.Errorf("dialler's bundle: %v", err)
	}
	say(cpe, &controlpb.JoinFrame{Id: 7, Body: []byte("hello")}) // the stream exists with its first frame
	w := frame(cpw, "opened at the acceptor", opened)
	leaf := east.client.source.Identity().Chain[0].Raw
	if !w.Inbound || !bytes.Equal(w.Opened.Exporter, e.Opened.Exporter) || sha256.Sum256(w.Opened.PeerChainDer[0]) != sha256.Sum256(leaf) {
		t.Errorf("acceptor: %v", w)
	}
	body := func(want string) func(*controlpb.JoinFrame) bool {
		return func(f *controlpb.JoinFrame) bool { return string(f.Body) == want }
	}
	frame(cpw, "hello", body("hello"))
	say(cpw, &controlpb.JoinFrame{Id: w.Id, Inbound: true, Body: []byte("challenge")})
	frame(cpe, "challenge", body("challenge"))
	say(cpw, &controlpb.JoinFrame{Id: w.Id, Inbound: true, Body: []byte("verdict")})
	say(cpw, &controlpb.JoinFrame{Id: w.Id, Inbound: true, Close: true})
	frame(cpe, "verdict before the end", body("verdict"))
	if f := frame(cpe, "end", func(f *controlpb.JoinFrame) bool { return f.Close }); f.Id != 7 || f.ErrorCode != "" {
		t.Errorf("end: %v", f)
	}
	pin[0]++
	dial(8, pin)
	if f := frame(cpe, "refusal", func(f *controlpb.JoinFrame) bool { return f.Close }); f.Id != 8 || f.ErrorCode != "STR-2210" {
		t.Errorf("another pin: %v", f)
	}
}

// TestStrangersWordsDoNotEndTheLink: the reason with which a stranger closes its connection ends up in an error, and may be any bytes.
func TestStrangersWordsDoNotEndTheLink(t *testing.T) {
	west, stranger := newCluster(t, "eu-west"), newCluster(t, "thief")
	cp := west.controlPlane()
	west.start()
	cp.hear("hello", func(m *controlpb.GatewayMessage) bool { return m.GetHello() != nil })
	config := trust.PinnedClientTLS(west.ca.Bundle().Hash(), stranger.client.source, nil,
		trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{tunnel.ALPNJoin}}, nil)
	conn := must(quic.DialAddr(t.Context(), west.addrs.Listen, config, nil))
	st := must(conn.OpenStreamSync(t.Context()))
	if err := tunnel.WriteFrame(st, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	cp.hear("the conversation", func(m *controlpb.GatewayMessage) bool { return string(m.GetJoin().GetBody()) == "hello" })
	_ = conn.CloseWithError(1, "\xff\x1b[2J")
	end := cp.hear("its end", func(m *controlpb.GatewayMessage) bool { return m.GetJoin().GetClose() }).GetJoin()
	if end.ErrorMessage == "" || strings.ContainsRune(end.ErrorMessage, 0x1b) || !utf8.ValidString(end.ErrorMessage) {
		t.Errorf("the control plane is told %q", end.ErrorMessage)
	}
}
