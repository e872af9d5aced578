// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"io"
	"net"
	"net/http"
	"time"

	"github.com/strait-mesh/strait/federation"
)

// statusServer answers /metrics, /healthz and /readyz, and nothing else.
func (s *Sidecar) statusServer() *http.Server {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", s.cfg.Metrics.Handler())
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if why := s.notReady(); why != "" {
			http.Error(w, why, http.StatusServiceUnavailable)
			return
		}
		io.WriteString(w, "ready\n")
	})
	return &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
}

// notReady says why not, or nothing. Readiness never waits for a peer or for the control plane: a snapshot on disk is enough.
func (s *Sidecar) notReady() string {
	switch {
	case s.draining.Load():
		return "draining"
	case s.self.Load() == nil:
		return "no configuration yet"
	case s.source.Identity() == nil:
		return "no identity yet"
	case !s.cfg.Now().Before(s.source.Identity().NotAfter):
		return federation.IdentityExpired.String() + ": the identity ended at " + s.source.Identity().NotAfter.UTC().Format(time.RFC3339)
	}
	return ""
}

// advertised is the inbound address that others are told.
func advertised(configured string, bound net.Addr) string {
	if configured != "" {
		return configured
	}
	a, ok := bound.(*net.TCPAddr)
	if !ok || !a.IP.IsUnspecified() {
		return bound.String()
	}
	addrs, err := net.InterfaceAddrs()
	if err == nil {
		for _, x := range addrs {
			if n, ok := x.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
				return (&net.TCPAddr{IP: n.IP, Port: a.Port}).String()
			}
		}
	}
	return (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: a.Port}).String()
}
