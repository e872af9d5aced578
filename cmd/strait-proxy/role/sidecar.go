// SPDX-License-Identifier: Apache-2.0

package role

import (
	"context"
	"io"
	"time"

	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/settings"
	"github.com/strait-mesh/strait/internal/version"
	"github.com/strait-mesh/strait/sidecar"
	"github.com/strait-mesh/strait/trust/endpoint"
)

// sidecarSettings is the section "sidecar" of strait.yaml.
type sidecarSettings struct {
	DataDir          string        `name:"data-dir" help:"directory for the sidecar's identity and snapshots"`
	Proxy            string        `name:"proxy" help:"NAMESPACE/NAME of the sidecar (default: the token's)"`
	TokenFile        string        `name:"token-file" help:"registration token, needed once"`
	ControlPlane     []string      `name:"control-plane" help:"HOST:7400 of each control plane replica (default: the token's)"`
	SPIFFESocket     string        `name:"spiffe-endpoint-socket" help:"take the identity from this SPIFFE Workload API, unix:///path, instead of a token (default: SPIFFE_ENDPOINT_SOCKET)"`
	Cluster          string        `name:"cluster" help:"name of the cluster; with a Workload API only, as the next three"`
	Federation       string        `name:"federation" help:"name of the federation"`
	Region           string        `name:"region" help:"region it is in"`
	Zone             string        `name:"zone" help:"zone it is in"`
	ServiceAccount   string        `name:"service-account" help:"which identity of its namespace to take from a Workload API that offers several"`
	InboundListen    string        `name:"inbound-listen" default:":15008" help:"mTLS from other sidecars"`
	InboundAdvertise string        `name:"inbound-advertise" help:"what other sidecars and gateways are told to dial"`
	MetricsListen    string        `name:"metrics-listen" default:":15020" help:"metrics and health"`
	HTTPProxy        string        `name:"http-proxy" help:"address of an HTTP listener that routes by Host"`
	Upstreams        []string      `name:"upstream" help:"NAMESPACE/SERVICE[:PORT][@CLUSTER]=HOST:PORT, repeatable"`
	WorkloadAPI      string        `name:"workload-api" help:"path of a unix socket that serves applications the SPIFFE Workload API (default: none)"`
	DrainDelay       time.Duration `name:"drain-delay" default:"2s" help:"how long listeners stay open after a stop"`
	DrainGrace       time.Duration `name:"drain-grace" default:"20s" help:"how long open connections may go on after that"`
	CheckEvery       time.Duration `name:"check-every" default:"1s" help:"interval of active health checks"`
	ReportEvery      time.Duration `name:"report-every" default:"2s" help:"interval of health reports"`
	RenewEvery       time.Duration `name:"renew-every" default:"1h" help:"mean time between renewals of the identity"`
	Sampling         float64       `name:"sampling" default:"1" help:"share of new traces recorded, 0 to 1"`
	LogLevel         string        `name:"log-level" default:"info" help:"debug, info, warn or error"`
}

func sidecarRun(ctx context.Context, args []string, getenv func(string) (string, bool), out, errw io.Writer) error {
	var s sidecarSettings
	s.DataDir = defaultDir("sidecar", getenv)
	if err := settings.Bind("sidecar", &s).Resolve(args, endpoint.StandardEnv(getenv), sections, out); err != nil {
		return err
	}
	upstreams := make([]sidecar.Upstream, 0, len(s.Upstreams))
	for _, text := range s.Upstreams {
		u, err := sidecar.ParseUpstream(text)
		if err != nil {
			return problem.New(problem.Usage, "--upstream: %v", err).WithFix("--upstream shop/checkout=127.0.0.1:9001")
		}
		upstreams = append(upstreams, u)
	}
	p, err := start(ctx, proxyclient.Sidecar, s.Proxy, common{
		s.DataDir, s.TokenFile, s.LogLevel, s.ControlPlane, s.RenewEvery, sampling(s.Sampling),
		elsewhere{s.SPIFFESocket, s.Cluster, s.Federation, s.Region, s.Zone, s.ServiceAccount},
	}, errw)
	if err != nil {
		return err
	}
	sc, err := sidecar.New(sidecar.Config{
		Proxy: p.client.Info().Name, Client: p.client, InboundListen: s.InboundListen, InboundAdvertise: s.InboundAdvertise,
		MetricsListen: s.MetricsListen, HTTPProxyListen: s.HTTPProxy, Upstreams: upstreams, Version: version.String(),
		Recorder: p.recorder, Metrics: p.metrics, CheckEvery: s.CheckEvery, ReportEvery: s.ReportEvery,
		WorkloadAPI: s.WorkloadAPI, RenewEvery: s.RenewEvery,
		DrainDelay: s.DrainDelay, DrainGrace: s.DrainGrace, Logger: p.log,
		Bound: func(a sidecar.Addrs) { p.publish(a) },
	})
	if err != nil {
		return err
	}
	return p.serve(ctx, sc.Run)
}
