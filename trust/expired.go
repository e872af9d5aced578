// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"time"
)

// ALPNRenew is the one protocol on which an identity that has ended still counts, for nothing but its own renewal.
const ALPNRenew = "strait-renew/1"

// VerifyExpired judges a chain whose leaf may have ended, at most grace ago. Every other rule of Verify holds: an ended leaf is
// judged as of its own last moment, and everything above it on its path to a root must be valid now as well. A leaf that has not ended is judged by Verify: the two ends' clocks may differ. Errors are *VerifyError.
func VerifyExpired(chain []*x509.Certificate, bundles *Bundles, now time.Time, grace time.Duration) (*Peer, error) {
	if err := checkSize(chain, MaxChainLength); err != nil {
		return nil, err
	}
	leaf := chain[0]
	id, err := leafID(leaf)
	if err != nil {
		return nil, err
	}
	refuse := func(reason, format string, args ...any) (*Peer, error) {
		return nil, &VerifyError{Reason: reason, ID: id, Err: fmt.Errorf(format, args...)}
	}
	ended := now.Sub(leaf.NotAfter)
	switch {
	case now.Before(leaf.NotBefore):
		return refuse("not_yet_valid", "valid from %s", leaf.NotBefore.UTC().Format(time.RFC3339))
	case leaf.NotAfter.Before(leaf.NotBefore):
		return refuse("expired", "it was never valid")
	case ended <= 0:
		return Verify(chain, bundles, now)
	case grace <= 0 || ended > grace:
		return refuse("expired", "expired for %s; renewable for %s", ended.Round(time.Second), grace)
	}
	return verify(chain, bundles, leaf.NotAfter, now)
}

// RenewServerTLS is the configuration of a listener for ALPNRenew: the server proves its identity, and the client presents one that
// has ended, at most grace ago, and proves possession of its key. What the handshake leaves is judged by ExpiredPeer.
func (s *Source) RenewServerTLS(authorize Authorize, grace time.Duration) *tls.Config {
	c := baseConfig(TLSOptions{ALPN: []string{ALPNRenew}})
	c.ClientAuth = tls.RequireAnyClientCert
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.ownCertificate(false) }
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		_, err := s.expiredPeer(cs, authorize, grace)
		return err
	}
	return c
}

// ExpiredPeer is the client of a connection that RenewServerTLS has let in, judged again: PeerFromState refuses it.
func (s *Source) ExpiredPeer(cs tls.ConnectionState, authorize Authorize, grace time.Duration) (*Peer, error) {
	if !cs.HandshakeComplete {
		return nil, &VerifyError{Reason: "no_certificate"}
	}
	return s.expiredPeer(cs, authorize, grace)
}

func (s *Source) expiredPeer(cs tls.ConnectionState, authorize Authorize, grace time.Duration) (*Peer, error) {
	if err := checkProtocol(cs, []string{ALPNRenew}); err != nil {
		return nil, err
	}
	p, err := VerifyExpired(cs.PeerCertificates, s.Bundles(), s.now(), grace)
	if err == nil {
		err = s.judgeWithdrawn(p)
	}
	if err != nil {
		return nil, err
	}
	return p, authorized(p.ID, authorize)
}

// RenewClientTLS is the configuration of a dialler of ALPNRenew, and the one that presents an identity which has ended. The server is
// verified as ever.
func (s *Source) RenewClientTLS(authorize Authorize) *tls.Config {
	c := s.ClientTLS(TLSOptions{Authorize: authorize, ALPN: []string{ALPNRenew}})
	verify := c.VerifyConnection
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := checkProtocol(cs, []string{ALPNRenew}); err != nil {
			return err
		}
		return verify(cs)
	}
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		m := s.cur.Load()
		if m.cert == nil {
			return nil, errNoIdentity
		}
		return m.cert, nil
	}
	return c
}
