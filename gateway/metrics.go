// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/relay"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// metrics are the gateway's handles; names are API (UX 4.2).
type metrics struct {
	cluster, name string

	up         *metric.Gauge
	rtt        *metric.Histogram
	loss       *metric.Gauge
	streams    *metric.Gauge
	reconnects *metric.Counter
	failures   *metric.Counter
	bytes      *metric.Counter
	refusals   *metric.Counter
	requests   *metric.Requests

	mu    sync.Mutex
	known map[*tunnel.Session]*sessionFigures
	shown map[[5]string]bool // series of gauges that exist
}

type sessionFigures struct{ in, out uint64 }

func newMetrics(r *metric.Registry, cluster, name string) *metrics {
	tunnelLabels := []string{"local_cluster", "peer_cluster", "transport", "lane", "gateway"}
	return &metrics{
		cluster: cluster, name: name,
		up:         r.Gauge("strait_tunnel_up", "Whether a tunnel to the peer is up (1), suspect (0.5) or down (0).", tunnelLabels...),
		rtt:        r.Histogram("strait_tunnel_rtt_seconds", "Smoothed round-trip time of tunnels.", metric.Latency, tunnelLabels...),
		loss:       r.Gauge("strait_tunnel_loss_ratio", "Smoothed share of packets lost.", tunnelLabels...),
		streams:    r.Gauge("strait_tunnel_streams", "Open interactive streams.", tunnelLabels...),
		reconnects: r.Counter("strait_tunnel_reconnects_total", "Tunnels that were established, by transport.", "local_cluster", "peer_cluster", "transport", "reason"),
		failures:   r.Counter("strait_tunnel_handshake_failures_total", "Tunnels that could not be established.", "local_cluster", "peer", "transport", "reason"),
		bytes:      r.Counter("strait_tunnel_bytes_total", "Bytes on the wire of tunnels.", "local_cluster", "peer_cluster", "transport", "direction"),
		refusals:   r.Counter("strait_gateway_refusals_total", "Connections and streams that were refused.", "from", "code"),
		requests:   metric.NewRequests(r),
		known:      make(map[*tunnel.Session]*sessionFigures), shown: make(map[[5]string]bool),
	}
}

func (m *metrics) handshakeFailed(peer spiffeid.TrustDomain, transport, reason string) {
	m.failures.With(m.cluster, peer.String(), transport, reason).Inc()
}

func (m *metrics) refused(from, code string) { m.refusals.With(from, code).Inc() }

// opened counts a relayed connection as open; call the result once, with how it ended. Towards the callee is "sent".
func (m *metrics) opened(direction, src, dst string) func(r relay.Result, sent, received int64, ended string) {
	closed := m.requests.Open(direction, "tcp", src, dst)
	return func(r relay.Result, sent, received int64, ended string) {
		switch {
		case ended != "":
		case r.Err != nil:
			ended = "reset"
		default:
			ended = "finished"
		}
		closed(ended)
		m.requests.Bytes("sent", "tcp", src, dst, sent)
		m.requests.Bytes("received", "tcp", src, dst, received)
	}
}

// tunnels writes the figures of the sessions that live now.
func (m *metrics) tunnels(sessions []*tunnel.Session, v *view) {
	m.mu.Lock()
	defer m.mu.Unlock()
	shown := make(map[[5]string]bool)
	live := make(map[*tunnel.Session]bool)
	upOf := make(map[[5]string]float64)
	streamsOf := make(map[[5]string]int)
	lossOf := make(map[[5]string]float64)
	for _, s := range sessions {
		p := v.peers[s.Peer()]
		if p == nil {
			continue
		}
		live[s] = true
		cluster := string(p.cluster)
		key := [5]string{m.cluster, cluster, s.Transport(), "interactive", m.name}
		shown[key] = true
		upOf[key] = max(upOf[key], map[tunnel.State]float64{tunnel.StateUp: 1, tunnel.StateSuspect: 0.5}[s.State()])
		streamsOf[key] += s.Streams()
		lossOf[key] = max(lossOf[key], s.Loss())
		if rtt := s.RTT(); rtt > 0 {
			m.rtt.With(key[:]...).Observe(rtt.Seconds())
		}
		f := m.known[s]
		if f == nil {
			f = &sessionFigures{}
			m.known[s] = f
			m.reconnects.With(m.cluster, cluster, s.Transport(), "established").Inc()
		}
		in, out := s.Bytes()
		m.bytes.With(m.cluster, cluster, s.Transport(), "received").Add(float64(in - min(in, f.in)))
		m.bytes.With(m.cluster, cluster, s.Transport(), "sent").Add(float64(out - min(out, f.out)))
		f.in, f.out = in, out
	}
	for s := range m.known {
		if !live[s] {
			delete(m.known, s)
		}
	}
	for key := range shown {
		m.up.With(key[:]...).Set(upOf[key])
		m.streams.With(key[:]...).Set(float64(streamsOf[key]))
		m.loss.With(key[:]...).Set(lossOf[key])
	}
	for key := range m.shown {
		if !shown[key] { // down, not unknown
			m.up.With(key[:]...).Set(0)
			m.streams.With(key[:]...).Set(0)
		}
	}
	for key := range shown {
		m.shown[key] = true
	}
}

// web serves /metrics, /healthz and /readyz, and nothing else.
type web struct {
	ln  net.Listener
	srv *http.Server
}

func listenWeb(g *Gateway) (*web, error) {
	if g.cfg.MetricsListen == "off" {
		return nil, nil
	}
	ln, err := net.Listen("tcp", g.cfg.MetricsListen)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", g.cfg.Metrics.Handler())
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if why := g.notReady(); why != "" {
			http.Error(w, why, http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	})
	return &web{ln: ln, srv: &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: 30 * time.Second, IdleTimeout: 60 * time.Second, MaxHeaderBytes: 16 << 10}}, nil
}

// notReady says what is missing; it never waits for a peer.
func (g *Gateway) notReady() string {
	switch {
	case g.draining.Load():
		return "draining"
	case g.cfg.Client.Source().Identity() == nil:
		return "no identity yet"
	case !g.cfg.Client.Source().Now().Before(g.cfg.Client.Source().Identity().NotAfter):
		return "identity_expired: the identity ended at " + g.cfg.Client.Source().Identity().NotAfter.UTC().Format(time.RFC3339)
	}
	return ""
}

func (w *web) addr() string { return w.ln.Addr().String() }

func (w *web) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, w.close)
	defer stop()
	if err := w.srv.Serve(w.ln); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

func (w *web) close() {
	_ = w.srv.Close()
	_ = w.ln.Close()
}
