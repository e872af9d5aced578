// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/endpoint"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Role is what a proxy is.
type Role string

// The roles.
const (
	Gateway Role = "gateway"
	Sidecar Role = "sidecar"
)

// Config says who the proxy is and where its control plane answers.
type Config struct {
	Role         Role
	Name         string       // a gateway's name, a sidecar's "<namespace>/<proxy>"
	DataDir      *datadir.Dir // identity, bundles and the snapshot live here; required
	ControlPlane []string     // host:port of each replica, used in turn; empty: those of the token
	TokenFile    string       // registration token, read when there is no usable identity
	// WorkloadAPI is the address (unix:///path) of the SPIFFE Workload API that identity and own bundle come from. There is no
	// registration and no renewal by the control plane then; Self tells what a registration would have told: cluster,
	// federation and locality. ServiceAccount chooses among the identities of a sidecar's namespace; empty: any.
	WorkloadAPI    string
	Self           Info
	ServiceAccount string
	Source         *trust.Source // filled and kept; nil: a new one
	Version        string        // of this program
	// RenewEvery is the mean time between renewals (1 h); the actual one is drawn from ±10 %. Raising it costs margin: an
	// identity that is not renewed for its lifetime (36 h) stops working.
	RenewEvery time.Duration
	// SnapshotEvery is the least time between two writes of the snapshot (1 s). Raising it costs freshness after a crash.
	SnapshotEvery time.Duration
	Dial          func(ctx context.Context, addr string) (net.Conn, error) // nil: TCP
	Now           func() time.Time
	Logger        *slog.Logger
}

// Info is what the registration told the proxy about itself.
type Info struct {
	Name        string
	ID          spiffeid.ID
	TrustDomain spiffeid.TrustDomain
	Cluster     federation.ClusterName
	Federation  federation.FederationName
	Locality    federation.Locality
}

// State says what is known of a resource.
type State int

// The states of a resource.
const (
	Unknown State = iota // nobody has said anything yet
	Known
	Absent // the control plane says that it does not exist
)

// Change is one change of one subscribed resource.
type Change struct {
	TypeURL string
	Name    string
	Message proto.Message // nil: removed, or told to be absent
	More    bool          // further changes of the same response follow at once
}

// Status is how the client and its control plane get along.
type Status struct {
	Connected bool      // a discovery stream is open and was answered
	Since     time.Time // of Connected
	LastError error     // of the last stream or renewal that failed; nil after a success
	Renewed   time.Time // last time an identity was obtained
	NotAfter  time.Time // of the identity in use
}

// Client is the proxy's side of its control plane's port.
type Client struct {
	cfg     Config
	log     *slog.Logger
	source  *trust.Source
	conn    *grpc.ClientConn
	store   *store
	bundles *bundleKeeper
	health  health
	wires   wires
	closed  sync.Once
	// endpoint is the Workload API, nil where the control plane issues the identity
	endpoint *endpoint.Handle
	ended    chan struct{} // wakes the renewal: the identity has ended
	observer *observer
	recall   chan struct{} // wakes the renewal: identities of before some time are to be renewed
	// addresses of the control plane, fixed after Open
	addresses []string

	identityMu sync.Mutex
	info       Info
	obtained   time.Time // when the identity in use was obtained

	lastToken atomic.Pointer[string] // id of the token that was redeemed or refused last
}

// Open loads identity, bundle and snapshot from the data directory, or registers with the token, and returns a Client
// that can answer from its snapshot. It contacts the control plane only when there is no usable identity, and then waits
// for it until ctx ends. With a Workload API it waits for that instead.
func Open(ctx context.Context, cfg Config) (_ *Client, err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	c := &Client{cfg: cfg, log: cfg.Logger, source: cfg.Source, store: newStore(cfg.Now), recall: make(chan struct{}, 1), ended: make(chan struct{}, 1), addresses: cfg.ControlPlane}
	first := c.loadOrRegister
	if cfg.WorkloadAPI != "" {
		first = c.openEndpoint
	}
	if err := first(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && c.endpoint != nil {
			err = errors.Join(err, c.endpoint.Close())
		}
	}()
	if len(c.addresses) == 0 {
		return nil, errors.New("control plane client: no address of a control plane, neither configured nor in the token")
	}
	c.bundles = newBundleKeeper(c.source, c.info.TrustDomain, c.cfg.DataDir)
	c.bundles.elsewhere = c.endpoint != nil
	if err := c.loadSnapshot(); err != nil {
		c.log.Warn("snapshot not loaded", "err", err)
	}
	switch cfg.Role {
	case Gateway:
		c.SubscribeAll(controlpb.TypePeer)
		c.Subscribe(controlpb.TypeBundle, c.info.TrustDomain.String())
	case Sidecar:
		c.SubscribeAll(controlpb.TypeBundle)
	}
	c.store.watch(c.bundles.apply)
	c.store.watch(c.watchRecall)
	c.store.deliver(c.log) // the snapshot's bundles are in force before the first caller asks
	if c.conn, err = c.dial(); err != nil {
		return nil, fmt.Errorf("control plane client: %w", err)
	}
	return c, nil
}

// Run renews the identity, follows the subscriptions and writes the snapshot until ctx ends. It closes the connection and
// returns nil after all of its goroutines have ended.
func (c *Client) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	in := make(chan inbound)
	renew := c.renewLoop
	if c.endpoint != nil {
		renew = c.endpointLoop
	}
	fresh := c.freshLoop
	if c.endpoint != nil {
		fresh = func(context.Context) {} // no token counts there
	}
	for _, f := range []func(context.Context){
		renew, fresh,
		func(ctx context.Context) { c.streamLoop(ctx, in) },
		func(ctx context.Context) { c.applyLoop(ctx, in) },
		c.snapshotLoop,
		c.expiryLoop,
		c.observeLoop,
	} {
		wg.Go(func() { f(ctx) })
	}
	<-ctx.Done()
	cancel()
	wg.Wait()
	return c.Close()
}

// Close releases the connection. It is idempotent; Run calls it.
func (c *Client) Close() error {
	var err error
	c.closed.Do(func() {
		err = c.conn.Close()
		if c.endpoint != nil {
			err = errors.Join(err, c.endpoint.Close())
		}
	})
	return err
}

// Source holds the proxy's identity and bundles.
func (c *Client) Source() *trust.Source { return c.source }

// Conn is the connection to the control plane. RPCs on it fail fast while it is away unless they wait for ready.
func (c *Client) Conn() grpc.ClientConnInterface { return c.conn }

// Info is who the proxy is.
func (c *Client) Info() Info {
	c.identityMu.Lock()
	defer c.identityMu.Unlock()
	return c.info
}

// Status is how it goes.
func (c *Client) Status() Status {
	s := c.health.status()
	if c.endpoint != nil && s.LastError == nil {
		s.LastError = c.endpointError()
	}
	c.identityMu.Lock()
	defer c.identityMu.Unlock()
	s.Renewed = c.obtained
	if id := c.source.Identity(); id != nil {
		s.NotAfter = id.NotAfter
	}
	return s
}

// Subscribe asks for the named resources of a type, now and after each reconnect.
func (c *Client) Subscribe(typeURL string, names ...string) { c.store.subscribe(typeURL, names) }

// SubscribeAll asks for all resources of a type that this proxy may see.
func (c *Client) SubscribeAll(typeURL string) { c.store.subscribe(typeURL, []string{wildcard}) }

// Unsubscribe forgets the named resources. Watchers are not told.
func (c *Client) Unsubscribe(typeURL string, names ...string) { c.store.unsubscribe(typeURL, names) }

// Get returns the message of a subscribed resource, and what is known of it. The message is shared: do not modify it.
func (c *Client) Get(typeURL, name string) (proto.Message, State) { return c.store.get(typeURL, name) }

// List returns all known subscribed resources of a type by name. The messages are shared: do not modify them.
func (c *Client) List(typeURL string) map[string]proto.Message { return c.store.list(typeURL) }

// Wait returns as soon as the resource is known or absent, or with ctx's error.
func (c *Client) Wait(ctx context.Context, typeURL, name string) (proto.Message, State, error) {
	return c.store.wait(ctx, typeURL, name)
}

// Watch calls f for every subscribed resource that is known, then for each change, until cancel is called. Get and List
// already show a change while f is told of it. If f returns an error, the control plane is told (NACK), the previous version
// is restored, and watchers that were told of the new one are told of the previous one again. f is called by Run only; a
// call that runs while cancel is called is not waited for.
func (c *Client) Watch(f func(Change) error) (cancel func()) { return c.store.watch(f) }

// PushSpans hands spans to the control plane as OTLP.
func (c *Client) PushSpans(ctx context.Context, spans *tracepb.TracesData) error {
	// TracesData and the collector's request and response share their bytes: one repeated field, and nothing we read.
	return c.conn.Invoke(ctx, exportMethod, spans, &emptypb.Empty{})
}

const exportMethod = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"

func (cfg Config) withDefaults() (Config, error) {
	switch {
	case cfg.Role != Gateway && cfg.Role != Sidecar:
		return cfg, fmt.Errorf("control plane client: role %q", cfg.Role)
	case cfg.Name == "":
		return cfg, errors.New("control plane client: no name")
	case cfg.DataDir == nil:
		return cfg, errors.New("control plane client: no data directory")
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
	if cfg.RenewEvery <= 0 {
		cfg.RenewEvery = time.Hour
	}
	if cfg.SnapshotEvery <= 0 {
		cfg.SnapshotEvery = time.Second
	}
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		}
	}
	return cfg, nil
}
