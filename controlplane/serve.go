// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/http"
	"time"

	"google.golang.org/grpc"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/identity"
	"github.com/strait-mesh/strait/internal/peercred"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

// listenLocal opens the data directory's sockets: their user is admin.
func (c *ControlPlane) listenLocal() ([]server, error) {
	op, err := peercred.Listen(c.dir.Path("run", "operator.sock"), c.log)
	if err != nil {
		return nil, err
	}
	g := grpc.NewServer(grpc.ConnectionTimeout(trust.HandshakeTimeout), grpc.ChainUnaryInterceptor(c.needsCA))
	controlpb.RegisterOperatorServer(g, &operator{c: c})
	servers := []server{{"operator socket", func() error { return g.Serve(op) }, func() { stopGRPC(g) }}}

	api, err := peercred.Listen(c.dir.Path("run", "api.sock"), c.log)
	if err != nil {
		return servers, err
	}
	h := &http.Server{Handler: c.api.Handler(), ReadHeaderTimeout: 5 * time.Second}
	return append(servers, httpServer("api socket", h, api)), nil
}

func httpServer(name string, h *http.Server, l net.Listener) server {
	return server{name, func() error {
		if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	}, func() {
		ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
		defer cancel()
		if h.Shutdown(ctx) != nil {
			_ = h.Close()
		}
	}}
}

// listenMetrics serves /metrics, /healthz and /readyz, and nothing else.
func (c *ControlPlane) listenMetrics() (server, error) {
	l, err := net.Listen("tcp", c.cfg.MetricsListen)
	if err != nil {
		return server{}, err
	}
	c.addrs.Metrics = l.Addr().String()
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", c.metrics.Handler())
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if c.compiled.Load() == nil {
			http.Error(w, "the first snapshot is not compiled yet", http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	})
	return httpServer("metrics", &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}, l), nil
}

// renewEvery is the mean time between renewals of the control plane's own identities: 1 h, or a third of a shorter lifetime.
func (c *ControlPlane) renewEvery() time.Duration {
	if c.cfg.SVIDTTL > 0 && c.cfg.SVIDTTL < 3*time.Hour {
		return c.cfg.SVIDTTL / 3
	}
	return time.Hour
}

// renewLoop renews the own identities.
func (c *ControlPlane) renewLoop(ctx context.Context) error {
	renewals := c.metrics.Counter("strait_certificate_renewals_total", "Attempts to renew the own identities.", "result")
	t := time.NewTimer(0)
	defer t.Stop()
	for first := true; ; first = false {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		wait := time.Duration(float64(c.renewEvery()) * (0.9 + 0.2*rand.Float64()))
		if !first {
			if err := c.renewOwn(); err != nil {
				c.log.Error("own identity not renewed", "err", err)
				renewals.With("failure").Inc()
				wait = time.Minute
			} else {
				renewals.With("success").Inc()
			}
		}
		if c.elsewhere != nil {
			wait = min(wait, 10*time.Second) // the Workload API renews when it likes
		}
		t.Reset(wait)
	}
}

// lastWord is how long a withdrawn proxy's connection stands: it hears there that it was withdrawn, and ends what it holds itself. It may
// renew nothing, and nobody else takes its certificate meanwhile.
const lastWord = time.Second

// denyLoop ends the connections of identities that were withdrawn, and with them their streams, and judges discovery again.
func (c *ControlPlane) denyLoop(ctx context.Context) error {
	for {
		changed := c.denied.Changed()
		c.registry.Judge(func(s withdrawal.Subject) (string, bool) {
			if k := identity.KindOf(s.Identity); s.Class == identity.Class && (k == identity.Workload || k == identity.Gateway) {
				return "", true
			}
			return c.judgeSubject(s)
		})
		c.judgeAPI()
		t := time.NewTimer(lastWord)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
		c.registry.Judge(c.judgeSubject)
		c.discovery.Judge()
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}
