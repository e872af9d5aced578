// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"

	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/span"
	"github.com/strait-mesh/strait/trust"
)

// Client is where a sidecar learns from and reports to: *proxyclient.Client, or a Snapshot.
type Client interface {
	Source() *trust.Source
	// Conn is the connection to the control plane; nil when there is nobody to report to.
	Conn() grpc.ClientConnInterface
	Subscribe(typeURL string, names ...string)
	SubscribeAll(typeURL string)
	Unsubscribe(typeURL string, names ...string)
	// Watch calls f for what is known and then for each change, one at a time.
	Watch(f func(proxyclient.Change) error) (cancel func())
}

// Upstream is an explicit listener for one service.
type Upstream struct {
	Service federation.ServiceName
	Port    string                 // name or number; empty: the only port, or the first
	Pinned  federation.ClusterName // zero: wherever the decision says
	Listen  string                 // host:port
}

// ParseUpstream reads "<ns>/<svc>[:port][@cluster]=host:port".
func ParseUpstream(s string) (Upstream, error) {
	name, listen, ok := strings.Cut(s, "=")
	if !ok || listen == "" {
		return Upstream{}, fmt.Errorf("upstream %q: want <namespace>/<service>[:port][@cluster]=host:port", s)
	}
	u := Upstream{Listen: listen}
	if _, _, err := net.SplitHostPort(listen); err != nil {
		return Upstream{}, fmt.Errorf("upstream %q: %w", s, err)
	}
	var err error
	if n, cluster, pinned := strings.Cut(name, "@"); pinned {
		if u.Pinned, err = federation.ParseClusterName(cluster); err != nil {
			return Upstream{}, fmt.Errorf("upstream %q: %w", s, err)
		}
		name = n
	}
	if n, port, has := strings.Cut(name, ":"); has {
		if _, err := federation.ParsePortName(port); err != nil {
			return Upstream{}, fmt.Errorf("upstream %q: %w", s, err)
		}
		name, u.Port = n, port
	}
	if u.Service, err = federation.ParseServiceName(name); err != nil {
		return Upstream{}, fmt.Errorf("upstream %q: %w", s, err)
	}
	return u, nil
}

// String returns what ParseUpstream reads.
func (u Upstream) String() string {
	s := u.Service.String()
	if u.Port != "" {
		s += ":" + u.Port
	}
	if u.Pinned != "" {
		s += "@" + u.Pinned.String()
	}
	return s + "=" + u.Listen
}

// Addrs are the addresses that were bound; those not configured are empty.
type Addrs struct {
	Inbound   string
	Metrics   string
	HTTPProxy string
	Upstreams []string // in the order of Config.Upstreams
	// WorkloadAPI is the socket of the SPIFFE Workload API, as the value of SPIFFE_ENDPOINT_SOCKET.
	WorkloadAPI string `json:",omitempty"`
}

// Config is a sidecar's. Proxy and Client are required.
type Config struct {
	Proxy  string // "<namespace>/<proxy>"
	Client Client

	InboundListen string // mTLS from other sidecars; default ":15008"
	// InboundAdvertise is what others are told to dial; default: the bound address, and where that names no host, the
	// host's first global address.
	InboundAdvertise string
	MetricsListen    string // default ":15020"
	HTTPProxyListen  string // HTTP by Host; empty: none
	Upstreams        []Upstream
	// WorkloadAPI is the path of the unix socket on which applications get their identity (SPIFFE Workload API); empty: none. It
	// needs a Client that asks a control plane for identities.
	WorkloadAPI string

	Version  string
	Recorder *span.Recorder   // of the HTTP engine's spans; nil: none. The caller runs it.
	Metrics  *metric.Registry // nil: one of its own

	// CheckEvery is the interval of active checks, 1 s: raising it delays the notice of a silent death by as much.
	CheckEvery time.Duration
	// ReportEvery is the interval of health reports, 2 s; three missed ones make the instances unknown. Lower costs messages.
	ReportEvery time.Duration
	// DialTimeout bounds one inner connection's making, 2 s: raising it delays the move to the next endpoint.
	DialTimeout time.Duration
	// Handshake bounds a TLS handshake on the inbound listener, 5 s.
	Handshake time.Duration
	// DrainDelay is how long the listeners stay open after a stop was asked for, so that callers hear of it first: 2 s. DrainGrace is
	// how long what is open may take to end after that: 20 s.
	DrainDelay time.Duration
	DrainGrace time.Duration
	// MaxConnections bounds the connections of each listener, 10,000; what comes above waits in the kernel's queue.
	MaxConnections int
	// ServiceIdle is how long a service that was asked for by Host stays subscribed without a call: 10 min.
	ServiceIdle time.Duration

	// RenewEvery is the mean time between renewals of the identity that the Workload API hands out, 1 h ±10 %.
	RenewEvery time.Duration

	// Bound is called once, when all listeners are bound and before anything is served.
	Bound  func(Addrs)
	Now    func() time.Time
	Logger *slog.Logger
}

func (c Config) withDefaults() (Config, error) {
	ns, name, ok := strings.Cut(c.Proxy, "/")
	if !ok || ns == "" || name == "" {
		return c, fmt.Errorf("sidecar: proxy %q: want <namespace>/<name>", c.Proxy)
	}
	if c.Client == nil {
		return c, errors.New("sidecar: no client")
	}
	if c.InboundListen == "" {
		c.InboundListen = ":15008"
	}
	if c.MetricsListen == "" {
		c.MetricsListen = ":15020"
	}
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{
		{&c.CheckEvery, time.Second},
		{&c.ReportEvery, 2 * time.Second},
		{&c.DialTimeout, 2 * time.Second},
		{&c.Handshake, 5 * time.Second},
		{&c.DrainDelay, 2 * time.Second},
		{&c.DrainGrace, 20 * time.Second},
		{&c.ServiceIdle, 10 * time.Minute},
	} {
		if *d.v <= 0 {
			*d.v = d.def
		}
	}
	if c.MaxConnections <= 0 {
		c.MaxConnections = 10_000
	}
	if c.Metrics == nil {
		c.Metrics = metric.New(metric.Config{Role: "sidecar", Version: c.Version})
	}
	if c.Bound == nil {
		c.Bound = func(Addrs) {}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}
