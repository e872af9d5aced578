// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/lookalike"
)

// overPipe connects the two; the server says "secret" to whomever its handshake lets in. It returns what the client read and how the
// server's handshake ended. wrap may stand between the client's TLS and the network.
func overPipe(client, server *tls.Config, wrap func(net.Conn) net.Conn) (read []byte, se error) {
	far, near := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		c := tls.Server(near, server)
		if se = trust.Handshake(context.Background(), c); se == nil {
			_, _ = c.Write([]byte("secret"))
		}
		near.Close()
	})
	_ = far.SetDeadline(time.Now().Add(10 * time.Second))
	c := tls.Client(wrap(far), client)
	if trust.Handshake(context.Background(), c) == nil {
		read, _ = io.ReadAll(c)
	}
	far.Close()
	wg.Wait()
	return read, se
}

// byName chooses by the server name as it was sent, as a sidecar's port does.
func byName(config *tls.Config, name string, asked *string) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true, GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		if asked != nil {
			*asked = h.ServerName
		}
		if h.ServerName != name {
			return nil, errors.New("no such name")
		}
		return config, nil
	}}
}

// TestSplitClientHello: class T7. However the ClientHello is cut and whatever name it carries, a client without a certificate gets no
// byte of application data from any kind of listener; with one it does.
func TestSplitClientHello(t *testing.T) {
	m := newMeshes(t, at(t0))
	any := trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"h2"}}
	register := m.b.ServerTLS(trust.TLSOptions{ServerOnly: true, SendRoots: true, ALPN: []string{"strait-register/1"}})
	listeners := map[string]*tls.Config{
		"mutual": m.b.ServerTLS(any), "by name": byName(m.b.ServerTLS(any), "http.checkout.shop.svc.b.mesh", nil), "by protocol": trust.ByALPN(m.b.ServerTLS(any), register),
	}
	client := func(certificate bool) *tls.Config {
		o := any
		o.ServerName = "http.checkout.shop.svc.b.mesh"
		c := m.a.ClientTLS(o)
		c.CurvePreferences = []tls.CurveID{tls.X25519} // a short ClientHello has fewer places to cut
		if !certificate {
			c.GetClientCertificate = nil
		}
		return c
	}
	for name, server := range listeners {
		for _, records := range []bool{false, true} {
			cuts := 0
			for n := 1; ; n++ {
				var s *lookalike.SplitConn
				wrap := func(c net.Conn) net.Conn { s = &lookalike.SplitConn{Conn: c, At: n, Records: records}; return s }
				if got, err := overPipe(client(false), server, wrap); len(got) > 0 || err == nil {
					t.Fatalf("%s, cut at %d (records %t): the client read %q, the server says %v", name, n, records, got, err)
				}
				if n%16 == 1 { // the control
					if got, err := overPipe(client(true), server, wrap); string(got) != "secret" || err != nil {
						t.Fatalf("%s, cut at %d (records %t), with a certificate: %q, %v", name, n, records, got, err)
					}
				}
				if cuts++; n >= s.Len()-1 {
					break
				}
			}
			t.Logf("%s: %d cuts (records %t)", name, cuts, records)
			if cuts < 200 {
				t.Errorf("%s: only %d cuts", name, cuts)
			}
		}
	}
}

// renameConn replaces a name in the ClientHello by another of the same length, which Go's client would not send.
type renameConn struct {
	net.Conn
	from, to string
}

func (c *renameConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(bytes.Replace(b, []byte(c.from), []byte(c.to), 1))
	return min(n, len(b)), err
}

// TestServerNames: class T7. No server name opens a listener to a client without a certificate.
func TestServerNames(t *testing.T) {
	m := newMeshes(t, at(t0))
	const proper = "http.checkout.shop.svc.b.mesh"
	asked := ""
	server := byName(m.b.ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"h2"}}), proper, &asked)
	for _, tt := range []struct{ name, sni, sent string }{
		{"proper", proper, ""},
		{"upper case", "HTTP.CHECKOUT.SHOP.SVC.B.MESH", ""},
		{"one letter in upper case", "Http.checkout.shop.svc.b.mesh", ""},
		{"absent", "", ""},
		{"address", "10.0.0.1", ""},
		{"unknown", "x", ""},
		{"long", string(bytes.Repeat([]byte("a."), 126)) + "a", ""},
		{"trailing dot", proper + "x", proper + "."},
		{"address as a name", "aaaaaaaa", "10.0.0.1"},
		{"NUL", proper + "xx", proper + "\x00x"},
		{"asterisk", "x.b.mesh", "*.b.mesh"},
		{"space", proper + "x", proper + " "},
	} {
		o := trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"h2"}, ServerName: tt.sni}
		wrap := func(c net.Conn) net.Conn {
			if tt.sent == "" {
				return c
			}
			return &renameConn{c, tt.sni, tt.sent}
		}
		without := m.a.ClientTLS(o)
		without.GetClientCertificate = nil
		if got, err := overPipe(without, server, wrap); len(got) > 0 || err == nil {
			t.Errorf("%s: without a certificate the client read %q; the server says %v", tt.name, got, err)
		}
		asked = ""
		got, err := overPipe(m.a.ClientTLS(o), server, wrap)
		if want := tt.name == "proper"; (string(got) == "secret") != want || (err == nil) != want {
			t.Errorf("%s (asked for %q): with a certificate the client read %q; the server says %v", tt.name, asked, got, err)
		}
	}
}
