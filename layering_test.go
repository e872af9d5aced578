// SPDX-License-Identifier: Apache-2.0

package strait_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
)

const module = "github.com/strait-mesh/strait"

// mayImport maps a tree to the trees of ours that it may import. The longest matching prefix decides. Test files may
// import anything of ours but cmd and e2e: they build the other side of a contract from real parts.
var mayImport = map[string][]string{
	"internal":                 {"internal", "controlplane/controlpb"}, // the span exporter and the preface speak wire types
	"trust":                    {"trust", "internal", "controlplane/controlpb"},
	"trust/spiffeid":           {},
	"federation":               {"trust/spiffeid"},
	"federation/catalog":       {"federation", "trust", "internal", "controlplane/controlpb"},
	"federation/join":          {"federation", "trust", "internal", "controlplane/controlpb"},
	"federation/gossip":        {"federation", "trust", "internal"},
	"gateway":                  {"gateway", "federation", "trust", "internal", "controlplane/controlpb", "controlplane/wire", "controlplane/proxyclient"},
	"sidecar":                  {"sidecar", "federation", "trust", "internal", "controlplane/controlpb", "controlplane/wire", "controlplane/proxyclient"},
	"controlplane":             {"controlplane", "federation", "trust", "internal"},
	"controlplane/controlpb":   {},
	"controlplane/wire":        {"controlplane/controlpb", "federation", "trust", "internal"},
	"controlplane/proxyclient": {"controlplane/controlpb", "controlplane/wire", "federation", "trust", "internal"},
	"cmd":                      {"cmd", "controlplane", "gateway", "sidecar", "federation", "trust", "internal"},
	"e2e":                      {"e2e", "cmd/strait/demo", "controlplane", "gateway", "sidecar", "federation", "trust", "internal"},
	"tools":                    {},
}

// owners maps a third party (by import path prefix) to the trees that alone may import it outside tests.
var owners = map[string][]string{
	"github.com/quic-go/quic-go":             {"gateway/tunnel"},
	"github.com/hashicorp/yamux":             {"gateway/tunnel"},
	"github.com/hashicorp/serf":              {"federation/gossip"},
	"github.com/hashicorp/memberlist":        {"federation/gossip"},
	"go.etcd.io/":                            {"controlplane/configapi"},
	"k8s.io/apiserver":                       {"controlplane/configapi", "controlplane/schema"},
	"k8s.io/apiextensions-apiserver":         {"controlplane/configapi", "controlplane/schema"},
	"k8s.io/":                                {"controlplane", "cmd/strait"},
	"sigs.k8s.io/mcs-api":                    {"controlplane"},
	"github.com/spf13/cobra":                 {"cmd"},
	"github.com/spf13/pflag":                 {"cmd"},
	"go.opentelemetry.io/otel":               {"cmd"},
	"github.com/envoyproxy/go-control-plane": {"controlplane/xds"},
	"github.com/prometheus/client_golang":    {"internal/metric"},
	"github.com/spiffe/go-spiffe":            {"trust"},
	"regexp":                                 {"controlplane/schema", "docs", "tools"}, // identities and paths are compared, not matched
}

// testOnly are packages that only tests may import: they are in no binary.
var testOnly = []string{"trust/lookalike", "internal/crowd/crowdtest"}

var forbiddenNames = map[string]bool{"util": true, "utils": true, "common": true, "helper": true, "helpers": true, "misc": true, "base": true, "shared": true}

func TestLayering(t *testing.T) {
	comments := map[string]int{}
	packages := map[string]bool{}
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && p != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "bin"):
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(p, ".go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), p, nil, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		checkFile(t, filepath.ToSlash(p), file, comments, packages)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for dir := range packages {
		if n := comments[dir]; n != 1 && dir != "." {
			t.Errorf("%s: %d package comments, want one (doc.go or main.go)", dir, n)
		}
	}
}

func checkFile(t *testing.T, p string, file *ast.File, comments map[string]int, packages map[string]bool) {
	dir := path.Dir(p)
	test := strings.HasSuffix(p, "_test.go")
	if forbiddenNames[path.Base(dir)] {
		t.Errorf("%s: name the package for what it does", dir)
	}
	if !test {
		packages[dir] = true
		if file.Doc != nil && !strings.HasPrefix(file.Doc.Text(), "SPDX") && !strings.Contains(p, ".pb.go") {
			comments[dir]++
		}
	}
	if len(file.Comments) == 0 || !strings.Contains(file.Comments[0].Text()+headComment(p), "SPDX-License-Identifier: Apache-2.0") {
		if !strings.HasSuffix(p, ".pb.go") {
			t.Errorf("%s: the first line is not the SPDX line", p)
		}
	}
	for _, imp := range file.Imports {
		target := strings.Trim(imp.Path.Value, `"`)
		if ours, ok := strings.CutPrefix(target, module+"/"); ok {
			checkOurs(t, p, dir, ours, test)
			continue
		}
		if !test && !strings.HasPrefix(dir, "e2e") {
			checkThirdParty(t, p, dir, target)
		}
	}
}

// headComment returns the first line of the file: directives such as //go:build may hide it from the parser's first group.
func headComment(p string) string {
	data, err := os.ReadFile(p)
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return line
}

func checkOurs(t *testing.T, p, dir, target string, test bool) {
	if under(target, "cmd") && !under(dir, "cmd") && !under(dir, "e2e") && !under(dir, "docs") || under(target, "e2e") && !under(dir, "e2e") {
		t.Errorf("%s imports %s: nobody imports cmd or e2e", p, target)
		return
	}
	if test {
		return
	}
	for _, tree := range testOnly {
		if under(target, tree) && !under(dir, tree) {
			t.Errorf("%s imports %s: only tests may", p, target)
		}
	}
	rule, best := []string(nil), -1
	for tree, allowed := range mayImport {
		if under(dir, tree) && len(tree) > best {
			rule, best = allowed, len(tree)
		}
	}
	if best < 0 {
		t.Errorf("%s: tree %s is not in the layering map", p, dir)
		return
	}
	if target == dir {
		return
	}
	for _, tree := range rule {
		if under(target, tree) {
			return
		}
	}
	t.Errorf("%s imports %s: not allowed for %s", p, target, dir)
}

func checkThirdParty(t *testing.T, p, dir, target string) {
	rule, best := []string(nil), -1
	for prefix, trees := range owners {
		if strings.HasPrefix(target, prefix) && len(prefix) > best {
			rule, best = trees, len(prefix)
		}
	}
	if best < 0 {
		return
	}
	for _, tree := range rule {
		if under(dir, tree) {
			return
		}
	}
	t.Errorf("%s imports %s: only %s may", p, target, strings.Join(rule, ", "))
}

func under(p, tree string) bool { return p == tree || strings.HasPrefix(p, tree+"/") }

// TestModule holds go.mod to what it must not contain.
func TestModule(t *testing.T) {
	data, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(data), "\n") {
		if strings.HasPrefix(strings.TrimSpace(line), "replace") {
			t.Errorf("go.mod: %q: no replace", line)
		}
	}
}
