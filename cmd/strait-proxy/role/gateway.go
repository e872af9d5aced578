// SPDX-License-Identifier: Apache-2.0

package role

import (
	"context"
	"io"
	"time"

	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/gateway"
	"github.com/strait-mesh/strait/internal/settings"
	"github.com/strait-mesh/strait/internal/version"
	"github.com/strait-mesh/strait/trust/endpoint"
)

// gatewaySettings is the section "gateway" of strait.yaml.
type gatewaySettings struct {
	DataDir       string        `name:"data-dir" help:"directory for the gateway's identity and snapshots"`
	Name          string        `name:"name" help:"name of the gateway (default: the token's)"`
	TokenFile     string        `name:"token-file" help:"registration token, needed once"`
	ControlPlane  []string      `name:"control-plane" help:"HOST:7400 of each control plane replica (default: the token's)"`
	SPIFFESocket  string        `name:"spiffe-endpoint-socket" help:"take the identity from this SPIFFE Workload API, unix:///path, instead of a token (default: SPIFFE_ENDPOINT_SOCKET)"`
	Cluster       string        `name:"cluster" help:"name of the cluster; with a Workload API only, as the next three"`
	Federation    string        `name:"federation" help:"name of the federation"`
	Region        string        `name:"region" help:"region it is in"`
	Zone          string        `name:"zone" help:"zone it is in"`
	Listen        string        `name:"listen" default:":7443" help:"UDP and TCP address for other clusters' gateways"`
	Advertise     []string      `name:"advertise" help:"HOST:PORT where other clusters reach --listen"`
	LocalListen   string        `name:"local-listen" default:":7444" help:"address for this cluster's sidecars"`
	LocalAddress  string        `name:"local-address" help:"what sidecars are told to dial (default: the bound --local-listen)"`
	MetricsListen string        `name:"metrics-listen" default:":7445" help:"metrics and health; off for none"`
	DisableUDP    bool          `name:"disable-udp" help:"TCP only"`
	DrainGrace    time.Duration `name:"drain-grace" default:"10s" help:"how long open streams may go on after a stop"`
	RenewEvery    time.Duration `name:"renew-every" default:"1h" help:"mean time between renewals of the identity"`
	Sampling      float64       `name:"sampling" default:"1" help:"share of new traces recorded, 0 to 1"`
	LogLevel      string        `name:"log-level" default:"info" help:"debug, info, warn or error"`
}

func gatewayRun(ctx context.Context, args []string, getenv func(string) (string, bool), out, errw io.Writer) error {
	var s gatewaySettings
	s.DataDir = defaultDir("gateway", getenv)
	if err := settings.Bind("gateway", &s).Resolve(args, endpoint.StandardEnv(getenv), sections, out); err != nil {
		return err
	}
	p, err := start(ctx, proxyclient.Gateway, s.Name, common{
		s.DataDir, s.TokenFile, s.LogLevel, s.ControlPlane, s.RenewEvery, sampling(s.Sampling),
		elsewhere{s.SPIFFESocket, s.Cluster, s.Federation, s.Region, s.Zone, ""},
	}, errw)
	if err != nil {
		return err
	}
	g, err := gateway.New(gateway.Config{
		Name: s.Name, Listen: s.Listen, Advertise: s.Advertise, LocalListen: s.LocalListen, LocalAddress: s.LocalAddress,
		MetricsListen: s.MetricsListen, DisableUDP: s.DisableUDP, Version: version.String(), Client: p.client, DataDir: p.dir,
		DrainGrace: s.DrainGrace, Logger: p.log, Recorder: p.recorder, Metrics: p.metrics,
		Bound: func(a gateway.Addrs) { p.publish(a) },
	})
	if err != nil {
		return err
	}
	return p.serve(ctx, g.Run)
}

// sampling turns 0 into the recorder's "none": its own zero value means all.
func sampling(ratio float64) float64 {
	if ratio == 0 {
		return -1
	}
	return ratio
}
