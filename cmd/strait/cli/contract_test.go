// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/strait-mesh/strait/cmd/strait/cli"
	"github.com/strait-mesh/strait/internal/problem"
)

// walk calls f with every command of the tree.
func walk(c *cobra.Command, f func(*cobra.Command)) {
	f(c)
	for _, sub := range c.Commands() {
		walk(sub, f)
	}
}

// commands are the paths of all commands that do something: topics of help are no commands.
func commands(t *testing.T) []*cobra.Command {
	t.Helper()
	var list []*cobra.Command
	walk(cli.Root(&bytes.Buffer{}, &bytes.Buffer{}), func(c *cobra.Command) {
		if c.Runnable() || c.HasSubCommands() {
			list = append(list, c)
		}
	})
	if len(list) < 35 {
		t.Fatalf("only %d commands found", len(list))
	}
	return list
}

// isolate keeps a command in this process away from the user's files and from a strait-proxy in PATH.
func isolate(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	for k, v := range map[string]string{"HOME": dir, "XDG_STATE_HOME": dir, "XDG_CONFIG_HOME": dir, "STRAIT_DEMO_DIR": dir + "/demo", "STRAIT_DATA_DIR": dir + "/none", "PATH": dir} {
		t.Setenv(k, v)
	}
}

func run(t *testing.T, args ...string) (code int, out, errw string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var o, e bytes.Buffer
	code = cli.Run(ctx, args, strings.NewReader(""), &o, &e)
	return code, o.String(), e.String()
}

func words(c *cobra.Command) []string { return strings.Fields(c.CommandPath())[1:] }

// TestContract is UX 1.1 for every command of the tree.
func TestContract(t *testing.T) {
	isolate(t)
	for _, c := range commands(t) {
		path := c.CommandPath()
		t.Run(strings.ReplaceAll(path, " ", "_"), func(t *testing.T) {
			if n := len(words(c)) + 1; n > 3 {
				t.Errorf("%d words deep, want at most 3", n)
			}
			if c.Short == "" || strings.HasSuffix(c.Short, ".") || strings.Contains(c.Short, "\n") || len(c.Short) > 80 {
				t.Errorf("one-line help %q: want one line of at most 80 bytes without a full stop", c.Short)
			}
			if c.Long == "" {
				t.Error("no long help")
			}
			testExamples(t, c)
			testHelp(t, c)
			testUsageErrors(t, c)
		})
	}
}

func testExamples(t *testing.T, c *cobra.Command) {
	if !c.HasParent() {
		return
	}
	lines := strings.Split(strings.TrimSpace(c.Example), "\n")
	if len(lines) < 2 {
		t.Errorf("%d examples, want two or more", len(lines))
	}
	uses := 0
	for _, l := range lines {
		if strings.Contains(l, c.CommandPath()) {
			uses++
		}
	}
	if uses == 0 {
		t.Errorf("no example shows %s:\n%s", c.CommandPath(), c.Example)
	}
}

func testHelp(t *testing.T, c *cobra.Command) {
	for _, args := range [][]string{append(words(c), "--help"), append([]string{"help"}, words(c)...)} {
		code, out, errw := run(t, args...)
		if executed := c.Name() == "gateway" || c.Name() == "sidecar"; executed && args[0] != "help" && code == problem.ExitUsage {
			code, errw = 0, "" // strait-proxy adds its flags; there is none beside a test
		}
		if code != 0 || errw != "" {
			t.Errorf("%q: exit %d, stderr %q", args, code, errw)
		}
		for _, want := range []string{"EXIT CODES", strings.SplitN(c.Long, "\n", 2)[0]} {
			if !strings.Contains(out, want) {
				t.Errorf("%q lacks %q:\n%s", args, want, out)
			}
		}
		if c.HasParent() && !strings.Contains(out, "Examples:") {
			t.Errorf("%q shows no examples", args)
		}
		if strings.Contains(out, "\x1b") {
			t.Errorf("%q is coloured", args)
		}
	}
}

// Usage errors: exit 2, code STR-1001, nothing on standard output, five fields with -o json.
func testUsageErrors(t *testing.T, c *cobra.Command) {
	wrong := [][]string{append(words(c), "--no-such-flag")}
	if c.HasSubCommands() {
		wrong = append(wrong, append(words(c), "no-such-command"))
	}
	for _, args := range wrong {
		code, out, errw := run(t, args...)
		if code != problem.ExitUsage || out != "" || !strings.Contains(errw, "[STR-1001]") || strings.Contains(errw, "\x1b") {
			t.Errorf("%q: exit %d, stdout %q, stderr:\n%s", args, code, out, errw)
		}
		for _, part := range []string{"error: ", "  what  ", "  why   ", "  fix   ", "  state "} {
			if !strings.Contains(errw, part) {
				t.Errorf("%q: no %q in\n%s", args, strings.TrimSpace(part), errw)
			}
		}
		if c.DisableFlagParsing {
			continue // roles have flags of their own and print no documents
		}
		_, out, errw = run(t, append(args, "-o", "json")...)
		var doc map[string]any
		if err := json.Unmarshal([]byte(errw), &doc); err != nil || out != "" {
			t.Fatalf("%q -o json: %v, stdout %q, stderr %s", args, err, out, errw)
		}
		for _, field := range []string{"code", "what", "why", "fix", "state", "retryable", "cluster", "object", "field", "apiVersion"} {
			if _, ok := doc[field]; !ok {
				t.Errorf("%q -o json: no %q in %s", args, field, errw)
			}
		}
		if doc["kind"] != "Error" || doc["code"] != "STR-1001" || doc["state"] == "" {
			t.Errorf("%q -o json: %v", args, doc)
		}
	}
}

// A misspelt command is answered with the nearest one, at every level.
func TestNearestCommand(t *testing.T) {
	isolate(t)
	for _, c := range commands(t) {
		if !c.HasParent() || c.Hidden || len(c.Name()) < 3 {
			continue
		}
		w := words(c)
		last := w[len(w)-1]
		typo := last[:len(last)-2] + last[len(last)-1:] + last[len(last)-2:len(last)-1] // the last two letters changed places
		if typo == last {
			typo = last + "x"
		}
		if slices.ContainsFunc(c.Parent().Commands(), func(o *cobra.Command) bool { return o.Name() == typo }) {
			continue
		}
		code, out, errw := run(t, append(slices.Clone(w[:len(w)-1]), typo)...)
		if code != problem.ExitUsage || out != "" || !strings.Contains(errw, "did you mean: "+c.CommandPath()+"\n") {
			t.Errorf("%s %s: exit %d, stderr:\n%s", c.Parent().CommandPath(), typo, code, errw)
		}
	}
}

// Without a control plane every command fails with a code of its own, and says nothing on standard output.
func TestNoControlPlane(t *testing.T) {
	isolate(t)
	// These need none, or begin something that a unit test does not.
	exempt := map[string]bool{
		"strait": true, "strait version": true, "strait explain": true, "strait context ls": true, "strait help": true, "strait completion": true, "strait reference": true,
		"strait init": true, "strait demo up": true, "strait context add": true,
	}
	args := map[string][]string{
		"strait why": {"checkout"}, "strait ping": {"eu-west"}, "strait join": {"-"}, "strait leave": {"--yes"}, "strait token revoke": {"x"}, "strait token gateway": {"g", "--out", t.TempDir() + "/t"},
		"strait member describe": {"x"}, "strait member approve": {"x"}, "strait member evict": {"x", "--yes"}, "strait export": {"a", "--to", "b"}, "strait unexport": {"a"},
		"strait service describe": {"a"}, "strait workload register": {"a/b"},
		"strait workload evict": {"a/b", "--yes"}, "strait workload readmit": {"a/b"}, "strait trust revoke": {"spiffe://a/ns/b/sa/c", "--yes"}, "strait failover set": {"a", "--order", "local"}, "strait apply": {"-f", "/dev/null"}, "strait get": {"workload"},
		"strait delete": {"workload", "a/b"}, "strait access issue": {"ada", "--out", t.TempDir()}, "strait backup": {"--out", "-"}, "strait restore": {"/nonexistent"},
		"strait trust rotate": {"prepare"}, "strait demo break": {"eu-west"}, "strait demo heal": {"eu-west"}, "strait demo down": {}, "strait context use": {"x"},
	}
	for _, c := range commands(t) {
		path := c.CommandPath()
		if exempt[path] || c.HasSubCommands() {
			continue
		}
		code, out, errw := run(t, append(words(c), args[path]...)...)
		if path == "strait demo down" {
			continue // nothing to take down is what was asked for
		}
		if code == 0 || out != "" || !strings.Contains(errw, "[STR-") {
			t.Errorf("%s %q: exit %d, stdout %q, stderr:\n%s", path, args[path], code, out, errw)
		}
		if strings.Contains(errw, "[STR-9001]") {
			t.Errorf("%s: an internal error for a control plane that is not there:\n%s", path, errw)
		}
	}
}

// Without a demo, demo says so, and taking it down is no error.
func TestNoDemo(t *testing.T) {
	isolate(t)
	for _, args := range [][]string{{"demo", "status"}, {"demo", "break", "eu-west"}, {"demo", "heal", "eu-west"}} {
		if code, out, errw := run(t, args...); code != problem.ExitNotFound || out != "" || !strings.Contains(errw, "["+string(problem.DemoNotRunning)+"]") {
			t.Errorf("%q: exit %d, stdout %q, stderr:\n%s", args, code, out, errw)
		}
	}
}

// Every global flag has its STRAIT_ variable; a flag on the command line wins; a wrong value names the variable.
func TestGlobalFlagsFromEnvironment(t *testing.T) {
	values := map[string]string{
		"data-dir": "/d", "context": "lab", "namespace": "shop", "output": "json", "jq": ".x", "no-headers": "true", "ascii": "true",
		"quiet": "true", "verbose": "true", "yes": "true", "wait": "programmed", "timeout": "7s",
	}
	vars := map[string]string{}
	for name, v := range values {
		vars["STRAIT_"+strings.ToUpper(strings.ReplaceAll(name, "-", "_"))] = v
	}
	got, err := cli.Globals(vars)
	if err != nil {
		t.Fatal(err)
	}
	cli.Root(&bytes.Buffer{}, &bytes.Buffer{}).PersistentFlags().VisitAll(func(f *pflag.Flag) {
		if values[f.Name] == "" {
			t.Errorf("--%s is a global flag without a case here", f.Name)
		}
		if got[f.Name] != values[f.Name] {
			t.Errorf("--%s = %q from its variable, want %q", f.Name, got[f.Name], values[f.Name])
		}
	})
	if got, err := cli.Globals(vars, "--timeout", "9s", "-o", "yaml"); err != nil || got["timeout"] != "9s" || got["output"] != "yaml" {
		t.Errorf("flags over variables: %v, timeout %s, output %s", err, got["timeout"], got["output"])
	}
	for k, v := range map[string]string{"STRAIT_TIMEOUT": "soon", "STRAIT_ASCII": "perhaps", "STRAIT_OUTPUT": "xml", "STRAIT_WAIT": "forever"} {
		_, err := cli.Globals(map[string]string{k: v})
		if !problem.Is(err, problem.Usage) || !strings.Contains(err.Error(), v) {
			t.Errorf("%s=%s: %v", k, v, err)
		}
	}
}

// Completion knows kinds, codes and commands without a control plane.
func TestCompletion(t *testing.T) {
	isolate(t)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"__complete", "explain", "STR-21"}, "STR-2104"},
		{[]string{"__complete", "get", "fail"}, "failoverpolicy"},
		{[]string{"__complete", "to"}, "token"},
		{[]string{"__complete", "help", ""}, "exit-codes"},
	} {
		code, out, _ := run(t, c.args...)
		if code != 0 || !strings.Contains(out, c.want) {
			t.Errorf("%q: exit %d, got %q, want %s", c.args, code, out, c.want)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if code, out, errw := run(t, "completion", shell); code != 0 || !strings.Contains(out, "strait") || errw != "" {
			t.Errorf("completion %s: exit %d, %d bytes, stderr %q", shell, code, len(out), errw)
		}
	}
}
