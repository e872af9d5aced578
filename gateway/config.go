// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/span"
	"github.com/strait-mesh/strait/trust"
)

// Client is the gateway's side of its control plane; *proxyclient.Client is one. The gateway does not run it.
type Client interface {
	Control
	Resources
}

// Control is who the gateway is, and the way to its control plane.
type Control interface {
	Source() *trust.Source
	Info() proxyclient.Info
	Conn() grpc.ClientConnInterface
}

// Resources is the part of discovery that the gateway uses.
type Resources interface {
	SubscribeAll(typeURL string)
	Subscribe(typeURL string, names ...string)
	Unsubscribe(typeURL string, names ...string)
	List(typeURL string) map[string]proto.Message
	Watch(f func(proxyclient.Change) error) (cancel func())
}

// Config says what one gateway is. Every field but Client has a usable zero value.
type Config struct {
	Name          string   // default: the name in the identity
	Listen        string   // UDP and TCP address for other clusters' gateways; ":7443"
	Advertise     []string // where others reach Listen, host:port; empty = dial-out only
	LocalListen   string   // TCP address for this cluster's sidecars; ":7444"
	LocalAddress  string   // what sidecars are told to dial; default: the bound LocalListen, or the first address of this host
	MetricsListen string   // TCP address of /metrics, /healthz and /readyz; ":7445"; "off" = none
	DisableUDP    bool     // TCP only
	Version       string

	Client  Client       // discovery, identity and the link; required
	DataDir *datadir.Dir // offers are kept in catalogs/ below it; nil = nothing is kept

	// HeadStart is how long a dial over QUIC has before TCP is tried beside it, 400 ms. Raising it delays the fallback where UDP
	// does not pass, lowering it makes TCP win on long paths.
	HeadStart time.Duration
	// DrainGrace is how long open streams may go on after the stop was requested, 10 s. Raising it delays restarts.
	DrainGrace time.Duration

	Now      func() time.Time // nil = time.Now
	Logger   *slog.Logger     // nil = discard
	Recorder *span.Recorder   // nil = no spans; run by its maker
	Metrics  *metric.Registry // nil = one of its own
	Bound    func(Addrs)      // called once when everything listens
}

// Addrs are the bound addresses, host:port.
type Addrs struct {
	Listen  string // UDP and TCP
	Local   string
	Metrics string // empty when off
}

func (c Config) withDefaults() (Config, error) {
	if c.Client == nil {
		return c, errors.New("gateway: no client")
	}
	if c.Name == "" {
		c.Name, _ = c.Client.Info().ID.Gateway()
	}
	if c.Name == "" {
		return c, errors.New("gateway: no name, and the identity is not a gateway's")
	}
	for v, def := range map[*string]string{&c.Listen: ":7443", &c.LocalListen: ":7444", &c.MetricsListen: ":7445"} {
		if *v == "" {
			*v = def
		}
	}
	if c.DrainGrace <= 0 {
		c.DrainGrace = 10 * time.Second
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = metric.New(metric.Config{Role: "gateway", Version: c.Version})
	}
	return c, nil
}
