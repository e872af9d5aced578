// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"github.com/strait-mesh/strait/internal/datadir"
)

const epochFile = "catalogs/epoch"

// FileEpochs keeps the epoch in a data directory, whose lock makes this process the only one to change it.
type FileEpochs struct {
	dir *datadir.Dir
	mu  sync.Mutex
}

// NewFileEpochs returns the store of a data directory.
func NewFileEpochs(dir *datadir.Dir) *FileEpochs { return &FileEpochs{dir: dir} }

type storedEpoch struct {
	Epoch uint64 `json:"epoch"`
}

// Current implements EpochStore.
func (f *FileEpochs) Current(context.Context) (uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.read()
}

func (f *FileEpochs) read() (uint64, error) {
	data, err := f.dir.ReadState(epochFile)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("epoch: %w", err)
	}
	var s storedEpoch
	if err := json.Unmarshal(data, &s); err != nil {
		return 0, fmt.Errorf("epoch: %w", err)
	}
	return s.Epoch, nil
}

// CompareAndSwap implements EpochStore.
func (f *FileEpochs) CompareAndSwap(_ context.Context, old, next uint64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	cur, err := f.read()
	if err != nil {
		return err
	}
	if cur != old {
		return ErrEpochConflict
	}
	data, err := json.Marshal(storedEpoch{Epoch: next})
	if err != nil {
		return fmt.Errorf("epoch: %w", err)
	}
	return f.dir.WriteState(epochFile, data)
}

// epochTerm is this process's term as signer: an epoch above every one that was signed with before.
type epochTerm struct {
	store EpochStore
	wait  func(ctx context.Context) // for peers to say what they hold

	mu   sync.Mutex
	term uint64 // 0: not begun
}

// get begins the term at the first call, raises it to atLeast, and re-reads it: an error means that another process signs.
func (e *epochTerm) get(ctx context.Context, atLeast uint64) (uint64, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	begin := e.term == 0
	if begin {
		e.wait(ctx)
	}
	cur, err := e.store.Current(ctx)
	if err != nil {
		return 0, err
	}
	next := max(e.term, atLeast)
	switch {
	case begin:
		next = max(cur+1, atLeast)
	case cur != e.term:
		return 0, fmt.Errorf("term %d, stored %d: %w", e.term, cur, ErrEpochConflict)
	}
	if next != cur {
		if err := e.store.CompareAndSwap(ctx, cur, next); err != nil {
			return 0, err
		}
	}
	e.term = next
	return next, nil
}
