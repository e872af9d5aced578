// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"crypto/tls"
	"net"
	"testing"
	"time"

	"github.com/strait-mesh/strait/trust"
)

// TestInspectTLS: what a server presents is returned, whoever signed it, and the server never has a connection that it could use.
func TestInspectTLS(t *testing.T) {
	root := newRoot(t, "root")
	server := trust.NewSource(trust.SourceConfig{Now: at(t0)})
	server.SetIdentity(root.identity("spiffe://us-east.acme/ns/shop/sa/web", t0.Add(time.Hour), root.issuer("issuer")))
	client, inside := net.Pipe()
	served := make(chan error, 1)
	go func() {
		c := tls.Server(inside, server.ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"h2"}}))
		err := c.HandshakeContext(t.Context())
		_ = inside.Close()
		served <- err
	}()
	chain, err := trust.InspectTLS(t.Context(), client, "h2")
	if err != nil || len(chain) == 0 || !chain[0].Equal(server.Identity().Chain[0]) {
		t.Fatalf("%d certificates, %v", len(chain), err)
	}
	if err := <-served; err == nil {
		t.Error("the server's handshake was completed")
	}
	if _, err := client.Write([]byte("x")); err == nil {
		t.Error("the connection is still open")
	}
}

func TestInspectTLSOfSomethingElse(t *testing.T) {
	client, inside := net.Pipe()
	go func() {
		b := make([]byte, 1024)
		_, _ = inside.Read(b)
		_, _ = inside.Write([]byte("SSH-2.0-nothing of ours\r\n"))
		_ = inside.Close()
	}()
	if chain, err := trust.InspectTLS(t.Context(), client); err == nil {
		t.Fatalf("%d certificates of something that speaks no TLS", len(chain))
	}
}
