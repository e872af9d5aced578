// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	straitschema "github.com/strait-mesh/strait/controlplane/schema"
	"github.com/strait-mesh/strait/internal/problem"
)

// Run executes one command line and returns its exit code.
func Run(ctx context.Context, args []string, in io.Reader, out, errw io.Writer) int {
	e := &env{in: in, out: out, err: errw, getenv: os.LookupEnv, now: time.Now}
	root := newRoot(e)
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errw)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return problem.ExitOK
	}
	e.outputOfError(args)
	return e.report(ctx, err)
}

// exitError ends a command with a code after it has said everything itself.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit %d", int(e)) }

// report prints err in the shape of UX 1.1 and returns the exit code.
func (e *env) report(ctx context.Context, err error) int {
	var code exitError
	if errors.As(err, &code) {
		return int(code)
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		fmt.Fprintln(e.err, "interrupted")
		return problem.ExitInterrupted
	}
	p := problem.From(err)
	switch e.output {
	case "json", "jsonl", "yaml":
		doc := map[string]any{
			"apiVersion": apiVersion, "kind": "Error", "code": p.Code, "title": p.Title(), "what": p.What, "why": p.Reason(),
			"fix": p.Fixes(), "state": p.Condition(), "retryable": p.Retryable, "cluster": p.Cluster, "object": p.Object, "field": p.Field,
		}
		var found straitschema.Errors
		if errors.As(err, &found) {
			doc["findings"] = found
		}
		value, err := plainValue(doc)
		if err == nil {
			_ = writePlain(e.err, e.output, value)
		}
	default:
		fmt.Fprint(e.err, p.Human())
	}
	return p.Exit()
}

// outputOfError finds the format asked for when the command line was refused before it was read to its end.
func (e *env) outputOfError(args []string) {
	if e.output == "table" {
		if v, ok := e.getenv("STRAIT_OUTPUT"); ok {
			e.output = v
		}
	}
	for i, a := range args {
		switch {
		case a == "--":
			return
		case (a == "-o" || a == "--output") && i+1 < len(args):
			e.output = args[i+1]
		case strings.HasPrefix(a, "--output="):
			e.output = strings.TrimPrefix(a, "--output=")
		case strings.HasPrefix(a, "-o") && len(a) > 2:
			e.output = strings.TrimPrefix(a[2:], "=")
		}
	}
}

func newRoot(e *env) *cobra.Command {
	root := &cobra.Command{
		Use:           "strait",
		Short:         "Join clusters, export services, set failover, trace calls across clusters",
		Long:          "strait joins clusters and datacenters into a federation, exports services across regions, sets failover priorities and\ntraces calls across clusters.",
		SilenceErrors: true, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError(cmd, fmt.Errorf("unknown command %q", args[0]))
			}
			return cmd.Help()
		},
		Args: cobra.ArbitraryArgs,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(usageError)
	e.globalFlags(root.PersistentFlags())
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return e.fromEnvironment(cmd) }
	for _, group := range []struct {
		id, title string
		commands  []*cobra.Command
	}{
		{"daily", "Daily:", dailyCommands(e)},
		{"demo", "Demo:", demoCommands(e)},
		{"setup", "Set up and federate:", setupCommands(e)},
		{"service", "Services and failover:", serviceCommands(e)},
		{"config", "Configuration and trust:", configCommands(e)},
		{"run", "Run:", runCommands(e)},
		{"meta", "About:", metaCommands(e)},
	} {
		root.AddGroup(&cobra.Group{ID: group.id, Title: group.title})
		for _, c := range group.commands {
			c.GroupID = group.id
			root.AddCommand(c)
		}
	}
	help := newHelpCmd(root)
	help.GroupID = "meta"
	root.SetHelpCommand(help)
	root.SetHelpTemplate(helpTemplate)
	root.AddCommand(topicCommands()...)
	finish(root)
	return root
}

// finish gives every command what the contract asks of all: usage errors with a code, and a refusal of unknown
// subcommands that names the nearest.
func finish(c *cobra.Command) {
	for _, sub := range c.Commands() {
		finish(sub)
	}
	if c.Long == "" {
		c.Long = c.Short + "."
	}
	c.SuggestionsMinimumDistance = 2
	if c.HasSubCommands() && c.RunE == nil && c.Run == nil {
		c.Args = cobra.ArbitraryArgs
		c.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return usageError(cmd, fmt.Errorf("unknown command %q", args[0]))
		}
		return
	}
	if c.Args != nil {
		check := c.Args
		c.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usageError(cmd, err)
			}
			return nil
		}
	}
}

// helpTemplate ends every help with the exit codes.
const helpTemplate = `{{.Long | trimTrailingWhitespaces}}

{{if or .Runnable .HasSubCommands}}{{.UsageString}}
EXIT CODES
` + exitCodeTable + `
{{end}}`

const exitCodeTable = `  0 done; 1 failed; 2 usage; 3 accepted but not ready in time; 4 authentication or trust refused; 5 not found;
  6 checks found errors; 7 warnings with --fail-on=warning; 8 validation refused; 10 partial: some clusters unreachable;
  130 interrupted`

func usageError(cmd *cobra.Command, err error) error {
	p := problem.New(problem.Usage, "%s: %v", cmd.CommandPath(), err)
	if name, ok := strings.CutPrefix(err.Error(), `unknown command "`); ok {
		name, _, _ = strings.Cut(name, `"`)
		for _, s := range cmd.SuggestionsFor(name) {
			p = p.WithFix("did you mean: %s %s", cmd.CommandPath(), s)
		}
	}
	return p.WithFix("%s --help", cmd.CommandPath()).WithState("nothing was done.")
}

func (e *env) globalFlags(f *pflag.FlagSet) {
	f.StringVar(&e.dataDir, "data-dir", "", "data directory of the control plane to talk to (default: the context's)")
	f.StringVar(&e.context, "context", "", "context of the command line (see strait context ls)")
	f.StringVarP(&e.namespace, "namespace", "n", "", "namespace of bare names")
	f.StringVarP(&e.output, "output", "o", "table", "table, wide, json, yaml, name or jsonl")
	f.StringVar(&e.jq, "jq", "", "filter JSON output by a jq expression")
	f.BoolVar(&e.noHeaders, "no-headers", false, "tables without a head")
	f.BoolVar(&e.ascii, "ascii", false, "ASCII glyphs only")
	f.BoolVarP(&e.quiet, "quiet", "q", false, "no progress on standard error")
	f.BoolVarP(&e.verbose, "verbose", "v", false, "log what is done, on standard error")
	f.BoolVar(&e.yes, "yes", false, "confirm what would otherwise be refused")
	f.StringVar(&e.wait, "wait", "ready", "of commands that write policies: none, or ready (programmed): every proxy has it")
	f.DurationVar(&e.timeout, "timeout", 60*time.Second, "how long to wait for readiness")
}

// fromEnvironment fills global flags that were not given from STRAIT_ variables.
func (e *env) fromEnvironment(cmd *cobra.Command) error {
	var bad error
	cmd.Root().PersistentFlags().VisitAll(func(f *pflag.Flag) {
		if f.Changed || f.Name == "help" {
			return
		}
		key := "STRAIT_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		if v, ok := e.getenv(key); ok {
			if err := f.Value.Set(v); err != nil && bad == nil {
				bad = usageError(cmd, fmt.Errorf("%s: %w", key, err))
			}
		}
	})
	if bad != nil {
		return bad
	}
	if e.wait != "none" && e.wait != "ready" && e.wait != "programmed" {
		return usageError(cmd, fmt.Errorf("--wait=%s: want none, programmed or ready", e.wait))
	}
	switch e.output {
	case "table", "wide", "json", "yaml", "name", "jsonl", "waterfall":
		return nil
	}
	return usageError(cmd, fmt.Errorf("-o %q: want table, wide, json, yaml, name or jsonl", e.output))
}
