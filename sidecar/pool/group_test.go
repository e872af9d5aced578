// SPDX-License-Identifier: Apache-2.0

package pool_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/sidecar/pool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// net is a world of endpoints that can be made to fail.
type world struct {
	mu    sync.Mutex
	fail  map[string]error
	delay time.Duration
	dials []pool.Want
	keys  []string // remote: instances, taken in turn unless avoided
	turn  int
	conns []*conn
}

type conn struct {
	key     string
	once    sync.Once
	done    chan struct{}
	retired bool
	full    bool
}

func (c *conn) Usable() bool {
	select {
	case <-c.done:
		return false
	default:
		return !c.full
	}
}
func (c *conn) Retire()               { c.retired = true; c.Close() }
func (c *conn) Close() error          { c.once.Do(func() { close(c.done) }); return nil }
func (c *conn) Done() <-chan struct{} { return c.done }

func (w *world) dial(ctx context.Context, want pool.Want) (pool.Conn, string, error) {
	if w.delay > 0 {
		select {
		case <-time.After(w.delay):
		case <-ctx.Done():
			return nil, "", ctx.Err()
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dials = append(w.dials, want)
	key := want.Key
	if len(w.keys) > 0 {
		for range w.keys {
			key = w.keys[w.turn%len(w.keys)]
			w.turn++
			if !slices.Contains(want.Avoid, key) {
				break
			}
		}
	}
	if err := w.fail[key]; err != nil {
		return nil, "", err
	}
	c := &conn{key: key, done: make(chan struct{})}
	w.conns = append(w.conns, c)
	return c, key, nil
}

func (w *world) set(key string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail[key] = err
}

func (w *world) dialed() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.dials)
}

func local(t *testing.T, w *world, keys ...string) *pool.Group {
	g := pool.New(pool.Config{Dial: w.dial})
	var list []pool.Endpoint
	for _, k := range keys {
		list = append(list, pool.Endpoint{Key: k, Weight: 1})
	}
	g.SetEndpoints(list)
	t.Cleanup(g.Close)
	return g
}

func remote(t *testing.T, w *world, healthy int) *pool.Group {
	g := pool.New(pool.Config{Dial: w.dial, Remote: true})
	g.SetHealthy(healthy)
	t.Cleanup(g.Close)
	return g
}

func use(t *testing.T, g *pool.Group, o pool.Outcome) string {
	t.Helper()
	l, err := g.Get(t.Context(), nil, false)
	if err != nil {
		t.Fatal(err)
	}
	l.Done(o, nil)
	return l.Key
}

func unreachable(key string) error {
	return &pool.Failure{Key: key, Reason: federation.UpstreamReset, Err: errors.New("connect refused")}
}

func TestLocalSharesDialsAndConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{fail: map[string]error{}, delay: time.Second}
		g := local(t, w, "a")
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() { use(t, g, pool.OK) })
		}
		wg.Wait()
		if n := w.dialed(); n != 1 {
			t.Errorf("%d dials for 20 waiters", n)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		g.RetireIf(func(pool.Conn) bool { return true })
		synctest.Wait()
		if _, err := g.Get(ctx, nil, false); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a waiter outlived its context: %v", err)
		}
		time.Sleep(2 * time.Second)
		if use(t, g, pool.OK); w.dialed() != 2 {
			t.Errorf("the dial was lost with its first waiter: %d dials", w.dialed())
		}
	})
}

func TestUnreachableEndpointIsLeftOutAndProbed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{fail: map[string]error{}}
		g := local(t, w, "a", "b")
		w.set("a", unreachable("a"))
		failed := 0
		for range 50 {
			l, err := g.Get(t.Context(), nil, false)
			synctest.Wait()
			if err != nil {
				failed++
				continue
			}
			l.Done(pool.OK, nil)
		}
		if failed > 1 {
			t.Errorf("%d calls had to find out that a is gone", failed)
		}
		e := g.Evidence()
		if e.Down || e.Ejected != 1 || len(e.Ejections) != 1 || e.Ejections[0].Key != "a" {
			t.Errorf("evidence %+v", e)
		}
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if e := g.Evidence(); e.Ejected != 1 {
			t.Errorf("came back without being reached: %+v", e)
		}
		w.set("a", nil)
		time.Sleep(7 * time.Second)
		synctest.Wait()
		if e := g.Evidence(); e.Ejected != 0 {
			t.Errorf("7 s after it can be reached again: %+v", e)
		}
	})
}

// TestNobodyWaitsForASlowDial: while one endpoint takes its time to be dialled, calls go to the other.
func TestNobodyWaitsForASlowDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{fail: map[string]error{}, delay: time.Second}
		g := local(t, w, "a", "b")
		first := use(t, g, pool.OK)
		began := time.Now()
		for range 50 {
			if k := use(t, g, pool.OK); k != first {
				t.Fatalf("got %s, which is still being dialled", k)
			}
		}
		if d := time.Since(began); d != 0 {
			t.Errorf("calls waited %v", d)
		}
		time.Sleep(2 * time.Second)
		if _, keys := g.Len(); keys != 2 {
			t.Errorf("connections to %d endpoints", keys)
		}
	})
}

func TestAllUnreachableIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{fail: map[string]error{"a": unreachable("a"), "b": unreachable("b")}}
		g := local(t, w, "a", "b")
		for range 3 {
			if _, err := g.Get(t.Context(), nil, false); err == nil {
				t.Fatal("got a connection")
			}
		}
		e := g.Evidence()
		if !e.Down || e.Reason != federation.UpstreamReset {
			t.Fatalf("evidence %+v", e)
		}
		before := w.dialed()
		if _, err := g.Get(t.Context(), nil, false); !errors.Is(err, pool.ErrNone) || w.dialed() != before {
			t.Errorf("tried again at once: %v", err)
		}
		if _, err := g.Get(t.Context(), nil, true); err == nil || w.dialed() == before {
			t.Errorf("force did not try: %v", err)
		}
	})
}

func TestStreakNeverEjectsTheLastLocalOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{fail: map[string]error{}}
		g := local(t, w, "a", "b")
		for range 100 {
			use(t, g, pool.ServerError)
		}
		e := g.Evidence()
		if e.Down || e.Ejected != 1 || e.Ejections[0].Reason != federation.OutlierEjected {
			t.Fatalf("evidence %+v", e)
		}
		time.Sleep(31 * time.Second)
		if e := g.Evidence(); e.Ejected != 0 {
			t.Errorf("after 31 s: %+v", e)
		}
	})
}

// A connection that breaks under many requests is one event: a callee that was restarted, or a tunnel that was cut for a moment,
// must not be out for as long as one that fails request after request.
func TestBrokenConnectionCountsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{fail: map[string]error{}, keys: []string{"h0@gw"}}
		g := remote(t, w, 1)
		for round := range 5 {
			if e := g.Evidence(); e.Ejected != 0 {
				t.Fatalf("after %d broken connections: %+v", round, e)
			}
			var leases []*pool.Lease
			for range 50 {
				l, err := g.Get(t.Context(), nil, false)
				if err != nil {
					t.Fatal(err)
				}
				leases = append(leases, l)
			}
			leases[0].Conn.Close()
			for _, l := range leases {
				l.Done(pool.Reset, nil)
			}
			synctest.Wait()
		}
		if e := g.Evidence(); e.Ejected != 1 {
			t.Errorf("after 5 running: %+v", e)
		}
	})
}

func TestRemoteGrowsToDifferentInstances(t *testing.T) {
	for _, tc := range []struct{ healthy, instances, want int }{{1, 8, 1}, {3, 8, 3}, {8, 8, 4}, {8, 2, 2}, {8, 1, 1}} {
		t.Run(fmt.Sprintf("healthy=%d instances=%d", tc.healthy, tc.instances), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &world{fail: map[string]error{}}
				for i := range tc.instances {
					w.keys = append(w.keys, fmt.Sprintf("h%d@gw", i))
				}
				g := remote(t, w, tc.healthy)
				for range 50 {
					use(t, g, pool.OK)
					synctest.Wait()
				}
				if conns, keys := g.Len(); conns != tc.want || keys != tc.want {
					t.Errorf("%d connections to %d instances, want %d", conns, keys, tc.want)
				}
				if n := w.dialed(); n > tc.want+1 {
					t.Errorf("%d dials", n)
				}
			})
		})
	}
}

func TestRemoteClusterIsDownOnlyWhenAllHandlesAgree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{fail: map[string]error{}, keys: []string{"h0@gw", "h1@gw"}}
		g := remote(t, w, 2)
		for range 10 {
			use(t, g, pool.OK)
			synctest.Wait()
		}
		fail := func(key string) {
			for range 5 {
				l, err := g.Get(t.Context(), func(k string) bool { return k != key }, false)
				if err != nil {
					t.Fatal(err)
				}
				l.Done(pool.ServerError, nil)
			}
		}
		fail("h0@gw")
		if e := g.Evidence(); e.Down || e.Ejected != 1 {
			t.Fatalf("one of two: %+v", e)
		}
		fail("h1@gw")
		e := g.Evidence()
		if !e.Down || e.Reason != federation.OutlierEjected {
			t.Fatalf("both: %+v", e)
		}
		time.Sleep(31 * time.Second)
		if e := g.Evidence(); e.Down {
			t.Errorf("after 31 s: %+v", e)
		}
	})
}

func TestTypedReplySpeaksForTheCluster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := &pool.Failure{Cluster: true, Reason: federation.NoEndpoints, Err: errors.New("no_healthy_instance")}
		w := &world{fail: map[string]error{"h0@gw": refused}, keys: []string{"h0@gw"}}
		g := remote(t, w, 1)
		if _, err := g.Get(t.Context(), nil, false); err == nil {
			t.Fatal("got a connection")
		}
		if e := g.Evidence(); !e.Down || e.Reason != federation.NoEndpoints {
			t.Fatalf("evidence %+v", e)
		}
		w.set("h0@gw", nil)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if e := g.Evidence(); e.Down {
			t.Fatalf("a probe got through, still %+v", e)
		}
		if conns, _ := g.Len(); conns != 1 {
			t.Errorf("the probe's connection was not kept")
		}
	})
}

func TestNeutralFailuresBlameNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		neutral := &pool.Failure{Neutral: true, Reason: federation.PeerUnreachable, Err: errors.New("no session")}
		w := &world{fail: map[string]error{"h0@gw": neutral}, keys: []string{"h0@gw"}}
		g := remote(t, w, 1)
		for range 5 {
			if _, err := g.Get(t.Context(), nil, false); err == nil {
				t.Fatal("got a connection")
			}
		}
		if e := g.Evidence(); e.Down || e.Ejected != 0 {
			t.Fatalf("evidence %+v", e)
		}
	})
}

func TestDrainingEndpointIsRetired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{fail: map[string]error{}}
		g := local(t, w, "a")
		use(t, g, pool.OK)
		g.SetEndpoints([]pool.Endpoint{{Key: "b", Weight: 1}})
		synctest.Wait()
		if !w.conns[0].retired {
			t.Error("the connection to an endpoint that is gone was kept")
		}
		if k := use(t, g, pool.OK); k != "b" {
			t.Errorf("got %s", k)
		}
		g.SetEndpoints([]pool.Endpoint{{Key: "b", Weight: 1, Draining: true}, {Key: "c", Weight: 1}})
		for range 10 {
			if k := use(t, g, pool.OK); k != "c" {
				t.Errorf("got %s", k)
			}
		}
	})
}

func TestNearIsPreferredWhileFit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{fail: map[string]error{}}
		g := local(t, w)
		g.SetEndpoints([]pool.Endpoint{{Key: "near", Weight: 1, Near: true}, {Key: "far", Weight: 1}})
		for range 20 {
			if k := use(t, g, pool.OK); k != "near" {
				t.Fatalf("got %s", k)
			}
		}
		g.SetEndpoints([]pool.Endpoint{{Key: "near", Near: true}, {Key: "far", Weight: 1}})
		if k := use(t, g, pool.OK); k != "far" {
			t.Fatalf("got %s", k)
		}
	})
}

// TestFastOneGetsMore: of two endpoints, one ten times slower, the fast one carries most of the work.
func TestFastOneGetsMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{fail: map[string]error{}}
		g := local(t, w, "fast", "slow")
		var mu sync.Mutex
		count := map[string]int{}
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 100 {
					l, err := g.Get(t.Context(), nil, false)
					if err != nil {
						t.Error(err)
						return
					}
					d := 10 * time.Millisecond
					if l.Key == "slow" {
						d *= 10
					}
					time.Sleep(d)
					l.Done(pool.OK, nil)
					mu.Lock()
					count[l.Key]++
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if count["fast"] < 2*count["slow"] {
			t.Errorf("got %v", count)
		}
	})
}
