// SPDX-License-Identifier: Apache-2.0

package http

import (
	"encoding/json"
	"fmt"
	nethttp "net/http"
	"strconv"
	"strings"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
)

// gRPC status codes that we generate or look at.
const (
	grpcOK               = 0
	grpcUnknown          = 2
	grpcDeadlineExceeded = 4
	grpcPermissionDenied = 7
	grpcUnimplemented    = 12
	grpcInternal         = 13
	grpcUnavailable      = 14
	grpcDataLoss         = 15
)

// status returns the HTTP status of a refusal.
func (r *Refusal) status() int {
	if r.Status != 0 {
		return r.Status
	}
	switch r.Reason {
	case federation.PolicyDenied, federation.NotExported, federation.NotGranted:
		return nethttp.StatusForbidden
	case federation.RateLimited:
		return nethttp.StatusTooManyRequests
	case federation.UpstreamReset, federation.TrustRefused, federation.IdentityExpired:
		return nethttp.StatusBadGateway
	case federation.DeadlineExceeded:
		return nethttp.StatusGatewayTimeout
	}
	switch r.Code {
	case problem.RequestRefused:
		return nethttp.StatusBadRequest
	case problem.PolicyDenied:
		return nethttp.StatusForbidden
	}
	return nethttp.StatusServiceUnavailable
}

// proxyError is the error type of RFC 9209 §2.3.
func (r *Refusal) proxyError() string {
	switch r.Reason {
	case federation.PolicyDenied, federation.NotExported, federation.NotGranted, federation.RateLimited:
		return "http_request_denied"
	case federation.UpstreamReset:
		return "connection_terminated"
	case federation.TrustRefused, federation.IdentityExpired:
		return "tls_certificate_error"
	case federation.DeadlineExceeded:
		return "http_response_timeout"
	case federation.CircuitOpen:
		return "connection_limit_reached"
	case federation.ConfigMissing:
		return "destination_not_found"
	}
	if s := r.status(); s >= 400 && s < 500 {
		return "http_request_error"
	}
	return "destination_unavailable"
}

func (r *Refusal) grpcStatus() int {
	switch r.status() {
	case nethttp.StatusForbidden:
		return grpcPermissionDenied
	case nethttp.StatusGatewayTimeout:
		return grpcDeadlineExceeded
	case nethttp.StatusMethodNotAllowed, nethttp.StatusNotFound, nethttp.StatusNotImplemented:
		return grpcUnimplemented
	case nethttp.StatusBadRequest, nethttp.StatusRequestTimeout, nethttp.StatusRequestHeaderFieldsTooLarge:
		return grpcInternal
	}
	return grpcUnavailable
}

// problemBody is the JSON form of a generated response.
type problemBody struct {
	Code   problem.Code      `json:"code"`
	Title  string            `json:"title"`
	What   string            `json:"what,omitempty"`
	Why    string            `json:"why,omitempty"`
	Fix    []string          `json:"fix,omitempty"`
	Reason federation.Reason `json:"reason,omitempty"`
	Trace  string            `json:"trace,omitempty"`
}

// write sends the refusal as a response: a gRPC status for gRPC, else JSON or text by Accept.
func (r *Refusal) write(w nethttp.ResponseWriter, req *nethttp.Request, proxy, trace string) {
	h := w.Header()
	clear(h)
	h.Set("Proxy-Status", token(proxy)+"; error="+r.proxyError()+"; details="+quote(r.Error()))
	if trace != "" {
		h.Set(headerTrace, trace)
	}
	if isGRPC(req.Header) {
		h.Set("Content-Type", "application/grpc")
		h.Set("Grpc-Status", strconv.Itoa(r.grpcStatus()))
		h.Set("Grpc-Message", grpcMessage(r.Error()))
		w.WriteHeader(nethttp.StatusOK)
		return
	}
	p := problem.New(r.Code, r.Message)
	b := problemBody{Code: r.Code, Title: p.Title(), What: r.Message, Why: p.Reason(), Fix: p.Fixes(), Reason: r.Reason, Trace: trace}
	var body []byte
	if wantsJSON(req.Header.Values("Accept")) {
		h.Set("Content-Type", "application/json")
		body, _ = json.Marshal(b) // strings only: cannot fail
		body = append(body, '\n')
	} else {
		h.Set("Content-Type", "text/plain; charset=utf-8")
		body = []byte(b.text())
	}
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(r.status())
	if req.Method != nethttp.MethodHead {
		_, _ = w.Write(body) // the client may have gone
	}
}

func (b problemBody) text() string {
	var s strings.Builder
	fmt.Fprintf(&s, "%s: %s", b.Code, b.Title)
	if b.Reason != "" {
		fmt.Fprintf(&s, " (%s)", b.Reason)
	}
	s.WriteByte('\n')
	for _, line := range [][2]string{{"what", b.What}, {"why", b.Why}} {
		if line[1] != "" {
			fmt.Fprintf(&s, "  %s: %s\n", line[0], line[1])
		}
	}
	for _, fix := range b.Fix {
		fmt.Fprintf(&s, "  fix: %s\n", fix)
	}
	if b.Trace != "" {
		fmt.Fprintf(&s, "  trace: %s\n", b.Trace)
	}
	return s.String()
}

// wantsJSON reports whether JSON is named in Accept before text.
func wantsJSON(accept []string) bool {
	for _, part := range strings.Split(strings.Join(accept, ","), ",") {
		kind, _, _ := strings.Cut(strings.TrimSpace(part), ";")
		switch kind = strings.ToLower(kind); {
		case kind == "application/json" || kind == "application/*" || strings.HasPrefix(kind, "application/") && strings.HasSuffix(kind, "+json"):
			return true
		case strings.HasPrefix(kind, "text/"):
			return false
		}
	}
	return false
}

// token writes s as an sf-token (RFC 8941) where it is one, else as a string.
func token(s string) string {
	if s == "" {
		return "strait"
	}
	for i := range len(s) {
		c := s[i]
		alpha := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !alpha && (i == 0 || !(c >= '0' && c <= '9') && strings.IndexByte("!#$%&'*+-.^_`|~:/", c) < 0) {
			return quote(s)
		}
	}
	return s
}

// quote writes s as an sf-string; what such a string cannot hold becomes a question mark.
func quote(s string) string {
	if len(s) > 512 {
		s = s[:512]
	}
	var b strings.Builder
	b.WriteByte('"')
	for i := range len(s) {
		switch c := s[i]; {
		case c < 0x20 || c > 0x7e:
			b.WriteByte('?')
		case c == '"' || c == '\\':
			b.WriteByte('\\')
			b.WriteByte(c)
		default:
			b.WriteByte(c)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// grpcMessage percent-encodes a status message (gRPC over HTTP/2, Status-Message).
func grpcMessage(s string) string {
	if len(s) > 1024 {
		s = s[:1024]
	}
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c < 0x20 || c > 0x7e || c == '%' {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}
