// SPDX-License-Identifier: Apache-2.0

package register

import (
	"bytes"
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
	var buf bytes.Buffer // grows with what has come, not with what was announced
	if got, err := io.CopyN(&buf, r, int64(n)); err != nil {
		return fmt.Errorf("%d of %d bytes: %w", got, n, err)
	}
	return proto.Unmarshal(buf.Bytes(), m)
}

func writeMessage(w io.Writer, m proto.Message) error {
	body, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	if len(body) > maxMessage {
		return fmt.Errorf("a message of %d bytes; at most %d", len(body), maxMessage)
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
	Tokens *Tokens
	// Sign issues an identity for the key of a request whose signature has been checked; *ca.CA's IssueCSR does it.
	Sign       func(csrDER []byte, id spiffeid.ID) (chainDER [][]byte, err error)
	Bundle     func() *trust.Bundle
	Cluster    string
	Federation string
	Refused    error        // answers every registration; nil: tokens are judged
	Logger     *slog.Logger // nil: discard
	// Rate is how many exchanges a second are answered in all, with a burst of ten times as many; 0: 20. One address gets a
	// tenth of it.
	Rate float64
	Now  func() time.Time // nil: time.Now

	limit limiter
}

func (s *Server) now() time.Time {
	if s.Now != nil {
		return s.Now()
	}
	return time.Now()
}

func (s *Server) log() *slog.Logger {
	if s.Logger != nil {
		return s.Logger
	}
	return slog.New(slog.DiscardHandler)
}

// TLS is the configuration of the exchange, for a listener that chooses by ALPN (trust.ByALPN).
func TLS(source *trust.Source) *tls.Config {
	return source.ServerTLS(trust.TLSOptions{ServerOnly: true, SendRoots: true, ALPN: []string{ALPN}})
}

// ServeConn completes the handshake if that has not happened, answers one exchange and closes the connection, all within
// Timeout.
func (s *Server) ServeConn(ctx context.Context, c *tls.Conn) {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	raw := c.NetConn()
	defer raw.Close() // the answer is written by then; Close of c would wait for one who does not read
	_ = c.SetDeadline(time.Now().Add(Timeout))
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()
	if err := c.HandshakeContext(ctx); err != nil || c.ConnectionState().NegotiatedProtocol != ALPN {
		return
	}
	var req controlpb.RegisterRequest
	if err := readMessage(c, &req); err != nil {
		s.log().Debug("registration unreadable", "address", c.RemoteAddr().String(), "error", err.Error())
		return
	}
	if err := writeMessage(c, s.answer(c, &req)); err == nil {
		_ = c.CloseWrite()
	}
}

func (s *Server) answer(c *tls.Conn, req *controlpb.RegisterRequest) *controlpb.RegisterResponse {
	grant, chain, err := s.grant(c, req)
	if err != nil {
		id := req.TokenId
		if !validID(id) {
			id = "malformed"
		}
		s.log().Warn("registration refused", "token", id, "address", c.RemoteAddr().String(), "error", err.Error())
		p := problem.From(err)
		if p.Code != problem.RegistrationRefused && p.Code != problem.RegistrationBusy { // ours to know
			p = problem.New(problem.RegistrationBusy, "").WithWhy("the control plane could not issue an identity")
		}
		return &controlpb.RegisterResponse{ErrorCode: string(p.Code), ErrorMessage: p.Reason()}
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return &controlpb.RegisterResponse{ErrorCode: string(problem.Internal), ErrorMessage: "malformed certificate"}
	}
	s.log().Info("registered", "spiffe_id", grant.SPIFFEID.String(), "name", grant.Name, "token", req.TokenId)
	return &controlpb.RegisterResponse{
		ChainDer: chain, BundleJwks: s.Bundle().Marshal(), NotAfterUnix: leaf.NotAfter.Unix(), SpiffeId: grant.SPIFFEID.String(),
		Name: grant.Name, Cluster: s.Cluster, Federation: s.Federation, Locality: &controlpb.Locality{Region: grant.Region, Zone: grant.Zone},
	}
}

// grant goes from cheap to dear: rate, proof (two hashes), then the request's signature, then the store and the CA. Nobody
// without the secret makes us check a signature.
func (s *Server) grant(c *tls.Conn, req *controlpb.RegisterRequest) (Grant, [][]byte, error) {
	if !s.limit.admit(c.RemoteAddr(), s.now(), s.Rate) {
		return Grant{}, nil, problem.New(problem.RegistrationBusy, "registrations are limited").WithWhy("too many registrations at once")
	}
	if s.Refused != nil {
		return Grant{}, nil, s.Refused
	}
	exp, err := exporter(c)
	if err != nil {
		return Grant{}, nil, err
	}
	if err := s.Tokens.judge(req.TokenId, req.Proof, exp, req.CsrDer); err != nil {
		return Grant{}, nil, err
	}
	csr, err := x509.ParseCertificateRequest(req.CsrDer)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		return Grant{}, nil, refused("the certificate request is malformed")
	}
	grant, err := s.Tokens.bind(req.TokenId, sha256.Sum256(csr.RawSubjectPublicKeyInfo))
	if err != nil {
		return Grant{}, nil, err
	}
	chain, err := s.Sign(req.CsrDer, grant.SPIFFEID)
	if err == nil && len(chain) == 0 {
		err = errors.New("no certificate was issued")
	}
	if err == nil {
		err = s.Tokens.stands(req.TokenId)
	}
	return grant, chain, err
}

// ClientConfig of Register.
type ClientConfig struct {
	Token     Token
	Addresses []string // of the control plane; empty: the token's
	// Key to certify; nil: a new one. The token is bound to the first key: keep the key on disk before, and a registration
	// whose answer was lost may be repeated with it.
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

// Register redeems the token at the first address where the control plane named in it answers; its refusal is final. Refusals
// are *problem.Error of STR-5301; STR-5303 and errors of the network, which are plain, may be tried again.
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
		if err == nil {
			return r, nil
		}
		var imposter *trust.VerifyError
		if problem.Is(err, problem.RegistrationRefused) && !errors.As(err, &imposter) {
			return nil, err
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
	switch resp.ErrorCode {
	case "":
	case string(problem.RegistrationRefused):
		return nil, refused(resp.ErrorMessage)
	default:
		return nil, problem.New(problem.RegistrationBusy, "the control plane could not register this process now").WithWhy("%s", resp.ErrorMessage).Retry()
	}
	id, err := trust.NewIdentity(resp.ChainDer, cfg.Key)
	if err != nil {
		return nil, err
	}
	if got, want := resp.Name, cfg.Token.Name; id.ID.String() != resp.SpiffeId || got != want {
		return nil, fmt.Errorf("the answer is for %q (%s), the token for %q", got, resp.SpiffeId, want)
	}
	b, err := trust.ParseBundle(cfg.Token.TrustDomain, resp.BundleJwks)
	if err != nil {
		return nil, err
	}
	bundles, err := trust.NewBundles(b)
	if err != nil {
		return nil, err
	}
	if _, err := trust.Verify(id.Chain, bundles, cfg.Now()); err != nil { // an ID of another trust domain finds no bundle
		return nil, fmt.Errorf("the identity received: %w", err)
	}
	return &Result{
		Identity: id, Bundle: b, Name: resp.Name, Cluster: resp.Cluster, Federation: resp.Federation,
		Region: resp.GetLocality().GetRegion(), Zone: resp.GetLocality().GetZone(),
	}, nil
}
