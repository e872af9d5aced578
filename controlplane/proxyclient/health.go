// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"sync"
	"time"
)

// health remembers how the stream and the connection do.
type health struct {
	mu sync.Mutex
	s  Status
}

func (h *health) status() Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.s
}

func (h *health) connected(now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.s.Connected, h.s.Since, h.s.LastError = true, now, nil
}

// disconnected reports whether it was connected before.
func (h *health) disconnected(now time.Time, err error) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	was := h.s.Connected
	if was {
		h.s.Connected, h.s.Since = false, now
	}
	if err != nil {
		h.s.LastError = err
	}
	return was
}

func (h *health) failed(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.s.LastError = err
}
