// SPDX-License-Identifier: Apache-2.0

package withdrawal_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

func domain(t *testing.T, s string) spiffeid.TrustDomain {
	t.Helper()
	td, err := spiffeid.ParseTrustDomain(s)
	if err != nil {
		t.Fatal(err)
	}
	return td
}

func TestJudgeEndsExactlyTheRefused(t *testing.T) {
	r := withdrawal.New(withdrawal.Config{})
	bad, good := domain(t, "bad.acme"), domain(t, "good.acme")
	ended := map[string]string{}
	for _, name := range []string{"a", "b"} {
		r.Add(withdrawal.Subject{Peer: bad}, func(reason string) { ended[name] = reason })
	}
	r.Add(withdrawal.Subject{Peer: good}, func(string) { t.Error("the honest peer's was ended") })
	removed := r.Add(withdrawal.Subject{Peer: bad}, func(string) { t.Error("what had ended by itself was ended") })
	removed()
	removed()

	judge := func(s withdrawal.Subject) (string, bool) { return "trust_refused", s.Peer != bad }
	if n := r.Judge(judge); n != 2 || ended["a"] != "trust_refused" || ended["b"] != "trust_refused" {
		t.Errorf("ended %d: %v", n, ended)
	}
	if n := r.Judge(judge); n != 0 || r.Len() != 1 || len(r.Snapshot()) != 1 {
		t.Errorf("second judgement ended %d; %d stand", n, r.Len())
	}
}

func TestExpiryEndsOnTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := withdrawal.New(withdrawal.Config{})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		start := time.Now()
		var mu sync.Mutex
		at := map[time.Duration]time.Duration{}
		for _, d := range []time.Duration{36 * time.Hour, 90 * time.Second, 2 * time.Second} {
			r.Add(withdrawal.Subject{NotAfter: start.Add(d)}, func(reason string) {
				mu.Lock()
				defer mu.Unlock()
				if reason != withdrawal.ReasonExpired {
					t.Errorf("reason %q", reason)
				}
				at[d] = time.Since(start)
			})
		}
		early := r.Add(withdrawal.Subject{NotAfter: start.Add(time.Minute)}, func(string) { t.Error("removed one expired") })
		early()
		time.Sleep(37 * time.Hour)
		synctest.Wait()
		for d, got := range at {
			if got != d {
				t.Errorf("ended after %v, want %v", got, d)
			}
		}
		if len(at) != 3 || r.Len() != 0 {
			t.Errorf("%d ended, %d stand", len(at), r.Len())
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestConcurrentUse(t *testing.T) {
	r := withdrawal.New(withdrawal.Config{})
	bad := domain(t, "bad.acme")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 500 {
				remove := r.Add(withdrawal.Subject{Peer: bad, NotAfter: time.Now().Add(time.Hour)}, func(string) {})
				remove()
			}
		})
	}
	wg.Go(func() {
		for range 200 {
			r.Judge(func(s withdrawal.Subject) (string, bool) { return "x", s.Peer != bad })
		}
	})
	wg.Wait()
	if r.Len() != 0 {
		t.Errorf("%d stand", r.Len())
	}
}

// TestClockStep: fault row F25. When the wall clock jumps past a certificate's end, what stands on it is ended within a second;
// what had ended already when it was added is ended at once.
func TestClockStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var step time.Duration
		now := func() time.Time {
			mu.Lock()
			defer mu.Unlock()
			return time.Now().Add(step)
		}
		r := withdrawal.New(withdrawal.Config{Now: now})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		ended := make(chan string, 2)
		r.Add(withdrawal.Subject{NotAfter: now().Add(24 * time.Hour)}, func(reason string) { ended <- reason })
		r.Add(withdrawal.Subject{}, func(string) { t.Error("ended what has no end") })
		time.Sleep(10 * time.Minute)
		mu.Lock()
		step = 25 * time.Hour
		mu.Unlock()
		stepped := time.Now()
		if reason := <-ended; reason != withdrawal.ReasonExpired || time.Since(stepped) > time.Second {
			t.Errorf("%s after %v", reason, time.Since(stepped))
		}
		late := time.Now()
		r.Add(withdrawal.Subject{NotAfter: now().Add(-time.Hour)}, func(reason string) { ended <- reason })
		if <-ended; time.Since(late) != 0 {
			t.Errorf("what had ended stood for %v", time.Since(late))
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestCallbacksMayUseTheRegistry: neither a judgement nor an end runs under the lock.
func TestCallbacksMayUseTheRegistry(t *testing.T) {
	r := withdrawal.New(withdrawal.Config{})
	ended := 0
	var remove func()
	remove = r.Add(withdrawal.Subject{}, func(string) {
		ended++
		remove()
		r.Add(withdrawal.Subject{Export: "later"}, func(string) {})
	})
	n := r.Judge(func(s withdrawal.Subject) (string, bool) { return "x", r.Len() > 1 || s.Export == "later" })
	if n != 1 || ended != 1 || r.Len() != 1 {
		t.Errorf("judged %d, ended %d, %d stand", n, ended, r.Len())
	}
}
