// SPDX-License-Identifier: Apache-2.0

package rotation

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	stateFile = "rotation/renewed"
	// SaveEvery is the least time between two writes of what is known.
	SaveEvery = time.Second
	// seenEvery is how fine the time is that a connected process was last seen, on disk.
	seenEvery = time.Minute
	// maxProcesses bounds what is remembered; more than that are not a cluster of ours, and the oldest give way.
	maxProcesses = 100_000
)

// Identity is one identity that a process was issued.
type Identity struct {
	Issued   time.Time `json:"issued"`
	NotAfter time.Time `json:"notAfter"`
	Issuer   string    `json:"issuer,omitempty"` // SHA-256 of the issuer's public key, hex; empty: not known
}

// process is what is known of one process, by its name.
type process struct {
	ID          spiffeid.ID `json:"id"`
	Own         Identity    `json:"own"`
	Application *Identity   `json:"application,omitempty"` // that it obtained for its application
	Sequence    uint64      `json:"sequence"`              // of our bundle that it acknowledged
	Seen        time.Time   `json:"seen"`
}

// stored is the state file.
type stored struct {
	Processes map[string]*process `json:"processes"`
	Tokens    time.Time           `json:"tokens,omitzero"`
}

// ends is when the last identity that it holds has ended.
func (p *process) ends() time.Time {
	if p.Application != nil && p.Application.NotAfter.After(p.Own.NotAfter) {
		return p.Application.NotAfter
	}
	return p.Own.NotAfter
}

// Config of a Tracker.
type Config struct {
	Dir    *datadir.Dir     // required
	Now    func() time.Time // nil: time.Now
	Logger *slog.Logger     // nil: discard
}

// Tracker remembers what processes hold.
type Tracker struct {
	dir *datadir.Dir
	now func() time.Time
	log *slog.Logger

	mu        sync.Mutex
	processes map[string]*process
	tokens    time.Time // end of the last JWT-SVID signed by a key that the next retire takes away
	dirty     bool
	kick      chan struct{}
	changed   chan struct{}
}

// Open reads what is on disk. A damaged file is set aside: processes that are there are soon known again.
func Open(cfg Config) (*Tracker, error) {
	t := &Tracker{
		dir: cfg.Dir, now: cfg.Now, log: cfg.Logger, processes: map[string]*process{}, kick: make(chan struct{}, 1), changed: make(chan struct{}),
	}
	if t.now == nil {
		t.now = time.Now
	}
	if t.log == nil {
		t.log = slog.New(slog.DiscardHandler)
	}
	var s stored
	data, err := t.dir.ReadState(stateFile)
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	t.tokens = s.Tokens
	if s.Processes != nil {
		t.processes = s.Processes
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case errors.Is(err, datadir.ErrCorrupt):
		t.log.Error("it is not known any more which processes have renewed", "err", err)
	case err != nil:
		return nil, fmt.Errorf("rotation: %w", err)
	}
	return t, nil
}

// Issued notes an identity that a process holds, or its application. An older one than is known changes nothing.
func (t *Tracker) Issued(name string, id spiffeid.ID, application bool, held Identity) {
	t.change(name, id, func(p *process) bool {
		have := p.Own
		if application {
			have = Identity{}
			if p.Application != nil {
				have = *p.Application
			}
		}
		newer := held.Issued.After(have.Issued) || held.Issued.Equal(have.Issued) && held.NotAfter.After(have.NotAfter)
		if newer && application {
			p.Application = &held
		} else if newer {
			p.Own = held
		}
		return newer
	})
}

// Acknowledged notes that a process has put our bundle of that sequence in force, or a later one.
func (t *Tracker) Acknowledged(name string, id spiffeid.ID, sequence uint64) {
	t.change(name, id, func(p *process) bool {
		newer := sequence > p.Sequence
		p.Sequence = max(p.Sequence, sequence)
		return newer
	})
}

// TokenIssued notes a JWT-SVID that was signed before activate. Whoever got it may show it until it ends.
func (t *Tracker) TokenIssued(notAfter time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !notAfter.After(t.tokens) {
		return
	}
	t.tokens = notAfter.Truncate(seenEvery).Add(seenEvery) // on disk once a minute, not once a token
	t.dirtyLocked()
}

// Seen notes that a process is connected now.
func (t *Tracker) Seen(name string, id spiffeid.ID) {
	t.change(name, id, func(*process) bool { return false })
}

// change applies f to a process, which says whether that is news.
func (t *Tracker) change(name string, id spiffeid.ID, f func(*process) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	p := t.processes[name]
	if p == nil || p.ID != id { // another one took its name
		p = &process{ID: id}
		t.processes[name] = p
		t.boundLocked()
	}
	news := f(p)
	if now.Sub(p.Seen).Abs() >= seenEvery {
		p.Seen, t.dirty = now, true
	}
	if news {
		t.dirty = true
		close(t.changed)
		t.changed = make(chan struct{})
	}
	if t.dirty {
		t.dirtyLocked()
	}
}

func (t *Tracker) dirtyLocked() {
	t.dirty = true
	select {
	case t.kick <- struct{}{}:
	default:
	}
}

// boundLocked forgets the process that was not seen for the longest time when there are too many.
func (t *Tracker) boundLocked() {
	if len(t.processes) <= maxProcesses {
		return
	}
	oldest := ""
	for name, p := range t.processes {
		if !p.Seen.IsZero() && (oldest == "" || p.Seen.Before(t.processes[oldest].Seen)) {
			oldest = name
		}
	}
	delete(t.processes, oldest)
}

// Changed is closed at the next news.
func (t *Tracker) Changed() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.changed
}

// Run writes what is known to disk, at most once in SaveEvery and at the end, until ctx ends.
func (t *Tracker) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			t.save()
			return nil
		case <-t.kick:
		}
		t.save()
		wait := time.NewTimer(SaveEvery)
		select {
		case <-ctx.Done():
		case <-wait.C:
		}
		wait.Stop()
	}
}

// save writes if there is news, and forgets processes whose identities have ended since they were last seen.
func (t *Tracker) save() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.dirty {
		return
	}
	now := t.now()
	maps.DeleteFunc(t.processes, func(_ string, p *process) bool { return now.After(p.ends()) && now.Sub(p.Seen) > 2*seenEvery })
	data, err := json.Marshal(stored{t.processes, t.tokens})
	if err == nil {
		err = t.dir.WriteState(stateFile, data)
	}
	if err != nil {
		t.log.Error("what processes hold was not saved", "err", err) // the next news tries again
		return
	}
	t.dirty = false
}
