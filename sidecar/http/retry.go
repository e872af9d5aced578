// SPDX-License-Identifier: Apache-2.0

package http

import (
	"context"
	"errors"
	"fmt"
	nethttp "net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/span"
)

// attempt is one way tried.
type attempt struct {
	call      *outCall
	leg       *Leg
	number    int
	span      *span.Active
	start     time.Time
	firstByte time.Time
	cancel    context.CancelFunc
	resp      *nethttp.Response
	once      sync.Once
}

// verdict is what an attempt without a deliverable answer means.
type verdict struct {
	ok     bool // deliver it
	safe   bool // the application saw nothing: any request may be sent again
	result Result
	reason federation.Reason
	err    error
}

// attempts sends the request until an answer can be delivered, or says why not. The attempt it returns is not ended.
func (call *outCall) attempts(parent span.Context) (*attempt, *Refusal) {
	left := call.o.cfg.Attempts - 1
	if n, ok := parent.Retries(); ok {
		left = min(left, n) // what the chain before us has left over
	}
	var tried []Tried
	var held *attempt // an application's own 502, 503 or 504: its answer if nothing better comes
	var last verdict
	giveUp := func(refusal *Refusal) (*attempt, *Refusal) {
		if held != nil && !call.gone() {
			return held, nil
		}
		if held != nil {
			held.discard()
		}
		return nil, refusal
	}
	for {
		leg, err := call.o.cfg.Picker.Pick(call.ctx, call.meta, tried)
		if err != nil || leg == nil {
			if len(tried) > 0 {
				call.o.cfg.Metrics.Retry(metric.RetryNoWay, call.meta.Service.String(), "")
			}
			return giveUp(call.nothingLeft(err, last, len(tried)))
		}
		a := call.begin(leg, left)
		v := a.send()
		if v.ok {
			if held != nil {
				held.discard()
			}
			return a, nil
		}
		if a.resp != nil && v.result == Answered {
			if held != nil {
				held.discard()
			}
			held = a
			call.last = a
		} else {
			a.end(v.result, v.reason, v.err)
		}
		last = v
		tried = append(tried, Tried{Cluster: leg.Cluster, Instance: leg.Instance})
		if refusal := call.mayRetry(v, &left, leg); refusal != nil {
			return giveUp(refusal)
		}
		call.span.Event(span.EventRetry, span.String("cause", v.cause()), span.String(span.DstCluster, string(leg.Cluster)))
	}
}

// mayRetry takes a retry out of the budget, or says what the caller is told instead.
func (call *outCall) mayRetry(v verdict, left *int, leg *Leg) *Refusal {
	refusal := call.failure(v)
	switch {
	case v.result == Cancelled || v.result == TimedOut || call.ctx.Err() != nil:
		return refusal
	case !v.safe && !call.meta.Idempotent, !call.body.replayable(), *left <= 0:
		return refusal
	case !call.o.cfg.Budget.Retry():
		call.o.cfg.Metrics.Retry(metric.RetryBudgetEmpty, call.meta.Service.String(), string(leg.Cluster))
		refusal.Reason, refusal.Status = federation.RetryBudgetEmpty, refusal.status()
		return refusal
	}
	*left--
	call.o.cfg.Metrics.Retry(metric.RetryUsed, call.meta.Service.String(), string(leg.Cluster))
	return nil
}

// begin starts an attempt's span.
func (call *outCall) begin(leg *Leg, left int) *attempt {
	cfg := &call.o.cfg
	a := &attempt{call: call, leg: leg, number: call.tries, start: cfg.Now()}
	call.tries++
	call.last = a
	a.span = cfg.Recorder.StartAt(call.span.Context(), methodLabel(call.r.Method)+" "+call.meta.Service.Name, span.Client, a.start)
	a.span.SetRetries(left)
	if s := a.span; s.Recording() {
		s.Set(span.String(span.HopKind, span.SidecarOut), span.Int(span.HopIndex, s.Context().Hop), span.String(span.HTTPMethod, methodLabel(call.r.Method)),
			span.String(span.SrcService, cfg.Self.Service), span.String(span.SrcCluster, string(cfg.Self.Cluster)),
			span.String(span.DstService, call.meta.Service.String()), span.String(span.DstCluster, string(leg.Cluster)),
			span.String(span.NetworkPeer, leg.Address), span.String(span.Instance, leg.Instance),
			span.String(span.DecisionReason, string(leg.Reason)), span.Int(span.DecisionTier, leg.Tier),
			span.String(span.DecisionPolicy, leg.Policy), span.Int(span.DecisionRevision, int(leg.Revision)),
			span.Strings(span.DecisionCandidates, leg.Candidates), span.Int(span.RetryBudgetLeft, cfg.Budget.Left()),
			span.Int(span.HTTPResendCount, a.number), span.Millis(span.QueueDuration, a.start.Sub(call.start)))
		if !leg.PeerID.IsZero() {
			s.Set(span.String(span.MTLSPeerID, leg.PeerID.String()))
		}
		if left, ok := deadlineLeft(call.ctx, call.r.Header, a.start.Sub(call.start)); ok {
			s.Set(span.Millis(span.DeadlineLeft, left))
		}
	}
	return a
}

// send sends the request once and judges what came.
func (a *attempt) send() verdict {
	call := a.call
	if a.leg.Err != nil || a.leg.Conn == nil {
		err := a.leg.Err
		if err == nil {
			err = errors.New("no connection")
		}
		if call.ctx.Err() != nil {
			return a.judgeError(err) // it was ours to end, not a way that does not work
		}
		return verdict{safe: true, result: Unsent, reason: legReason(err), err: err}
	}
	var ctx context.Context
	ctx, a.cancel = context.WithCancel(call.ctx)
	out, err := call.outgoing(ctx, call.path)
	if err != nil {
		return verdict{result: Cancelled, reason: federation.ConfigMissing, err: err} // a path that does not parse twice: never seen
	}
	next := a.span.Context()
	if a.leg.Remote {
		next = next.WithHop(next.Hop+2, next.Cluster) // the two gateways, which cannot count for themselves
	}
	next.Inject(out.Header)
	if expect := call.r.Header["Expect"]; len(expect) == 1 && call.body != nil && strings.EqualFold(expect[0], "100-continue") {
		out.Header[headerExpect] = expect
		out.Header["Expect"] = expect
	} else {
		delete(out.Header, "Expect")
	}
	if call.meta.Upgrade != "" {
		out.Header["Connection"] = []string{"Upgrade"}
		out.Header["Upgrade"] = []string{call.meta.Upgrade}
	}
	if a.leg.Begin != nil {
		a.leg.Begin(a.span.Context())
	}
	resp, err := a.leg.Conn.RoundTrip(out)
	if err != nil {
		return a.judgeError(err)
	}
	a.resp, a.firstByte = resp, call.o.cfg.Now()
	return a.judgeResponse()
}

func (a *attempt) judgeError(err error) verdict {
	call := a.call
	switch {
	case call.gone():
		return verdict{result: Cancelled, err: err}
	case call.body.broken() != nil:
		return verdict{result: Cancelled, err: fmt.Errorf("request body: %w", call.body.broken())}
	case call.ctx.Err() != nil, call.overdue():
		return verdict{result: TimedOut, reason: federation.DeadlineExceeded, err: err}
	case errors.Is(err, errUnsent):
		return verdict{safe: true, result: Unsent, reason: federation.UpstreamReset, err: err}
	}
	return verdict{result: Broken, reason: federation.UpstreamReset, err: err}
}

func (a *attempt) judgeResponse() verdict {
	h := a.resp.Header
	if values := h[headerRefused]; len(values) > 0 {
		return verdict{safe: true, result: Refused, reason: refusedReason(values[0]), err: fmt.Errorf("refused: %.64s", values[0])}
	}
	switch a.resp.StatusCode {
	case nethttp.StatusSwitchingProtocols:
		if a.call.meta.Upgrade == "" {
			return verdict{result: Broken, reason: federation.UpstreamReset, err: errNotSwitched}
		}
	case nethttp.StatusBadGateway, nethttp.StatusServiceUnavailable, nethttp.StatusGatewayTimeout:
		if a.call.meta.Idempotent {
			return verdict{result: Answered, err: fmt.Errorf("status %d", a.resp.StatusCode)}
		}
	}
	// A gRPC status in the head is a response without messages: nothing of it was delivered yet.
	if grpcStatusOf(h, a.call.grpc) == grpcUnavailable && a.call.meta.Idempotent {
		return verdict{result: Answered, err: errors.New("gRPC status UNAVAILABLE")}
	}
	return verdict{ok: true, result: Answered}
}

// refusedReason maps the word of a callee's refusal to a reason.
func refusedReason(word string) federation.Reason {
	if r, err := federation.ParseReason(word); err == nil {
		return r
	}
	return federation.NoEndpoints // no_healthy_instance, and words of later versions
}

func legReason(err error) federation.Reason {
	var refusal *Refusal
	if errors.As(err, &refusal) && refusal.Reason != "" {
		return refusal.Reason
	}
	return federation.PeerUnreachable
}

func (v verdict) cause() string {
	if v.reason != "" {
		return v.result.String() + " " + string(v.reason)
	}
	return v.err.Error()
}

// end closes the attempt's span and reports its outcome; only the first call counts.
func (a *attempt) end(result Result, reason federation.Reason, err error) {
	a.once.Do(func() {
		now := a.call.o.cfg.Now()
		out := Outcome{Result: result, GRPC: -1, Reason: reason, Err: err, Total: now.Sub(a.start)}
		if a.resp != nil {
			out.Status, out.FirstByte = a.resp.StatusCode, a.firstByte.Sub(a.start)
			if out.GRPC = grpcStatusOf(a.resp.Trailer, a.call.grpc); out.GRPC < 0 {
				out.GRPC = grpcStatusOf(a.resp.Header, a.call.grpc)
			}
			a.span.Set(span.Int(span.HTTPStatus, out.Status))
			if out.GRPC >= 0 {
				a.span.Set(span.Int(span.RPCStatus, out.GRPC))
			}
			a.resp.Body.Close()
		}
		if a.cancel != nil {
			a.cancel()
		}
		switch {
		case result != Answered:
			message := string(reason)
			if err != nil {
				message = strings.TrimPrefix(message+": "+err.Error(), ": ")
			}
			a.span.Fail(result.String(), message)
		case out.Status >= 500:
			a.span.Fail(strconv.Itoa(out.Status), "")
		case out.GRPC > grpcOK:
			a.span.Fail("grpc_"+strconv.Itoa(out.GRPC), "")
		}
		a.span.EndAt(now)
		if a.leg.Done != nil {
			a.leg.Done(out)
		}
	})
}

// discard ends an attempt whose answer is not delivered.
func (a *attempt) discard() {
	drainBody(a.resp.Body)
	a.end(Answered, "", nil)
}

// nothingLeft is the answer when no way is left.
func (call *outCall) nothingLeft(err error, last verdict, tried int) *Refusal {
	var refusal *Refusal
	switch {
	case call.body.broken() != nil:
		return call.badBody()
	case call.ctx.Err() != nil && !call.gone():
		return call.failure(verdict{result: TimedOut})
	case tried > 0 && last.result == Broken:
		return call.failure(last)
	case errors.As(err, &refusal):
		return refusal
	case tried > 0:
		return call.failure(last)
	case err == nil:
		err = errors.New("nowhere to go")
	}
	return &Refusal{Reason: federation.NoEndpoints, Code: problem.NoEndpoints, Message: err.Error(), Err: err}
}

// failure is the answer when the last attempt failed and may not be repeated.
func (call *outCall) failure(v verdict) *Refusal {
	where := call.meta.Service.String()
	if call.last != nil && !call.last.leg.Cluster.IsZero() {
		where += " in " + string(call.last.leg.Cluster)
	}
	attempts := fmt.Sprintf(", attempt %d", call.tries)
	switch v.result {
	case TimedOut:
		return &Refusal{Reason: federation.DeadlineExceeded, Code: problem.DeadlineExceeded, Message: where + " did not answer in time" + attempts, Err: v.err}
	case Refused, Unsent:
		return &Refusal{Reason: v.reason, Code: problem.NoEndpoints, Status: nethttp.StatusServiceUnavailable,
			Message: fmt.Sprintf("%s: %s%s", where, v.cause(), attempts), Err: v.err}
	case Cancelled:
		return call.badBody()
	}
	return &Refusal{Reason: federation.UpstreamReset, Code: problem.UpstreamReset, Status: nethttp.StatusBadGateway,
		Message: where + ": the connection broke before a response" + attempts, Err: v.err}
}

// deadlineLeft is what the caller's deadline leaves: our own, or grpc-timeout, which travels on untouched.
func deadlineLeft(ctx context.Context, h nethttp.Header, elapsed time.Duration) (time.Duration, bool) {
	if at, ok := ctx.Deadline(); ok {
		return time.Until(at), true
	}
	if values := h["Grpc-Timeout"]; len(values) == 1 {
		if d, ok := parseGRPCTimeout(values[0]); ok {
			return d - elapsed, true
		}
	}
	return 0, false
}

// parseGRPCTimeout reads TimeoutValue TimeoutUnit (gRPC over HTTP/2).
func parseGRPCTimeout(s string) (time.Duration, bool) {
	if len(s) < 2 || len(s) > 9 {
		return 0, false
	}
	unit, ok := map[byte]time.Duration{'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond,
		'n': time.Nanosecond}[s[len(s)-1]]
	n, err := strconv.ParseUint(s[:len(s)-1], 10, 32)
	if !ok || err != nil {
		return 0, false
	}
	return time.Duration(min(n, uint64(int64(1)<<62)/uint64(unit))) * unit, true
}
