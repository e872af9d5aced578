// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// HandshakeTimeout is how long any listener waits for a handshake.
const HandshakeTimeout = 5 * time.Second

// ALPNJoin is the one protocol whose clients may be unverified after the handshake.
const ALPNJoin = "strait-join/1"

// Handshake completes the handshake of c within HandshakeTimeout; c is closed when it fails.
func Handshake(ctx context.Context, c *tls.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, HandshakeTimeout)
	defer cancel()
	if err := c.HandshakeContext(ctx); err != nil {
		_ = c.NetConn().Close() // Close would wait up to 5 s to write an alert to one who does not read
		return err
	}
	return nil
}

// SourceConfig configures a Source.
type SourceConfig struct {
	Now    func() time.Time // nil: time.Now
	Logger *slog.Logger     // nil: discard
}

type material struct {
	identity *Identity
	cert     *tls.Certificate
	rooted   *tls.Certificate // cert with the roots of its trust domain
	bundles  *Bundles
}

// withRoots appends the roots of the identity's trust domain, oldest first.
func (m material) withRoots() *tls.Certificate {
	if m.cert == nil {
		return nil
	}
	c := *m.cert
	if b := m.bundles.Get(m.identity.ID.TrustDomain()); b != nil {
		roots := slices.Clone(b.Roots())
		slices.SortStableFunc(roots, func(a, b *x509.Certificate) int { return a.NotBefore.Compare(b.NotBefore) })
		c.Certificate = slices.Clone(c.Certificate)
		for _, r := range roots {
			c.Certificate = append(c.Certificate, r.Raw)
		}
	}
	return &c
}

// Source holds the process's identity and the bundles that it trusts now.
type Source struct {
	now func() time.Time
	log *slog.Logger
	cur atomic.Pointer[material]
	out atomic.Pointer[func(*Peer) error] // SetWithdrawn

	mu      sync.Mutex
	changed chan struct{}
}

// NewSource makes an empty source: until it has an identity, handshakes fail.
func NewSource(cfg SourceConfig) *Source {
	s := &Source{now: cfg.Now, log: cfg.Logger, changed: make(chan struct{})}
	if s.now == nil {
		s.now = time.Now
	}
	if s.log == nil {
		s.log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	s.cur.Store(&material{})
	return s
}

func (s *Source) change(f func(material) material) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := f(*s.cur.Load())
	m.rooted = m.withRoots()
	s.cur.Store(&m)
	close(s.changed)
	s.changed = make(chan struct{})
}

// SetIdentity replaces the identity for handshakes that begin from now on.
func (s *Source) SetIdentity(id *Identity) {
	s.change(func(m material) material {
		m.identity, m.cert = id, nil
		if id != nil {
			m.cert = id.certificate()
		}
		return m
	})
}

// SetBundles replaces the bundles for handshakes that are judged from now on. Open connections are the withdrawal
// registry's matter.
func (s *Source) SetBundles(b *Bundles) {
	s.change(func(m material) material { m.bundles = b; return m })
}

// UpdateBundles replaces the bundles by what f makes of the present ones, nothing coming in between: for a source whose bundles
// several keep. f may be given nil, and may return what it was given.
func (s *Source) UpdateBundles(f func(*Bundles) *Bundles) {
	s.change(func(m material) material { m.bundles = f(m.bundles); return m })
}

// Identity is the present one, or nil.
func (s *Source) Identity() *Identity { return s.cur.Load().identity }

// Bundles are the present ones; nil is an empty set.
func (s *Source) Bundles() *Bundles { return s.cur.Load().bundles }

// Now is the source's clock.
func (s *Source) Now() time.Time { return s.now() }

// Changed returns a channel that is closed at the next change.
func (s *Source) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// Ready waits until there are an identity and the bundle of its trust domain.
func (s *Source) Ready(ctx context.Context) error {
	for {
		changed := s.Changed()
		if m := s.cur.Load(); m.identity != nil && m.bundles.Get(m.identity.ID.TrustDomain()) != nil {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Verify judges a chain against the present bundles and the present time.
func (s *Source) Verify(chain []*x509.Certificate) (*Peer, error) {
	p, err := Verify(chain, s.Bundles(), s.now())
	if err != nil {
		return nil, err
	}
	if err := s.judgeWithdrawn(p); err != nil {
		return nil, err
	}
	return p, nil
}

// TLSOptions says what one kind of connection asks of the other end.
type TLSOptions struct {
	Authorize  Authorize // required, except for ServerOnly
	ALPN       []string
	ServerName string // of a client: the SNI that it sends
	// AcceptUnverifiedClient lets a server accept a client chain whose bundle it does not have yet. The chain, in
	// ConnectionState.PeerCertificates, proves possession of its key and nothing else. For ALPNJoin alone: with another
	// ALPN every handshake fails.
	AcceptUnverifiedClient bool
	// ServerOnly asks the client for no certificate. For strait-register/1 only; the client must offer one of ALPN.
	ServerOnly bool
	// SendRoots makes a server append its bundle's roots to its chain, oldest first, for clients that pin the bundle's hash.
	SendRoots bool
}

var errNoIdentity = errors.New("no identity yet")

func (s *Source) ownCertificate(sendRoots bool) (*tls.Certificate, error) {
	m := s.cur.Load()
	if m.cert == nil {
		return nil, errNoIdentity
	}
	if !s.now().Before(m.identity.NotAfter) {
		return nil, &VerifyError{Reason: "identity_expired", ID: m.identity.ID, Err: errors.New("own identity has expired")}
	}
	if sendRoots {
		return m.rooted, nil
	}
	return m.cert, nil
}

func baseConfig(o TLSOptions) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, MaxVersion: tls.VersionTLS13, NextProtos: o.ALPN, ServerName: o.ServerName,
		SessionTicketsDisabled: true, ClientSessionCache: nil,
	}
}

// ServerTLS is the configuration of a listener.
func (s *Source) ServerTLS(o TLSOptions) *tls.Config {
	c := baseConfig(o)
	c.ClientAuth = tls.RequireAnyClientCert
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.ownCertificate(o.SendRoots) }
	switch {
	case o.ServerOnly:
		c.ClientAuth = tls.NoClientCert
		c.VerifyConnection = func(cs tls.ConnectionState) error { return checkProtocol(cs, o.ALPN) }
		return c
	case o.AcceptUnverifiedClient:
		c.VerifyConnection = func(cs tls.ConnectionState) error {
			if err := checkProtocol(cs, []string{ALPNJoin}); err != nil {
				return err
			}
			return checkSize(cs.PeerCertificates, MaxChainLength)
		}
		return c
	}
	c.VerifyConnection = s.verifyConnection(o.Authorize)
	return c
}

// checkProtocol keeps what a listener grants to one protocol from clients that negotiate none.
func checkProtocol(cs tls.ConnectionState, want []string) error {
	if cs.DidResume || cs.NegotiatedProtocol == "" || !slices.Contains(want, cs.NegotiatedProtocol) {
		return &VerifyError{Reason: "untrusted", Err: fmt.Errorf("protocol %q on a connection for %v", cs.NegotiatedProtocol, want)}
	}
	return nil
}

// ByALPN serves several configurations on one port: a client gets the first that has one of the protocols that it offers, and
// no handshake when there is none.
func ByALPN(configs ...*tls.Config) *tls.Config {
	out := baseConfig(TLSOptions{})
	out.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		for _, c := range configs {
			if !slices.ContainsFunc(h.SupportedProtos, func(p string) bool { return slices.Contains(c.NextProtos, p) }) {
				continue
			}
			if c.GetConfigForClient != nil {
				if d, err := c.GetConfigForClient(h); d != nil || err != nil {
					return d, err
				}
			}
			return c, nil
		}
		return nil, &VerifyError{Reason: "untrusted", Err: errors.New("no protocol of this port was offered")}
	}
	return out
}

// ClientTLS is the configuration of a dialler.
func (s *Source) ClientTLS(o TLSOptions) *tls.Config {
	return clientConfig(o, s, s.verifyConnection(o.Authorize))
}

// clientConfig is the one place that turns the standard library's verification off: it compares host names, and trust is a
// matter of SPIFFE IDs. verify takes its place, on every handshake.
func clientConfig(o TLSOptions, s *Source, verify func(tls.ConnectionState) error) *tls.Config {
	c := baseConfig(o)
	c.InsecureSkipVerify = true
	c.VerifyConnection = verify
	if s != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return s.ownCertificate(false) }
	}
	return c
}

func (s *Source) verifyConnection(authorize Authorize) func(tls.ConnectionState) error {
	return func(cs tls.ConnectionState) error {
		if cs.DidResume {
			return &VerifyError{Reason: "untrusted", Err: errors.New("a resumed session")}
		}
		p, err := s.Verify(cs.PeerCertificates)
		if err != nil {
			return err
		}
		return authorized(p.ID, authorize)
	}
}

func authorized(id spiffeid.ID, authorize Authorize) error {
	if authorize == nil {
		return &VerifyError{Reason: "not_authorized", ID: id, Err: errors.New("no authorizer")}
	}
	if err := authorize(id); err != nil {
		return &VerifyError{Reason: "not_authorized", ID: id, Err: err}
	}
	return nil
}

// Pinned is what a client with a pin learns from the handshake.
type Pinned struct {
	Peer   *Peer
	Bundle *Bundle // the roots that were pinned, with sequence 0; the server may have sent others beside them
}

// PinnedClientTLS is the configuration of a dialler that knows the server's bundle by its hash alone: the server sends its
// roots after its chain (SendRoots), and those count that are exactly what was pinned, which may be some of them in a row. With a source the client
// presents its identity, too; without one it is anonymous. got is called once, after verification.
func PinnedClientTLS(pin [32]byte, s *Source, now func() time.Time, o TLSOptions, got func(Pinned)) *tls.Config {
	if s != nil {
		now = s.now
	}
	if now == nil {
		now = time.Now
	}
	return clientConfig(o, s, func(cs tls.ConnectionState) error {
		if cs.DidResume {
			return &VerifyError{Reason: "untrusted", Err: errors.New("a resumed session")}
		}
		p, err := verifyPinned(cs.PeerCertificates, pin, now())
		if err != nil {
			return err
		}
		if err := authorized(p.Peer.ID, o.Authorize); err != nil {
			return err
		}
		if got != nil {
			got(*p)
		}
		return nil
	})
}

func verifyPinned(chain []*x509.Certificate, pin [32]byte, now time.Time) (*Pinned, error) {
	if err := checkSize(chain, MaxChainLength+MaxBundleRoots); err != nil {
		return nil, err
	}
	id, err := leafID(chain[0])
	if err != nil {
		return nil, err
	}
	refuse := func(err error) (*Pinned, error) { return nil, &VerifyError{Reason: "untrusted", ID: id, Err: err} }
	from, to := pinnedRun(chain, pin)
	if from == 0 {
		return refuse(errors.New("the server's roots are not those that were pinned"))
	}
	bundle, err := NewBundle(id.TrustDomain(), chain[from:to], 0)
	if err != nil {
		return refuse(err)
	}
	bundles, err := NewBundles(bundle)
	if err != nil {
		return refuse(err)
	}
	own := chain[:from]
	for len(own) > MaxChainLength && selfIssued(own[len(own)-1]) { // roots before those that were pinned
		own = own[:len(own)-1]
	}
	p, err := Verify(own, bundles, now)
	if err != nil {
		return nil, err
	}
	return &Pinned{p, bundle}, nil
}

// maxRuns is how many of the last certificates are searched for runs that end before the last.
const maxRuns = 16

// pinnedRun finds the certificates whose hash is the pin: from 1 on any tail of the chain, else any run within its last
// maxRuns. A server sends its roots oldest first, so that a pin made before a root was added still finds its own. from is 0
// when there is none. It hashes at most MaxChainLength + MaxBundleRoots + maxRuns²/2 times.
func pinnedRun(chain []*x509.Certificate, pin [32]byte) (from, to int) {
	for from = 1; from < len(chain); from++ {
		if hashRoots(chain[from:]) == pin {
			return from, len(chain)
		}
	}
	for from = max(1, len(chain)-maxRuns); from < len(chain); from++ {
		for to = from + 1; to < len(chain); to++ {
			if hashRoots(chain[from:to]) == pin {
				return from, to
			}
		}
	}
	return 0, 0
}
