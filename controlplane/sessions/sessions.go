// SPDX-License-Identifier: Apache-2.0

package sessions

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Config says who may report, and where the snapshot is.
type Config struct {
	// Peer says who calls; required. identity.PeerFromContext knows.
	Peer func(context.Context) (spiffeid.ID, error)
	// Authorize judges whether peer is the proxy that it says it is; required. See Owner.
	Authorize func(ctx context.Context, peer spiffeid.ID, hello *controlpb.SessionHello) error
	Dir       *datadir.Dir // of the snapshot; nil: none
	// PublishEvery is the least time between two views (20 ms). Raising it makes failover later by as much.
	PublishEvery time.Duration
	// SaveEvery is the least time between two snapshots (2 s). Raising it costs freshness after a crash.
	SaveEvery time.Duration
	// KeepFor is how long a session without a report is remembered (a week).
	KeepFor time.Duration
	Now     func() time.Time
	Logger  *slog.Logger
}

// Bounds of what one sidecar may say.
const (
	minInterval     = 100 * time.Millisecond
	maxInterval     = time.Minute
	defaultInterval = 5 * time.Second
	silentAfter     = 3 // intervals
	settleAfter     = 2 // intervals
	helloTimeout    = 10 * time.Second
	// saveHeartbeats is how often the snapshot is written when nothing changes but the times of the last reports.
	saveHeartbeats = time.Minute
	maxInstances   = 4096
	maxDecisions   = 1024
	maxName        = 512
	maxText        = 1024
	maxStateJSON   = 64 << 10
	maxInputsJSON  = 256 << 10
)

// Server receives reports.
type Server struct {
	controlpb.UnimplementedSessionsServer
	cfg     Config
	log     *slog.Logger
	started time.Time

	view    atomic.Pointer[View]
	publish chan struct{} // something changed

	mu      sync.Mutex
	records map[string]*record
	changed chan struct{} // closed when a View is published
	rev     uint64
	decided uint64
	dirty   bool // a view is due
	unsaved bool
	saved   time.Time // of the last snapshot
}

// New reads the snapshot and returns a Server. A damaged snapshot is reported in the log and left out.
func New(cfg Config) (*Server, error) {
	if cfg.Peer == nil || cfg.Authorize == nil {
		return nil, errors.New("sessions: Peer and Authorize are required")
	}
	if cfg.PublishEvery <= 0 {
		cfg.PublishEvery = 20 * time.Millisecond
	}
	if cfg.SaveEvery <= 0 {
		cfg.SaveEvery = 2 * time.Second
	}
	if cfg.KeepFor <= 0 {
		cfg.KeepFor = 7 * 24 * time.Hour
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		cfg: cfg, log: cfg.Logger, started: cfg.Now(), publish: make(chan struct{}, 1), records: map[string]*record{}, changed: make(chan struct{}),
	}
	if cfg.Dir != nil {
		if err := s.load(); err != nil {
			s.log.Error("sessions not loaded", "err", err)
		}
	}
	s.publishNow()
	return s, nil
}

// Register serves on r.
func (s *Server) Register(r grpc.ServiceRegistrar) { controlpb.RegisterSessionsServer(r, s) }

// Run publishes views, notices silence and writes the snapshot until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	sweep := time.NewTimer(s.sweep())
	defer sweep.Stop()
	save := time.NewTicker(s.cfg.SaveEvery)
	defer save.Stop()
	for {
		select {
		case <-ctx.Done():
			s.publishNow()
			s.save()
			return nil
		case <-s.publish:
			s.publishNow()
			pause(ctx, s.cfg.PublishEvery)
		case <-sweep.C:
		case <-save.C:
			s.save()
		}
		sweep.Reset(s.sweep())
	}
}

// View is the newest view.
func (s *Server) View() *View { return s.view.Load() }

// Changed is closed when a newer View is published.
func (s *Server) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// Notify sends a notice ("drain") to a live session. It reports whether there is one.
func (s *Server) Notify(proxy, notice string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.records[proxy]
	if r == nil || r.live == nil {
		return false
	}
	select {
	case r.live.notices <- notice:
	default: // it has one to read already
	}
	return true
}

// Forget drops a proxy that is no longer configured, and ends its session.
func (s *Server) Forget(proxy string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.records[proxy]; r != nil {
		if r.live != nil {
			r.live.end(errors.New("the proxy is no longer configured"))
		}
		delete(s.records, proxy)
		s.changedLocked()
	}
}

// Owner is an Authorize for proxies whose identities are configured: idOf says which ID a proxy has.
func Owner(idOf func(proxy string) (spiffeid.ID, bool)) func(context.Context, spiffeid.ID, *controlpb.SessionHello) error {
	return func(_ context.Context, peer spiffeid.ID, hello *controlpb.SessionHello) error {
		if want, ok := idOf(hello.GetProxy()); !ok || want != peer {
			return problem.New(problem.AccessDenied, "%s is not the identity of proxy %.200q", peer, hello.GetProxy()).
				WithWhy("no Workload of that name has this identity").WithFix("register the workload, then start its sidecar again")
		}
		return nil
	}
}

// live is the open stream of a session.
type live struct {
	notices chan string
	end     context.CancelCauseFunc
}

// Report serves one session.
func (s *Server) Report(stream grpc.BidiStreamingServer[controlpb.SessionReport, controlpb.SessionNotice]) error {
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	peer, err := s.cfg.Peer(ctx)
	if err != nil {
		return status.Error(codes.Unauthenticated, err.Error())
	}
	reports, failed := make(chan *controlpb.SessionReport), make(chan error, 1)
	go receive(ctx, stream, reports, failed) // ends with the stream, which ends when this function returns
	first, err := firstReport(ctx, reports, failed)
	if err != nil {
		return err
	}
	hello := first.GetHello()
	if err := checkHello(hello); err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	if err := s.cfg.Authorize(ctx, peer, hello); err != nil {
		s.log.Warn("session refused", "peer", peer, "proxy", hello.GetProxy(), "err", err)
		if _, ok := status.FromError(err); ok {
			return err
		}
		return wire.ToStatus(problem.From(asDenied(err)))
	}
	l := &live{notices: make(chan string, 1), end: cancel}
	r := s.open(peer, hello, l)
	defer s.close(r, l)
	if err := s.receive(r, l, first); err != nil {
		return err
	}
	for {
		select {
		case q := <-reports:
			if err := s.receive(r, l, q); err != nil {
				return err
			}
		case n := <-l.notices:
			if err := stream.Send(&controlpb.SessionNotice{Notice: n}); err != nil {
				return err
			}
		case err := <-failed:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-ctx.Done():
			return status.Error(codes.Aborted, context.Cause(ctx).Error())
		}
	}
}

func asDenied(err error) error {
	var p *problem.Error
	if errors.As(err, &p) {
		return err
	}
	return problem.New(problem.AccessDenied, "%v", err).Wrap(err)
}

func receive(ctx context.Context, stream grpc.BidiStreamingServer[controlpb.SessionReport, controlpb.SessionNotice],
	reports chan<- *controlpb.SessionReport, failed chan<- error) {
	for {
		q, err := stream.Recv()
		if err != nil {
			failed <- err
			return
		}
		select {
		case reports <- q:
		case <-ctx.Done():
			return
		}
	}
}

func firstReport(ctx context.Context, reports <-chan *controlpb.SessionReport, failed <-chan error) (*controlpb.SessionReport, error) {
	timeout := time.NewTimer(helloTimeout)
	defer timeout.Stop()
	select {
	case q := <-reports:
		return q, nil
	case err := <-failed:
		return nil, err
	case <-timeout.C:
		return nil, status.Error(codes.DeadlineExceeded, "no hello")
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

func checkHello(h *controlpb.SessionHello) error {
	switch {
	case h == nil:
		return errors.New("the first report has no hello")
	case h.GetProxy() == "" || len(h.GetProxy()) > maxName:
		return errors.New("hello without a proxy name, or with one that is too long")
	case len(h.GetInboundAddress()) > maxName || len(h.GetVersion()) > maxName:
		return errors.New("hello with a field that is too long")
	}
	return nil
}

// open makes l the live session of its proxy; an older one ends.
func (s *Server) open(peer spiffeid.ID, hello *controlpb.SessionHello, l *live) *record {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	r := s.records[hello.GetProxy()]
	if r == nil {
		r = newRecord(hello.GetProxy())
		s.records[hello.GetProxy()] = r
	}
	if r.live != nil {
		r.live.end(errors.New("a newer session of the same proxy has taken over"))
	}
	r.live, r.id, r.hello, r.since, r.silent = l, peer, hello, now, false
	r.interval = interval(hello)
	r.lastReport.Store(now.UnixMilli())
	s.changedLocked()
	s.log.Info("session opened", "proxy", r.proxy, "peer", peer)
	return r
}

func interval(h *controlpb.SessionHello) time.Duration {
	if h.GetIntervalMs() <= 0 {
		return defaultInterval
	}
	return min(max(time.Duration(min(h.GetIntervalMs(), maxInterval.Milliseconds()))*time.Millisecond, minInterval), maxInterval)
}

func (s *Server) close(r *record, l *live) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.live != l {
		return // another has taken over
	}
	r.live, r.silent = nil, true
	if s.records[r.proxy] == r {
		s.changedLocked()
		s.log.Info("session lost", "proxy", r.proxy)
	}
}

// receive takes one report in.
func (s *Server) receive(r *record, l *live, q *controlpb.SessionReport) error {
	if err := checkReport(q); err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.live != l {
		return status.Error(codes.Aborted, "another session has taken over")
	}
	now := s.cfg.Now()
	r.lastReport.Store(now.UnixMilli())
	if now.Sub(s.saved) > saveHeartbeats {
		s.unsaved = true
	}
	changed := r.silent || r.draining != q.GetDraining()
	r.silent, r.draining = false, q.GetDraining()
	if q.GetInstancesPresent() || len(q.GetInstances()) > 0 {
		changed = r.report(q.GetInstances()) || changed
	}
	if changed {
		s.changedLocked()
	}
	for _, d := range q.GetDecisions() {
		name, err := wire.ServiceFromProto(d.GetService())
		if err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		if len(r.decisions) >= maxDecisions && r.decisions[name] == nil {
			return status.Errorf(codes.ResourceExhausted, "more than %d decisions", maxDecisions)
		}
		r.decisions = maps.Clone(r.decisions) // the old map is in a view
		r.decisions[name] = &Decision{Report: d, Received: now}
		s.decided++
		s.dirtyLocked()
	}
	return nil
}

func checkReport(q *controlpb.SessionReport) error {
	if len(q.GetInstances()) > maxInstances || len(q.GetDecisions()) > maxDecisions {
		return errors.New("a report with too many instances or decisions")
	}
	for _, i := range q.GetInstances() {
		if i.GetWorkload() == "" || len(i.GetWorkload()) > maxName || len(i.GetPortName()) > maxName || len(i.GetReason()) > maxText {
			return errors.New("an instance without a workload, or with a field that is too long")
		}
	}
	for _, d := range q.GetDecisions() {
		if len(d.GetStateJson()) > maxStateJSON || len(d.GetInputsJson()) > maxInputsJSON {
			return errors.New("a decision whose state or inputs are too large")
		}
	}
	return nil
}

// changedLocked counts a change of sessions or instances.
func (s *Server) changedLocked() {
	s.rev++
	s.dirtyLocked()
}

func (s *Server) dirtyLocked() {
	s.dirty, s.unsaved = true, true
	select {
	case s.publish <- struct{}{}:
	default:
	}
}

func (s *Server) publishNow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.dirty && s.view.Load() != nil {
		return
	}
	s.dirty = false
	now := s.cfg.Now()
	v := &View{Revision: s.rev, Decided: s.decided, Sessions: make(map[string]*Session, len(s.records))}
	for proxy, r := range s.records {
		held := r.restored != nil && now.Before(s.settled(r))
		v.Settling = v.Settling || held
		v.Sessions[proxy] = r.session(held)
	}
	s.view.Store(v)
	close(s.changed)
	s.changed = make(chan struct{})
}

// settled is when a session of before the restart counts as it is reported.
func (s *Server) settled(r *record) time.Time { return s.started.Add(settleAfter * r.interval) }

// sweep marks what became silent, settled or forgotten, and returns when to look again.
func (s *Server) sweep() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	next := time.Minute
	soon := func(at time.Time) bool {
		wait := at.Sub(now)
		if wait > 0 {
			next = min(next, wait)
		}
		return wait <= 0
	}
	for proxy, r := range s.records {
		last := time.UnixMilli(r.lastReport.Load())
		if !r.silent && soon(last.Add(silentAfter*r.interval)) {
			r.silent = true
			s.changedLocked()
			s.log.Info("session silent", "proxy", proxy, "since", last)
		}
		if r.restored != nil && soon(s.settled(r)) {
			r.restored = nil
			s.changedLocked()
		}
		if r.live == nil && soon(last.Add(s.cfg.KeepFor)) {
			delete(s.records, proxy)
			s.changedLocked()
		}
	}
	return max(next, time.Millisecond)
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
