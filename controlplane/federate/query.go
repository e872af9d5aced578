// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Built-in methods.
const (
	methodProbe     = "probe"
	methodProbeBack = "probe-back"
	methodHeadOf    = "head-of"
	methodIntroduce = "introduce"
	methodLeave     = "leave"
)

// Bounds of a query.
const (
	maxQueryBody   = 256 << 10
	maxAnswerBody  = 1 << 20
	defaultTimeout = 10 * time.Second
	maxTimeout     = 60 * time.Second
)

// Handler answers a peer's query. An error that is a *problem.Error keeps its code, any other becomes STR-9001 without details.
type Handler func(ctx context.Context, from spiffeid.TrustDomain, body []byte) ([]byte, error)

// Handle registers the handler of a method; built in are probe, probe-back, head-of, introduce and leave. Only ready peers reach it.
func (m *Manager) Handle(method string, h Handler) { m.handlers.Store(method, h) }

func (m *Manager) builtins() {
	m.Handle(methodProbe, m.handleProbe)
	m.Handle(methodProbeBack, m.handleProbeBack)
	m.Handle(methodHeadOf, m.handleHeadOf)
	m.Handle(methodIntroduce, m.handleIntroduce)
	m.Handle(methodLeave, m.handleLeave)
}

// Reply is a peer's answer.
type Reply struct {
	Body      []byte
	Elapsed   time.Duration // as the own gateway measured
	Transport string
	Gateway   string // own, that carried it
}

// Ask asks a peer's control plane through the tunnel. Without a live tunnel, or when it dies meanwhile: STR-2101. A refusal by the
// peer keeps its code.
func (m *Manager) Ask(ctx context.Context, td spiffeid.TrustDomain, method string, body []byte) (*Reply, error) {
	if len(body) > maxQueryBody {
		return nil, problem.New(problem.Internal, "query of %d bytes; at most %d", len(body), maxQueryBody)
	}
	ctx, cancel := context.WithTimeout(ctx, maxTimeout)
	defer cancel()
	cluster := td.String()
	if p := m.View().Peer(td); p != nil {
		cluster = p.Cluster.String()
	}
	links := m.linksTo(td)
	cause := errors.New("no tunnel is up")
	for _, l := range links {
		r, err := l.ask(ctx, td, method, body)
		switch {
		case err == nil:
			return r, nil
		case errors.Is(err, errLinkEnded):
			cause = err
		case ctx.Err() != nil:
			return nil, problem.New(problem.ClusterUnreachable, "%s did not answer %s in time", cluster, method).WithCluster(cluster).Retry().Wrap(err)
		default:
			return nil, err
		}
	}
	return nil, problem.New(problem.ClusterUnreachable, "no live tunnel leads to %s", cluster).WithCluster(cluster).Retry().Wrap(cause)
}

// linksTo returns the links whose gateways have a live tunnel to td, the fastest first.
func (m *Manager) linksTo(td spiffeid.TrustDomain) []*link {
	m.mu.Lock()
	defer m.mu.Unlock()
	tunnels := slices.DeleteFunc(m.tunnelsLocked(td), func(t Tunnel) bool { return t.GetState() != "up" })
	slices.SortStableFunc(tunnels, func(a, b Tunnel) int { return cmp.Compare(a.GetRttSeconds(), b.GetRttSeconds()) })
	var out []*link
	for _, t := range tunnels {
		if l := m.links[t.Gateway]; l != nil && !slices.Contains(out, l) {
			out = append(out, l)
		}
	}
	return out
}

func (l *link) ask(ctx context.Context, td spiffeid.TrustDomain, method string, body []byte) (*Reply, error) {
	got := make(chan *controlpb.Answer, 1)
	l.mu.Lock()
	l.lastID++
	id := l.lastID
	l.pending[id] = got
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		delete(l.pending, id)
		l.mu.Unlock()
	}()
	timeout := defaultTimeout
	if d, ok := ctx.Deadline(); ok {
		timeout = min(time.Until(d), maxTimeout)
	}
	q := &controlpb.Query{Id: id, PeerTrustDomain: td.String(), Method: method, Body: body, TimeoutMs: timeout.Milliseconds()}
	if err := l.put(ctx, &controlpb.ControlMessage{Message: &controlpb.ControlMessage_Query{Query: q}}); err != nil {
		return nil, err
	}
	select {
	case a := <-got:
		if code := a.GetErrorCode(); code != "" {
			return nil, answerError(code, a.GetErrorMessage())
		}
		return &Reply{
			Body: a.GetBody(), Transport: a.GetTransport(), Gateway: l.name,
			Elapsed: time.Duration(a.GetElapsedSeconds() * float64(time.Second)),
		}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-l.ctx.Done():
		return nil, errLinkEnded
	}
}

func answerError(code, message string) error {
	c := problem.Code(code)
	if _, known := problem.Lookup(c); !known {
		c = problem.Internal
	}
	e := problem.New(c, "%.512s", printable(message))
	if c == problem.ClusterUnreachable {
		e = e.Retry()
	}
	return e
}

// printable keeps what a terminal may show.
func printable(s string) string {
	out := []rune(s)
	for i, r := range out {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			out[i] = ' '
		}
	}
	return string(out)
}

// answered hands an answer to whoever asked.
func (l *link) answered(a *controlpb.Answer) {
	l.mu.Lock()
	got := l.pending[a.GetId()]
	delete(l.pending, a.GetId())
	l.mu.Unlock()
	if got != nil {
		got <- a
	}
}

// question answers a peer's query in a goroutine of its own, if a slot is free.
func (l *link) question(q *controlpb.Query) {
	select {
	case l.queries <- struct{}{}:
		l.start(func() {
			defer func() { <-l.queries }()
			l.answer(q)
		})
	default:
		l.start(func() {
			l.reply(q, nil, problem.New(problem.ClusterUnreachable, "too many questions at once").Retry())
		})
	}
}

func (l *link) answer(q *controlpb.Query) {
	timeout := time.Duration(q.GetTimeoutMs()) * time.Millisecond
	if timeout <= 0 || timeout > maxTimeout {
		timeout = defaultTimeout
	}
	ctx, cancel := context.WithTimeout(l.ctx, timeout)
	defer cancel()
	body, err := l.m.handle(ctx, q)
	l.reply(q, body, err)
	if err == nil && q.GetMethod() == methodLeave {
		if td, ok := parseTD(q.GetPeerTrustDomain()); ok {
			l.m.left(td) // after the answer is on its way
		}
	}
}

func (l *link) reply(q *controlpb.Query, body []byte, err error) {
	a := &controlpb.Answer{Id: q.GetId(), Body: body}
	if len(body) > maxAnswerBody {
		a.Body, err = nil, problem.New(problem.Internal, "answer of %d bytes; at most %d", len(body), maxAnswerBody)
	}
	if err != nil {
		var p *problem.Error
		if !errors.As(err, &p) {
			l.m.log.Warn("query failed", "peer", q.GetPeerTrustDomain(), "method", q.GetMethod(), "error", err)
			p = problem.New(problem.Internal, "the control plane could not answer; its log says why")
		}
		a.ErrorCode, a.ErrorMessage, a.Body = string(p.Code), p.What, nil
	}
	_ = l.put(l.ctx, &controlpb.ControlMessage{Message: &controlpb.ControlMessage_Answer{Answer: a}}) // fails only when the link ends
}

// handle judges who asks before anything of the body is looked at.
func (m *Manager) handle(ctx context.Context, q *controlpb.Query) ([]byte, error) {
	td, ok := parseTD(q.GetPeerTrustDomain())
	if !ok || len(q.GetBody()) > maxQueryBody {
		return nil, problem.New(problem.TrustRefused, "malformed query")
	}
	m.mu.Lock()
	p := m.peers[td]
	state := State("")
	if p != nil {
		state = p.rec.State
	}
	m.mu.Unlock()
	switch {
	case state == StateReady, state == StateJoining && joiningMethod(q.GetMethod()):
	case state == StateJoining:
		return nil, problem.New(problem.ProbeFailed, "%s is joining here; probes have not crossed both ways yet", td).Retry()
	default:
		return nil, problem.New(problem.TrustRefused, "%s is not a ready member here", td)
	}
	h, ok := m.handlers.Load(q.GetMethod())
	if !ok {
		return nil, problem.New(problem.VersionSkew, "no method %.40q", printable(q.GetMethod()))
	}
	return h.(Handler)(ctx, td, q.GetBody())
}

// forNow reports whether the same question may be answered later: no tunnel, no answer in time, or the peer sees us joining still.
func forNow(err error) bool {
	return problem.Is(err, problem.ClusterUnreachable) || problem.Is(err, problem.ProbeFailed) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

func joiningMethod(method string) bool {
	return method == methodProbe || method == methodProbeBack || method == methodLeave
}
