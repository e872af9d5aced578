// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"log/slog"
	"runtime/debug"
	"time"

	"github.com/strait-mesh/strait/controlplane"
	"github.com/strait-mesh/strait/internal/problem"
)

// controlPlaneSettings is the section "controlplane" of strait.yaml.
type controlPlaneSettings struct {
	DataDir       string        `name:"data-dir" help:"data directory that strait init made"`
	Listen        string        `name:"listen" default:":7400" help:"gRPC over mTLS: discovery, identity, operators"`
	APIListen     string        `name:"api-listen" default:"127.0.0.1:7401" help:"configuration API"`
	MetricsListen string        `name:"metrics-listen" default:":7402" help:"metrics and health"`
	Advertise     []string      `name:"advertise" help:"addresses of --listen that tokens name (default: the bound address)"`
	CatalogTTL    time.Duration `name:"catalog-ttl" default:"60s" help:"freshness of catalog heads; they are signed again every third of it"`
	SVIDTTL       time.Duration `name:"svid-ttl" default:"36h" help:"validity of the identities issued"`
	JoinExpiry    time.Duration `name:"join-expiry" default:"24h" help:"how long an interrupted join may be resumed"`
	RenewGrace    time.Duration `name:"renew-grace" default:"168h" help:"how long after its end an identity may still be renewed; 0: only a fresh token replaces it"`
	AllowLoopback bool          `name:"allow-loopback" help:"accept loopback addresses of other clusters' gateways: for federations on one machine"`
	BundleListen  string        `name:"bundle-listen" help:"address of the SPIFFE bundle endpoint, usually :7404 (default: none)"`
	BundleWebCert string        `name:"bundle-web-cert" help:"PEM certificate of the bundle endpoint: profile https_web in place of https_spiffe"`
	BundleWebKey  string        `name:"bundle-web-key" help:"PEM key of --bundle-web-cert; both files are read again when they change"`
	BundleRoots   string        `name:"bundle-web-roots" help:"PEM roots that verify bundle endpoints of profile https_web (default: the system's)"`
	ExternalCA    string        `name:"external-ca" help:"directory with tls.crt (an intermediate CA), tls.key and ca.crt, as cert-manager writes them, in place of the own root; read again when they change"`
	SPIFFESocket  string        `name:"spiffe-endpoint-socket" help:"where the SPIFFE Workload API listens that strait init was told of, unix:///path (SPIFFE_ENDPOINT_SOCKET)"`
	LogLevel      string        `name:"log-level" default:"info" help:"debug, info, warn or error"`
}

func controlPlaneRun(ctx context.Context, e *env, args []string) error {
	var s controlPlaneSettings
	s.DataDir = e.defaultDataDir()
	if c, err := e.current(); err == nil && c.DataDir != "" {
		s.DataDir = c.DataDir
	}
	done, err := e.resolveRole("controlplane", &s, args)
	if done || err != nil {
		return err
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(s.LogLevel)); err != nil {
		return problem.New(problem.ConfigInvalid, "log-level: %v", err)
	}
	log := slog.New(slog.NewTextHandler(e.err, &slog.HandlerOptions{Level: level}))
	forward, stop, err := otlpForward(ctx, e.getenv, log)
	if err != nil {
		return problem.New(problem.ConfigInvalid, "OTLP exporter: %v", err).WithFix("correct the OTEL_* variables")
	}
	defer stop()
	if e.lookup("GOGC") == "" {
		debug.SetGCPercent(50) // a mostly idle heap of caches: half the growth costs little CPU
	}
	cp, err := controlplane.New(controlplane.Config{
		DataDir: s.DataDir, Listen: s.Listen, APIListen: s.APIListen, MetricsListen: s.MetricsListen, Advertise: s.Advertise,
		CatalogTTL: s.CatalogTTL, SVIDTTL: s.SVIDTTL, JoinExpiry: s.JoinExpiry, RenewGrace: s.RenewGrace, AllowLoopback: s.AllowLoopback, ExternalCA: s.ExternalCA, WorkloadAPI: s.SPIFFESocket,
		Bundles: controlplane.BundlesConfig{
			Listen: s.BundleListen, WebCert: s.BundleWebCert, WebKey: s.BundleWebKey, WebRoots: s.BundleRoots, AllowLocalTarget: s.AllowLoopback,
		},
		Forward: forward, Logger: log,
	})
	if err != nil {
		return err
	}
	return cp.Run(ctx)
}
