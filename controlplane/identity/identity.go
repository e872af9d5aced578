// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// DefaultTTL is how long identities live: a day without a control plane breaks nothing, and half of one is left.
const DefaultTTL = 36 * time.Hour

const (
	maxCSR  = 16 << 10
	maxName = 512 // bytes of a process's name
)

// Signer issues certificates for an ID; of the request it uses the public key only. *ca.CA is one.
type Signer interface {
	IssueCSR(csrDER []byte, id spiffeid.ID, ttl time.Duration) (chainDER [][]byte, err error)
}

// Config says what a Server issues from.
type Config struct {
	Signer Signer               // required
	Bundle func() *trust.Bundle // of the own trust domain; required
	JWT    JWTSigner            // nil: no tokens are issued
	Denied func(id spiffeid.ID, issued time.Time) (reason string, denied bool)
	TTL    time.Duration // DefaultTTL
	// Renewed hears of each identity issued, before it is answered. nil: nobody does.
	Renewed func(Renewal)
	Logger  *slog.Logger
}

// Renewal is one identity that was issued.
type Renewal struct {
	ID spiffeid.ID
	// Proxy is the process that asked, by the name that it gave itself: nothing proves it but ID. Empty: it gave none.
	Proxy       string
	Application bool // for the application behind the sidecar Proxy, not for itself
	Issued      time.Time
	NotAfter    time.Time
	Issuer      string // SHA-256 of the issuer's public key, hex: certificates of one key by two roots have the same
}

// Server renews identities.
type Server struct {
	controlpb.UnimplementedIdentityServer
	cfg       Config
	jwtLimits jwtLimits
}

// New returns a Server.
func New(cfg Config) (*Server, error) {
	if cfg.Signer == nil || cfg.Bundle == nil {
		return nil, errors.New("identity: Signer and Bundle are required")
	}
	if cfg.TTL <= 0 {
		cfg.TTL = DefaultTTL
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: cfg}, nil
}

// Register serves on r.
func (s *Server) Register(r grpc.ServiceRegistrar) { controlpb.RegisterIdentityServer(r, s) }

// Renew issues an identity with the caller's own ID for the key of the request.
func (s *Server) Renew(ctx context.Context, q *controlpb.RenewRequest) (*controlpb.RenewResponse, error) {
	peer, ok := PeerFromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Unauthenticated, "no verified identity")
	}
	return s.renew(peer, q)
}

func (s *Server) renew(peer trust.Peer, q *controlpb.RenewRequest) (*controlpb.RenewResponse, error) {
	if s.cfg.Denied != nil {
		if reason, denied := s.cfg.Denied(peer.ID, peer.Issued()); denied {
			return nil, wire.ToStatus(problem.New(problem.IdentityWithdrawn, "%s was withdrawn", peer.ID).WithWhy("%s", reason))
		}
	}
	if len(q.GetCsrDer()) == 0 || len(q.GetCsrDer()) > maxCSR {
		return nil, status.Errorf(codes.InvalidArgument, "certificate request of %d bytes", len(q.GetCsrDer()))
	}
	if len(q.GetProxy()) > maxName {
		return nil, status.Errorf(codes.InvalidArgument, "a name of %d bytes", len(q.GetProxy()))
	}
	chain, err := s.cfg.Signer.IssueCSR(q.GetCsrDer(), peer.ID, s.cfg.TTL)
	if problem.Is(err, problem.IdentityWithdrawn) {
		return nil, wire.ToStatus(err)
	}
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	issued, err := checkIssued(chain)
	if err != nil {
		s.cfg.Logger.Error("issued identity is unusable", "id", peer.ID, "err", err)
		return nil, wire.ToStatus(err)
	}
	if s.cfg.Renewed != nil {
		issued.ID, issued.Proxy, issued.Application = peer.ID, q.GetProxy(), q.GetApplication()
		s.cfg.Renewed(issued)
	}
	s.cfg.Logger.Debug("identity renewed", "id", peer.ID, "proxy", q.GetProxy(), "not_after", issued.NotAfter)
	return &controlpb.RenewResponse{ChainDer: chain, BundleJwks: s.cfg.Bundle().Marshal(), NotAfterUnix: issued.NotAfter.Unix()}, nil
}

// checkIssued reads times and issuer of what was just issued.
func checkIssued(chain [][]byte) (Renewal, error) {
	if len(chain) == 0 {
		return Renewal{}, errors.New("the issuer returned no certificate")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return Renewal{}, err
	}
	r := Renewal{Issued: trust.Issued(leaf), NotAfter: leaf.NotAfter}
	if len(chain) > 1 {
		issuer, err := x509.ParseCertificate(chain[1])
		if err != nil {
			return Renewal{}, err
		}
		sum := sha256.Sum256(issuer.RawSubjectPublicKeyInfo)
		r.Issuer = hex.EncodeToString(sum[:])
	}
	return r, nil
}
