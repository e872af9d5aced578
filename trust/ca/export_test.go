// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"errors"
	"io"
	"sync"

	"github.com/strait-mesh/strait/internal/datadir"
)

// ErrCrash is what every access to the disk gives after the one at which a Crash strikes.
var ErrCrash = errors.New("the process was killed")

// Crash ends a process at its n-th write (1 …), before or after it reaches the disk. 0: never.
type Crash struct {
	At    int
	After bool // the write reaches the disk, its caller does not learn of it
	Once  bool // an error and no crash: later writes succeed

	mu     sync.Mutex
	writes int
	dead   bool
}

// Writes is how many there were.
func (k *Crash) Writes() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.writes
}

func (k *Crash) write(f func() error) error {
	k.mu.Lock()
	k.writes++
	strikes := k.writes == k.At
	if k.dead || strikes && !k.After {
		k.dead = k.dead || !k.Once
		k.mu.Unlock()
		return ErrCrash
	}
	k.dead = k.dead || strikes && !k.Once
	k.mu.Unlock()
	if err := f(); err != nil || !strikes {
		return err
	}
	return ErrCrash
}

// With is cfg with writes that k may end.
func (k *Crash) With(cfg Config) Config {
	cfg.wrap = func(f files) files { return crashing{f, k} }
	return cfg
}

type crashing struct {
	files
	k *Crash
}

func (c crashing) WriteFile(rel string, data []byte) error {
	return c.k.write(func() error { return c.files.WriteFile(rel, data) })
}

func (c crashing) Remove(rel string) error {
	return c.k.write(func() error { return c.files.Remove(rel) })
}

func (c crashing) append(rel string) (a appender, err error) {
	err = c.k.write(func() (err error) { a, err = c.files.append(rel); return err })
	return crashingFile{a, c.k}, err
}

type crashingFile struct {
	appender
	k *Crash
}

func (c crashingFile) Append(lines []byte) error {
	return c.k.write(func() error { return c.appender.Append(lines) })
}

// ExportRootCrashing is ExportRoot in a process that k may end.
func ExportRootCrashing(k *Crash, dir *datadir.Dir, w io.Writer) error {
	return exportRoot(crashing{stored{dir}, k}, dir, w, nil)
}

// Ledger reads all that a data directory has issued.
func Ledger(dir *datadir.Dir) (out []Entry, err error) {
	names, err := dir.List(issuedDir)
	for _, name := range names {
		data, err := dir.ReadFile(issuedDir + "/" + name)
		if err != nil {
			return nil, err
		}
		for e := range entries(data) {
			out = append(out, e)
		}
	}
	return out, err
}
