// SPDX-License-Identifier: Apache-2.0

package drain_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/strait-mesh/strait/internal/drain"
)

func TestDrainWaitsThenCuts(t *testing.T) {
	cases := []struct {
		name     string
		lives    []time.Duration // how long each member lives unless cut
		grace    time.Duration
		cancel   time.Duration // of the context; 0 = never
		took     time.Duration
		cut      int
		stubborn time.Duration // how long a cut takes
	}{
		{name: "empty", grace: time.Second},
		{name: "all end in time", lives: []time.Duration{time.Second, 2 * time.Second}, grace: 5 * time.Second, took: 2 * time.Second},
		{name: "one is cut", lives: []time.Duration{time.Second, time.Hour}, grace: 5 * time.Second, took: 5 * time.Second, cut: 1},
		{name: "context ends first", lives: []time.Duration{time.Hour}, grace: time.Hour, cancel: time.Second, took: time.Second, cut: 1},
		{name: "waits for what was cut", lives: []time.Duration{time.Hour}, grace: time.Second, stubborn: time.Second, took: 2 * time.Second, cut: 1},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var g drain.Group
				for _, life := range c.lives {
					stop := make(chan struct{})
					done, ok := g.Add(func() { close(stop) })
					if !ok {
						t.Fatal("refused before the drain")
					}
					go func() {
						select {
						case <-time.After(life):
						case <-stop:
							<-time.After(c.stubborn)
						}
						done()
						done()
					}()
				}
				ctx := t.Context()
				if c.cancel > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, c.cancel)
					defer cancel()
				}
				began := time.Now()
				if cut := g.Drain(ctx, c.grace); cut != c.cut || time.Since(began) != c.took {
					t.Errorf("cut %d after %v, want %d after %v", cut, time.Since(began), c.cut, c.took)
				}
				if _, ok := g.Add(func() {}); ok || g.Len() != 0 {
					t.Error("a drained group takes members")
				}
			})
		})
	}
}
