// SPDX-License-Identifier: Apache-2.0

package datadir_test

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
)

func create(t *testing.T) *datadir.Dir {
	t.Helper()
	d, err := datadir.Create(filepath.Join(t.TempDir(), "a", "strait"))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func mode(t *testing.T, path string) fs.FileMode {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Mode().Perm()
}

func TestModes(t *testing.T) {
	d := create(t)
	if err := d.WriteFile("ca/deep/root.pem", []byte("secret")); err != nil {
		t.Fatal(err)
	}
	if err := d.WriteState("store.state", []byte("x")); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]fs.FileMode{d.Path(): 0o700, d.Path("ca"): 0o700, d.Path("ca/deep"): 0o700,
		d.Path("ca/deep/root.pem"): 0o600, d.Path("store.state"): 0o600, d.Path("FORMAT"): 0o600} {
		if got := mode(t, path); got != want {
			t.Errorf("%s has mode %o, want %o", path, got, want)
		}
	}
}

func TestCreateAndOpen(t *testing.T) {
	d := create(t)
	if _, err := datadir.Create(d.Path()); err != nil {
		t.Errorf("Create of a data directory that exists: %v", err)
	}
	other := t.TempDir()
	if _, err := datadir.Open(other, datadir.Options{}); !problem.Is(err, problem.ConfigInvalid) {
		t.Errorf("Open of something else: %v", err)
	}
	for _, name := range []string{"lost+found", "FORMAT.tmp-12"} { // a mount point; a Create cut short
		if err := os.WriteFile(filepath.Join(other, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := datadir.Create(other); err != nil {
		t.Errorf("Create in a fresh mount: %v", err)
	}
	foreign := t.TempDir()
	if err := os.WriteFile(filepath.Join(foreign, "thesis.tex"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := datadir.Create(foreign); !problem.Is(err, problem.ConfigInvalid) {
		t.Errorf("Create in a directory with other things: %v", err)
	}
	if names, _ := os.ReadDir(foreign); len(names) != 1 {
		t.Errorf("Create that was refused left %d entries", len(names))
	}
}

func TestFormat(t *testing.T) {
	for content, want := range map[string]problem.Code{"2\n": problem.VersionSkew, "99999": problem.VersionSkew, "": problem.StateCorrupt, "x": problem.StateCorrupt, "0": problem.StateCorrupt, "-1": problem.StateCorrupt} {
		d := create(t)
		if err := os.WriteFile(d.Path("FORMAT"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := datadir.Open(d.Path(), datadir.Options{Lock: true}); !problem.Is(err, want) {
			t.Errorf("FORMAT %q: %v, want %s", content, err, want)
		}
		if _, err := datadir.Create(d.Path()); !problem.Is(err, want) {
			t.Errorf("Create over FORMAT %q: %v, want %s", content, err, want)
		}
	}
}

func TestLock(t *testing.T) {
	d := create(t)
	first, err := datadir.Open(d.Path(), datadir.Options{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := datadir.Open(d.Path(), datadir.Options{Lock: true}); !problem.Is(err, problem.DataDirBusy) {
		t.Errorf("second lock: %v", err)
	}
	if _, err := datadir.Open(d.Path(), datadir.Options{}); err != nil {
		t.Errorf("reading beside the lock: %v", err)
	}
	if err := errors.Join(first.Close(), first.Close()); err != nil {
		t.Errorf("Close: %v", err)
	}
	again, err := datadir.Open(d.Path(), datadir.Options{Lock: true})
	if err != nil {
		t.Fatalf("lock after Close: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

func TestSweep(t *testing.T) {
	d := create(t)
	stale, young, store := d.Path("ca", "root.pem.tmp-1"), d.Path("ca", "root.pem.tmp-2"), d.Path("store", "wal.tmp-1")
	for _, p := range []string{stale, young, store} {
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte("half a key"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	hour := time.Now().Add(-time.Hour)
	if err := errors.Join(os.Chtimes(stale, hour, hour), os.Chtimes(store, hour, hour)); err != nil {
		t.Fatal(err)
	}
	l, err := datadir.Open(d.Path(), datadir.Options{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for p, want := range map[string]bool{stale: false, young: true, store: true} {
		if _, err := os.Stat(p); (err == nil) != want {
			t.Errorf("%s is there: %t, want %t", p, err == nil, want)
		}
	}
}

func TestFiles(t *testing.T) {
	d := create(t)
	for _, rel := range []string{"../x", "/etc/passwd", "a/../../x", ""} {
		if err := d.WriteFile(rel, nil); err == nil {
			t.Errorf("WriteFile(%q) is allowed", rel)
		}
		if _, err := d.ReadFile(rel); err == nil {
			t.Errorf("ReadFile(%q) is allowed", rel)
		}
		if err := d.Remove(rel); err == nil {
			t.Errorf("Remove(%q) is allowed", rel)
		}
	}
	if _, err := d.ReadState("none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("ReadState of nothing: %v", err)
	}
	if err := errors.Join(d.Remove("none"), d.Remove("no/such/dir")); err != nil {
		t.Errorf("Remove of nothing: %v", err)
	}
	if names, err := d.List("none"); err != nil || len(names) != 0 {
		t.Errorf("List of nothing: %v, %v", names, err)
	}
	sub, err := d.Sub("peers")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"b", "a"} {
		if err := sub.WriteState(name, []byte(name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"a.tmp-9", "a.corrupt-1"} {
		if err := os.WriteFile(sub.Path(name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if names, err := d.List("peers"); err != nil || strings.Join(names, " ") != "a b" {
		t.Errorf("List = %v, %v", names, err)
	}
	if err := d.Remove("peers/a"); err != nil {
		t.Error(err)
	}
	if got, err := sub.ReadState("b"); err != nil || string(got) != "b" {
		t.Errorf("ReadState = %q, %v", got, err)
	}
}

// TestStateDetectsDamage: fault row F19. Every one of 200 flipped bits, every truncation and every extension is noticed, the
// file is set aside, and nothing of it is returned.
func TestStateDetectsDamage(t *testing.T) {
	d := create(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	content := make([]byte, 4096)
	for i := range content {
		content[i] = byte(r.Uint32())
	}
	if err := d.WriteState("good", content); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(d.Path("good"))
	if err != nil {
		t.Fatal(err)
	}
	damages := map[string][]byte{"empty": {}, "no header": content, "longer": append(bytes.Clone(good), 0), "header alone": good[:86]}
	for range 200 {
		bit := r.IntN(len(good) * 8)
		if len(damages)%4 == 0 { // the header is short: aim at it
			bit = r.IntN(86 * 8)
		}
		b := bytes.Clone(good)
		b[bit/8] ^= 1 << (bit % 8)
		damages["bit "+time.Duration(bit).String()] = b
	}
	for range 50 {
		n := r.IntN(len(good))
		damages["cut at "+time.Duration(n).String()] = good[:n]
	}
	n := 0
	for name, b := range damages {
		if err := os.WriteFile(d.Path("s"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := d.ReadState("s")
		if !errors.Is(err, datadir.ErrCorrupt) || got != nil {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
		if _, err := d.ReadState("s"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the damaged file stayed: %v", name, err)
		}
		n++
	}
	kept, err := filepath.Glob(d.Path("s.corrupt-*"))
	if err != nil || len(kept) != n {
		t.Errorf("%d of %d damaged files were kept, %v", len(kept), n, err)
	}
	if got, err := d.ReadState("good"); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the good file: %v", err)
	}
}

// TestReadersSeeWholeFiles: a reader beside writers sees one content or another, never a mixture, and no temporary file stays.
func TestReadersSeeWholeFiles(t *testing.T) {
	d := create(t)
	contents := [][]byte{bytes.Repeat([]byte("a"), 8192), bytes.Repeat([]byte("b"), 70_000)}
	if err := d.WriteState("s", contents[0]); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	for _, c := range contents {
		wg.Go(func() {
			for range 40 {
				if err := d.WriteState("s", c); err != nil {
					t.Error(err)
				}
			}
		})
	}
	var readers sync.WaitGroup
	readers.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if got, err := d.ReadState("s"); err != nil || !bytes.Equal(got, contents[0]) && !bytes.Equal(got, contents[1]) {
				t.Errorf("read %d bytes, %v", len(got), err)
				return
			}
		}
	})
	wg.Wait()
	close(done)
	readers.Wait()
	if left, _ := filepath.Glob(d.Path("s.tmp-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
