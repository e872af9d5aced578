// SPDX-License-Identifier: Apache-2.0

package http

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	nethttp "net/http"
	"net/http/httptrace"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http2"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/span"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// AppProtocol is what an application speaks on a port.
type AppProtocol int

// Protocols towards the application.
const (
	HTTP1 AppProtocol = iota // HTTP/1.1
	H2C                      // HTTP/2 with prior knowledge; gRPC
)

// Call is what an access policy judges: exactly the bytes that will be forwarded.
type Call struct {
	Peer   spiffeid.ID
	Method string
	// Path is without the query, in the one spelling that is forwarded: no dot segment, %2f, %5c, %00 or backslash, no
	// percent-encoded unreserved character; and while JudgesPaths, no empty segment and no ";". OPTIONS may have "*".
	Path      string
	Authority string
	Header    nethttp.Header // read only
}

// Instance is one application process behind this sidecar.
type Instance struct {
	Name    string // workload
	Address string // host:port
	// Done is called exactly once, when the attempt on this instance has ended; nil is allowed.
	Done func(Outcome)
}

// InboundConfig configures the engine for one port of one service. SelfID, Authorize and PickInstance are required.
type InboundConfig struct {
	Name     string // of this proxy in Proxy-Status
	Self     Local
	SelfID   func() spiffeid.ID // own identity, By= in x-forwarded-client-cert
	Service  federation.ServiceName
	Port     federation.PortName
	Protocol AppProtocol
	// Authorize returns nil to allow; the refusal is sent otherwise (403 unless it says more).
	Authorize func(Call) *Refusal
	// JudgesPaths reports whether Authorize looks at paths. Then spellings that only some applications fold away ("//", ";")
	// are refused too. nil is always.
	JudgesPaths func() bool
	// PickInstance returns an instance whose name is not among tried. An error, or nil, means that none is healthy: the
	// caller is told so with x-strait-refused and may go elsewhere.
	PickInstance func(ctx context.Context, tried []string) (*Instance, error)
	// Dial opens a connection to an instance; nil is TCP with a timeout of 2 s.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// PeerCluster names the cluster of a caller for metrics and spans; nil uses its trust domain.
	PeerCluster func(spiffeid.ID) string
	Recorder    *span.Recorder
	Metrics     *metric.Requests
	Limits      Limits
	Now         func() time.Time
	Logger      *slog.Logger
}

// maxInstances bounds how many instances one request is tried on.
const maxInstances = 4

// wordNoInstance is the value of x-strait-refused when no instance can take the request.
const wordNoInstance = "no_healthy_instance"

// Inbound carries requests of other sidecars to the application.
type Inbound struct {
	cfg    InboundConfig
	server *server
	app    nethttp.RoundTripper
	idle   func() // closes pooled connections
	dials  *dialer
}

// NewInbound checks the configuration; it starts nothing.
func NewInbound(cfg InboundConfig) (*Inbound, error) {
	if cfg.Authorize == nil || cfg.PickInstance == nil || cfg.SelfID == nil {
		return nil, errors.New("new inbound: SelfID, Authorize and PickInstance are required")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.JudgesPaths == nil {
		cfg.JudgesPaths = func() bool { return true }
	}
	if cfg.PeerCluster == nil {
		cfg.PeerCluster = func(id spiffeid.ID) string { return id.TrustDomain().String() }
	}
	if cfg.Dial == nil {
		d := &net.Dialer{Timeout: 2 * time.Second}
		cfg.Dial = func(ctx context.Context, address string) (net.Conn, error) { return d.DialContext(ctx, "tcp", address) }
	}
	cfg.Limits = cfg.Limits.withDefaults()
	i := &Inbound{cfg: cfg, dials: &dialer{dial: cfg.Dial, open: map[*appConn]struct{}{}}}
	if err := i.connect(); err != nil {
		return nil, fmt.Errorf("new inbound: %w", err)
	}
	i.server = newServer(cfg.Limits, i.handle)
	return i, nil
}

// connect makes the pool of connections to the application.
func (i *Inbound) connect() error {
	t1 := &nethttp.Transport{
		DialContext:        func(ctx context.Context, _, address string) (net.Conn, error) { return i.dials.to(ctx, address) },
		DisableCompression: true, MaxIdleConnsPerHost: 64, IdleConnTimeout: time.Minute, ExpectContinueTimeout: continueAfter,
		MaxResponseHeaderBytes: int64(i.cfg.Limits.HeaderBytes), TLSNextProto: map[string]func(string, *tls.Conn) nethttp.RoundTripper{},
		HTTP2: &nethttp.HTTP2Config{MaxReceiveBufferPerStream: windowStream, MaxReceiveBufferPerConnection: windowConn},
	}
	i.app, i.idle = t1, t1.CloseIdleConnections
	if i.cfg.Protocol != H2C {
		return nil
	}
	t2, err := http2.ConfigureTransports(t1)
	if err != nil {
		return err
	}
	pool := &appPool{transport: t2, dial: i.dials.to, places: map[string]*place{}}
	t2.ConnPool, t2.AllowHTTP = pool, true
	t2.MaxHeaderListSize, t2.IdleConnTimeout = uint32(i.cfg.Limits.HeaderBytes), time.Minute
	t2.ReadIdleTimeout, t2.PingTimeout, t2.WriteByteTimeout = 30*time.Second, 10*time.Second, writeStall
	i.app, i.idle = t2, pool.close
	return nil
}

// ServeConn serves one verified connection (normally a *tls.Conn) of peer and returns when it has ended. It owns c. The
// protocol is what ALPN negotiated; without ALPN the first bytes decide.
func (i *Inbound) ServeConn(ctx context.Context, c net.Conn, peer spiffeid.ID) {
	proto := negotiated(c)
	if proto != "" && proto != ProtoH2 && proto != ProtoHTTP1 {
		c.Close()
		return
	}
	closed := i.cfg.Metrics.Open("inbound", protocolLabel(proto), i.cfg.PeerCluster(peer), string(i.cfg.Self.Cluster))
	i.server.serve(ctx, c, proto, peer)
	closed("end")
}

// Close cuts every connection at once, also to the application, and waits.
func (i *Inbound) Close() error {
	i.server.close()
	i.idle()
	i.dials.close()
	return nil
}

// inCall is one request on its way in.
type inCall struct {
	*exchange
	i        *Inbound
	peer     spiffeid.ID
	path     string
	instance string
	app      net.Conn // the connection used, for upgrades
}

func (i *Inbound) handle(c *served, w nethttp.ResponseWriter, r *nethttp.Request) {
	call := &inCall{exchange: newExchange(c, w, r, i.cfg.Name, i.cfg.Now), i: i, peer: c.peer}
	parent, _ := span.Extract(r.Header)
	call.span = i.cfg.Recorder.StartAt(parent, methodLabel(r.Method)+" "+i.cfg.Service.Name, span.Server, call.start)
	call.span.SetHop(parent.Hop+1, string(i.cfg.Self.Cluster))
	defer func() {
		call.body.stop()
		call.finish()
		if call.broken != nil {
			call.abort()
		}
	}()
	if refusal := call.judge(); refusal != nil {
		call.refuse(refusal)
		return
	}
	call.run()
}

// judge normalises the path and asks the access policy about exactly what will be forwarded.
func (call *inCall) judge() *Refusal {
	r := call.r
	malformed := func(status int, format string, args ...any) *Refusal {
		return &Refusal{Code: problem.RequestRefused, Status: status, Message: fmt.Sprintf(format, args...)}
	}
	if r.Method == nethttp.MethodConnect {
		return malformed(nethttp.StatusMethodNotAllowed, "CONNECT is not supported")
	}
	if _, _, err := ParseAuthority(r.Host); err != nil {
		return malformed(nethttp.StatusBadRequest, "%v", err)
	}
	raw := rawPath(r.URL)
	switch {
	case raw == "*" && r.Method == nethttp.MethodOptions:
		call.path = raw
	case raw == "" && r.URL.Host != "": // absolute form without a path
		call.path = "/"
	default:
		path, err := normalPath(raw, call.i.cfg.JudgesPaths())
		if err != nil {
			return malformed(nethttp.StatusBadRequest, "path refused: %v", err)
		}
		call.path = path
	}
	refusal := call.i.cfg.Authorize(Call{Peer: call.peer, Method: r.Method, Path: call.path, Authority: r.Host, Header: r.Header})
	if refusal != nil && refusal.Code == "" {
		refusal.Code = problem.PolicyDenied
	}
	if refusal != nil && refusal.Reason == "" {
		refusal.Reason = federation.PolicyDenied
	}
	return refusal
}

// run sends the request to an instance; another one only when the first could not be connected to.
func (call *inCall) run() {
	upgrade := upgradeOf(call.r)
	var tried []string
	last := wordNoInstance
	for len(tried) < maxInstances {
		in, err := call.i.cfg.PickInstance(call.r.Context(), tried)
		if err != nil || in == nil || slices.Contains(tried, in.Name) {
			break
		}
		tried = append(tried, in.Name)
		call.instance = in.Name
		if call.try(in, upgrade) {
			return
		}
		last = "connect: no instance accepts connections"
	}
	if call.gone() {
		call.clientGone, call.broken = true, errClient
		return
	}
	call.refuseUnseen(federation.NoEndpoints, last)
}

// refuseUnseen tells the caller that the application saw nothing of the request.
func (call *inCall) refuseUnseen(reason federation.Reason, message string) {
	call.refuse(&Refusal{Reason: reason, Code: problem.NoEndpoints, Status: nethttp.StatusServiceUnavailable,
		Message: call.i.cfg.Service.String() + ": " + message}, [2]string{headerRefused, wordNoInstance})
}

// try sends the request to one instance and answers. It reports false if the instance could not be connected to.
func (call *inCall) try(in *Instance, upgrade string) bool {
	i := call.i
	ctx, cancel := context.WithCancel(call.r.Context())
	defer cancel()
	start := i.cfg.Now()
	s := i.cfg.Recorder.StartAt(call.span.Context(), methodLabel(call.r.Method)+" "+i.cfg.Service.Name, span.Client, start)
	if s.Recording() {
		s.Set(span.String(span.HopKind, span.SidecarIn), span.Int(span.HopIndex, s.Context().Hop), span.String(span.HTTPMethod, methodLabel(call.r.Method)),
			span.String(span.NetworkPeer, in.Address), span.String(span.Instance, in.Name), span.String(span.DstService, i.cfg.Service.String()),
			span.String(span.DstCluster, string(i.cfg.Self.Cluster)), span.String(span.SrcCluster, i.cfg.PeerCluster(call.peer)))
	}
	resp, mark, err := call.send(ctx, in, upgrade, s.Context())
	if err != nil && mark.unseen() && !errors.Is(err, errDial) && ctx.Err() == nil && call.body.replayable() {
		resp, mark, err = call.send(ctx, in, upgrade, s.Context()) // most likely a pooled connection that was ending
	}
	out := Outcome{GRPC: -1, Err: err}
	answered := true
	switch {
	case err == nil:
		out.Status, out.FirstByte = resp.StatusCode, i.cfg.Now().Sub(start)
		call.firstByte = i.cfg.Now().Sub(call.start)
		err = call.answer(ctx, resp)
		out.GRPC = call.grpcStatus
		switch {
		case err == nil:
		case call.clientGone:
			out.Result, out.Err = Cancelled, err
		default:
			out.Result, out.Err, out.Reason = Broken, err, federation.UpstreamReset
		}
		resp.Body.Close()
	case call.gone():
		out.Result, call.clientGone, call.broken = Cancelled, true, errClient
	case call.body.broken() != nil:
		out.Result = Cancelled
		call.refuse(call.badBody())
		call.clientGone = true
	case errors.Is(err, errDial):
		out.Result, out.Reason = Unsent, federation.NoEndpoints
		answered = false
	case mark.unseen():
		out.Result, out.Reason = Unsent, federation.NoEndpoints
		call.refuseUnseen(federation.NoEndpoints, "the application refused the request unseen")
	case call.overdue():
		out.Result, out.Reason = TimedOut, federation.DeadlineExceeded
		call.refuse(&Refusal{Reason: federation.DeadlineExceeded, Code: problem.DeadlineExceeded, Message: i.cfg.Service.String() + " did not answer in time", Err: err})
	default:
		out.Result, out.Reason = Broken, federation.UpstreamReset
		i.cfg.Logger.Debug("application broke a request", "service", i.cfg.Service.String(), "instance", in.Name, "error", err)
		call.refuse(&Refusal{Reason: federation.UpstreamReset, Code: problem.UpstreamReset, Status: nethttp.StatusBadGateway,
			Message: i.cfg.Service.String() + ": the application closed the connection without a response", Err: err})
	}
	out.Total = i.cfg.Now().Sub(start)
	endAppSpan(s, out, i.cfg.Now())
	if in.Done != nil {
		in.Done(out)
	}
	return answered
}

func endAppSpan(s *span.Active, out Outcome, now time.Time) {
	if out.Status > 0 {
		s.Set(span.Int(span.HTTPStatus, out.Status))
	}
	if out.GRPC >= 0 {
		s.Set(span.Int(span.RPCStatus, out.GRPC))
	}
	switch {
	case out.Result != Answered && out.Err != nil:
		s.Fail(out.Result.String(), out.Err.Error())
	case out.Status >= 500:
		s.Fail(strconv.Itoa(out.Status), "")
	case out.GRPC > grpcOK:
		s.Fail("grpc_"+strconv.Itoa(out.GRPC), "")
	}
	s.EndAt(now)
}

// send writes the request to the application with the identity that its sidecar vouches for.
func (call *inCall) send(ctx context.Context, in *Instance, upgrade string, trace span.Context) (*nethttp.Response, *sentMark, error) {
	mark := &sentMark{}
	out, err := call.outgoing(ctx, call.path)
	if err != nil {
		return nil, mark, err
	}
	h := out.Header
	h[headerClientCert] = []string{clientCert(call.i.cfg.SelfID(), call.peer)}
	trace.Inject(h)
	delete(h, "Expect")
	if expect := call.r.Header[headerExpect]; call.body != nil && (len(expect) == 1 || len(call.r.Header["Expect"]) == 1) {
		h["Expect"] = []string{"100-continue"}
	}
	if upgrade != "" {
		h["Connection"] = []string{"Upgrade"}
		h["Upgrade"] = []string{upgrade}
	}
	u := *out.URL
	u.Host = in.Address
	out.URL = &u
	if call.body != nil {
		out.GetBody = call.bodyAgain
	}
	ctx = httptrace.WithClientTrace(out.Context(), &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) { call.app = info.Conn }})
	resp, err := call.i.app.RoundTrip(mark.attach(out.WithContext(ctx)))
	return resp, mark, err
}

var errNotKept = errors.New("request body was not kept")

// bodyAgain lets the client try once more on another connection when the pooled one turned out to be dead before
// anything was written to it.
func (call *inCall) bodyAgain() (io.ReadCloser, error) {
	if !call.body.replayable() {
		return nil, errNotKept
	}
	return call.body.attempt(), nil
}

// answer relays the application's response.
func (call *inCall) answer(ctx context.Context, resp *nethttp.Response) error {
	if resp.StatusCode == nethttp.StatusSwitchingProtocols {
		rw, ok := resp.Body.(io.ReadWriteCloser)
		if !ok || upgradeOf(call.r) == "" {
			call.broken = errNotSwitched
			return errNotSwitched
		}
		resp.Body = &switchedBody{ReadWriteCloser: rw, conn: call.app, done: func() {}}
		call.status = resp.StatusCode
		var err error
		call.sent, call.received, err = call.tunnel(ctx, resp)
		if err != nil && !call.hijacked {
			call.broken = err
		}
		return err
	}
	err := call.deliver(resp)
	call.settle(err)
	return err
}

func (call *inCall) finish() {
	x, cfg := call.exchange, &call.i.cfg
	s := x.span
	cluster := cfg.PeerCluster(call.peer)
	service := strings.TrimPrefix(call.peer.Path(), "/")
	if ns, sa, ok := call.peer.Workload(); ok {
		service = ns + "/" + sa
	}
	s.Set(span.String(span.HopKind, span.SidecarIn), span.Int(span.HopIndex, s.Context().Hop), span.String(span.MTLSPeerID, call.peer.String()),
		span.String(span.SrcCluster, cluster), span.String(span.SrcService, service), span.String(span.DstService, cfg.Service.String()),
		span.String(span.DstCluster, string(cfg.Self.Cluster)), span.String(span.DstRegion, cfg.Self.Region), span.String(span.DstZone, cfg.Self.Zone),
		span.String(span.Instance, call.instance))
	x.finishSpan()
	q := metric.Request{
		Reporter: metric.Destination, SrcService: service, SrcCluster: cluster, DstService: cfg.Service.String(), DstCluster: string(cfg.Self.Cluster),
		Protocol: x.protocol(), Code: x.status, GRPCCode: x.grpcStatus, Failure: x.failed(), MTLS: true,
		Duration: cfg.Now().Sub(call.start), TTFB: x.firstByte,
	}
	if x.refusal != nil {
		q.Reason = string(x.refusal.Reason)
	}
	if s.Recording() {
		q.Trace = s.Context().Trace.String()
	}
	cfg.Metrics.Observe(q)
	cfg.Metrics.Bytes("sent", q.Protocol, cluster, q.DstCluster, x.sent+x.body.received())
	cfg.Metrics.Bytes("received", q.Protocol, cluster, q.DstCluster, x.received)
	s.EndAt(cfg.Now())
}
