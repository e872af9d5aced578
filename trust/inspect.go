// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
)

// errInspected ends a handshake once its server has presented itself.
var errInspected = errors.New("inspected")

// InspectTLS returns the certificates that the TLS server at the other end of conn presents, leaf first, and closes conn. It
// judges nothing, and so the handshake ends there: nothing is sent but a hello with the protocols of alpn, and nothing can be.
func InspectTLS(ctx context.Context, conn net.Conn, alpn ...string) ([]*x509.Certificate, error) {
	defer conn.Close()
	var chain []*x509.Certificate
	c := tls.Client(conn, clientConfig(TLSOptions{ALPN: alpn}, nil, func(cs tls.ConnectionState) error {
		chain = cs.PeerCertificates
		return errInspected
	}))
	ctx, cancel := context.WithTimeout(ctx, HandshakeTimeout)
	defer cancel()
	err := c.HandshakeContext(ctx)
	switch {
	case errors.Is(err, errInspected):
		return chain, checkSize(chain, MaxChainLength+MaxBundleRoots)
	case err == nil:
		return nil, &VerifyError{Reason: "no_certificate"}
	}
	return nil, err
}
