// SPDX-License-Identifier: Apache-2.0

package http

import (
	"context"
	nethttp "net/http"
	"time"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/span"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Target is what a Host or :authority stands for.
type Target struct {
	Service federation.ServiceName
	Port    federation.PortName
	Pinned  federation.ClusterName // zero: any cluster
	// Timeout bounds a request from its head to the end of its response; 0 is none. Set it for unary routes only.
	Timeout time.Duration
	// Idempotent overrides the judgement by method (routes marked idempotent, gRPC methods too); nil judges by method.
	Idempotent func(method, path string) bool
}

// Resolve maps a normalised host (lower case, no trailing dot, IPv6 without brackets; may be empty) and the port that
// was written with it ("" if none) to a target. A *Refusal says why not; any other error is an unknown service.
type Resolve func(host, port string) (Target, error)

// Meta describes one request to a Picker.
type Meta struct {
	Service    federation.ServiceName
	Port       federation.PortName
	Pinned     federation.ClusterName
	Method     string
	Path       string
	Authority  string
	Idempotent bool
	// Upgrade is the protocol asked for ("websocket"), or empty. Such a request needs an http/1.1 connection of its own:
	// dial one (ALPN http/1.1), give it to NewClientConn, and close it in Leg.Done.
	Upgrade string
	GRPC    bool
	Header  nethttp.Header // read only
	Trace   span.Context   // of the SERVER span of this request
}

// Tried is one attempt that failed. An empty Instance means that the whole cluster was not reached.
type Tried struct {
	Cluster  federation.ClusterName
	Instance string
}

// Leg is one attempt's way to the service.
type Leg struct {
	Cluster    federation.ClusterName
	Instance   string // instance handle or sidecar, for Tried and spans
	Address    string // host:port of the next hop, for spans; may be empty
	PeerID     spiffeid.ID
	Tier       int
	Reason     federation.Reason
	Policy     string
	Revision   uint64
	Candidates []string // "us-east 1/4 tripped"
	Scope      string   // local, cross_zone, cross_cluster, cross_region
	// Remote means that the way leads through two gateways.
	Remote bool
	// Conn carries the request. With Err set instead, this way could not be dialled: nothing was sent, and the engine
	// counts a failed attempt and picks again, avoiding it.
	Conn ClientConn
	Err  error
	// Begin, if set, is called with the attempt's trace context before its first byte is written (trace markers).
	Begin func(span.Context)
	// Done is called exactly once for each Leg, when the attempt has ended; nil is allowed.
	Done func(Outcome)
}

// ClientConn is one connection to a callee's sidecar. NewClientConn makes it.
type ClientConn interface {
	RoundTrip(*nethttp.Request) (*nethttp.Response, error)
	Close() error
}

// Result says how an attempt ended.
type Result int

// Results of an attempt.
const (
	// Answered: a whole response came; Outcome.Status tells which.
	Answered Result = iota
	// Refused: a typed refusal (x-strait-refused, REFUSED_STREAM, GOAWAY, a gateway's reply): the application saw nothing.
	Refused
	// Unsent: the way could not be used at all (dial error, dead connection); the application saw nothing.
	Unsent
	// Broken: the connection or stream broke after bytes of the request may have arrived.
	Broken
	// TimedOut: our own deadline passed.
	TimedOut
	// Cancelled: the caller gave up; says nothing about the callee.
	Cancelled
)

// String returns the word used in logs.
func (r Result) String() string {
	return [...]string{"answered", "refused", "unsent", "broken", "timed_out", "cancelled"}[r]
}

// Outcome is what became of one attempt.
type Outcome struct {
	Result    Result
	Status    int               // HTTP status, 0 without a response
	GRPC      int               // gRPC status, -1 if there was none
	Reason    federation.Reason // of a Refused attempt, as far as known
	Err       error
	FirstByte time.Duration // until the response's head; 0 without one
	Total     time.Duration
}

// Picker chooses the way of each attempt. It returns a *Refusal when nothing is left.
type Picker interface {
	Pick(ctx context.Context, m Meta, tried []Tried) (*Leg, error)
}

// Refusal is why a request is not carried out, and what its caller is told.
type Refusal struct {
	Reason  federation.Reason
	Code    problem.Code
	Message string // one line, e.g. "0/4 healthy in 3 clusters"
	Status  int    // HTTP status; 0 means by reason (503, 502, 504, 403, 429)
	Err     error
}

// Error returns code, reason and message.
func (r *Refusal) Error() string {
	s := string(r.Code)
	if r.Reason != "" {
		s += " " + string(r.Reason)
	}
	if r.Message != "" {
		s += ": " + r.Message
	}
	return s
}

// Unwrap returns the cause.
func (r *Refusal) Unwrap() error { return r.Err }
