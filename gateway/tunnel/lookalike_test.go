// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/lookalike"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// intrusion dials addr as a hostile client and returns what it was given: bytes of application data, and how it ended.
type intrusion func(ctx context.Context, addr string, config *tls.Config) (given int, end error)

// overTCP completes the handshake if it may, speaks, and reads until the end.
func overTCP(ctx context.Context, addr string, config *tls.Config) (int, error) {
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return 0, err
	}
	return speak(ctx, raw, config)
}

func speak(ctx context.Context, raw net.Conn, config *tls.Config) (int, error) {
	defer raw.Close()
	deadline, _ := ctx.Deadline()
	_ = raw.SetDeadline(deadline)
	c := tls.Client(raw, config)
	if err := c.HandshakeContext(ctx); err != nil {
		return 0, err
	}
	_, _ = c.Write([]byte("hello"))
	n, err := c.Read(make([]byte, 1))
	return n, err
}

// overQUIC dials with early data if there is a ticket, opens a stream, sends a packet, and waits for the end.
func overQUIC(ctx context.Context, addr string, config *tls.Config) (int, error) {
	c, err := quic.DialAddrEarly(ctx, addr, config, &quic.Config{EnableDatagrams: true, InitialPacketSize: initialPacketSize})
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.CloseWithError(0, "") }()
	given := 0
	if s, err := c.OpenStreamSync(ctx); err == nil {
		_, _ = s.Write([]byte("hello"))
		_ = c.SendDatagram([]byte("gossip"))
		_ = s.SetReadDeadline(time.Now().Add(5 * time.Second))
		n, _ := s.Read(make([]byte, 1))
		given += n
	}
	if _, err := c.ReceiveDatagram(ctx); err == nil {
		given++
	}
	select {
	case <-c.Context().Done():
		return given, context.Cause(c.Context())
	case <-ctx.Done():
		return given, ctx.Err()
	}
}

var transports = []struct {
	name, alpn string
	dial       intrusion
}{{TCP, ALPNTCP, overTCP}, {QUIC, ALPNQUIC, overQUIC}}

// quiet is an endpoint that reports what it should never see: a stream or a packet.
func quiet(t *testing.T, d *domain, source *trust.Source, peer spiffeid.TrustDomain) *end {
	t.Helper()
	x := d.run(t, Config{Source: source, Packet: func(from string, _ []byte) { t.Errorf("a packet from %s", from) }})
	x.SetPeers([]Peer{{TrustDomain: peer, Cluster: "bb", Ready: true}})
	return x
}

// nobody checks that x has no session, so that no gossip goes anywhere.
func nobody(t *testing.T, x *end) {
	t.Helper()
	if s, g := x.Sessions(), x.Gossip().Peers(); len(s) > 0 || len(g) > 0 {
		t.Errorf("sessions %v, gossip with %v", s, g)
	}
}

// TestLookalikesGetNoSession: classes T2 and T3 at a gateway. No certificate of the corpus gets a session, a byte or a gossip packet,
// over TCP or QUIC; the honest gateway of the same peer does.
func TestLookalikesGetNoSession(t *testing.T) {
	a, third := newDomain(t, "aa"), newDomain(t, "cc")
	peer := must(lookalike.NewPeer(must(spiffeid.ParseTrustDomain("bb.acme")), time.Now()))
	bundles := must(trust.NewBundles(a.ca.Bundle(), third.ca.Bundle(), peer.Bundle()))
	own, honest := trust.NewSource(trust.SourceConfig{}), trust.NewSource(trust.SourceConfig{})
	own.SetIdentity(must(a.ca.IssueKey(must(spiffeid.Gateway(a.td, "gw-1")), time.Hour)))
	honest.SetIdentity(must(peer.Honest("/strait/gateway/gw-1")))
	own.SetBundles(bundles)
	honest.SetBundles(bundles)
	id := own.Identity()
	leaves := must(peer.Leaves(lookalike.Target{ID: id.ID, Chain: append(id.Chain[1:], a.ca.Bundle().Roots()...), Third: third.td}))

	x := quiet(t, a, own, honest.Identity().ID.TrustDomain())
	reasons := listenBeside(t, x)
	for _, tr := range transports {
		for _, l := range leaves {
			config := honest.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{tr.alpn}})
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &l.Certificate, nil }
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			given, err := tr.dial(ctx, x.Addr().String(), config)
			if given > 0 || !refusedByTLS(err) {
				t.Errorf("%s over %s: given %d bytes, %v", l.Name, tr.name, given, err)
			}
			if tr.name == QUIC {
				if _, err := tr.dial(ctx, reasons.addr, config); !refusedByTLS(err) {
					t.Errorf("%s beside: %v", l.Name, err)
				}
				if got := reasons.last(); l.Reason != lookalike.Malformed && got != l.Reason || l.Reason == lookalike.Malformed && got != "" {
					t.Errorf("%s over QUIC: %q, want %s", l.Name, got, l.Reason)
				}
			}
			cancel()
		}
		nobody(t, x)
		t.Logf("0 of %d accepted over %s", len(leaves), tr.name)
	}
	d := &domain{name: "bb", td: honest.Identity().ID.TrustDomain()}
	y := d.run(t, Config{Source: honest, Dialable: true})
	y.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: true, Gateways: []Gateway{{Name: "gw-1", Addresses: []string{x.Addr().String()}}}}})
	x.await(t, "a session with the honest gateway", func() bool { return len(x.Gossip().Peers()) == 1 })
}

// refusedByTLS reports whether the far end ended the handshake, or what the client took for its end, with an alert.
func refusedByTLS(err error) bool {
	var alert tls.AlertError
	var op *net.OpError
	var transport *quic.TransportError
	return errors.As(err, &alert) || errors.As(err, &op) && op.Op == "remote error" ||
		errors.As(err, &transport) && transport.Remote && transport.ErrorCode.IsCryptoError()
}

// beside is a QUIC listener with the endpoint's own configuration that keeps the reason of the last refusal.
type beside struct {
	addr string
	mu   sync.Mutex
	why  string
}

func (b *beside) last() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	why := b.why
	b.why = ""
	return why
}

func listenBeside(t *testing.T, x *end) *beside {
	t.Helper()
	b := &beside{}
	config := x.serverTLS(ALPNQUIC)
	verify := config.VerifyConnection
	config.VerifyConnection = func(cs tls.ConnectionState) error {
		err := verify(cs)
		var v *trust.VerifyError
		if errors.As(err, &v) {
			b.mu.Lock()
			b.why = v.Reason
			b.mu.Unlock()
		}
		return err
	}
	udp := must(net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}))
	tr := &quic.Transport{Conn: udp}
	ln := must(tr.Listen(config, quicConfig(maxInteractive)))
	b.addr = udp.LocalAddr().String()
	t.Cleanup(func() { ln.Close(); tr.Close(); udp.Close() })
	return b
}

// keeper is a session cache that counts what it is given.
type keeper struct {
	tls.ClientSessionCache
	kept atomic.Int64
}

func (k *keeper) Put(key string, s *tls.ClientSessionState) {
	if s != nil {
		k.kept.Add(1)
	}
	k.ClientSessionCache.Put(key, s)
}

// TestNothingResumes: class T1 at a gateway. A client that keeps tickets and sends early data gets neither tickets nor anything else, and
// after its trust domain was withdrawn none of 100 connections is accepted, over TCP and over QUIC.
func TestNothingResumes(t *testing.T) {
	a, b := newDomain(t, "aa"), newDomain(t, "bb")
	for _, tr := range transports {
		own := a.source(must(spiffeid.Gateway(a.td, "gw-1")), b)
		far := b.source(must(spiffeid.Gateway(b.td, "gw-1")), a)
		x := quiet(t, a, own, b.td)
		cache := &keeper{ClientSessionCache: tls.NewLRUClientSessionCache(32)}
		config := far.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{tr.alpn}, ServerName: "gw"})
		config.SessionTicketsDisabled, config.ClientSessionCache = false, cache
		resumed := atomic.Int64{}
		verify := config.VerifyConnection
		config.VerifyConnection = func(cs tls.ConnectionState) error {
			if cs.DidResume {
				resumed.Add(1)
			}
			return verify(cs)
		}
		for range 3 { // in time: the endpoint waits for a hello that does not come
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			if _, err := tr.dial(ctx, x.Addr().String(), config); refusedByTLS(err) {
				t.Fatalf("%s: %v", tr.name, err)
			}
			cancel()
		}
		own.SetBundles(own.Bundles().Without(b.td))
		for i := range 100 {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			given, err := tr.dial(ctx, x.Addr().String(), config)
			cancel()
			if given > 0 || !refusedByTLS(err) {
				t.Fatalf("%s, attempt %d after the withdrawal: given %d bytes, %v", tr.name, i, given, err)
			}
		}
		nobody(t, x)
		if cache.kept.Load() > 0 || resumed.Load() > 0 {
			t.Errorf("%s: %d tickets, %d sessions resumed", tr.name, cache.kept.Load(), resumed.Load())
		}
		x.stop()
	}
}

// TestNoCertificateNoByte: class T7 at a gateway. Whatever the name in the ClientHello, and wherever that is cut, a client without a
// certificate gets no byte over TCP or QUIC. Over QUIC the hello of a post-quantum handshake fills two packets; names of every
// length move the cut.
func TestNoCertificateNoByte(t *testing.T) {
	a, b := newDomain(t, "aa"), newDomain(t, "bb")
	far := b.source(must(spiffeid.Gateway(b.td, "gw-1")), a)
	x := quiet(t, a, a.source(must(spiffeid.Gateway(a.td, "gw-1")), b), b.td)
	names := []string{"", "gw-1.aa", "GW-1.AA", "gw-1.aa.", "10.0.0.1", "::1", "*", "strait"}
	for n := 1; n < 240; n += 3 {
		names = append(names, strings.Repeat("n", n%60+1)+strings.Repeat(".n", n/2))
	}
	anonymous := func(alpn, name string) *tls.Config {
		c := far.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{alpn}, ServerName: name})
		c.GetClientCertificate = nil
		return c
	}
	for _, tr := range transports {
		for _, name := range names {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			if given, err := tr.dial(ctx, x.Addr().String(), anonymous(tr.alpn, name)); given > 0 || !refusedByTLS(err) {
				t.Errorf("%s, name %q: given %d bytes, %v", tr.name, name, given, err)
			}
			cancel()
		}
	}
	for _, records := range []bool{false, true} {
		for n := 1; ; n++ {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", x.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			s := &lookalike.SplitConn{Conn: raw, At: n, Records: records}
			config := anonymous(ALPNTCP, "gw-1.aa")
			config.CurvePreferences = []tls.CurveID{tls.X25519}
			if given, err := speak(ctx, s, config); given > 0 || !refusedByTLS(err) {
				t.Errorf("cut at %d (records %t): given %d bytes, %v", n, records, given, err)
			}
			cancel()
			if n >= s.Len()-1 {
				break
			}
		}
	}
	nobody(t, x)
}
