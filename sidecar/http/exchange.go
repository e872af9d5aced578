// SPDX-License-Identifier: Apache-2.0

package http

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	nethttp "net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/span"
)

// exchange is one request of one client, whichever side we are on.
type exchange struct {
	conn   *served
	limits *Limits
	proxy  string // name in Proxy-Status
	w      nethttp.ResponseWriter
	r      *nethttp.Request
	rc     *nethttp.ResponseController
	grpc   bool
	body   *keptBody    // nil: no body
	span   *span.Active // SERVER span
	now    func() time.Time
	start  time.Time

	head     sync.Mutex // orders informational responses before the final one
	answered bool

	// trailers of the request that were announced, filled when its body has ended
	trailer nethttp.Header

	// what became of it
	status     int // sent to the client; 0 none
	grpcStatus int // -1 none
	sent       int64
	received   int64
	firstByte  time.Duration
	hijacked   bool
	broken     error // the response was begun and could not be finished
	clientGone bool
	refusal    *Refusal // generated response
}

func newExchange(c *served, w nethttp.ResponseWriter, r *nethttp.Request, proxy string, now func() time.Time) *exchange {
	x := &exchange{now: now, start: now(), conn: c, limits: &c.server.limits, proxy: proxy, w: w, r: r, rc: nethttp.NewResponseController(w), grpc: isGRPC(r.Header), grpcStatus: -1}
	if r.ProtoMajor == 1 {
		_ = x.rc.EnableFullDuplex() // always supported by net/http's HTTP/1 server
	}
	if r.Body != nil && r.Body != nethttp.NoBody && r.ContentLength != 0 {
		x.trailer = announced(r.Trailer)
		stall := x.limits.BodyStall
		if x.grpc {
			stall = 0 // its streams are silent for as long as they like
		}
		x.body = newKeptBody(r.Body, r.ContentLength, x.limits.KeepBody, stall, x.rc.SetReadDeadline, x.fillTrailer)
	}
	return x
}

// announced returns the trailer names that may travel.
func announced(trailer nethttp.Header) nethttp.Header {
	var out nethttp.Header
	for name := range trailer {
		if identityName(name) {
			continue
		}
		if out == nil {
			out = nethttp.Header{}
		}
		out[name] = nil
	}
	return out
}

func (x *exchange) fillTrailer() {
	for name := range x.trailer {
		x.trailer[name] = x.r.Trailer[name]
	}
}

// stalled reports whether the client's body made no progress for too long.
func (x *exchange) stalled() bool { return errors.Is(x.body.broken(), os.ErrDeadlineExceeded) }

// gone reports whether the client has gone away; net/http says the same of a body that stalled.
func (x *exchange) gone() bool {
	if x.r.Context().Err() == nil {
		return false
	}
	x.body.quiet()
	return !x.stalled()
}

// badBody is the answer to a request whose body did not arrive.
func (x *exchange) badBody() *Refusal {
	status := nethttp.StatusBadRequest
	if x.stalled() {
		status = nethttp.StatusRequestTimeout
	}
	return &Refusal{Code: problem.RequestRefused, Status: status, Message: "the request's body did not arrive whole", Err: x.body.broken()}
}

// overdue reports whether the deadline that a gRPC caller set has passed. Servers reset the stream then, without a
// status; it must not look like a connection that broke.
func (x *exchange) overdue() bool {
	values := x.r.Header["Grpc-Timeout"]
	if !x.grpc || len(values) != 1 {
		return false
	}
	d, ok := parseGRPCTimeout(values[0])
	return ok && x.now().Sub(x.start) >= d
}

// protocol is the label of the client's protocol.
func (x *exchange) protocol() string {
	switch {
	case x.grpc:
		return "grpc"
	case x.r.ProtoMajor == 2:
		return "h2"
	}
	return "http1"
}

// outgoing makes the request of one attempt. The caller fills in headers of its own; path is what is written.
func (x *exchange) outgoing(ctx context.Context, path string) (*nethttp.Request, error) {
	u, err := withPath(x.r.URL, path)
	if err != nil {
		return nil, err
	}
	u.Scheme, u.Host, u.User = "http", "callee.invalid", nil
	out := (&nethttp.Request{
		Method: x.r.Method, URL: u, Host: x.r.Host, Header: endToEnd(x.r.Header), ContentLength: x.r.ContentLength,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Trailer: x.trailer,
	}).WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{Got1xxResponse: x.informational}))
	if _, ok := out.Header["User-Agent"]; !ok {
		out.Header["User-Agent"] = []string{""} // or the client would add its own
	}
	stripIdentity(out.Header)
	if x.body != nil {
		out.Body = x.body.attempt()
	}
	return out, nil
}

// informational passes a 1xx response on. 100 is the server's own business: it is sent when the body is first read.
func (x *exchange) informational(code int, header textproto.MIMEHeader) error {
	x.head.Lock()
	defer x.head.Unlock()
	if x.answered || code == nethttp.StatusContinue || code == nethttp.StatusSwitchingProtocols || x.r.ProtoMinor == 0 && x.r.ProtoMajor == 1 {
		return nil
	}
	h := x.w.Header()
	informational := endToEnd(nethttp.Header(header))
	stripIdentity(informational)
	maps.Copy(h, informational)
	x.w.WriteHeader(code)
	clear(h)
	return nil
}

// begin ends the time of informational responses and of further attempts.
func (x *exchange) begin() nethttp.Header {
	x.head.Lock()
	x.answered = true
	x.head.Unlock()
	x.body.release()
	h := x.w.Header()
	clear(h)
	if x.r.ProtoMajor == 1 && (!x.body.finished() || x.conn.draining()) {
		// We may stop reading the body: what is left of it must not be taken for the next request.
		h.Set("Connection", "close")
	}
	return h
}

// refuse sends a generated response.
func (x *exchange) refuse(refusal *Refusal, header ...[2]string) {
	x.refusal = refusal
	h := x.begin()
	closing := h.Get("Connection")
	x.status = refusal.status()
	trace := ""
	if c := x.span.Context(); c.IsValid() {
		trace = c.Trace.String()
	}
	w := x.w
	if closing != "" || len(header) > 0 {
		w = &headerAdder{ResponseWriter: x.w, add: append(header, [2]string{"Connection", closing})}
	}
	refusal.write(w, x.r, x.proxy, trace)
	if x.grpc {
		x.grpcStatus = refusal.grpcStatus()
	}
	x.span.Set(span.String(span.ProxyError, string(refusal.Code)), span.String(span.DecisionReason, string(refusal.Reason)))
	x.span.Fail(string(refusal.Code), refusal.Error())
}

// headerAdder adds headers at the last moment.
type headerAdder struct {
	nethttp.ResponseWriter
	add [][2]string
}

func (a *headerAdder) WriteHeader(code int) {
	for _, kv := range a.add {
		if kv[1] != "" {
			a.Header().Set(kv[0], kv[1])
		}
	}
	a.ResponseWriter.WriteHeader(code)
}

var chunks = sync.Pool{New: func() any { return new([32 << 10]byte) }}

var (
	errClient = errors.New("client went away")
	errCallee = errors.New("callee broke the response")
)

// deliver sends a response, as it comes, and returns errClient or errCallee (wrapped) if it could not be finished; the
// caller must then abort the handler so that the client does not take it for finished. spare names a header of our own
// that may pass.
func (x *exchange) deliver(resp *nethttp.Response, spare ...string) error {
	h := x.begin()
	closing := h["Connection"]
	maps.Copy(h, endToEnd(resp.Header))
	stripIdentity(h, spare...)
	if len(closing) > 0 {
		h["Connection"] = closing
	}
	if _, ok := h["Content-Type"]; !ok {
		h["Content-Type"] = nil // no guessing
	}
	names := announced(resp.Trailer)
	for name := range names {
		h.Add("Trailer", name)
		if x.r.ProtoMajor == 1 {
			delete(h, "Content-Length") // HTTP/1.1 has trailers only after chunks
		}
	}
	x.status, x.grpcStatus = resp.StatusCode, grpcStatusOf(resp.Header, x.grpc)
	x.w.WriteHeader(resp.StatusCode)
	hasBody := resp.Body != nil && resp.Body != nethttp.NoBody && resp.ContentLength != 0 && x.r.Method != nethttp.MethodHead
	if hasBody {
		if resp.ContentLength < 0 {
			if err := x.flush(); err != nil {
				return err
			}
		}
		if err := x.copy(resp); errors.Is(err, errCallee) && x.overdue() {
			x.grpcStatus = grpcDeadlineExceeded
			h[nethttp.TrailerPrefix+"Grpc-Status"] = []string{strconv.Itoa(grpcDeadlineExceeded)}
			return nil
		} else if err != nil {
			return err
		}
	} else if resp.Body != nil {
		_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 1)) // its end, and with it the trailers
	}
	for name, values := range resp.Trailer {
		if identityName(name) {
			continue
		}
		if _, ok := names[name]; !ok {
			name = nethttp.TrailerPrefix + name
		}
		h[name] = values
	}
	if s := grpcStatusOf(resp.Trailer, x.grpc); s >= 0 {
		x.grpcStatus = s
	}
	return nil
}

// copy relays the body and sends what it has whenever no more is at hand.
func (x *exchange) copy(resp *nethttp.Response) error {
	chunk := chunks.Get().(*[32 << 10]byte)
	defer chunks.Put(chunk)
	for {
		n, err := resp.Body.Read(chunk[:])
		if n > 0 {
			x.received += int64(n)
			if werr := x.write(chunk[:n], resp.ContentLength < 0 || x.received < resp.ContentLength); werr != nil {
				return werr
			}
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return fmt.Errorf("%w: %w", errCallee, err)
		}
	}
}

func (x *exchange) write(p []byte, flush bool) error {
	stall := !x.grpc && x.limits.BodyStall > 0
	if stall {
		_ = x.rc.SetWriteDeadline(time.Now().Add(x.limits.BodyStall))
	}
	if _, err := x.w.Write(p); err != nil {
		return fmt.Errorf("%w: %w", errClient, err)
	}
	if flush {
		if err := x.flush(); err != nil {
			return err
		}
	}
	if stall {
		_ = x.rc.SetWriteDeadline(time.Time{})
	}
	return nil
}

func (x *exchange) flush() error {
	if err := x.rc.Flush(); err != nil {
		return fmt.Errorf("%w: %w", errClient, err)
	}
	return nil
}

// abort ends the handler so that the client sees a broken response.
func (x *exchange) abort() {
	if x.r.ProtoMajor == 1 {
		// A plain close would be a clean end of a response without length or chunks.
		reset(x.conn.raw)
	}
	panic(nethttp.ErrAbortHandler) // net/http: closes the connection, or sends RST_STREAM
}

// failed reports whether the request counts as a failure of the service.
func (x *exchange) failed() bool {
	switch {
	case x.clientGone:
		return false
	case x.broken != nil || x.status >= 500:
		return true
	}
	switch x.grpcStatus {
	case grpcUnknown, grpcDeadlineExceeded, grpcUnimplemented, grpcInternal, grpcUnavailable, grpcDataLoss:
		return true
	}
	return false
}

// finishSpan sets what both sides say about a request.
func (x *exchange) finishSpan() {
	s := x.span
	if !s.Recording() {
		return
	}
	s.Set(span.String(span.HTTPMethod, methodLabel(x.r.Method)), span.String(span.URLScheme, "http"), span.String(span.NetworkProtocol, "http"),
		span.String(span.NetworkVersion, strconv.Itoa(x.r.ProtoMajor)))
	if x.status > 0 {
		s.Set(span.Int(span.HTTPStatus, x.status))
	}
	if x.grpc {
		s.Set(span.String(span.RPCSystem, "grpc"), span.String(span.RPCMethod, strings.TrimPrefix(x.r.URL.Path, "/")))
		if x.grpcStatus >= 0 {
			s.Set(span.Int(span.RPCStatus, x.grpcStatus))
		}
	}
	switch {
	case x.refusal != nil:
	case x.clientGone:
		s.Fail("cancelled", "the caller gave up")
	case x.broken != nil:
		s.Fail("broken", x.broken.Error())
	case x.failed():
		s.Fail(strconv.Itoa(x.status), "")
	}
}

// protocolLabel is the label of a connection's protocol, in the words of exchange.protocol.
func protocolLabel(alpn string) string {
	if alpn == ProtoH2 {
		return "h2"
	}
	return "http1"
}

// methodLabel folds methods that nobody knows.
func methodLabel(m string) string {
	switch m {
	case "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT":
		return m
	}
	return "_OTHER"
}

func grpcStatusOf(h nethttp.Header, grpc bool) int {
	if values := h["Grpc-Status"]; grpc && len(values) == 1 {
		if n, err := strconv.Atoi(values[0]); err == nil && n >= 0 {
			return n
		}
	}
	return -1
}

// idempotentMethod are the methods that may be sent twice (RFC 9110 §9.2.2).
func idempotentMethod(m string) bool {
	switch m {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return true
	}
	return false
}
