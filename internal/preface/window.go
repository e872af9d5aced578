// SPDX-License-Identifier: Apache-2.0

package preface

import "sync"

const windowSize = 4096

// Window accepts each counter of one session once. Counters may arrive out of order; one that lies more than 4096 below
// the highest seen is refused. The zero value is ready.
type Window struct {
	mu   sync.Mutex
	top  uint64 // highest accepted + 1
	bits [windowSize / 64]uint64
}

// Accept reports whether counter n is seen for the first time.
func (w *Window) Accept(n uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n == ^uint64(0) {
		return false
	}
	if n >= w.top {
		if n-w.top >= windowSize {
			w.bits = [windowSize / 64]uint64{}
		} else {
			for i := w.top; i <= n; i++ {
				w.bits[i%windowSize/64] &^= 1 << (i % 64)
			}
		}
		w.top = n + 1
	} else if w.top-n > windowSize {
		return false
	}
	word, bit := n%windowSize/64, uint64(1)<<(n%64)
	if w.bits[word]&bit != 0 {
		return false
	}
	w.bits[word] |= bit
	return true
}
