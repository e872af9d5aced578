// SPDX-License-Identifier: Apache-2.0

package role

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/settings"
	"github.com/strait-mesh/strait/internal/span"
	"github.com/strait-mesh/strait/internal/version"
	"github.com/strait-mesh/strait/trust/register"
)

// Run executes "strait-proxy gateway|sidecar …" until ctx ends and returns the exit code.
func Run(ctx context.Context, args []string, getenv func(string) (string, bool), out, errw io.Writer) int {
	err := run(ctx, args, getenv, out, errw)
	switch {
	case err == nil, errors.Is(err, settings.ErrHelp), errors.Is(err, settings.ErrPrinted):
		return problem.ExitOK
	}
	p := problem.From(err)
	fmt.Fprint(errw, p.Human())
	return p.Exit()
}

func run(ctx context.Context, args []string, getenv func(string) (string, bool), out, errw io.Writer) error {
	usage := problem.New(problem.Usage, "want strait-proxy gateway|sidecar|version").WithFix("strait-proxy gateway --help").WithFix("strait-proxy sidecar --help")
	if len(args) == 0 {
		return usage
	}
	switch args[0] {
	case "gateway":
		return gatewayRun(ctx, args[1:], getenv, out, errw)
	case "sidecar":
		return sidecarRun(ctx, args[1:], getenv, out, errw)
	case "version", "--version":
		fmt.Fprintf(out, "strait-proxy %s %s wire %d\n", version.String(), version.Go(), version.Wire)
		return nil
	default:
		return usage
	}
}

// sections of strait.yaml; each role reads its own.
var sections = []string{"cluster", "controlplane", "gateway", "sidecar"}

// common are the settings that both roles have.
type common struct {
	dataDir, tokenFile, logLevel string
	controlPlane                 []string
	renewEvery                   time.Duration
	sampling                     float64
	elsewhere                    elsewhere
}

// process is what both roles stand on.
type process struct {
	log      *slog.Logger
	dir      *datadir.Dir
	client   *proxyclient.Client
	recorder *span.Recorder
	metrics  *metric.Registry
}

func start(ctx context.Context, role proxyclient.Role, name string, c common, errw io.Writer) (*process, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.logLevel)); err != nil {
		return nil, problem.New(problem.ConfigInvalid, "log-level: %v", err)
	}
	p := &process{log: slog.New(slog.NewTextHandler(errw, &slog.HandlerOptions{Level: level}))}
	if c.dataDir == "" {
		return nil, problem.New(problem.Usage, "--data-dir is missing").WithWhy("identity and the last good snapshot are kept there").
			WithFix("strait %s --data-dir DIR", role)
	}
	created, err := datadir.Create(c.dataDir)
	if err != nil {
		return nil, err
	}
	_ = created.Close()
	if p.dir, err = datadir.Open(c.dataDir, datadir.Options{Lock: true}); err != nil {
		return nil, err
	}
	self, err := c.elsewhere.self(role, name, c.controlPlane)
	if err == nil {
		name, err = p.name(name, c.tokenFile)
	}
	if err != nil {
		return nil, errors.Join(err, p.dir.Close())
	}
	p.client, err = proxyclient.Open(ctx, proxyclient.Config{
		Role: role, Name: name, DataDir: p.dir, ControlPlane: c.controlPlane, TokenFile: c.tokenFile,
		Version: version.String(), RenewEvery: c.renewEvery, Logger: p.log,
		WorkloadAPI: c.elsewhere.socket, Self: self, ServiceAccount: c.elsewhere.serviceAccount,
	})
	if err != nil {
		return nil, errors.Join(err, p.dir.Close())
	}
	if err := p.dir.WriteFile(nameFile, []byte(name+"\n")); err != nil {
		return nil, errors.Join(err, p.dir.Close())
	}
	info := p.client.Info()
	p.metrics = metric.New(metric.Config{Role: string(role), Version: version.String(), Process: true})
	p.client.Observe(p.metrics)
	dropped := p.metrics.Counter("strait_spans_dropped_total", "Spans lost before they were delivered.").With()
	service := strings.TrimPrefix(info.Name, "/")
	namespace := ""
	if ns, n, ok := strings.Cut(service, "/"); ok {
		namespace, service = ns, n
	}
	p.recorder = span.NewRecorder(span.Config{
		Resource: []span.Attr{
			span.String("service.name", service), span.String("service.namespace", namespace), span.String("service.version", version.String()),
			span.String("cloud.region", info.Locality.Region), span.String("cloud.availability_zone", info.Locality.Zone),
			span.String("strait.federation", info.Federation.String()), span.String("strait.cluster", info.Cluster.String()),
			span.String("strait.role", string(role)), span.String("strait.trust_domain", info.TrustDomain.String()),
		},
		Export: func(ctx context.Context, data *tracepb.TracesData) error { return p.client.PushSpans(ctx, data) },
		Ratio:  c.sampling, OnDrop: func(n int) { dropped.Add(float64(n)) }, Logger: p.log,
	})
	return p, nil
}

// nameFile remembers who this directory's process is: the token is needed once only.
const nameFile = "identity/name"

// name is the one configured, the token's, or the one of the run before.
func (p *process) name(configured, tokenFile string) (string, error) {
	if configured != "" {
		return configured, nil
	}
	if data, err := p.dir.ReadFile(nameFile); err == nil {
		return strings.TrimSpace(string(data)), nil
	}
	if tokenFile == "" {
		return "", problem.New(problem.Usage, "--token-file is missing").WithWhy("this directory holds no identity yet").
			WithFix("gateway: the token that strait init wrote, or strait token gateway NAME --out FILE").
			WithFix("sidecar: strait workload register NAMESPACE/NAME --token-out FILE")
	}
	text, err := os.ReadFile(tokenFile)
	if err != nil {
		return "", problem.New(problem.Usage, "--token-file: %v", err)
	}
	token, err := register.ParseToken(string(text))
	if err != nil {
		return "", err
	}
	return token.Name, nil
}

// serve runs the role beside the client and the recorder. Those end after the role has: what it says last still gets out.
func (p *process) serve(ctx context.Context, role func(context.Context) error) error {
	background, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var wg sync.WaitGroup
	errs := make(chan error, 2)
	for _, f := range []func(context.Context) error{p.client.Run, p.recorder.Run} {
		wg.Go(func() { errs <- f(background) })
	}
	err := role(ctx)
	cancel()
	wg.Wait()
	close(errs)
	for e := range errs {
		err = errors.Join(err, e)
	}
	return errors.Join(err, p.dir.Close())
}

// publish writes the bound addresses to run/addrs.json, for whoever configured ":0".
func (p *process) publish(addrs any) {
	data, err := json.Marshal(addrs)
	if err == nil {
		err = p.dir.WriteFile(filepath.Join("run", "addrs.json"), append(data, '\n'))
	}
	if err != nil {
		p.log.Warn("bound addresses not written", "err", err)
	}
}

// defaultDir is the data directory of a role that was given none.
func defaultDir(role string, getenv func(string) (string, bool)) string {
	if state, ok := getenv("XDG_STATE_HOME"); ok && state != "" {
		return filepath.Join(state, "strait", role)
	}
	if os.Geteuid() == 0 {
		return filepath.Join("/var/lib/strait", role)
	}
	home, _ := getenv("HOME")
	return filepath.Join(home, ".local", "state", "strait", role)
}
