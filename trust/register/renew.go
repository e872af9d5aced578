// SPDX-License-Identifier: Apache-2.0

package register

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
)

// RenewGrace is how long after its end an identity may still be renewed, unless configured otherwise.
const RenewGrace = 168 * time.Hour

// RenewServer answers renewals of identities that have ended, on connections whose handshake chose trust.ALPNRenew. See DESIGN.md.
type RenewServer struct {
	// Peer judges the client of a connection again: trust.Source.ExpiredPeer with the listener's rules.
	Peer func(tls.ConnectionState) (*trust.Peer, error)
	// Renew issues an identity with the peer's own ID for the key of the request. Its errors are told as their problem's reason.
	Renew  func(context.Context, *trust.Peer, *controlpb.RenewRequest) (*controlpb.RenewResponse, error)
	Logger *slog.Logger // nil: discard
	Rate   float64      // exchanges a second in all; see Server.Rate
	Now    func() time.Time

	limit limiter
}

// ServeConn answers one exchange on c, whose handshake is complete, and closes it, all within Timeout.
func (s *RenewServer) ServeConn(ctx context.Context, c *tls.Conn) {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	raw := c.NetConn()
	defer raw.Close()
	_ = c.SetDeadline(time.Now().Add(Timeout))
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()
	log := s.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	peer, err := s.Peer(c.ConnectionState())
	if err != nil {
		return
	}
	r, err := s.exchange(ctx, c, peer)
	answer := &controlpb.RegisterResponse{}
	switch {
	case err == nil:
		answer.ChainDer, answer.BundleJwks, answer.NotAfterUnix, answer.SpiffeId = r.GetChainDer(), r.GetBundleJwks(), r.GetNotAfterUnix(), peer.ID.String()
		log.Warn("ended identity renewed", "spiffe_id", peer.ID, "ended", peer.Chain[0].NotAfter, "serial", peer.Chain[0].SerialNumber, "address", c.RemoteAddr())
	case errors.Is(err, errUnreadable):
		return
	default:
		log.Warn("ended identity not renewed", "spiffe_id", peer.ID, "ended", peer.Chain[0].NotAfter, "address", c.RemoteAddr(), "err", err)
		p := problem.From(err)
		answer.ErrorCode, answer.ErrorMessage = string(p.Code), p.Reason()
	}
	if err := writeMessage(c, answer); err == nil {
		_ = c.CloseWrite()
	}
}

var errUnreadable = errors.New("unreadable request")

func (s *RenewServer) exchange(ctx context.Context, c *tls.Conn, peer *trust.Peer) (*controlpb.RenewResponse, error) {
	now := time.Now
	if s.Now != nil {
		now = s.Now
	}
	if !s.limit.admit(c.RemoteAddr(), now(), s.Rate) {
		return nil, problem.New(problem.RegistrationBusy, "renewals are limited").WithWhy("too many renewals at once")
	}
	var req controlpb.RenewRequest
	if err := readMessage(c, &req); err != nil {
		return nil, errUnreadable
	}
	return s.Renew(ctx, peer, &req)
}

// RenewConfig of Renew.
type RenewConfig struct {
	Source    *trust.Source // with the identity that has ended
	Addresses []string      // of the control plane
	Request   *controlpb.RenewRequest
	Dial      func(ctx context.Context, addr string) (net.Conn, error) // nil: TCP
}

// renewTime bounds the attempt at one address: a proxy without an identity serves nobody until one succeeds.
const renewTime = 2 * time.Second

// Renew asks the control plane's replicas, in turn, to renew the source's identity although it has ended. What it returns is not yet
// verified. A refusal is a *problem.Error that is not Retryable; everything else may be tried again.
func Renew(ctx context.Context, cfg RenewConfig) (*controlpb.RenewResponse, error) {
	id := cfg.Source.Identity()
	if id == nil {
		return nil, errors.New("renew: no identity")
	}
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		}
	}
	conf := cfg.Source.RenewClientTLS(trust.AuthorizeControlPlane(id.ID.TrustDomain()))
	var errs []error
	for _, addr := range cfg.Addresses {
		r, err := renewAt(ctx, cfg, conf, addr)
		if err == nil {
			return r, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

func renewAt(ctx context.Context, cfg RenewConfig, conf *tls.Config, addr string) (*controlpb.RenewResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, renewTime)
	defer cancel()
	raw, err := cfg.Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()
	c := tls.Client(raw, conf)
	if err := c.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	if err := writeMessage(c, cfg.Request); err != nil {
		return nil, err
	}
	var answer controlpb.RegisterResponse
	if err := readMessage(c, &answer); err != nil {
		return nil, err
	}
	switch answer.ErrorCode {
	case "":
		return &controlpb.RenewResponse{ChainDer: answer.ChainDer, BundleJwks: answer.BundleJwks, NotAfterUnix: answer.NotAfterUnix}, nil
	case string(problem.RegistrationBusy), string(problem.Internal):
		return nil, problem.New(problem.RegistrationBusy, "the control plane could not renew this identity now").WithWhy("%s", answer.ErrorMessage).Retry()
	}
	return nil, problem.New(problem.IdentityExpired, "the control plane does not renew this identity").WithWhy("%s", answer.ErrorMessage)
}
