// SPDX-License-Identifier: Apache-2.0

package metric

import (
	"strconv"
	"time"
)

// Reporters: which end of a call counted it.
const (
	Source      = "source"
	GatewaySide = "gateway"
	Destination = "destination"
)

// Requests are the metrics of requests. Make it once per process; nil does nothing.
type Requests struct {
	total    *Counter
	duration *Histogram
	ttfb     *Histogram
	retries  *Counter
	bytes    *Counter
	active   *Gauge
	conns    *Counter
	authz    *Counter
}

// Request is one finished request.
type Request struct {
	Reporter   string
	SrcService string
	SrcCluster string
	DstService string
	DstCluster string
	Route      string // "other" if empty
	Protocol   string // http1, h2, grpc, tcp
	Code       int    // HTTP status; 0 when the caller had gone
	GRPCCode   int    // -1: none
	Failure    bool
	Reason     string
	Scope      string // local, cross_zone, cross_cluster, cross_region
	MTLS       bool
	Duration   time.Duration
	TTFB       time.Duration // 0: no response
	Trace      string        // of a recorded trace, for the exemplar
}

// NewRequests registers the metrics; a nil registry makes handles that do nothing.
func NewRequests(r *Registry) *Requests {
	perCall := []string{"reporter", "src_cluster", "dst_service", "dst_cluster", "protocol", "classification"}
	return &Requests{
		total: r.Counter("strait_requests_total", "Requests finished.",
			"reporter", "src_service", "src_cluster", "dst_service", "dst_cluster", "route", "protocol", "code", "grpc_code",
			"classification", "reason", "scope", "mtls"),
		duration: r.Histogram("strait_request_duration_seconds", "From a request's head to the end of its response.", Latency, perCall...),
		ttfb:     r.Histogram("strait_request_ttfb_seconds", "From a request's head to its response's head.", Latency, perCall...),
		retries:  r.Counter("strait_retries_total", "Attempts beyond the first, by result.", "result", "service", "dst_cluster"),
		bytes:    r.Counter("strait_bytes_total", "Payload bytes carried.", "direction", "protocol", "src_cluster", "dst_cluster"),
		active:   r.Gauge("strait_connections_active", "Connections open.", "direction", "protocol", "src_cluster", "dst_cluster"),
		conns: r.Counter("strait_connections_total", "Connections ended, by cause.",
			"direction", "protocol", "src_cluster", "dst_cluster", "close_reason"),
		authz: r.Counter("strait_authz_total", "Access decisions.", "policy", "action", "dst_service", "src_cluster"),
	}
}

// Observe counts one finished request.
func (m *Requests) Observe(q Request) {
	if m == nil {
		return
	}
	class, mtls, route := "success", "false", q.Route
	if q.Failure {
		class = "failure"
	}
	if q.MTLS {
		mtls = "true"
	}
	if route == "" {
		route = "other"
	}
	m.total.With(q.Reporter, q.SrcService, q.SrcCluster, q.DstService, q.DstCluster, route, q.Protocol, statusLabel(q.Code), grpcLabel(q.GRPCCode),
		class, q.Reason, q.Scope, mtls).Inc()
	m.duration.With(q.Reporter, q.SrcCluster, q.DstService, q.DstCluster, q.Protocol, class).ObserveTrace(q.Duration.Seconds(), q.Trace)
	if q.TTFB > 0 {
		m.ttfb.With(q.Reporter, q.SrcCluster, q.DstService, q.DstCluster, q.Protocol, class).ObserveTrace(q.TTFB.Seconds(), q.Trace)
	}
}

// statusLabel folds what no server should send.
func statusLabel(code int) string {
	if code == 0 {
		return "0"
	}
	if code < 100 || code > 599 {
		return "other"
	}
	return strconv.Itoa(code)
}

func grpcLabel(code int) string {
	if code < 0 {
		return ""
	}
	if code > 16 {
		return "other"
	}
	return strconv.Itoa(code)
}

// Results of Retry.
const (
	RetryUsed        = "used"
	RetryBudgetEmpty = "budget_empty"
	RetryNoWay       = "no_way" // nowhere else to go
)

// Retry counts a retry, or the lack of one that would have been allowed.
func (m *Requests) Retry(result, service, dstCluster string) {
	if m != nil {
		m.retries.With(result, service, dstCluster).Inc()
	}
}

// Bytes counts payload; direction is "sent" (towards the callee) or "received".
func (m *Requests) Bytes(direction, protocol, srcCluster, dstCluster string, n int64) {
	if m != nil && n > 0 {
		m.bytes.With(direction, protocol, srcCluster, dstCluster).Add(float64(n))
	}
}

// Open counts a connection as open; call the result once when it ends. direction is "inbound" or "outbound".
func (m *Requests) Open(direction, protocol, srcCluster, dstCluster string) func(closeReason string) {
	if m == nil {
		return func(string) {}
	}
	g := m.active.With(direction, protocol, srcCluster, dstCluster)
	g.Inc()
	return func(reason string) {
		g.Dec()
		m.conns.With(direction, protocol, srcCluster, dstCluster, reason).Inc()
	}
}

// Access counts an access decision; action is allow, deny or audit_deny, policy is empty for the default.
func (m *Requests) Access(policy, action, dstService, srcCluster string) {
	if m != nil {
		m.authz.With(policy, action, dstService, srcCluster).Inc()
	}
}
