// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/controlplane/configapi"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/ca"
)

const (
	backupMarker   = "STRAIT-BACKUP-1"
	storeSnapshot  = "store.snapshot"
	maxBackupBytes = 4 << 30
	maxBackupFiles = 100_000
)

// skipped are parts of a data directory that a backup leaves out: the running store (its snapshot takes its place), sockets,
// and what is made again.
var skipped = map[string]bool{"store": true, "run": true, "LOCK": true, "spans": true, "gateway": true}

// writeBackup streams a backup of dir: a marker, every file, and the store's snapshot, as a compressed tar. Files that together says belong
// to one moment are taken from there: a rotation may take a step meanwhile.
func writeBackup(ctx context.Context, dir *datadir.Dir, together func() (map[string][]byte, error), snapshot func(context.Context, io.Writer) error, w io.Writer) error {
	zw := gzip.NewWriter(w)
	tw := tar.NewWriter(zw)
	if err := addFile(tw, backupMarker, []byte(time.Now().UTC().Format(time.RFC3339)+"\n")); err != nil {
		return err
	}
	held, err := together()
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	for _, name := range slices.Sorted(maps.Keys(held)) {
		if err := addFile(tw, name, held[name]); err != nil {
			return err
		}
	}
	root := dir.Path()
	err = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a temporary file of a write under way
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil || rel == "." {
			return err
		}
		if skipped[rel] {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if !d.Type().IsRegular() || strings.Contains(d.Name(), ".tmp-") {
			return nil
		}
		if _, ok := held[filepath.ToSlash(rel)]; ok || held != nil && path.Dir(filepath.ToSlash(rel)) == "ca" {
			return nil
		}
		data, err := os.ReadFile(p)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return addFile(tw, filepath.ToSlash(rel), data)
	})
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	if err := addSnapshot(ctx, tw, snapshot); err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	return errors.Join(tw.Close(), zw.Close())
}

func addFile(tw *tar.Writer, name string, data []byte) error {
	if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(data)), Format: tar.FormatPAX}); err != nil {
		return err
	}
	_, err := tw.Write(data)
	return err
}

// addSnapshot goes through a file: a tar header needs the size first.
func addSnapshot(ctx context.Context, tw *tar.Writer, snapshot func(context.Context, io.Writer) error) error {
	f, err := os.CreateTemp("", "strait-snapshot-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := snapshot(ctx, f); err != nil {
		return err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if err := tw.WriteHeader(&tar.Header{Name: storeSnapshot, Mode: 0o600, Size: size, Format: tar.FormatPAX}); err != nil {
		return err
	}
	_, err = io.Copy(tw, f)
	return err
}

// Restored says what Restore made.
type Restored struct {
	Cluster string
	DataDir string
}

// Restore unpacks a backup into a new data directory. Nothing is left behind when it fails.
func Restore(r io.Reader, target string) (*Restored, error) {
	target, err := filepath.Abs(target)
	if err != nil {
		return nil, err
	}
	if entries, err := os.ReadDir(target); err == nil && len(entries) > 0 {
		return nil, problem.New(problem.AlreadyInitialized, "%s is not empty", target).WithWhy("restore never overwrites").
			WithFix("strait restore FILE --data-dir NEW-DIRECTORY").WithState("nothing was written.")
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o700); err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(target), ".strait-restore-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	if err := unpack(r, tmp); err != nil {
		return nil, problem.New(problem.StateCorrupt, "not a backup: %v", err).WithState("nothing was written.").
			WithWhy("the file is truncated, damaged or something else").WithFix("use a file that strait backup wrote").Wrap(err)
	}
	snapshot := filepath.Join(tmp, storeSnapshot)
	if err := configapi.Restore(snapshot, filepath.Join(tmp, "store"), nil); err != nil {
		return nil, problem.New(problem.StateCorrupt, "the store's snapshot: %v", err).WithState("nothing was written.").Wrap(err)
	}
	if err := os.Remove(snapshot); err != nil {
		return nil, err
	}
	dir, err := datadir.Open(tmp, datadir.Options{})
	if err != nil {
		return nil, err
	}
	facts, err := ReadFacts(dir)
	if err != nil {
		return nil, err
	}
	if err := ca.Restored(dir); err != nil {
		return nil, problem.New(problem.StateCorrupt, "the CA in the backup: %v", err).WithState("nothing was written.").Wrap(err)
	}
	_ = os.Remove(target) // an empty directory
	if err := os.Rename(tmp, target); err != nil {
		return nil, err
	}
	return &Restored{Cluster: facts.Cluster, DataDir: target}, nil
}

func unpack(r io.Reader, target string) error {
	zr, err := gzip.NewReader(r)
	if err != nil {
		return err
	}
	tr := tar.NewReader(zr)
	var total int64
	marked, snapshot := false, false
	for n := 0; ; n++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		total += h.Size
		switch {
		case n == 0 && h.Name != backupMarker:
			return errors.New("it has no marker")
		case n > maxBackupFiles || total > maxBackupBytes:
			return errors.New("it is too large")
		case h.Typeflag != tar.TypeReg || !filepath.IsLocal(h.Name) || path.Clean(h.Name) != h.Name:
			return fmt.Errorf("entry %q is not allowed", h.Name)
		}
		marked = true
		snapshot = snapshot || h.Name == storeSnapshot
		if h.Name == backupMarker {
			continue
		}
		if err := writeEntry(filepath.Join(target, filepath.FromSlash(h.Name)), tr); err != nil {
			return err
		}
	}
	if _, err := io.Copy(io.Discard, zr); err != nil { // the checksum at the end
		return err
	}
	if !marked || !snapshot {
		return errors.New("it is incomplete")
	}
	return nil
}

func writeEntry(name string, r io.Reader) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}
