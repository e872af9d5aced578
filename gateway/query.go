// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	maxQuery       = 256<<10 + 4096
	maxAnswer      = 1<<20 + 4096
	queryTimeout   = 10 * time.Second
	maxQueryTime   = time.Minute
	queriesPerPeer = 16
)

// query asks a peer's control plane through its gateway.
func (g *Gateway) query(ctx context.Context, q *controlpb.Query) *controlpb.Answer {
	td, err := spiffeid.ParseTrustDomain(q.PeerTrustDomain)
	if err != nil {
		return answerError(problem.ClusterUnreachable, "no such peer")
	}
	ctx, cancel := context.WithTimeout(ctx, queryTime(q.TimeoutMs))
	defer cancel()
	s := g.awaitSession(ctx, td)
	if s == nil {
		why := g.tun.LastError(td)
		if why == "" {
			why = "no tunnel is up"
		}
		return answerError(problem.ClusterUnreachable, fmt.Sprintf("no tunnel to %s: %s", td, why))
	}
	began := time.Now()
	a, err := exchange(ctx, s, q)
	if err != nil {
		return answerError(problem.ClusterUnreachable, fmt.Sprintf("query to %s: %v", td, err))
	}
	a.ElapsedSeconds, a.Transport = time.Since(began).Seconds(), s.Transport()
	return a
}

func queryTime(ms int64) time.Duration {
	if ms <= 0 {
		return queryTimeout
	}
	return min(time.Duration(ms)*time.Millisecond, maxQueryTime)
}

// awaitSession waits for a session to td until ctx ends.
func (g *Gateway) awaitSession(ctx context.Context, td spiffeid.TrustDomain, not ...*tunnel.Session) *tunnel.Session {
	for {
		changed := g.tun.Changed()
		if s := g.tun.Pick(td, not...); s != nil {
			return s
		}
		if s := g.tun.Pick(td); s != nil {
			return s
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

func exchange(ctx context.Context, s *tunnel.Session, q *controlpb.Query) (*controlpb.Answer, error) {
	deadline, _ := ctx.Deadline()
	b, err := proto.Marshal(&controlpb.Query{Method: q.Method, Body: q.Body, TimeoutMs: time.Until(deadline).Milliseconds()})
	if err != nil {
		return nil, err
	}
	if len(b) > maxQuery {
		return nil, fmt.Errorf("query of %d bytes", len(b))
	}
	st, err := s.OpenQuery(ctx)
	if err != nil {
		return nil, err
	}
	defer st.Reset()
	stop := context.AfterFunc(ctx, st.Reset)
	defer stop()
	if err := tunnel.WriteFrame(st, b); err != nil {
		return nil, err
	}
	if b, err = tunnel.ReadFrame(st, maxAnswer); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, err
	}
	a := &controlpb.Answer{}
	if err := proto.Unmarshal(b, a); err != nil {
		return nil, err
	}
	st.Close()
	return a, nil
}

// serveQuery passes one question of a peer up, and the answer back.
func (g *Gateway) serveQuery(ctx context.Context, s *tunnel.Session, st tunnel.Stream) {
	_ = st.SetReadDeadline(time.Now().Add(queryTimeout))
	b, err := tunnel.ReadFrame(st, maxQuery)
	if err != nil {
		return
	}
	q := &controlpb.Query{}
	if err := proto.Unmarshal(b, q); err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, queryTime(q.TimeoutMs))
	defer cancel()
	a := g.link.forward(ctx, s.Peer(), q)
	a.Id = 0
	b, err = proto.Marshal(a)
	if err != nil || len(b) > maxAnswer {
		b, _ = proto.Marshal(answerError(problem.Internal, "answer too large"))
	}
	_ = st.SetWriteDeadline(time.Now().Add(queryTimeout))
	if tunnel.WriteFrame(st, b) == nil {
		_ = st.CloseWrite()
		_, _ = tunnel.ReadFrame(st, 0) // until the asker has it
	}
}

// waiting are a peer's questions that the control plane has not answered yet.
type waiting struct {
	mu      sync.Mutex
	next    uint64
	open    map[uint64]chan *controlpb.Answer
	perPeer map[spiffeid.TrustDomain]int
}

func (w *waiting) add(td spiffeid.TrustDomain) (id uint64, ch chan *controlpb.Answer, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.open == nil {
		w.open, w.perPeer = make(map[uint64]chan *controlpb.Answer), make(map[spiffeid.TrustDomain]int)
	}
	if w.perPeer[td] >= queriesPerPeer {
		return 0, nil, false
	}
	w.next++
	w.perPeer[td]++
	ch = make(chan *controlpb.Answer, 1)
	w.open[w.next] = ch
	return w.next, ch, true
}

func (w *waiting) remove(id uint64, td spiffeid.TrustDomain) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.open, id)
	if w.perPeer[td]--; w.perPeer[td] <= 0 {
		delete(w.perPeer, td)
	}
}

func (w *waiting) answer(a *controlpb.Answer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if ch := w.open[a.GetId()]; ch != nil {
		select {
		case ch <- a:
		default:
		}
	}
}

// forward asks our control plane on behalf of td, which the tunnel has verified.
func (l *link) forward(ctx context.Context, td spiffeid.TrustDomain, q *controlpb.Query) *controlpb.Answer {
	id, ch, ok := l.queries.add(td)
	if !ok {
		return answerError(problem.ClusterUnreachable, "too many queries at a time")
	}
	defer l.queries.remove(id, td)
	deadline, _ := ctx.Deadline()
	err := l.send(ctx, &controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Query{Query: &controlpb.Query{
		Id: id, PeerTrustDomain: td.String(), Method: q.Method, Body: q.Body, TimeoutMs: time.Until(deadline).Milliseconds()}}})
	if err != nil {
		return answerError(problem.NoControlPlane, "the far gateway has no link to its control plane")
	}
	select {
	case a := <-ch:
		return a
	case <-ctx.Done():
		return answerError(problem.NoControlPlane, "the far control plane did not answer in time")
	}
}
