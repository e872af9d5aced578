// SPDX-License-Identifier: Apache-2.0

package problem_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/strait-mesh/strait/internal/problem"
)

func readRegistry(t *testing.T) []problem.Entry {
	t.Helper()
	data, err := os.ReadFile("codes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var rows []problem.Entry
	if err := yaml.UnmarshalStrict(data, &rows); err != nil {
		t.Fatal(err)
	}
	return rows
}

var codeForm = regexp.MustCompile(`^STR-[1-9]\d{3}$`)

// The registry is sorted, names each code and each constant once, and leaves no part of an explanation out.
func TestRegistry(t *testing.T) {
	rows := readRegistry(t)
	names := map[string]bool{}
	exits := []int{problem.ExitOK, problem.ExitFailed, problem.ExitUsage, problem.ExitNotReady, problem.ExitAuth, problem.ExitNotFound, problem.ExitWarnings, problem.ExitInvalid, problem.ExitPartial}
	for i, r := range rows {
		if i > 0 && rows[i-1].Code >= r.Code {
			t.Errorf("%s stands after %s: the registry is sorted and names each code once", r.Code, rows[i-1].Code)
		}
		if !codeForm.MatchString(string(r.Code)) || r.Name == "" || r.Title == "" || r.Why == "" || len(r.Fix) == 0 || r.Since == "" {
			t.Errorf("%s %s lacks a part: %+v", r.Code, r.Name, r)
		}
		if names[r.Name] {
			t.Errorf("%s: the name %s stands twice", r.Code, r.Name)
		}
		names[r.Name] = true
		if r.Severity != "error" && r.Severity != "warning" || r.Severity == "error" && r.Exit == 0 || !slices.Contains(exits, r.Exit) {
			t.Errorf("%s: severity %q with exit %d", r.Code, r.Severity, r.Exit)
		}
		if e, ok := problem.Lookup(r.Code); !ok || e.Name != r.Name {
			t.Errorf("%s is %s in the binary, %s in the file", r.Code, e.Name, r.Name)
		}
	}
	if got := len(problem.Entries()); got != len(rows) {
		t.Errorf("%d entries in the binary, %d in the file", got, len(rows))
	}
}

// The constants are those of the registry; make generate writes them.
func TestConstantsAreGenerated(t *testing.T) {
	data, err := os.ReadFile("codes_gen.go")
	if err != nil {
		t.Fatal(err)
	}
	constants := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^\t(\w+)\s+Code = "(STR-\d+)"`).FindAllStringSubmatch(string(data), -1) {
		constants[m[1]] = m[2]
	}
	for _, r := range readRegistry(t) {
		if constants[r.Name] != string(r.Code) {
			t.Errorf("constant %s is %q, want %s: run make generate", r.Name, constants[r.Name], r.Code)
		}
		delete(constants, r.Name)
	}
	for name := range constants {
		t.Errorf("constant %s has no row: run make generate", name)
	}
}

// sources calls f with every Go file and every script of the command line, but those of this package.
func sources(t *testing.T, f func(path, text string)) {
	t.Helper()
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		if d.IsDir() {
			if rel == "bin" || rel == filepath.Join("internal", "problem") || rel != "." && strings.HasPrefix(d.Name(), ".") || strings.HasPrefix(d.Name(), "zz_") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") && !(strings.HasSuffix(p, ".txt") && strings.Contains(p, "testdata")) {
			return nil
		}
		data, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		f(filepath.ToSlash(rel), string(data))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

var (
	constantUse = regexp.MustCompile(`\bproblem\.([A-Z]\w+)\b`)
	literalCode = regexp.MustCompile(`STR-\d{4}`)
)

// reserved are codes that nothing returns yet, and why they stand in the registry all the same.
var reserved = map[string]string{
	"NotExported":      "a caller is answered by the owner's gateway with the reason not_exported; the code is for strait why of such a service",
	"FailoverOverload": "strait failover simulate comes with operations",
	"CertNotYetValid":  "a tunnel's refusal is reported by its reason; the check that names it comes with the clock faults",
}

// untested are codes that no test of another package triggers, and why.
var untested = map[string]string{
	"Internal":       "a bug: it is what problem.From makes of an error without a code, which is tested here",
	"CatalogRefused": "federation/catalog and controlplane/federate test each refusal by its type; the code is that of the line in strait check",
	"CatalogFork":    "as CatalogRefused",
	"CatalogStale":   "as CatalogRefused; the freshness is tested by its name",
	"UpstreamReset":  "sidecar/http tests the 502 and the reason upstream_reset",
}

// Every code is returned somewhere, and some test of the package that returns it asks for it by name or by number.
func TestEveryCodeIsUsedAndTested(t *testing.T) {
	used, tested := map[string]bool{}, map[string]bool{}
	names := map[string]string{}
	for _, r := range readRegistry(t) {
		names[string(r.Code)] = r.Name
	}
	sources(t, func(path, text string) {
		test := strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".txt")
		for _, m := range constantUse.FindAllStringSubmatch(text, -1) {
			if test {
				tested[m[1]] = true
			} else {
				used[m[1]] = true
			}
		}
		for _, code := range literalCode.FindAllString(text, -1) {
			name, known := names[code]
			if !known && code != "STR-1234" && !strings.HasSuffix(path, ".txt") && !test {
				t.Errorf("%s mentions %s, which is not in the registry", path, code)
			}
			if test && !strings.HasSuffix(path, "render_test.go") { // renderings of fixed samples trigger nothing
				tested[name] = true
			}
		}
	})
	for _, r := range readRegistry(t) {
		if why, ok := reserved[r.Name]; ok {
			if used[r.Name] {
				t.Errorf("%s %s is used now; take it from the list (%s)", r.Code, r.Name, why)
			}
			continue
		}
		if !used[r.Name] {
			t.Errorf("%s %s is returned nowhere", r.Code, r.Name)
		}
		if why, ok := untested[r.Name]; !ok && !tested[r.Name] {
			t.Errorf("%s %s is triggered by no test", r.Code, r.Name)
		} else if ok && tested[r.Name] && r.Name != "Internal" {
			t.Errorf("%s %s is tested now; take it from the list (%s)", r.Code, r.Name, why)
		}
	}
}
