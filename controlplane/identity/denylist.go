// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"sync"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

const (
	denyFile = "ca/denied"
	markFile = "ca/issued-until"
	// markAhead is for how long one write of the mark lasts. Raising it lengthens how long an identity that is readmitted right
	// after a restart has to wait.
	markAhead = time.Minute
)

// ErrNotWithdrawn says that an identity to be readmitted is not withdrawn.
var ErrNotWithdrawn = errors.New("the identity is not withdrawn")

// Denial is one withdrawn identity.
type Denial struct {
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`
	// IssuedBefore is set once the identity was admitted again, or when only what was issued until then was withdrawn:
	// certificates issued before it stay out. It is a whole second, as times in certificates are. Zero: every certificate.
	IssuedBefore time.Time `json:"issued_before,omitzero"`
}

// Rule is what connections are judged by.
func (d Denial) Rule() withdrawal.Denial {
	return withdrawal.Denial{Reason: d.Reason, IssuedBefore: d.IssuedBefore}
}

// DenyList holds the identities that were withdrawn before their time, in the data directory. Nothing leaves the list by itself:
// a clock that is stepped must not bring back what was withdrawn.
//
// Certificates name the second in which they were issued, and nothing shorter. An identity that is readmitted therefore comes back
// with the beginning of the next second: what was issued in the same second as the readmission, before it or after it, stays out,
// and Issuable refuses to issue until then. The list also remembers the latest time at which anything was issued (Issuing), and
// readmits from there if the clock has been set back since.
type DenyList struct {
	dir *datadir.Dir
	now func() time.Time

	mu      sync.RWMutex
	denied  map[spiffeid.ID]Denial
	changed chan struct{}
	latest  time.Time // when the last certificate was issued, by whatever the clock said
	marked  time.Time // on disk: nothing was issued after it
}

// OpenDenyList reads the list of dir. now nil: time.Now.
func OpenDenyList(dir *datadir.Dir, now func() time.Time) (*DenyList, error) {
	if now == nil {
		now = time.Now
	}
	l := &DenyList{dir: dir, now: now, denied: map[spiffeid.ID]Denial{}, changed: make(chan struct{})}
	// An empty list would let withdrawn identities in again: what cannot be read is an error, at the next start as well.
	data, err := dir.ReadState(denyFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = damaged(dir)
	case err == nil:
		err = json.Unmarshal(data, &l.denied)
	}
	if err != nil {
		return nil, fmt.Errorf("deny list: %w", err)
	}
	if data, err = dir.ReadState(markFile); err == nil {
		err = json.Unmarshal(data, &l.marked)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, datadir.ErrCorrupt) {
		return nil, fmt.Errorf("deny list: %w", err)
	}
	l.latest = l.marked
	return l, nil
}

// damaged says that there was a list that could not be read.
func damaged(dir *datadir.Dir) error {
	aside, err := filepath.Glob(dir.Path(denyFile) + ".corrupt-*")
	if err != nil || len(aside) == 0 {
		return err
	}
	return fmt.Errorf("%w: restore %s from a backup, or remove %s and withdraw again what has to stay out", datadir.ErrCorrupt, denyFile, aside[0])
}

// Add withdraws an identity with every certificate that it has or gets. It is on disk when Add returns.
func (l *DenyList) Add(id spiffeid.ID, reason string) error {
	return l.change(func(m map[spiffeid.ID]Denial) error {
		m[id] = Denial{Reason: reason, At: l.now()}
		return nil
	})
}

// AddIssued withdraws what was issued to an identity until now, and leaves the identity to whoever registers again. An identity
// that is withdrawn altogether stays so.
func (l *DenyList) AddIssued(id spiffeid.ID, reason string) error {
	return l.change(func(m map[spiffeid.ID]Denial) error {
		if old, ok := m[id]; !ok || !old.Rule().Total() {
			m[id] = Denial{Reason: reason, At: l.now(), IssuedBefore: l.fenceLocked(old)}
		}
		return nil
	})
}

// Readmit admits an identity again, from the next second on: what was issued to it before stays out. The error of an identity that
// is not withdrawn is ErrNotWithdrawn.
func (l *DenyList) Readmit(id spiffeid.ID) error {
	return l.change(func(m map[spiffeid.ID]Denial) error {
		d, ok := m[id]
		if !ok {
			return ErrNotWithdrawn
		}
		if d.Rule().Total() {
			d.IssuedBefore = l.fenceLocked(d)
			m[id] = d
		}
		return nil
	})
}

// fenceLocked is the first whole second in which nothing can have been issued yet.
func (l *DenyList) fenceLocked(old Denial) time.Time {
	at := l.now()
	for _, t := range []time.Time{l.latest, old.At} {
		if t.After(at) {
			at = t
		}
	}
	at = at.UTC().Truncate(time.Second).Add(time.Second)
	if old.IssuedBefore.After(at) {
		return old.IssuedBefore
	}
	return at
}

func (l *DenyList) change(f func(map[spiffeid.ID]Denial) error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	next := maps.Clone(l.denied)
	if err := f(next); err != nil {
		return err
	}
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

// Denied reports whether a certificate of id issued at that time (trust.Issued) is withdrawn, and why. The zero time asks about the
// identity by its name alone.
func (l *DenyList) Denied(id spiffeid.ID, issued time.Time) (reason string, denied bool) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	d, ok := l.denied[id]
	return d.Reason, ok && d.Rule().Covers(issued)
}

// Issuable reports whether a certificate that is issued to id now would be withdrawn at once, and why: the identity is withdrawn, or
// the second from which it is admitted again has not come by this clock. Call it before and after issuing.
func (l *DenyList) Issuable(id spiffeid.ID) (reason string, denied bool) {
	return l.Denied(id, l.now().Truncate(time.Second))
}

// Issuing notes that something is issued about now. An error means that this could not be written down; it is no reason not to
// issue, since it matters only if the clock is then set back and the process started anew.
func (l *DenyList) Issuing() error {
	now := l.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.After(l.latest) {
		l.latest = now
	}
	if !now.After(l.marked) {
		return nil
	}
	mark := now.Add(markAhead).UTC()
	data, err := json.Marshal(mark)
	if err == nil {
		err = l.dir.WriteState(markFile, data)
	}
	if err != nil {
		return fmt.Errorf("deny list: %w", err)
	}
	l.marked = mark
	return nil
}

// Find returns the withdrawal of an identity.
func (l *DenyList) Find(id spiffeid.ID) (Denial, bool) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	d, ok := l.denied[id]
	return d, ok
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
