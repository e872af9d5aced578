// SPDX-License-Identifier: Apache-2.0

package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Issuer is where identities come from. Errors that carry a gRPC status keep it on their way to the caller.
type Issuer interface {
	// RequestIdentity asks for an X.509-SVID of a new key.
	RequestIdentity(ctx context.Context) (*trust.Identity, error)
	// RequestJWT asks for a JWT-SVID of the same ID.
	RequestJWT(ctx context.Context, audience []string) (token string, notAfter time.Time, err error)
}

// Config of a Server. Source and Issuer are required.
type Config struct {
	Source *trust.Source // whose bundles are served; its identity is not
	Issuer Issuer
	// Denied says whether what was issued to an ID at a time was withdrawn. nil: nothing was.
	Denied func(id spiffeid.ID, issued time.Time) (reason string, denied bool)
	// RenewEvery is the mean time between renewals (1 h), drawn from ±10 %. Raising it costs margin before NotAfter.
	RenewEvery time.Duration
	// FirstWait is how long a caller waits for the first SetAccess, and then for the first identity (5 s). Raising it delays the
	// reason that callers get.
	FirstWait time.Duration
	// MaxCalls bounds the calls of one uid at a time (256); each costs about 10 KiB.
	MaxCalls int
	// Refused hears one word for each call that was refused. nil: nobody does.
	Refused func(reason string)
	Now     func() time.Time // nil: time.Now
	Logger  *slog.Logger     // nil: discard
}

func (c Config) withDefaults() (Config, error) {
	if c.Source == nil || c.Issuer == nil {
		return c, errors.New("workload API: Source and Issuer are required")
	}
	if c.Denied == nil {
		c.Denied = func(spiffeid.ID, time.Time) (string, bool) { return "", false }
	}
	if c.RenewEvery <= 0 {
		c.RenewEvery = time.Hour
	}
	if c.FirstWait <= 0 {
		c.FirstWait = 5 * time.Second
	}
	if c.MaxCalls <= 0 {
		c.MaxCalls = 256
	}
	if c.Refused == nil {
		c.Refused = func(string) {}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// Server serves the Workload API. See the package comment.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	cfg    Config
	log    *slog.Logger
	gate   *gate
	keeper *keeper
	tokens tokenCache
	said   messages
	ending chan struct{} // closed when Run begins to end
}

// New returns a Server that serves nobody until SetAccess and Run.
func New(cfg Config) (*Server, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, log: cfg.Logger, gate: newGate(cfg), ending: make(chan struct{})}
	s.keeper = newKeeper(cfg)
	return s, nil
}

// SetAccess says who is served from now on, and as whom. Streams of callers that are not served any more end.
func (s *Server) SetAccess(a Access) {
	old := s.gate.set(a)
	if a.none() || old.ID != a.ID {
		s.keeper.stop()
	}
	s.tokens.clear()
}

// Reconsider judges again what was issued, after what Denied says has changed.
func (s *Server) Reconsider() {
	s.tokens.clear()
	s.keeper.judge()
}

// RenewIssuedBefore has identities that were issued before t renewed now rather than in their turn.
func (s *Server) RenewIssuedBefore(t time.Time) {
	s.tokens.clear()
	s.keeper.recall(t)
}

const (
	maxMessage       = 32 << 10 // of a caller
	maxCallsOfOne    = 32       // of one connection at a time
	handshakeTimeout = 5 * time.Second
	idleTimeout      = 10 * time.Minute
	endGrace         = 500 * time.Millisecond
)

// Run serves the connections of l, which must be a Listener's or such as say who is calling, until ctx ends. It closes l.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	g := grpc.NewServer(
		grpc.Creds(attested{}), grpc.MaxRecvMsgSize(maxMessage), grpc.MaxConcurrentStreams(maxCallsOfOne), grpc.MaxHeaderListSize(16<<10),
		grpc.ConnectionTimeout(handshakeTimeout), grpc.ReadBufferSize(4<<10), grpc.WriteBufferSize(4<<10), grpc.WaitForHandlers(true),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleTimeout}),
		grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream),
	)
	workload.RegisterSpiffeWorkloadAPIServer(g, s)
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { s.keeper.run(ctx) })
	wg.Go(func() { s.endWith(ctx, g) })
	err := g.Serve(l)
	if ctx.Err() != nil {
		err = nil
	}
	cancel()
	wg.Wait()
	if err != nil {
		return fmt.Errorf("workload API: %w", err)
	}
	return nil
}

// endWith stops g when ctx ends: streams are told first, and connections that do not end are cut.
func (s *Server) endWith(ctx context.Context, g *grpc.Server) {
	<-ctx.Done()
	close(s.ending)
	t := time.AfterFunc(endGrace, g.Stop)
	g.GracefulStop()
	if !t.Stop() {
		g.Stop() // returns when the one that the timer began has
	}
}
