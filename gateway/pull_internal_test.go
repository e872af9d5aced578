// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestHintWithoutUpdate: a subscription that brings nothing although gossip says that there is something is given up after a moment; one
// that brings it, sooner or later than the hint, is kept.
func TestHintWithoutUpdate(t *testing.T) {
	for _, tt := range []struct {
		name   string
		update time.Duration // after the hint; 1 h: none
		lags   bool
	}{
		{"nothing comes", time.Hour, true},
		{"it came just before", -time.Second, false},
		{"it comes just after", time.Second / 2, false},
		{"it came long before", -time.Minute, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, p := &Gateway{}, &pull{kick: make(chan struct{}, 1), again: make(chan struct{}, 1)}
				var taken atomic.Int64
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				start := time.Now()
				time.AfterFunc(time.Minute+tt.update, func() {
					if tt.update < time.Hour {
						taken.Store(time.Now().UnixNano())
					}
				})
				time.AfterFunc(time.Minute, func() { p.kick <- struct{}{} })
				time.AfterFunc(3*time.Minute, cancel)
				lags := g.supervisePull(ctx, p, &taken)
				if lags != tt.lags {
					t.Errorf("lags %v", lags)
				}
				if took := time.Since(start); tt.lags && took != time.Minute+hintPatience || !tt.lags && took != 3*time.Minute {
					t.Errorf("returned after %v", took)
				}
			})
		})
	}
}
