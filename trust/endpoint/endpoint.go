// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Config of a Handle.
type Config struct {
	Socket string        // unix:///path or tcp://IP:port, as in SPIFFE_ENDPOINT_SOCKET; required
	Wants  []Want        // what the process needs; required. The first becomes the Source's identity
	Source *trust.Source // filled and kept; nil: a new one
	Dir    *datadir.Dir  // keeps the own bundle and its sequence number; required
	File   string        // its name there; default bundles/<trust domain>.json
	// Federated says whose federated bundles are put in force; nil: nobody's.
	Federated func(spiffeid.TrustDomain) bool
	Dial      func(ctx context.Context) (net.Conn, error) // nil: Socket
	Now       func() time.Time
	Logger    *slog.Logger
}

// Handle keeps a process's identities. Make it with Open.
type Handle struct {
	cfg    Config
	log    *slog.Logger
	conn   *grpc.ClientConn
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	once   sync.Once
	err    error // of the connection's Close

	ready chan struct{} // closed when every want has been met

	mu         sync.Mutex
	identities []*trust.Identity // by want
	bundle     *trust.Bundle     // own, as published
	federated  map[spiffeid.TrustDomain]*trust.Bundle
	offered    []string
	unmet      []string // wants that the last message did not meet
	lastErr    error
	updated    time.Time
	fatal      error
	changed    chan struct{}
}

// Open waits until the server has offered every identity wanted, and all hold. When ctx ends before that, the error is a
// *problem.Error that names the socket, what was offered and what is missing.
func Open(ctx context.Context, cfg Config) (*Handle, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	h := &Handle{
		cfg: cfg, log: cfg.Logger.With("socket", cfg.Socket), ready: make(chan struct{}), changed: make(chan struct{}),
		identities: make([]*trust.Identity, len(cfg.Wants)), federated: map[spiffeid.TrustDomain]*trust.Bundle{},
	}
	h.ctx, h.cancel = context.WithCancel(context.WithoutCancel(ctx))
	h.conn, err = grpc.NewClient("passthrough:///workload-api",
		grpc.WithTransportCredentials(insecure.NewCredentials()), // of the specification: the socket is local
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return cfg.Dial(ctx) }),
		grpc.WithNoProxy(), grpc.WithDisableServiceConfig(), grpc.WithIdleTimeout(0),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: minPause, Multiplier: 2, Jitter: 0.2, MaxDelay: maxPause}, MinConnectTimeout: 5 * time.Second,
		}))
	if err != nil {
		h.cancel()
		return nil, fmt.Errorf("workload API: %w", err)
	}
	client := workload.NewSpiffeWorkloadAPIClient(h.conn)
	h.wg.Go(func() { h.x509Loop(client) })
	h.wg.Go(func() { h.jwtLoop(client) })
	select {
	case <-h.ready:
		return h, nil
	case <-h.ctx.Done(): // fatal
		err = h.fatal
	case <-ctx.Done():
		err = h.missing(ctx.Err())
	}
	return nil, errors.Join(err, h.Close())
}

func (cfg Config) withDefaults() (Config, error) {
	network, address, err := ParseAddress(cfg.Socket)
	if err != nil {
		return cfg, problem.New(problem.Usage, "address of the Workload API: %v", err).
			WithFix("%s=unix:///run/spire/sockets/agent.sock", SocketEnv).Wrap(err)
	}
	if len(cfg.Wants) == 0 || cfg.Dir == nil {
		return cfg, errors.New("workload API: Wants and Dir are required")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Source == nil {
		cfg.Source = trust.NewSource(trust.SourceConfig{Now: cfg.Now, Logger: cfg.Logger})
	}
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context) (net.Conn, error) { return (&net.Dialer{}).DialContext(ctx, network, address) }
	}
	return cfg, nil
}

// Close ends the connection and waits for the loops. What is in force stays. It is idempotent.
func (h *Handle) Close() error {
	h.once.Do(func() {
		h.cancel()
		h.err = h.conn.Close()
	})
	h.wg.Wait()
	return h.err
}

// Source holds the first identity wanted and the bundles.
func (h *Handle) Source() *trust.Source { return h.cfg.Source }

// Identity is the identity for the want of that index, never nil.
func (h *Handle) Identity(want int) *trust.Identity {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.identities[want]
}

// Bundle is the own trust domain's, with JWT keys and sequence number.
func (h *Handle) Bundle() *trust.Bundle {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.bundle
}

// Changed returns a channel that is closed when an identity or a bundle changes.
func (h *Handle) Changed() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.changed
}

// Status is how a Handle and its server get along.
type Status struct {
	Socket    string
	Offered   []string  // SPIFFE IDs of the last message, sorted as it came
	Updated   time.Time // when something was last put in force
	LastError error     // nil: the last message was as wanted
}

// Status is how it goes.
func (h *Handle) Status() Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	return Status{h.cfg.Socket, h.offered, h.updated, h.lastErr}
}

// missing says what there is not yet.
func (h *Handle) missing(cause error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	wants := h.unmet
	if len(wants) == 0 {
		for _, w := range h.cfg.Wants {
			wants = append(wants, w.Text)
		}
	}
	why := "it offers nothing to this process"
	if len(h.offered) > 0 {
		why = "it offers " + strings.Join(h.offered, ", ")
	}
	if h.lastErr != nil {
		why += "; " + strings.ReplaceAll(h.lastErr.Error(), "\n", "; ")
	}
	return problem.New(problem.IdentityNotOffered, "the Workload API at %s does not offer %s", h.cfg.Socket, strings.Join(wants, " and ")).
		WithWhy("%s", why).WithFix("register an entry with that SPIFFE ID for this process (its user, its service account)").
		Wrap(errors.Join(cause, h.lastErr)).Retry()
}
