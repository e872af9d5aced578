// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"encoding/json"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Bounds of a token's audiences: together they fit into a token of 16 KiB.
const (
	maxAudiences     = 16
	maxAudience      = 2048
	maxAudienceBytes = 8 << 10
)

// Tokens of one identity: 20 a second, 100 at once. Sidecars reuse what they have, so that an honest one asks rarely.
const (
	jwtRate     = 20
	jwtBurst    = 100
	maxLimiters = 10_000
)

// JWTSigner signs JWT-SVIDs. *ca.CA is one.
type JWTSigner interface {
	SignJWT(id spiffeid.ID, audience []string) (token string, notAfter time.Time, err error)
}

// IssueJWT issues a JWT-SVID with the caller's own ID, for the audiences that it names.
func (s *Server) IssueJWT(ctx context.Context, q *controlpb.IssueJWTRequest) (*controlpb.IssueJWTResponse, error) {
	peer, ok := PeerFromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Unauthenticated, "no verified identity")
	}
	if s.cfg.JWT == nil {
		return nil, status.Error(codes.Unimplemented, "this control plane issues no tokens")
	}
	if s.cfg.Denied != nil {
		if reason, denied := s.cfg.Denied(peer.ID, peer.Issued()); denied {
			return nil, wire.ToStatus(problem.New(problem.IdentityWithdrawn, "%s was withdrawn", peer.ID).WithWhy("%s", reason))
		}
	}
	if err := checkAudience(q.GetAudience()); err != nil {
		return nil, err
	}
	if !s.jwtLimits.allow(peer.ID) {
		return nil, status.Errorf(codes.ResourceExhausted, "%s asks for more than %d tokens a second", peer.ID, jwtRate)
	}
	token, notAfter, err := s.cfg.JWT.SignJWT(peer.ID, q.GetAudience())
	if err != nil {
		s.cfg.Logger.Error("token not issued", "id", peer.ID, "err", err)
		return nil, wire.ToStatus(err)
	}
	s.cfg.Logger.Debug("token issued", "id", peer.ID, "not_after", notAfter)
	return &controlpb.IssueJWTResponse{Token: token, NotAfterUnix: notAfter.Unix()}, nil
}

func checkAudience(audience []string) error {
	if len(audience) == 0 || len(audience) > maxAudiences {
		return status.Errorf(codes.InvalidArgument, "%d audiences; 1 to %d", len(audience), maxAudiences)
	}
	for _, a := range audience {
		if a == "" || len(a) > maxAudience {
			return status.Errorf(codes.InvalidArgument, "an audience has 1 to %d bytes", maxAudience)
		}
		if !utf8.ValidString(a) {
			return status.Error(codes.InvalidArgument, "an audience is no UTF-8")
		}
		for _, r := range a {
			if unicode.IsControl(r) {
				return status.Error(codes.InvalidArgument, "an audience has control characters")
			}
		}
	}
	if data, err := json.Marshal(audience); err != nil || len(data) > maxAudienceBytes {
		return status.Errorf(codes.InvalidArgument, "audiences have %d bytes together, as JSON", maxAudienceBytes)
	}
	return nil
}

// jwtLimits is one bucket for each identity. The zero value is ready.
type jwtLimits struct {
	mu   sync.Mutex
	each map[spiffeid.ID]*rate.Limiter
}

func (l *jwtLimits) allow(id spiffeid.ID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	one := l.each[id]
	if one == nil {
		if len(l.each) >= maxLimiters || l.each == nil {
			l.each = map[spiffeid.ID]*rate.Limiter{} // identities are ours: forgetting them forgives a burst, and bounds what is kept
		}
		one = rate.NewLimiter(jwtRate, jwtBurst)
		l.each[id] = one
	}
	return one.Allow()
}
