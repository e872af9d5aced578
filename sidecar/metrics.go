// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"errors"
	"sync"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/trust"
)

// metrics are the sidecar's own; requests are shared with the HTTP engine.
type metrics struct {
	requests    *metric.Requests
	endpoints   *metric.Gauge
	tier        *metric.Gauge
	share       *metric.Gauge
	transitions *metric.Counter
	ejections   *metric.Counter
	refusals    *metric.Counter
	handshakes  *metric.Counter

	mu   sync.Mutex
	seen map[federation.ServiceName][]func() // how to forget the series of a service
}

func newMetrics(r *metric.Registry) *metrics {
	return &metrics{
		requests:    metric.NewRequests(r),
		endpoints:   r.Gauge("strait_endpoints", "Instances of a service as this caller counts them.", "state", "service", "cluster"),
		tier:        r.Gauge("strait_failover_tier", "Active tier; -1 when nothing serves.", "service", "src_cluster"),
		share:       r.Gauge("strait_failover_share_ratio", "Share of calls that a cluster gets.", "service", "src_cluster", "dst_cluster"),
		transitions: r.Counter("strait_failover_transitions_total", "Changes of the active tier.", "service", "src_cluster", "from", "to", "reason"),
		ejections:   r.Counter("strait_ejections_total", "Endpoints taken out by what calls met.", "reason", "service", "dst_cluster"),
		refusals:    r.Counter("strait_connections_refused_total", "TCP connections that found no way.", "service", "reason"),
		handshakes:  r.Counter("strait_inbound_handshake_failures_total", "Inbound handshakes that failed, by cause.", "reason"),
		seen:        map[federation.ServiceName][]func(){},
	}
}

// decided publishes one decision; what the one before it had and this one has not disappears.
func (m *metrics) decided(name federation.ServiceName, cluster federation.ClusterName, old, r *route) {
	m.forget(name)
	service, src := name.String(), cluster.String()
	forget := []func(){func() { m.tier.Forget(service, src) }}
	m.tier.With(service, src).Set(float64(r.decision.ActiveTier))
	put := func(md federation.MemberDecision) {
		dst := md.Cluster.String()
		m.share.With(service, src, dst).Set(md.Share)
		forget = append(forget, func() { m.share.Forget(service, src, dst) })
	}
	for _, t := range r.decision.Tiers {
		for _, md := range t.Members {
			put(md)
		}
	}
	for _, in := range r.inputs.Members {
		dst := in.Cluster.String()
		for state, n := range map[string]uint32{
			"healthy": in.Health.Healthy, "unhealthy": in.Health.Unhealthy, "unknown": in.Health.Unknown, "ejected": in.Observed.Ejected,
		} {
			m.endpoints.With(state, service, dst).Set(float64(n))
			forget = append(forget, func() { m.endpoints.Forget(state, service, dst) })
		}
	}
	m.mu.Lock()
	m.seen[name] = forget
	m.mu.Unlock()
	if old == nil || old.svc == nil {
		return
	}
	if from, to := active(old.decision), active(r.decision); from != to {
		m.transitions.With(service, src, from, to, r.decision.Reason.String()).Inc()
	}
}

// active names the member of the active tier with the largest share.
func active(d federation.Decision) string {
	if d.ActiveTier < 0 || d.ActiveTier >= len(d.Tiers) {
		return "none"
	}
	best := federation.MemberDecision{}
	for _, m := range d.Tiers[d.ActiveTier].Members {
		if m.Share > best.Share {
			best = m
		}
	}
	return best.Cluster.String()
}

func (m *metrics) forget(name federation.ServiceName) {
	m.mu.Lock()
	list := m.seen[name]
	delete(m.seen, name)
	m.mu.Unlock()
	for _, f := range list {
		f()
	}
}

func (m *metrics) ejected(reason federation.Reason, name federation.ServiceName, cluster federation.ClusterName) {
	m.ejections.With(reason.String(), name.String(), cluster.String()).Inc()
}

func (m *metrics) refused(name federation.ServiceName, reason federation.Reason) {
	m.refusals.With(name.String(), reason.String()).Inc()
}

// handshake counts a failed inbound handshake under one of few words.
func (m *metrics) handshake(err error) {
	word := "broken"
	var verify *trust.VerifyError
	switch {
	case errors.Is(err, errUnknownName):
		word = "unknown_name"
	case errors.Is(err, errNoInstance):
		word = federation.NoEndpoints.String()
	case errors.As(err, &verify):
		word = verify.Reason
	case errors.Is(err, context.DeadlineExceeded):
		word = "timeout"
	case isAlert(err):
		word = "refused_by_caller"
	}
	m.handshakes.With(word).Inc()
}
