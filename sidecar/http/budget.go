// SPDX-License-Identifier: Apache-2.0

package http

import (
	"sync"
	"time"
)

const budgetSeconds = 10

// Budget is the retry budget of one sidecar: over the last 10 s at most a fifth of the requests may be retried, but 10
// a second always may. Without it a failing callee receives a multiple of its load when it can bear it least. Safe for
// concurrent use; make it with NewBudget.
type Budget struct {
	now func() time.Time

	mu      sync.Mutex
	second  int64                  // of the newest slot
	request [budgetSeconds]float64 // by second modulo budgetSeconds
	retry   [budgetSeconds]float64
}

const (
	budgetShare = 0.2
	budgetFloor = 10
)

// NewBudget returns an unused budget; nil means time.Now.
func NewBudget(now func() time.Time) *Budget {
	if now == nil {
		now = time.Now
	}
	return &Budget{now: now}
}

// Request counts an original request.
func (b *Budget) Request() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.request[b.advanceLocked()]++
}

// Retry takes one retry out of the budget, or reports that it is empty.
func (b *Budget) Retry() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	slot := b.advanceLocked()
	if b.retry[slot] >= budgetFloor && b.leftLocked() < 1 {
		return false
	}
	b.retry[slot]++
	return true
}

// Left is how many retries are possible now.
func (b *Budget) Left() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	slot := b.advanceLocked()
	return int(max(b.leftLocked(), budgetFloor-b.retry[slot], 0))
}

// Ratio is the used part of the budget, 0 to 1.
func (b *Budget) Ratio() float64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	slot := b.advanceLocked()
	left := max(b.leftLocked(), budgetFloor-b.retry[slot], 0)
	used := 0.0
	for _, n := range b.retry {
		used += n
	}
	if used == 0 {
		return 0
	}
	return used / (used + left)
}

func (b *Budget) leftLocked() float64 {
	var requests, retries float64
	for i := range b.request {
		requests += b.request[i]
		retries += b.retry[i]
	}
	return budgetShare*requests - retries
}

// advanceLocked forgets what is older than the window and returns the present slot. A clock that went back counts into
// the newest slot.
func (b *Budget) advanceLocked() int {
	now := b.now().Unix()
	if now > b.second {
		for s := max(b.second+1, now-budgetSeconds+1); s <= now; s++ {
			b.request[s%budgetSeconds], b.retry[s%budgetSeconds] = 0, 0
		}
		b.second = now
	}
	return int(b.second % budgetSeconds)
}
