// SPDX-License-Identifier: Apache-2.0

package datadir

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
)

// Format is the version of the layout that this program writes; a newer one is refused.
const Format = 1

// MaxFileSize bounds every file that is read back, in bytes.
const MaxFileSize = 256 << 20

const stateMagic = "strait-state/1 sha256:"

// ErrCorrupt is returned for a state file whose checksum does not match. The file was moved aside.
var ErrCorrupt = errors.New("state file is damaged")

// Options of Open.
type Options struct {
	Lock bool // hold LOCK until Close: only one process may
}

// Dir is an open data directory, or a directory below one.
type Dir struct {
	path string
	lock *os.File
	once sync.Once
}

// Create makes a data directory. The path may exist when it is empty.
func Create(path string) (*Dir, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("create data directory: %w", err)
	}
	if err := mkdirSynced(path); err != nil {
		return nil, problem.New(problem.ConfigInvalid, "data directory: %v", err).Wrap(err)
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, fmt.Errorf("create data directory: %w", err)
	}
	d := &Dir{path: path}
	if !slices.ContainsFunc(entries, foreign) {
		if err := os.Chmod(path, 0o700); err != nil {
			return nil, fmt.Errorf("create data directory: %w", err)
		}
		if err := d.WriteFile("FORMAT", []byte(strconv.Itoa(Format)+"\n")); err != nil {
			return nil, err
		}
		return d, nil
	}
	if err := d.checkFormat(); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, problem.New(problem.ConfigInvalid, "%s is not empty and is no data directory of Strait", path).
				WithFix("choose another --data-dir").WithState("nothing was written.")
		}
		return nil, err
	}
	return d, nil
}

// foreign reports whether an entry keeps a directory from being empty. A mount point's lost+found does not, nor does what
// a Create that was cut short leaves behind.
func foreign(e fs.DirEntry) bool {
	return e.Name() != "lost+found" && !isTemporary(e.Name())
}

// Open opens an existing data directory.
func Open(path string, o Options) (*Dir, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open data directory: %w", err)
	}
	d := &Dir{path: path}
	if err := d.checkFormat(); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, problem.New(problem.ConfigInvalid, "%s is no data directory of Strait", path).
				WithFix("strait init, or another --data-dir").Wrap(err)
		}
		return nil, err
	}
	if !o.Lock {
		return d, nil
	}
	f, err := os.OpenFile(d.Path("LOCK"), os.O_RDWR|os.O_CREATE|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, problem.New(problem.DataDirBusy, "%s is locked by another process", path).Wrap(err)
	}
	d.lock = f
	d.sweep()
	return d, nil
}

// sweepAge spares the files of a writer that holds no lock and is at it now.
const sweepAge = time.Minute

// sweep removes temporary files that a crash left behind, where WriteFile makes them: secrets should not linger in them. The
// configuration store below store/ is not ours to touch. What cannot be removed stays.
func (d *Dir) sweep() {
	_ = filepath.WalkDir(d.path, func(p string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return nil
		case e.IsDir() && p == d.Path("store"):
			return fs.SkipDir
		case e.Type().IsRegular() && isTemporary(e.Name()):
			if st, err := e.Info(); err == nil && time.Since(st.ModTime()) > sweepAge {
				_ = os.Remove(p)
			}
		}
		return nil
	})
}

func (d *Dir) checkFormat() error {
	data, err := os.ReadFile(d.Path("FORMAT"))
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil || n < 1 {
		return problem.New(problem.StateCorrupt, "%s/FORMAT does not hold a number", d.path)
	}
	if n > Format {
		return problem.New(problem.VersionSkew, "%s has format %d; this program knows %d", d.path, n, Format).
			WithWhy("a newer version wrote it").WithFix("run that version, or a newer one").WithState("nothing was read or written.")
	}
	return nil
}

// Close releases the lock. It is idempotent.
func (d *Dir) Close() error {
	var err error
	d.once.Do(func() {
		if d.lock != nil {
			err = d.lock.Close()
		}
	})
	return err
}

// Path joins elements below the directory.
func (d *Dir) Path(elem ...string) string {
	return filepath.Join(append([]string{d.path}, elem...)...)
}

// Sub is a directory below d, made when needed. It has no lock of its own.
func (d *Dir) Sub(rel string) (*Dir, error) {
	p, err := d.local(rel)
	if err != nil {
		return nil, err
	}
	if err := mkdirSynced(p); err != nil {
		return nil, fmt.Errorf("make %s: %w", rel, err)
	}
	return &Dir{path: p}, nil
}

// local refuses names that leave the directory.
func (d *Dir) local(rel string) (string, error) {
	if !filepath.IsLocal(rel) {
		return "", fmt.Errorf("%q is not below the data directory", rel)
	}
	return filepath.Join(d.path, rel), nil
}

// WriteFile replaces a file durably.
func (d *Dir) WriteFile(rel string, data []byte) error {
	p, err := d.local(rel)
	if err != nil {
		return err
	}
	if err := mkdirSynced(filepath.Dir(p)); err != nil {
		return fmt.Errorf("write %s: %w", rel, err)
	}
	tmp, err := writeTemporary(p, data)
	if err != nil {
		return fmt.Errorf("write %s: %w", rel, err)
	}
	if err := os.Rename(tmp, p); err != nil {
		_ = os.Remove(tmp)
		return fmt.Errorf("write %s: %w", rel, err)
	}
	if err := syncDir(filepath.Dir(p)); err != nil {
		return fmt.Errorf("write %s: %w", rel, err)
	}
	return nil
}

const temporary = ".tmp-"

func isTemporary(name string) bool { return strings.Contains(name, temporary) }

// writeTemporary writes data, synced, to a new file beside p. Its name is random: a process in a container has the same
// number after each restart, and meets what it left behind.
func writeTemporary(p string, data []byte) (string, error) {
	f, err := os.CreateTemp(filepath.Dir(p), filepath.Base(p)+temporary+"*") // 0600
	if err != nil {
		return "", err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

// mkdirSynced makes a directory and those above it, each durably.
func mkdirSynced(p string) error {
	st, err := os.Stat(p)
	switch {
	case err == nil && st.IsDir():
		return nil
	case err == nil:
		return &fs.PathError{Op: "mkdir", Path: p, Err: syscall.ENOTDIR}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	above := filepath.Dir(p)
	if err := mkdirSynced(above); err != nil {
		return err
	}
	if err := os.Mkdir(p, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(above)
}

func syncDir(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// ReadFile reads a file; an absent one is fs.ErrNotExist.
func (d *Dir) ReadFile(rel string) ([]byte, error) {
	p, err := d.local(rel)
	if err != nil {
		return nil, err
	}
	st, err := os.Stat(p)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", rel, err)
	}
	if st.Size() > MaxFileSize {
		return nil, fmt.Errorf("read %s: %d bytes; at most %d are read", rel, st.Size(), MaxFileSize)
	}
	data, err := os.ReadFile(p)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", rel, err)
	}
	return data, nil
}

// WriteState replaces a state file durably, with a checksum.
func (d *Dir) WriteState(rel string, data []byte) error {
	sum := sha256.Sum256(data)
	head := stateMagic + hex.EncodeToString(sum[:]) + "\n"
	return d.WriteFile(rel, append([]byte(head), data...))
}

// ReadState reads a state file. An absent one is fs.ErrNotExist; a damaged one is moved to <name>.corrupt-N and ErrCorrupt.
func (d *Dir) ReadState(rel string) ([]byte, error) {
	raw, err := d.ReadFile(rel)
	if err != nil {
		return nil, err
	}
	head, data, ok := bytes.Cut(raw, []byte("\n"))
	sum := sha256.Sum256(data)
	if ok && string(head) == stateMagic+hex.EncodeToString(sum[:]) {
		return data, nil
	}
	aside := d.setAside(rel)
	return nil, fmt.Errorf("read %s: %w (kept as %s)", rel, ErrCorrupt, aside)
}

func (d *Dir) setAside(rel string) string {
	for i := 1; i < 1000; i++ {
		name := fmt.Sprintf("%s.corrupt-%d", rel, i)
		if _, err := os.Lstat(d.Path(name)); errors.Is(err, fs.ErrNotExist) {
			if os.Rename(d.Path(rel), d.Path(name)) == nil {
				return name
			}
			break
		}
	}
	return rel
}

// Remove deletes a file; an absent one is no error.
func (d *Dir) Remove(rel string) error {
	p, err := d.local(rel)
	if err != nil {
		return err
	}
	err = os.Remove(p)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = syncDir(filepath.Dir(p))
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", rel, err)
	}
	return nil
}

// List returns the names of the regular files in a directory, sorted, without temporary and damaged ones. An absent
// directory is empty.
func (d *Dir) List(rel string) ([]string, error) {
	p, err := d.local(rel)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(p)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", rel, err)
	}
	var names []string
	for _, e := range entries {
		if e.Type().IsRegular() && !isTemporary(e.Name()) && !strings.Contains(e.Name(), ".corrupt-") {
			names = append(names, e.Name())
		}
	}
	sort.Strings(names)
	return names, nil
}
