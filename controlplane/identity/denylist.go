// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"sync"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const denyFile = "ca/denied"

// Denial is one withdrawn identity.
type Denial struct {
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`
}

// DenyList holds the identities that were withdrawn before their time, in the data directory.
type DenyList struct {
	dir *datadir.Dir
	now func() time.Time

	mu      sync.RWMutex
	denied  map[spiffeid.ID]Denial
	changed chan struct{}
}

// OpenDenyList reads the list of dir. now nil: time.Now.
func OpenDenyList(dir *datadir.Dir, now func() time.Time) (*DenyList, error) {
	if now == nil {
		now = time.Now
	}
	l := &DenyList{dir: dir, now: now, denied: map[spiffeid.ID]Denial{}, changed: make(chan struct{})}
	data, err := dir.ReadState(denyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &l.denied)
	}
	if err != nil {
		return nil, fmt.Errorf("deny list: %w", err) // an empty one would let withdrawn identities in again
	}
	return l, nil
}

// Add withdraws an identity. It is on disk when Add returns.
func (l *DenyList) Add(id spiffeid.ID, reason string) error {
	return l.change(func(m map[spiffeid.ID]Denial) { m[id] = Denial{Reason: reason, At: l.now()} })
}

// Remove admits an identity again.
func (l *DenyList) Remove(id spiffeid.ID) error {
	return l.change(func(m map[spiffeid.ID]Denial) { delete(m, id) })
}

func (l *DenyList) change(f func(map[spiffeid.ID]Denial)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	next := maps.Clone(l.denied)
	f(next)
	data, err := json.Marshal(next)
	if err == nil {
		err = l.dir.WriteState(denyFile, data)
	}
	if err != nil {
		return fmt.Errorf("deny list: %w", err)
	}
	l.denied = next
	close(l.changed)
	l.changed = make(chan struct{})
	return nil
}

// Denied reports whether an identity was withdrawn, and why.
func (l *DenyList) Denied(id spiffeid.ID) (reason string, denied bool) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	d, ok := l.denied[id]
	return d.Reason, ok
}

// All returns the withdrawn identities; do not modify it.
func (l *DenyList) All() map[spiffeid.ID]Denial {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.denied
}

// Changed is closed at the next change.
func (l *DenyList) Changed() <-chan struct{} {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.changed
}
