// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestOneUnverifiedConfig: class T8. The standard library's verification is turned off in one place of the whole program, where
// ours takes its place.
func TestOneUnverifiedConfig(t *testing.T) {
	var found []string
	err := filepath.WalkDir("..", func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && p != ".." && (strings.HasPrefix(d.Name(), ".") || strings.HasPrefix(d.Name(), "zz_") || d.Name() == "testdata"):
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(p, ".go") || strings.HasSuffix(p, "_test.go"):
			return nil
		}
		src, err := os.ReadFile(p)
		for range bytes.Count(src, []byte("InsecureSkipVerify")) {
			found = append(found, filepath.ToSlash(p))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(found) != 1 || found[0] != "../trust/source.go" {
		t.Errorf("InsecureSkipVerify in %v; want it in ../trust/source.go alone, once", found)
	}
}
