// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// redTeam is a session of a gateway that has a valid identity of c and speaks the tunnel protocol as it likes.
func (c *cluster) redTeam(target *cluster) *tunnel.Session {
	c.t.Helper()
	s, err := c.tryRedTeam(c.t.Context(), target, 10*time.Second)
	if err != nil {
		c.t.Fatal(err)
	}
	return s
}

func (c *cluster) tryRedTeam(ctx context.Context, target *cluster, limit time.Duration) (*tunnel.Session, error) {
	e, err := tunnel.Listen(tunnel.Config{Name: "red", Source: c.source(must(spiffeid.Gateway(c.td, "red")), target), Logger: logger(c.t)})
	if err != nil {
		return nil, err
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { _ = e.Run(run) })
	c.t.Cleanup(func() { cancel(); wg.Wait() })
	e.SetPeers([]tunnel.Peer{{TrustDomain: target.td, Cluster: string(target.name), Ready: true,
		Gateways: []tunnel.Gateway{{Name: "gw-1", Addresses: []string{target.addrs.Listen}}}}})
	timeout := time.After(limit)
	for {
		changed := e.Changed()
		if s := e.Pick(target.td); s != nil {
			return s, nil
		}
		select {
		case <-changed:
		case <-timeout:
			return nil, errors.New("no session: " + e.LastError(target.td))
		}
	}
}

// helloFor is the ClientHello that a TLS client would send for sni.
func helloFor(sni string) []byte {
	client, server := net.Pipe()
	defer client.Close()
	defer server.Close()
	go func() {
		_ = tls.Client(client, &tls.Config{ServerName: sni, InsecureSkipVerify: true}).Handshake()
	}()
	if sni == "" || strings.ToLower(sni) != sni { // not what crypto/tls would send: patch it in
		return patchedHello(sni)
	}
	h, err := preface.ReadHello(server, nil)
	if err != nil {
		panic(err)
	}
	return h.Raw
}

// patchedHello makes a hello whose server name is sni, byte for byte, or has none.
func patchedHello(sni string) []byte {
	if sni == "" {
		client, server := net.Pipe()
		defer client.Close()
		defer server.Close()
		go func() { _ = tls.Client(client, &tls.Config{InsecureSkipVerify: true}).Handshake() }()
		b := make([]byte, 16<<10)
		n, _ := server.Read(b)
		return b[:n]
	}
	h := helloFor(strings.ToLower(sni))
	return []byte(strings.Replace(string(h), strings.ToLower(sni), sni, 1))
}

// TestGarbageOnEveryPort: no crash, nothing left behind, and honest traffic passes (goleak watches the whole package).
func TestGarbageOnEveryPort(t *testing.T) {
	east, west, web, _ := pair(t)
	web.awaitPeer(west, tunnel.QUIC)
	honest := func(when string) {
		tc, _, err := web.call(west, "checkout")
		if err != nil {
			t.Errorf("honest call %s: %v", when, err)
			return
		}
		tc.NetConn().Close()
	}
	honest("before")
	before := runtime.NumGoroutine()
	hello := helloFor(west.sni("checkout"))
	random := make([]byte, 64<<10)
	for i := range random {
		random[i] = byte(rand.Uint32())
	}
	big := append([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x00\xff\xff"), make([]byte, 10<<20)...)
	frames := [][]byte{{}, random, []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), hello[:len(hello)/2], hello, big,
		preface.Signature[:], append(preface.Signature[:], 0x21, 0, 0, 4, 1, 2, 3, 4), {22}, {22, 3, 1, 0xff, 0xff}}
	var wg sync.WaitGroup
	for _, c := range []*cluster{east, west} {
		for _, addr := range []string{c.addrs.Listen, c.addrs.Local, c.addrs.Metrics} {
			for _, b := range frames {
				wg.Go(func() {
					conn, err := net.Dial("tcp", addr)
					if err != nil {
						t.Error(err)
						return
					}
					defer conn.Close()
					_ = conn.SetDeadline(time.Now().Add(8 * time.Second))
					_, _ = conn.Write(b)
					if len(b) > 0 && b[0] != 'G' {
						_ = conn.(*net.TCPConn).CloseWrite()
					}
					_, _ = io.Copy(io.Discard, conn)
				})
			}
		}
		wg.Go(func() {
			conn := must(net.Dial("udp", c.addrs.Listen))
			defer conn.Close()
			for range 200 {
				_, _ = conn.Write(random[:rand.IntN(1200)])
			}
		})
	}
	honest("meanwhile")
	wg.Wait()
	within(t, 30*time.Second, "goroutines back at where they were", func() bool { return runtime.NumGoroutine() <= before+8 })
	honest("afterwards")
}

// TestPeerSpeaksGarbageInside lets an authenticated peer write nonsense on streams.
func TestPeerSpeaksGarbageInside(t *testing.T) {
	east, west, web, _ := pair(t)
	web.awaitPeer(west, tunnel.QUIC)
	s := east.redTeam(west)
	for _, b := range [][]byte{{0, 0}, {0xff, 0xff}, {0, 4, 9, 9, 9, 9}, {0, 1, 1}, make([]byte, 4096)} {
		st, err := s.OpenRaw(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = st.Write(b)
		_ = st.CloseWrite()
		_ = st.SetReadDeadline(time.Now().Add(8 * time.Second))
		if b, err := io.ReadAll(st); len(b) > preface.MaxStatus {
			t.Errorf("answered with %d bytes, %v", len(b), err)
		}
		st.Reset()
	}
	if s.State() != tunnel.StateUp {
		t.Errorf("session is %v", s.State())
	}
	if _, _, err := web.call(west, "checkout"); err != nil {
		t.Errorf("honest call: %v", err)
	}
}
