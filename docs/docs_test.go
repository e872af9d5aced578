// SPDX-License-Identifier: Apache-2.0

package docs_test

import (
	"bytes"
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/strait-mesh/strait/cmd/strait-proxy/role"
	"github.com/strait-mesh/strait/cmd/strait/cli"
	"github.com/strait-mesh/strait/internal/problem"
)

// documents are all Markdown files of the repository, by their path from its root.
func documents(t *testing.T) map[string]string {
	t.Helper()
	docs := map[string]string{}
	root := ".."
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		rel = filepath.ToSlash(rel)
		if d.IsDir() && rel != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "bin" || d.Name() == "testdata" || strings.HasPrefix(d.Name(), "zz_")) {
			return fs.SkipDir
		}
		if d.IsDir() || path.Ext(rel) != ".md" || rel == "CONTRACT.md" {
			return nil
		}
		data, err := os.ReadFile(p)
		docs[rel] = string(data)
		return err
	})
	if err != nil || len(docs) < 15 {
		t.Fatalf("%d documents, %v", len(docs), err)
	}
	return docs
}

// The reference is what make generate writes.
func TestReferenceIsGenerated(t *testing.T) {
	for name, want := range cli.Reference(cli.Tree()) {
		got, err := os.ReadFile(filepath.Join("reference", name))
		if err != nil || string(got) != want {
			t.Errorf("docs/reference/%s is not up to date (%v): run make generate", name, err)
		}
	}
}

// fence is a block of a document: its language and its lines.
type fence struct {
	language string
	lines    []string
}

func fences(text string) (list []fence) {
	var open *fence
	for _, line := range strings.Split(text, "\n") {
		word, isFence := strings.CutPrefix(strings.TrimSpace(line), "```")
		switch {
		case isFence && open == nil:
			open = &fence{language: word}
		case isFence:
			list = append(list, *open)
			open = nil
		case open != nil:
			open.lines = append(open.lines, line)
		}
	}
	return list
}

// commandLines are the command lines of ours that a block shows: all of a block without a language, and those after a prompt.
func (f fence) commandLines() (list []string) {
	for _, line := range f.lines {
		line, prompted := strings.CutPrefix(strings.TrimSpace(line), "$ ")
		if (strings.HasPrefix(line, "strait ") || strings.HasPrefix(line, "strait-proxy ")) && (prompted || f.language == "") {
			list = append(list, line)
		}
	}
	return list
}

// split cuts a line into words as a shell would, up to a pipe, a redirection, a comment or an ampersand.
func split(line string) (words []string) {
	var word strings.Builder
	var quote rune
	started := false
	end := func() {
		if started {
			words = append(words, word.String())
		}
		word.Reset()
		started = false
	}
	for _, r := range line {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(r)
		case r == '\'' || r == '"':
			quote, started = r, true
		case r == ' ':
			end()
		case !started && strings.ContainsRune("|<>&#;", r):
			return words
		default:
			started = true
			word.WriteRune(r)
		}
	}
	end()
	return words
}

// judge parses one command line without doing anything.
func judge(t *testing.T, words []string) error {
	t.Helper()
	if words[0] == "strait-proxy" {
		words = append([]string{"strait"}, words[1:]...)
	}
	root := cli.Tree()
	c, rest, err := root.Find(words[1:])
	if err != nil {
		return err
	}
	if c.DisableFlagParsing {
		return judgeRole(t, words)
	}
	if err := c.ParseFlags(rest); err != nil {
		return err
	}
	args := c.Flags().Args()
	if c.Name() == "help" {
		_, _, err := root.Find(args)
		return err
	}
	return c.ValidateArgs(args)
}

// judgeRole asks the role for its merged configuration instead of running it.
func judgeRole(t *testing.T, words []string) error {
	t.Helper()
	args := []string{}
	var name string
	for _, w := range words[1:] {
		switch {
		case name == "":
			name = w
		case w != "config":
			args = append(args, w)
		}
	}
	args = append([]string{name, "config"}, args...)
	var out, errw bytes.Buffer
	code := 0
	if name == "controlplane" {
		code = cli.Run(context.Background(), args, strings.NewReader(""), &out, &errw)
	} else {
		code = role.Run(context.Background(), args, func(string) (string, bool) { return "", false }, &out, &errw)
	}
	if code != 0 {
		return problem.New(problem.Usage, "%s", errw.String())
	}
	return nil
}

// Every command line that a document shows is one: its verbs and flags exist, and its arguments are as many as they may be.
func TestCommandLines(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	seen := 0
	for name, text := range documents(t) {
		for _, f := range fences(text) {
			for _, line := range f.commandLines() {
				seen++
				if err := judge(t, split(line)); err != nil {
					t.Errorf("%s: %s: %v", name, line, err)
				}
			}
		}
	}
	if seen < 60 {
		t.Errorf("only %d command lines found", seen)
	}
}

var inlineCommand = regexp.MustCompile("`strait ([a-z-]+)( [a-z-]+)?")

// Commands in running text, and in the fixes of messages, exist too.
func TestCommandsInText(t *testing.T) {
	texts := documents(t)
	for _, e := range problem.Entries() {
		for _, f := range e.Fix {
			if strings.HasPrefix(f, "strait ") {
				texts[string(e.Code)] += "`" + f + "`\n"
			}
		}
	}
	for name, text := range texts {
		for _, m := range inlineCommand.FindAllStringSubmatch(text, -1) {
			root := cli.Tree()
			words := []string{m[1]}
			c, _, err := root.Find(words)
			if err != nil || c == root {
				t.Errorf("%s: there is no command strait %s", name, m[1])
				continue
			}
			if second := strings.TrimSpace(m[2]); second != "" && c.HasSubCommands() && !has(c, second) {
				t.Errorf("%s: there is no command strait %s %s", name, m[1], second)
			}
		}
	}
}

func has(c *cobra.Command, name string) bool {
	for _, sub := range c.Commands() {
		if sub.Name() == name {
			return true
		}
	}
	return false
}

var link = regexp.MustCompile(`\]\(([^)#\s]+)(#[^)]*)?\)`)

// Every link inside the repository leads to a file.
func TestLinks(t *testing.T) {
	for name, text := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
				continue
			}
			if _, err := os.Stat(filepath.Join("..", path.Dir(name), m[1])); err != nil {
				t.Errorf("%s links to %s: %v", name, m[1], err)
			}
		}
	}
}

// Every message code that a document mentions exists.
func TestCodes(t *testing.T) {
	for name, text := range documents(t) {
		for _, code := range regexp.MustCompile(`STR-\d{4}`).FindAllString(text, -1) {
			if _, ok := problem.Lookup(problem.Code(code)); !ok && code != "STR-1234" {
				t.Errorf("%s mentions %s, which does not exist", name, code)
			}
		}
	}
}

// Every metric that the code registers is in the reference, and the reference has no other.
func TestMetrics(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("reference", "metrics.md"))
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{}
	for _, m := range regexp.MustCompile("`(strait_[a-z_]+)`").FindAllStringSubmatch(string(page), -1) {
		listed[m[1]] = true
	}
	registered := map[string]bool{}
	definition := regexp.MustCompile(`(?:(?:Gauge|Counter|Histogram)\(|Name:\s*)"(strait_[a-z_]+)"`)
	goFiles(t, func(name, text string) {
		if strings.HasSuffix(name, "_test.go") {
			return
		}
		for _, m := range definition.FindAllStringSubmatch(text, -1) {
			registered[m[1]] = true
			if !listed[m[1]] {
				t.Errorf("%s registers %s, which docs/reference/metrics.md does not list", name, m[1])
			}
		}
	})
	for m := range listed {
		if !registered[m] {
			t.Errorf("docs/reference/metrics.md lists %s, which nothing registers", m)
		}
	}
}

func goFiles(t *testing.T, f func(name, text string)) {
	t.Helper()
	err := filepath.WalkDir("..", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && p != ".." && (strings.HasPrefix(d.Name(), ".") || strings.HasPrefix(d.Name(), "zz_")) {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(p, ".go") {
			return nil
		}
		data, err := os.ReadFile(p)
		f(filepath.ToSlash(strings.TrimPrefix(p, "../")), string(data))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Every test that SECURITY.md names exists in the package that it names.
func TestSecurityNamesTests(t *testing.T) {
	tests := map[string]bool{}
	goFiles(t, func(name, text string) {
		if !strings.HasSuffix(name, "_test.go") {
			return
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, text, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil {
				tests[path.Dir(name)+"."+fn.Name.Name] = true
			}
		}
	})
	text := documents(t)["SECURITY.md"]
	named := regexp.MustCompile("`([a-z0-9/]+\\.Test[A-Za-z0-9]+)`").FindAllStringSubmatch(text, -1)
	for _, m := range named {
		if !tests[m[1]] {
			t.Errorf("SECURITY.md names %s, which does not exist", m[1])
		}
	}
	for _, promise := range strings.Fields("P1 P2 P3 P4 P5 P6 P7 P8 P9 P10 P11 P12 P13 P14") {
		if !strings.Contains(text, "**"+promise+"**") {
			t.Errorf("SECURITY.md is silent about %s", promise)
		}
	}
	if len(named) < 30 {
		t.Errorf("only %d tests are named", len(named))
	}
}
