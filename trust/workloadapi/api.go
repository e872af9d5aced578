// SPDX-License-Identifier: Apache-2.0

package workloadapi

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/strait-mesh/strait/internal/peercred"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/jwtsvid"
)

// securityHeader keeps out requests that a browser or a proxy was talked into (SPIFFE Workload Endpoint, section 6.1).
const securityHeader = "workload.spiffe.io"

// Bounds of a request for a token.
const (
	maxAudiences     = 16
	maxAudience      = 2048
	maxAudienceBytes = 8 << 10
)

func (s *Server) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	leave, err := s.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	return next(ctx, req)
}

func (s *Server) stream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	leave, err := s.enter(stream.Context())
	if err != nil {
		return err
	}
	defer leave()
	return next(srv, stream)
}

func (s *Server) enter(ctx context.Context) (leave func(), err error) {
	who, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	if md, _ := metadata.FromIncomingContext(ctx); len(md[securityHeader]) != 1 || md[securityHeader][0] != "true" {
		s.cfg.Refused("no_header")
		return nil, status.Errorf(codes.InvalidArgument, "the metadata %s: true is missing", securityHeader)
	}
	if leave, err = s.gate.enter(who.UID); err != nil {
		return nil, err
	}
	if err := s.configured(ctx); err != nil {
		leave()
		return nil, err
	}
	return leave, nil
}

// configured waits until somebody has said who is served: until then nobody is refused for good.
func (s *Server) configured(ctx context.Context) error {
	select {
	case <-s.gate.first:
		return nil
	default:
	}
	t := time.NewTimer(s.cfg.FirstWait)
	defer t.Stop()
	select {
	case <-s.gate.first:
		return nil
	case <-t.C:
		s.cfg.Refused("no_configuration")
		return status.Error(codes.Unavailable, "the sidecar has no configuration yet")
	case <-s.ending:
		return status.Error(codes.Unavailable, "the sidecar ends")
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

func caller(ctx context.Context) (peercred.Caller, error) {
	p, ok := peer.FromContext(ctx)
	if ok {
		if info, ok := p.AuthInfo.(callerInfo); ok {
			return info.who, nil
		}
	}
	return peercred.Caller{}, status.Error(codes.Unauthenticated, "nobody knows who is calling")
}

// allowed judges the caller of one call.
func (s *Server) allowed(ctx context.Context) (Access, error) {
	who, err := caller(ctx)
	if err != nil {
		return Access{}, err
	}
	a, _ := s.gate.current()
	return a, s.gate.judge(a, who)
}

// follow sends what build makes, and again whenever it makes something else, for as long as the caller is allowed. build returns
// the time until which its message holds (zero: no end), or the error that ends the stream.
func follow[M any](ctx context.Context, s *Server, send func(*M) error, build func(Access, *trust.Bundles) (*M, time.Time, <-chan struct{}, error)) error {
	who, err := caller(ctx)
	if err != nil {
		return err
	}
	var last *M
	for {
		access, moved := s.gate.current()
		trusted := s.cfg.Source.Changed()
		if err := s.gate.judge(access, who); err != nil {
			return err
		}
		m, until, other, err := build(access, s.cfg.Source.Bundles())
		if err != nil {
			return err
		}
		if m != nil && m != last {
			if err := send(m); err != nil {
				return err
			}
			last = m
		}
		if err := s.pause(ctx, until, moved, trusted, other); err != nil {
			return err
		}
	}
}

// pause waits for a change, or for the time given.
func (s *Server) pause(ctx context.Context, until time.Time, moved, trusted, other <-chan struct{}) error {
	var end <-chan time.Time
	if !until.IsZero() {
		// In steps, so that a clock that is set forth ends what has ended.
		t := time.NewTimer(min(max(until.Sub(s.cfg.Now()), 0), time.Minute))
		defer t.Stop()
		end = t.C
	}
	select {
	case <-moved:
	case <-trusted:
	case <-other:
	case <-end:
	case <-s.ending:
		return status.Error(codes.Unavailable, "the sidecar ends")
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
	return nil
}

// FetchX509SVID streams the identity with its key, and the bundles.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	var patience time.Time // until when a first identity is waited for
	served := false
	return follow(stream.Context(), s, stream.Send, func(a Access, b *trust.Bundles) (*workload.X509SVIDResponse, time.Time, <-chan struct{}, error) {
		s.want()
		id, changed, why := s.keeper.current()
		now := s.cfg.Now()
		if id == nil {
			if patience.IsZero() {
				patience = now.Add(s.cfg.FirstWait)
			}
			if served || !now.Before(patience) {
				return nil, time.Time{}, nil, s.noIdentity(why)
			}
			return nil, patience, changed, nil
		}
		own := b.Get(id.ID.TrustDomain())
		if id.ID != a.ID || own == nil {
			return nil, time.Time{}, nil, s.noIdentity(errors.New("the sidecar's registration and its configuration differ"))
		}
		m, err := s.said.svid(a, id, b)
		if err != nil {
			return nil, time.Time{}, nil, status.Error(codes.Internal, err.Error())
		}
		served = true
		return m, id.NotAfter, changed, nil
	})
}

// want starts the keeper, unless nobody is allowed any more.
func (s *Server) want() {
	s.keeper.want()
	if a, _ := s.gate.current(); a.none() {
		s.keeper.stop()
	}
}

// noIdentity is what callers are told when there is nothing to give to them. Clients try again.
func (s *Server) noIdentity(why error) error {
	s.cfg.Refused("no_identity")
	switch {
	case why == nil:
		return status.Error(codes.Unavailable, "no identity yet: the control plane has not answered")
	case errors.Is(why, errWithdrawn):
		return status.Error(codes.PermissionDenied, why.Error())
	}
	return status.Errorf(codes.Unavailable, "no identity: %v", why)
}

// FetchX509Bundles streams the roots of all trust domains.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return follow(stream.Context(), s, stream.Send, func(_ Access, b *trust.Bundles) (*workload.X509BundlesResponse, time.Time, <-chan struct{}, error) {
		m := s.said.x509(b)
		if len(m.Bundles) == 0 {
			return nil, time.Time{}, nil, status.Error(codes.PermissionDenied, "no trust domain has roots")
		}
		return m, time.Time{}, nil, nil
	})
}

// FetchJWTBundles streams the keys for tokens of all trust domains.
func (s *Server) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return follow(stream.Context(), s, stream.Send, func(_ Access, b *trust.Bundles) (*workload.JWTBundlesResponse, time.Time, <-chan struct{}, error) {
		m, err := s.said.jwt(b)
		if err != nil {
			return nil, time.Time{}, nil, status.Error(codes.Internal, err.Error())
		}
		if len(m.Bundles) == 0 {
			return nil, time.Time{}, nil, status.Error(codes.PermissionDenied, "no trust domain has keys for tokens")
		}
		return m, time.Time{}, nil, nil
	})
}

// FetchJWTSVID returns a token for the audiences.
func (s *Server) FetchJWTSVID(ctx context.Context, q *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	a, err := s.allowed(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkAudience(q.GetAudience()); err != nil {
		return nil, err
	}
	if id := q.GetSpiffeId(); id != "" && id != a.ID.String() {
		s.cfg.Refused("other_id")
		return nil, status.Errorf(codes.PermissionDenied, "identities of this socket are %s", a.ID)
	}
	token, err := s.token(ctx, q.GetAudience())
	if err != nil {
		return nil, err
	}
	return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{SpiffeId: a.ID.String(), Svid: token, Hint: a.Hint}}}, nil
}

func checkAudience(audience []string) error {
	if len(audience) == 0 || len(audience) > maxAudiences {
		return status.Errorf(codes.InvalidArgument, "%d audiences; 1 to %d", len(audience), maxAudiences)
	}
	size := 0
	for _, a := range audience {
		if size += len(a); a == "" || len(a) > maxAudience || size > maxAudienceBytes {
			return status.Errorf(codes.InvalidArgument, "audiences have 1 to %d bytes each, and %d together", maxAudience, maxAudienceBytes)
		}
	}
	return nil
}

func (s *Server) token(ctx context.Context, audience []string) (string, error) {
	key := strings.Join(audience, "\x00")
	now := s.cfg.Now()
	bundles := s.cfg.Source.Bundles()
	if token, ok := s.tokens.get(key, bundles, now); ok {
		return token, nil
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	generation := s.tokens.generation.Load()
	token, notAfter, err := s.cfg.Issuer.RequestJWT(ctx, audience)
	if err != nil {
		s.cfg.Refused("no_token")
		if st, ok := status.FromError(err); ok {
			return "", status.Errorf(st.Code(), "no token: %s", st.Message())
		}
		return "", status.Errorf(codes.Unavailable, "no token: %v", err)
	}
	// What was withdrawn meanwhile is not handed out.
	if generation != s.tokens.generation.Load() {
		if _, err := s.allowed(ctx); err != nil {
			return "", err
		}
		return token, nil
	}
	s.tokens.put(key, bundles, cached{token, now.Add(notAfter.Sub(now) / 2)})
	return token, nil
}

// ValidateJWTSVID judges a token for the caller.
func (s *Server) ValidateJWTSVID(ctx context.Context, q *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	if _, err := s.allowed(ctx); err != nil {
		return nil, err
	}
	refuse := func(err error) (*workload.ValidateJWTSVIDResponse, error) {
		s.cfg.Refused("bad_token")
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if len(q.GetAudience()) > maxAudience {
		return refuse(errors.New("the audience is too long"))
	}
	c, err := jwtsvid.Verify(q.GetSvid(), q.GetAudience(), s.cfg.Source.Bundles(), s.cfg.Now())
	if err != nil {
		return refuse(err)
	}
	if reason, denied := s.cfg.Denied(c.ID, c.Issued); denied {
		return refuse(errors.New("JWT-SVID: " + c.ID.String() + " was withdrawn: " + reason))
	}
	claims, err := structpb.NewStruct(c.All)
	if err != nil {
		return refuse(err)
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: c.ID.String(), Claims: claims}, nil
}
