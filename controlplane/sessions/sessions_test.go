// SPDX-License-Identifier: Apache-2.0

package sessions_test

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/sessions"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var owners = map[string]spiffeid.ID{
	"shop/web-1":  id("spiffe://us-east.acme/ns/shop/sa/web"),
	"shop/cart-1": id("spiffe://us-east.acme/ns/shop/sa/cart"),
}

func id(s string) spiffeid.ID {
	parsed, err := spiffeid.Parse(s)
	if err != nil {
		panic(err)
	}
	return parsed
}

// caller is the key of the SPIFFE ID that a fake stream's context carries.
type caller struct{}

// stream is a sidecar's end of one session, without a network.
type stream struct {
	grpc.ServerStream
	ctx     context.Context
	cancel  context.CancelFunc
	in      chan *controlpb.SessionReport
	notices chan string
	ended   chan error
}

func (s *stream) Context() context.Context { return s.ctx }

func (s *stream) Recv() (*controlpb.SessionReport, error) {
	select {
	case r, ok := <-s.in:
		if !ok {
			return nil, io.EOF
		}
		return r, nil
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
}

func (s *stream) Send(n *controlpb.SessionNotice) error {
	select {
	case s.notices <- n.GetNotice():
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

// report opens a session for proxy as peer.
func report(server *sessions.Server, peer spiffeid.ID, hello *controlpb.SessionHello) *stream {
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), caller{}, peer))
	s := &stream{ctx: ctx, cancel: cancel, in: make(chan *controlpb.SessionReport), notices: make(chan string, 4), ended: make(chan error, 1)}
	go func() {
		err := server.Report(s)
		s.cancel()
		s.ended <- err
	}()
	select {
	case s.in <- &controlpb.SessionReport{Hello: hello}:
	case <-s.ctx.Done():
	}
	synctest.Wait()
	return s
}

func (s *stream) say(t *testing.T, verdicts ...string) {
	t.Helper()
	r := &controlpb.SessionReport{InstancesPresent: true}
	for _, v := range verdicts {
		name, verdict, _ := strings.Cut(v, "=")
		r.Instances = append(r.Instances, &controlpb.InstanceHealth{Workload: name, Health: map[string]controlpb.Health{
			"up": controlpb.Health_HEALTH_HEALTHY, "down": controlpb.Health_HEALTH_UNHEALTHY, "?": controlpb.Health_HEALTH_UNKNOWN,
		}[verdict]})
	}
	s.send(t, r)
}

func (s *stream) send(t *testing.T, r *controlpb.SessionReport) {
	t.Helper()
	select {
	case s.in <- r:
	case err := <-s.ended:
		t.Fatalf("the session has ended: %v", err)
	}
	settle()
}

// settle lets a change be published.
func settle() {
	time.Sleep(50 * time.Millisecond) // of the bubble's clock
	synctest.Wait()
}

// start runs a server until the returned function is called.
func start(t *testing.T, dir *datadir.Dir) (*sessions.Server, func()) {
	t.Helper()
	s, err := sessions.New(sessions.Config{
		Dir: dir,
		Peer: func(ctx context.Context) (spiffeid.ID, error) {
			return ctx.Value(caller{}).(spiffeid.ID), nil
		},
		Authorize: sessions.Owner(func(proxy string) (spiffeid.ID, bool) { id, ok := owners[proxy]; return id, ok }),
	})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return s, func() {
		cancel()
		must(t, <-done)
		synctest.Wait()
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newDir(t *testing.T) *datadir.Dir {
	t.Helper()
	d, err := datadir.Create(filepath.Join(t.TempDir(), "data"))
	must(t, err)
	return d
}

func hello(proxy string) *controlpb.SessionHello {
	return &controlpb.SessionHello{
		Proxy: proxy, InboundAddress: "127.0.0.1:15008", IntervalMs: 1000, Version: "v1", Locality: &controlpb.Locality{Region: "us", Zone: "a"},
	}
}

// instances renders what is in force: "a=up b=down* (silent)", the star for stale.
func instances(s *sessions.Server, proxy string) string {
	session := s.View().Get(proxy)
	if session == nil {
		return "none"
	}
	var parts []string
	for _, i := range session.Instances {
		p := i.Workload + map[controlpb.Health]string{
			controlpb.Health_HEALTH_HEALTHY: "=up", controlpb.Health_HEALTH_UNHEALTHY: "=down", controlpb.Health_HEALTH_UNKNOWN: "=?",
		}[i.Health]
		if i.Stale {
			p += "*"
		}
		parts = append(parts, p)
	}
	if session.Silent {
		parts = append(parts, "(silent)")
	}
	return strings.Join(parts, " ")
}

func expect(t *testing.T, s *sessions.Server, why, want string) {
	t.Helper()
	if have := instances(s, "shop/web-1"); have != want {
		t.Fatalf("%s: %q, want %q", why, have, want)
	}
}

func TestVerdicts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, stop := start(t, nil)
		defer stop()
		expect(t, s, "before anything", "none")
		w := report(s, owners["shop/web-1"], hello("shop/web-1"))
		settle()
		expect(t, s, "hello alone", "")
		w.say(t, "a=?", "b=?")
		expect(t, s, "no verdict yet", "a=? b=?")
		changed := s.Changed()
		w.say(t, "a=up", "b=down")
		expect(t, s, "first verdicts", "a=up b=down")
		select {
		case <-changed:
		default:
			t.Fatal("a verdict is a change")
		}
		w.say(t, "a=?", "b=?")
		expect(t, s, "unknown keeps the last verdict", "a=up* b=down*")
		w.say(t, "a=down")
		expect(t, s, "a full list", "a=down")
		w.say(t)
		expect(t, s, "an empty full list", "")
		w.say(t, "a=up")

		revision := s.View().Revision
		for range 5 {
			time.Sleep(time.Second)
			w.say(t, "a=up")
		}
		if s.View().Revision != revision {
			t.Fatal("a report without news is a change")
		}
		if age := time.Since(s.View().Get("shop/web-1").LastReport()); age > 100*time.Millisecond {
			t.Fatalf("last report %v ago", age)
		}
		time.Sleep(2900 * time.Millisecond)
		synctest.Wait()
		expect(t, s, "quiet for less than three intervals", "a=up")
		time.Sleep(200 * time.Millisecond)
		settle()
		expect(t, s, "quiet for three intervals", "a=up (silent)")
		w.say(t, "a=up")
		expect(t, s, "speaks again", "a=up")
		session := s.View().Get("shop/web-1")
		if !session.Live || session.InboundAddress != "127.0.0.1:15008" || session.Locality.String() != "us/a" || session.ID != owners["shop/web-1"] {
			t.Fatalf("session %+v", session)
		}
		close(w.in)
		must(t, <-w.ended)
		settle()
		expect(t, s, "stream lost", "a=up (silent)")
		if s.View().Get("shop/web-1").Live {
			t.Fatal("live without a stream")
		}
		s.Forget("shop/web-1")
		settle()
		expect(t, s, "forgotten", "none")
	})
}

func TestNewestSessionWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, stop := start(t, nil)
		defer stop()
		first := report(s, owners["shop/web-1"], hello("shop/web-1"))
		first.say(t, "a=up")
		again := hello("shop/web-1")
		again.InboundAddress = "127.0.0.1:25008"
		second := report(s, owners["shop/web-1"], again)
		if err := <-first.ended; status.Code(err) != codes.Aborted {
			t.Fatalf("the older session ended with %v", err)
		}
		settle()
		expect(t, s, "taken over", "a=up")
		if got := s.View().Get("shop/web-1"); !got.Live || got.InboundAddress != "127.0.0.1:25008" {
			t.Fatalf("session %+v", got)
		}
		if s.Notify("shop/cart-1", "drain") || !s.Notify("shop/web-1", "drain") {
			t.Fatal("notices go to live sessions only")
		}
		if n := <-second.notices; n != "drain" {
			t.Fatalf("notice %q", n)
		}
		second.send(t, &controlpb.SessionReport{Draining: true})
		if !s.View().Get("shop/web-1").Draining {
			t.Fatal("draining was not noticed")
		}
		close(second.in)
		must(t, <-second.ended)
	})
}

func TestRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, stop := start(t, nil)
		defer stop()
		long := hello("shop/web-1")
		long.InboundAddress = strings.Repeat("x", 1000)
		for _, tt := range []struct {
			name  string
			peer  spiffeid.ID
			hello *controlpb.SessionHello
			want  codes.Code
		}{
			{"another's proxy", owners["shop/cart-1"], hello("shop/web-1"), codes.PermissionDenied},
			{"an unknown proxy", owners["shop/web-1"], hello("shop/web-9"), codes.PermissionDenied},
			{"no hello", owners["shop/web-1"], nil, codes.InvalidArgument},
			{"no name", owners["shop/web-1"], hello(""), codes.InvalidArgument},
			{"too long", owners["shop/web-1"], long, codes.InvalidArgument},
		} {
			w := report(s, tt.peer, tt.hello)
			err := <-w.ended
			if status.Code(err) != tt.want {
				t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
			}
			if tt.want == codes.PermissionDenied && !problem.Is(wire.FromStatus(err), problem.AccessDenied) {
				t.Errorf("%s: %v carries no problem", tt.name, err)
			}
		}
		w := report(s, owners["shop/web-1"], hello("shop/web-1"))
		w.in <- &controlpb.SessionReport{Decisions: []*controlpb.DecisionReport{{Service: &controlpb.ServiceRef{Namespace: "Shop", Name: "x"}}}}
		if err := <-w.ended; status.Code(err) != codes.InvalidArgument {
			t.Errorf("a decision about no service: %v", err)
		}
		// Silence instead of a hello.
		ctx, cancel := context.WithCancel(context.WithValue(context.Background(), caller{}, owners["shop/web-1"]))
		silent := &stream{ctx: ctx, cancel: cancel, in: make(chan *controlpb.SessionReport)}
		if err := s.Report(silent); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("silence: %v", err)
		}
		cancel()
		synctest.Wait()
	})
}

func TestDecisions(t *testing.T) {
	dir := newDir(t)
	checkout := federation.ServiceName{Namespace: "shop", Name: "checkout"}
	synctest.Test(t, func(t *testing.T) {
		s, stop := start(t, dir)
		w := report(s, owners["shop/web-1"], hello("shop/web-1"))
		before := s.View()
		for i := range 3 {
			w.send(t, &controlpb.SessionReport{Decisions: []*controlpb.DecisionReport{{
				Service: wire.ServiceToProto(checkout), Reason: fmt.Sprint("r", i), StateJson: []byte(`{}`),
			}}})
		}
		callers := s.View().Callers(checkout)
		if len(callers) != 1 || callers["shop/web-1"].Report.GetReason() != "r2" || s.View().Decided-before.Decided != 3 {
			t.Fatalf("callers %v", callers)
		}
		if len(before.Callers(checkout)) != 0 {
			t.Fatal("an older view has changed")
		}
		received := callers["shop/web-1"].Received
		close(w.in)
		must(t, <-w.ended)
		stop()

		s, stop = start(t, dir)
		defer stop()
		d := s.View().Get("shop/web-1").Decisions[checkout]
		if d == nil || d.Report.GetReason() != "r2" || string(d.Report.GetStateJson()) != "{}" || d.Received.UnixMilli() != received.UnixMilli() {
			t.Fatalf("after a restart: %+v", d)
		}
	})
}

// TestRestartLowersNothing is the rule that a restarted control plane lowers no count until two full report intervals have
// passed.
func TestRestartLowersNothing(t *testing.T) {
	dir := newDir(t)
	synctest.Test(t, func(t *testing.T) {
		s, stop := start(t, dir)
		w := report(s, owners["shop/web-1"], hello("shop/web-1"))
		w.say(t, "a=up", "b=up", "c=down")
		w.cancel()
		<-w.ended
		stop()

		s, stop = start(t, dir)
		expect(t, s, "restarted", "a=up b=up c=down (silent)")
		if !s.View().Settling {
			t.Fatal("not settling")
		}
		w = report(s, owners["shop/web-1"], hello("shop/web-1"))
		w.say(t, "b=down", "c=up") // a is missing, b is worse, c is better
		expect(t, s, "settling", "a=up* b=up* c=up")
		w.cancel()
		<-w.ended
		stop()

		// Restarted once more before it had settled.
		s, stop = start(t, dir)
		defer stop()
		expect(t, s, "restarted again", "a=up b=up c=up (silent)")
		w = report(s, owners["shop/web-1"], hello("shop/web-1"))
		w.say(t, "b=down", "c=up")
		expect(t, s, "settling again", "a=up* b=up* c=up")
		time.Sleep(1800 * time.Millisecond)
		synctest.Wait()
		expect(t, s, "just before two intervals", "a=up* b=up* c=up")
		time.Sleep(200 * time.Millisecond)
		settle()
		expect(t, s, "two intervals have passed", "b=down c=up")
		if s.View().Settling {
			t.Fatal("still settling")
		}
		w.cancel()
		<-w.ended
	})
}

func TestForgottenAfterAWeek(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, stop := start(t, nil)
		defer stop()
		w := report(s, owners["shop/web-1"], hello("shop/web-1"))
		w.say(t, "a=up")
		w.cancel()
		<-w.ended
		time.Sleep(6 * 24 * time.Hour)
		settle()
		expect(t, s, "six days later", "a=up (silent)")
		time.Sleep(25 * time.Hour)
		settle()
		expect(t, s, "a week later", "none")
	})
}
