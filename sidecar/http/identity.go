// SPDX-License-Identifier: Apache-2.0

package http

import (
	nethttp "net/http"
	"net/textproto"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Headers of our own. Everything that begins with x-strait- is removed from what applications send and receive, except
// the trace id of a generated response.
const (
	headerClientCert = "X-Forwarded-Client-Cert"
	headerRefused    = "X-Strait-Refused" // callee's sidecar: the application saw nothing of this request
	headerTrace      = "X-Strait-Trace"
	headerExpect     = "X-Strait-Expect" // Expect, which the HTTP/2 server consumes on its hop
	ownPrefix        = "X-Strait-"
)

// identityName reports whether a header could be read by an application as one that only its own sidecar may write.
// Frameworks fold "_" and "-" and case together, so the comparison does too.
func identityName(name string) bool {
	const clientCert, own = len(headerClientCert), len(ownPrefix)
	if len(name) < min(clientCert, own) {
		return false
	}
	fold := func(i int) byte {
		c := name[i]
		switch {
		case c == '_':
			return '-'
		case c >= 'A' && c <= 'Z':
			return c + 'a' - 'A'
		}
		return c
	}
	matches := func(want string) bool {
		for i := range len(want) {
			w := want[i]
			if w >= 'A' && w <= 'Z' {
				w += 'a' - 'A'
			}
			if fold(i) != w {
				return false
			}
		}
		return true
	}
	return matches(ownPrefix) || len(name) == clientCert && matches(headerClientCert)
}

// stripIdentity removes identity headers in place; keep, if set, is spared.
func stripIdentity(h nethttp.Header, keep ...string) {
	for name := range h {
		if !identityName(name) {
			continue
		}
		spared := false
		for _, k := range keep {
			spared = spared || name == k
		}
		if !spared {
			delete(h, name)
		}
	}
}

// clientCert is the value of x-forwarded-client-cert in Envoy's format. SPIFFE IDs contain neither of ,;=" .
func clientCert(by, uri spiffeid.ID) string { return "By=" + by.String() + ";URI=" + uri.String() }

var hopHeaders = []string{"Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Te", "Trailer",
	"Transfer-Encoding", "Upgrade", "Http2-Settings"}

// endToEnd returns a copy of h without what belongs to one connection.
func endToEnd(h nethttp.Header) nethttp.Header {
	out := make(nethttp.Header, len(h)+4)
	for name, values := range h {
		out[name] = values
	}
	for _, line := range h["Connection"] {
		for name := range strings.SplitSeq(line, ",") {
			if name = textproto.TrimString(name); name != "" {
				delete(out, textproto.CanonicalMIMEHeaderKey(name))
			}
		}
	}
	for _, name := range hopHeaders {
		delete(out, name)
	}
	// The one value of TE that means something end to end: gRPC asks for it.
	if httpguts.HeaderValuesContainsToken(h["Te"], "trailers") {
		out["Te"] = []string{"trailers"}
	}
	return out
}

// upgradeOf returns the protocol that an HTTP/1.1 request asks to switch to. h2c is not one of them: it is ignored, as a
// server may.
func upgradeOf(r *nethttp.Request) string {
	if r.ProtoMajor != 1 || r.ProtoMinor < 1 || r.ContentLength != 0 || !httpguts.HeaderValuesContainsToken(r.Header["Connection"], "upgrade") {
		return ""
	}
	values := r.Header["Upgrade"]
	if len(values) != 1 || !httpguts.ValidHeaderFieldName(values[0]) || strings.EqualFold(values[0], "h2c") {
		return ""
	}
	return strings.ToLower(values[0])
}

// isGRPC reports whether a content type is that of gRPC.
func isGRPC(h nethttp.Header) bool {
	values := h["Content-Type"]
	return len(values) == 1 && (values[0] == "application/grpc" || strings.HasPrefix(values[0], "application/grpc+") ||
		strings.HasPrefix(values[0], "application/grpc;"))
}
