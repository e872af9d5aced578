// SPDX-License-Identifier: Apache-2.0

package http

import (
	"context"
	"log/slog"
	"net"
	nethttp "net/http"
	"time"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/span"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// AppProtocol is what an application speaks on a port.
type AppProtocol int

// Protocols towards the application.
const (
	HTTP1 AppProtocol = iota // HTTP/1.1
	H2C                      // HTTP/2 with prior knowledge; gRPC
)

// Call is what an access policy judges: exactly the bytes that will be forwarded.
type Call struct {
	Peer      spiffeid.ID
	Method    string
	Path      string // without the query; no dot segment, no %2f %5c %00, no backslash, no empty segment
	Authority string
	Header    nethttp.Header // read only
}

// Instance is one application process behind this sidecar.
type Instance struct {
	Name    string // workload
	Address string // host:port
	// Done is called exactly once, when the attempt on this instance has ended; nil is allowed.
	Done func(Outcome)
}

// InboundConfig configures the engine for one port of one service. Authorize and PickInstance are required.
type InboundConfig struct {
	Name     string // of this proxy in Proxy-Status
	Self     Local
	ID       spiffeid.ID // own identity, By= in x-forwarded-client-cert; zero takes SelfID
	SelfID   func() spiffeid.ID
	Service  federation.ServiceName
	Port     federation.PortName
	Protocol AppProtocol
	// Authorize returns nil to allow; the refusal is sent otherwise (403 unless it says more).
	Authorize func(Call) *Refusal
	// PickInstance returns an instance whose name is not among tried. An error, or nil, means that none is healthy: the
	// caller is told so with x-strait-refused and may go elsewhere.
	PickInstance func(ctx context.Context, tried []string) (*Instance, error)
	// Dial opens a connection to an instance; nil is TCP with a timeout of 2 s.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// PeerCluster names the cluster of a caller for metrics and spans; nil uses its trust domain.
	PeerCluster func(spiffeid.ID) string
	Recorder    *span.Recorder
	Metrics     *metric.Requests
	Limits      Limits
	Now         func() time.Time
	Logger      *slog.Logger
}

// Inbound carries requests of other sidecars to the application.
type Inbound struct{ cfg InboundConfig }

// NewInbound checks the configuration; it starts nothing.
func NewInbound(cfg InboundConfig) (*Inbound, error) { return &Inbound{cfg}, nil }

// ServeConn serves one verified connection (normally a *tls.Conn) of peer and returns when it has ended. It owns c. The
// protocol is what ALPN negotiated; without ALPN the HTTP/2 preface decides.
func (i *Inbound) ServeConn(ctx context.Context, c net.Conn, peer spiffeid.ID) {}

// Close cuts every connection at once, closes pooled connections to the application, and waits.
func (i *Inbound) Close() error { return nil }
