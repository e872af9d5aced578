// SPDX-License-Identifier: Apache-2.0

package register

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// ALPN of the exchange.
const ALPN = "strait-register/1"

const (
	exporterLabel = "EXPORTER-strait-register/1"
	maxMessage    = 64 << 10
	// Timeout is how long one exchange may take at the server, from accept.
	Timeout = 5 * time.Second
)

func readMessage(r io.Reader, m proto.Message) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 || n > maxMessage {
		return fmt.Errorf("a message of %d bytes; at most %d", n, maxMessage)
	}
	buf := make([]byte, n)
	if _, err := io.ReadFull(r, buf); err != nil {
		return err
	}
	return proto.Unmarshal(buf, m)
}

func writeMessage(w io.Writer, m proto.Message) error {
	body, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...))
	return err
}

func exporter(c *tls.Conn) ([]byte, error) {
	cs := c.ConnectionState()
	return cs.ExportKeyingMaterial(exporterLabel, nil, 32)
}

// Server answers registrations on connections whose handshake chose ALPN.
type Server struct {
	Tokens     *Tokens
	Sign       func(csrDER []byte, id spiffeid.ID) (chainDER [][]byte, err error)
	Bundle     func() *trust.Bundle
	Cluster    string
	Federation string
	Logger     *slog.Logger
	// Rate is how many exchanges a second are answered, with a burst of ten times as many (20).
	Rate float64
	Now  func() time.Time

	mu     sync.Mutex
	tokens float64
	filled time.Time
}

func (s *Server) now() time.Time {
	if s.Now != nil {
		return s.Now()
	}
	return time.Now()
}

// admit is a token bucket over all callers: guessing is slow, and so is a flood.
func (s *Server) admit() bool {
	rate := s.Rate
	if rate <= 0 {
		rate = 20
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if s.filled.IsZero() {
		s.tokens = rate * 10
	} else {
		s.tokens = min(rate*10, s.tokens+now.Sub(s.filled).Seconds()*rate)
	}
	s.filled = now
	if s.tokens < 1 {
		return false
	}
	s.tokens--
	return true
}

// ServeConn answers one exchange and closes the connection.
func (s *Server) ServeConn(ctx context.Context, c *tls.Conn) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(Timeout))
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	var req controlpb.RegisterRequest
	if err := readMessage(c, &req); err != nil {
		return
	}
	resp := s.answer(c, &req)
	if err := writeMessage(c, resp); err == nil {
		_ = c.CloseWrite()
	}
}

func (s *Server) answer(c *tls.Conn, req *controlpb.RegisterRequest) *controlpb.RegisterResponse {
	grant, chain, err := s.grant(c, req)
	if err != nil {
		if s.Logger != nil {
			s.Logger.Warn("registration refused", "token", req.TokenId, "remote", c.RemoteAddr().String(), "err", err)
		}
		p := problem.From(err)
		if p.Code == problem.Internal {
			p = problem.New(problem.Internal, "the control plane could not issue an identity")
		}
		return &controlpb.RegisterResponse{ErrorCode: string(p.Code), ErrorMessage: p.Reason()}
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return &controlpb.RegisterResponse{ErrorCode: string(problem.Internal), ErrorMessage: "malformed certificate"}
	}
	if s.Logger != nil {
		s.Logger.Info("registered", "spiffe_id", grant.SPIFFEID.String(), "name", grant.Name, "token", req.TokenId)
	}
	return &controlpb.RegisterResponse{
		ChainDer: chain, BundleJwks: s.Bundle().Marshal(), NotAfterUnix: leaf.NotAfter.Unix(), SpiffeId: grant.SPIFFEID.String(),
		Name: grant.Name, Cluster: s.Cluster, Federation: s.Federation, Locality: &controlpb.Locality{Region: grant.Region, Zone: grant.Zone},
	}
}

func (s *Server) grant(c *tls.Conn, req *controlpb.RegisterRequest) (Grant, [][]byte, error) {
	if !s.admit() {
		return Grant{}, nil, refused("too many registrations at once; try again in a moment")
	}
	exp, err := exporter(c)
	if err != nil {
		return Grant{}, nil, err
	}
	csr, err := x509.ParseCertificateRequest(req.CsrDer)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		return Grant{}, nil, refused("the certificate request is malformed")
	}
	grant, err := s.Tokens.redeem(req.TokenId, req.Proof, exp, req.CsrDer, sha256.Sum256(csr.RawSubjectPublicKeyInfo))
	if err != nil {
		return Grant{}, nil, err
	}
	chain, err := s.Sign(req.CsrDer, grant.SPIFFEID)
	return grant, chain, err
}

// ClientConfig of Register.
type ClientConfig struct {
	Token     Token
	Addresses []string // of the control plane; empty: the token's
	// Key to certify; nil: a new one. Repeating with the same key after a lost answer is allowed.
	Key  *ecdsa.PrivateKey
	Dial func(ctx context.Context, addr string) (net.Conn, error) // nil: TCP
	Now  func() time.Time
}

// Result is a first identity.
type Result struct {
	Identity   *trust.Identity
	Bundle     *trust.Bundle
	Name       string
	Cluster    string
	Federation string
	Region     string
	Zone       string
}

// Register redeems the token at the first address that answers. A refusal is a *problem.Error of STR-5301; errors of the
// network are plain.
func Register(ctx context.Context, cfg ClientConfig) (*Result, error) {
	if len(cfg.Addresses) == 0 {
		cfg.Addresses = cfg.Token.Addresses
	}
	if len(cfg.Addresses) == 0 {
		return nil, errors.New("register: no control plane address, neither configured nor in the token")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Key == nil {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("register: %w", err)
		}
		cfg.Key = key
	}
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		}
	}
	var errs []error
	for _, addr := range cfg.Addresses {
		r, err := registerAt(ctx, cfg, addr)
		if err == nil || problem.Is(err, problem.RegistrationRefused) {
			return r, err
		}
		errs = append(errs, fmt.Errorf("register at %s: %w", addr, err))
	}
	return nil, errors.Join(errs...)
}

func registerAt(ctx context.Context, cfg ClientConfig, addr string) (*Result, error) {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	raw, err := cfg.Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	deadline, _ := ctx.Deadline()
	_ = raw.SetDeadline(deadline)
	c := tls.Client(raw, trust.PinnedClientTLS([32]byte(cfg.Token.BundleSHA256), nil, cfg.Now, trust.TLSOptions{
		Authorize: trust.AuthorizeControlPlane(cfg.Token.TrustDomain), ALPN: []string{ALPN},
	}, nil))
	if err := c.HandshakeContext(ctx); err != nil {
		var v *trust.VerifyError
		if errors.As(err, &v) {
			return nil, problem.New(problem.RegistrationRefused, "%s is not the control plane that the token names", addr).WithWhy("%s", v.Reason).Wrap(err)
		}
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, cfg.Key)
	if err != nil {
		return nil, err
	}
	exp, err := exporter(c)
	if err != nil {
		return nil, err
	}
	req := &controlpb.RegisterRequest{TokenId: cfg.Token.ID, Proof: proofOf(deriveKey(cfg.Token.Secret), exp, csr), CsrDer: csr}
	if err := writeMessage(c, req); err != nil {
		return nil, err
	}
	var resp controlpb.RegisterResponse
	if err := readMessage(c, &resp); err != nil {
		return nil, err
	}
	return result(cfg, &resp)
}

func result(cfg ClientConfig, resp *controlpb.RegisterResponse) (*Result, error) {
	if resp.ErrorCode != "" {
		return nil, refused(resp.ErrorMessage)
	}
	id, err := trust.NewIdentity(resp.ChainDer, cfg.Key)
	if err != nil {
		return nil, err
	}
	b, err := trust.ParseBundle(cfg.Token.TrustDomain, resp.BundleJwks)
	if err != nil {
		return nil, err
	}
	bundles, err := trust.NewBundles(b)
	if err != nil {
		return nil, err
	}
	if _, err := trust.Verify(id.Chain, bundles, cfg.Now()); err != nil {
		return nil, fmt.Errorf("the identity received: %w", err)
	}
	return &Result{
		Identity: id, Bundle: b, Name: resp.Name, Cluster: resp.Cluster, Federation: resp.Federation,
		Region: resp.GetLocality().GetRegion(), Zone: resp.GetLocality().GetZone(),
	}, nil
}
