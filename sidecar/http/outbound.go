// SPDX-License-Identifier: Apache-2.0

package http

import (
	"context"
	"errors"
	"log/slog"
	"net"
	nethttp "net/http"
	"strings"
	"time"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/span"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// OutboundConfig configures the engine for an application's calls. Picker and Resolve are required.
type OutboundConfig struct {
	Name     string // of this proxy in Proxy-Status, e.g. "us-east/shop/web"
	Self     Local  // labels of metrics and spans
	Picker   Picker
	Resolve  Resolve
	Budget   *Budget        // shared by all Outbounds of a sidecar; nil makes one
	Recorder *span.Recorder // nil records nothing; context is still propagated
	Metrics  *metric.Requests
	Limits   Limits
	// Attempts is the most often one request is sent; default 4. Raising it raises the worst case of a failing request.
	Attempts int
	Now      func() time.Time
	Logger   *slog.Logger
}

// Local says who we are, for spans and metrics.
type Local struct {
	Service string // "<namespace>/<name>" of the application, or of the proxy
	Cluster federation.ClusterName
	Region  string
	Zone    string
}

// Outbound carries an application's requests to the mesh.
type Outbound struct {
	cfg    OutboundConfig
	server *server
}

// NewOutbound checks the configuration; it starts nothing.
func NewOutbound(cfg OutboundConfig) (*Outbound, error) {
	if cfg.Picker == nil || cfg.Resolve == nil {
		return nil, errors.New("new outbound: Picker and Resolve are required")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Budget == nil {
		cfg.Budget = NewBudget(cfg.Now)
	}
	if cfg.Attempts <= 0 {
		cfg.Attempts = 4
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.Limits = cfg.Limits.withDefaults()
	o := &Outbound{cfg: cfg}
	o.server = newServer(cfg.Limits, o.handle)
	o.server.opened = func(proto string) func(string) {
		return cfg.Metrics.Open("outbound", protocolLabel(proto), string(cfg.Self.Cluster), "")
	}
	return o, nil
}

// ServeConn serves one connection of the application and returns when it has ended. It owns c.
func (o *Outbound) ServeConn(ctx context.Context, c net.Conn) {
	o.server.serve(ctx, c, "", spiffeid.ID{})
}

// Close cuts every connection at once and waits.
func (o *Outbound) Close() error {
	o.server.close()
	return nil
}

// outCall is one request on its way out.
type outCall struct {
	*exchange
	o     *Outbound
	ctx   context.Context
	meta  Meta
	path  string
	tries int // attempts begun
	last  *attempt
}

func (o *Outbound) handle(c *served, w nethttp.ResponseWriter, r *nethttp.Request) {
	call := &outCall{exchange: newExchange(c, w, r, o.cfg.Name, o.cfg.Now), o: o}
	parent, _ := span.Extract(r.Header)
	call.span = o.cfg.Recorder.StartAt(parent, methodLabel(r.Method), span.Server, call.start)
	call.span.SetHop(parent.Hop+1, string(o.cfg.Self.Cluster))
	defer func() {
		call.body.stop()
		call.finish()
		if call.broken != nil {
			call.abort()
		}
	}()
	call.run(parent)
}

// run resolves, sends and answers.
func (call *outCall) run(parent span.Context) {
	r := call.r
	target, refusal := call.resolve()
	if refusal != nil {
		call.refuse(refusal)
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	if target.Timeout > 0 {
		ctx, cancel = context.WithTimeout(ctx, target.Timeout)
		defer cancel()
	}
	call.ctx = ctx
	upgrade := upgradeOf(r)
	idempotent := idempotentMethod(r.Method) && upgrade == ""
	if target.Idempotent != nil {
		idempotent = target.Idempotent(r.Method, r.URL.Path)
	}
	call.meta = Meta{
		Service: target.Service, Port: target.Port, Pinned: target.Pinned, Method: r.Method, Path: r.URL.Path, Authority: r.Host,
		Idempotent: idempotent, Upgrade: upgrade, GRPC: call.grpc, Header: r.Header, Trace: call.span.Context(),
	}
	call.span.SetName(methodLabel(r.Method) + " " + target.Service.Name)
	call.span.Set(span.String(span.DstService, target.Service.String()))
	call.o.cfg.Budget.Request()

	a, refusal := call.attempts(parent)
	if refusal != nil {
		if call.gone() {
			call.clientGone = true
			call.broken = errClient
			return
		}
		call.refuse(refusal)
		return
	}
	call.answer(a)
}

// resolve turns the request's authority into a target.
func (call *outCall) resolve() (Target, *Refusal) {
	r := call.r
	refused := func(status int, message string) (Target, *Refusal) {
		return Target{}, &Refusal{Code: problem.RequestRefused, Status: status, Message: message}
	}
	if r.Method == nethttp.MethodConnect {
		return refused(nethttp.StatusMethodNotAllowed, "CONNECT is not supported")
	}
	call.path = rawPath(r.URL)
	switch {
	case call.path == "" && r.URL.Host != "":
		call.path = "/"
	case call.path == "*" && r.Method == nethttp.MethodOptions:
	case !strings.HasPrefix(call.path, "/"):
		return refused(nethttp.StatusBadRequest, "the path does not begin with a slash")
	}
	host, port, err := ParseAuthority(r.Host)
	if err != nil {
		return refused(nethttp.StatusBadRequest, err.Error())
	}
	target, err := call.o.cfg.Resolve(host, port)
	if err == nil {
		return target, nil
	}
	var refusal *Refusal
	if !errors.As(err, &refusal) {
		refusal = &Refusal{Reason: federation.ConfigMissing, Code: problem.UnknownService, Status: nethttp.StatusBadGateway, Message: err.Error(), Err: err}
	}
	return Target{}, refusal
}

// answer delivers the response of an attempt.
func (call *outCall) answer(a *attempt) {
	call.last, call.firstByte = a, a.firstByte.Sub(call.start)
	call.span.Set(span.String(span.DstCluster, string(a.leg.Cluster)))
	if a.resp.StatusCode == nethttp.StatusSwitchingProtocols {
		call.switched(a)
		return
	}
	a.resp.Header.Del(headerRefused)
	err := call.deliver(a.resp, headerTrace)
	call.settle(err)
	switch {
	case err == nil:
		a.end(Answered, "", nil)
	case call.clientGone:
		a.end(Cancelled, "", err)
	case call.ctx.Err() != nil:
		a.end(TimedOut, federation.DeadlineExceeded, err)
	default:
		a.end(Broken, federation.UpstreamReset, err)
	}
}

// settle notes whether a response was finished.
func (x *exchange) settle(err error) {
	x.broken = err
	x.clientGone = err != nil && (errors.Is(err, errClient) || x.r.Context().Err() != nil || x.body.broken() != nil)
}

// switched relays what a request was upgraded to.
func (call *outCall) switched(a *attempt) {
	call.status = nethttp.StatusSwitchingProtocols
	var err error
	call.sent, call.received, err = call.tunnel(call.ctx, a.resp)
	result := Answered
	if err != nil {
		call.o.cfg.Logger.Debug("upgraded connection broke", "service", call.meta.Service.String(), "error", err)
		result = Broken
		if !call.hijacked {
			call.broken = err
		}
	}
	a.end(result, "", err)
}

// finish writes the span and the metrics of the whole request.
func (call *outCall) finish() {
	x, cfg := call.exchange, &call.o.cfg
	if call.last != nil {
		call.last.end(Cancelled, "", errClient) // only if nothing else ended it
	}
	s := x.span
	s.Set(span.String(span.HopKind, span.SidecarOut), span.Int(span.HopIndex, s.Context().Hop), span.String(span.SrcCluster, string(cfg.Self.Cluster)),
		span.String(span.SrcRegion, cfg.Self.Region), span.String(span.SrcZone, cfg.Self.Zone), span.String(span.SrcService, cfg.Self.Service),
		span.String(span.ServerAddress, call.r.Host), span.Int(span.HTTPResendCount, max(call.tries-1, 0)))
	x.finishSpan()
	q := metric.Request{
		Reporter: metric.Source, SrcService: cfg.Self.Service, SrcCluster: string(cfg.Self.Cluster), DstService: "unknown", Protocol: x.protocol(),
		Code: x.status, GRPCCode: x.grpcStatus, Failure: x.failed(), Duration: cfg.Now().Sub(call.start), TTFB: x.firstByte, MTLS: true,
	}
	if !call.meta.Service.IsZero() {
		q.DstService = call.meta.Service.String()
	}
	if a := call.last; a != nil {
		q.DstCluster, q.Reason, q.Scope = string(a.leg.Cluster), string(a.leg.Reason), a.leg.Scope
	}
	if x.refusal != nil {
		q.Reason = string(x.refusal.Reason)
	}
	if s.Recording() {
		q.Trace = s.Context().Trace.String()
	}
	cfg.Metrics.Observe(q)
	cfg.Metrics.Bytes("sent", q.Protocol, q.SrcCluster, q.DstCluster, x.sent+x.body.received())
	cfg.Metrics.Bytes("received", q.Protocol, q.SrcCluster, q.DstCluster, x.received)
	s.EndAt(cfg.Now())
}
