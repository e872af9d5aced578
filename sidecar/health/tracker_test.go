// SPDX-License-Identifier: Apache-2.0

package health_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/strait-mesh/strait/sidecar/health"
)

// app is a set of applications whose checks answer what the test says.
type app struct {
	mu     sync.Mutex
	answer map[string]error
	checks int
}

func (a *app) set(workload string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answer[workload] = err
}

func (a *app) check(_ context.Context, t health.Target) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.checks++
	return a.answer[t.Workload]
}

const port = "http.checkout.shop.svc.us-east.acme"

func target(workload string) health.Target {
	return health.Target{Key: health.Key{Port: port, Workload: workload}, Address: "127.0.0.1:1"}
}

var errRefused = fmt.Errorf("dial: %w", syscall.ECONNREFUSED)

// start runs a tracker over a in the present bubble.
func start(t *testing.T, a *app, workloads ...string) *health.Tracker {
	t.Helper()
	tr := health.New(health.Config{Check: a.check})
	var list []health.Target
	for _, w := range workloads {
		list = append(list, target(w))
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); tr.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	tr.Set(list)
	return tr
}

func state(tr *health.Tracker, workload string) (health.State, string) {
	for _, s := range tr.Snapshot() {
		if s.Workload == workload {
			return s.State, s.Reason
		}
	}
	return -1, "absent"
}

func TestVerdicts(t *testing.T) {
	timeout := os.ErrDeadlineExceeded
	type step struct {
		after  time.Duration
		err    error // of checks from then on
		want   health.State
		reason string
		why    string
	}
	for name, steps := range map[string][]step{
		"refused at once, two successes to return": {
			{0, nil, health.Healthy, "", "the first check counts at once"},
			{1200 * time.Millisecond, errRefused, health.Healthy, "", "nothing was checked since"},
			{1200 * time.Millisecond, nil, health.Unhealthy, "connect refused", "one refused check is enough"},
			{1200 * time.Millisecond, nil, health.Unhealthy, "connect refused", "one success is not"},
			{1200 * time.Millisecond, nil, health.Healthy, "", "two are"},
		},
		"timeouts need two": {
			{0, nil, health.Healthy, "", "first"},
			{500 * time.Millisecond, timeout, health.Healthy, "", "not checked yet"},
			{1000 * time.Millisecond, timeout, health.Healthy, "", "one timeout"},
			{1100 * time.Millisecond, timeout, health.Unhealthy, "check timed out", "two"},
		},
		"a first failure counts": {
			{0, timeout, health.Unknown, "", "the instance appeared a moment ago"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := &app{answer: map[string]error{"w": steps[0].err}}
				tr := start(t, a, "w")
				synctest.Wait()
				if steps[0].err != nil {
					if s, r := state(tr, "w"); s != health.Unhealthy {
						t.Fatalf("after a failed first check: %v %q", s, r)
					}
					return
				}
				for _, st := range steps {
					time.Sleep(st.after)
					synctest.Wait()
					s, r := state(tr, "w")
					if s != st.want || r != st.reason {
						t.Fatalf("%s: %v %q, want %v %q", st.why, s, r, st.want, st.reason)
					}
					a.set("w", st.err)
				}
			})
		})
	}
}

func TestLiveTrafficMarksAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &app{answer: map[string]error{}}
		tr := start(t, a, "a", "b")
		synctest.Wait()
		l, err := tr.Pick(port, func(w string) bool { return w != "a" })
		if err != nil {
			t.Fatal(err)
		}
		l.Done(health.NotReached, errRefused)
		if s, _ := state(tr, "a"); s != health.Unhealthy {
			t.Fatalf("after a failed connection: %v", s)
		}
		for range 20 {
			l, err := tr.Pick(port, nil)
			if err != nil || l.Workload != "b" {
				t.Fatalf("picked %v, %v", l, err)
			}
			l.Done(health.Succeeded, nil)
		}
	})
}

func TestStreakEjectsButNeverTheLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &app{answer: map[string]error{}}
		tr := start(t, a, "a", "b")
		synctest.Wait()
		fail := func(workload string, n int) {
			for range n {
				l, err := tr.Pick(port, func(w string) bool { return w != workload })
				if err != nil {
					t.Fatal(err)
				}
				l.Done(health.ServerError, nil)
			}
		}
		fail("a", 4)
		if s, _ := state(tr, "a"); s != health.Healthy {
			t.Fatalf("after four errors: %v", s)
		}
		fail("a", 1)
		if s, r := state(tr, "a"); s != health.Ejected || r != health.ReasonOutlier {
			t.Fatalf("after five errors: %v %q", s, r)
		}
		fail("b", 20)
		if s, _ := state(tr, "b"); s != health.Healthy {
			t.Fatalf("the last instance was taken out: %v", s)
		}
		time.Sleep(29 * time.Second)
		synctest.Wait()
		if s, _ := state(tr, "a"); s != health.Ejected {
			t.Fatalf("after 29 s: %v", s)
		}
		time.Sleep(2500 * time.Millisecond)
		synctest.Wait()
		if s, _ := state(tr, "a"); s != health.Healthy {
			t.Fatalf("after 31.5 s: %v", s)
		}
	})
}

func TestSetKeepsVerdictsAndStopsChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &app{answer: map[string]error{"a": errRefused}}
		tr := start(t, a, "a", "b")
		synctest.Wait()
		tr.Set([]health.Target{target("a")})
		synctest.Wait()
		if s, _ := state(tr, "a"); s != health.Unhealthy {
			t.Fatalf("the verdict was lost: %v", s)
		}
		if _, err := tr.Pick(port, nil); !errors.Is(err, health.ErrNone) {
			t.Fatalf("picked from what is gone: %v", err)
		}
		a.mu.Lock()
		a.checks = 0
		a.mu.Unlock()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.checks < 8 || a.checks > 12 {
			t.Errorf("%d checks of one instance in 10 s", a.checks)
		}
	})
}

func TestDraining(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &app{answer: map[string]error{}}
		tr := start(t, a)
		d, b := target("d"), target("b")
		d.Draining = true
		tr.Set([]health.Target{d, b})
		synctest.Wait()
		for range 10 {
			if l, err := tr.Pick(port, nil); err != nil || l.Workload != "b" {
				t.Fatalf("picked %v, %v", l, err)
			}
		}
		if c := tr.Counts(port); c != (health.Counts{Healthy: 1}) {
			t.Errorf("counts %+v", c)
		}
		tr.Set([]health.Target{d})
		synctest.Wait()
		if l, err := tr.Pick(port, nil); err != nil || l.Workload != "d" {
			t.Fatalf("with nothing else the draining one serves: %v, %v", l, err)
		}
	})
}

func TestProbe(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ok":
		case "/moved":
			http.Redirect(w, r, "/bad", http.StatusFound)
		default:
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer srv.Close()
	addr := srv.Listener.Addr().String()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	var status *health.StatusError
	for _, tc := range []struct {
		name, addr, path string
		ok, definite     bool
	}{
		{"connect", addr, "", true, false},
		{"get", addr, "/ok", true, false},
		{"redirects are not followed", addr, "/moved", true, false},
		{"status", addr, "/bad", false, false},
		{"nothing listens", closed.Addr().String(), "", false, true},
		{"nothing listens, get", closed.Addr().String(), "/ok", false, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			err := health.Probe(ctx, health.Target{Address: tc.addr, Path: tc.path})
			if (err == nil) != tc.ok || health.Definite(err) != tc.definite {
				t.Errorf("err %v, definite %v", err, health.Definite(err))
			}
			if tc.path == "/bad" && !errors.As(err, &status) {
				t.Errorf("err %v is no StatusError", err)
			}
		})
	}
}
