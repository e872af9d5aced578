// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/strait-mesh/strait/internal/problem"
)

// topics are pages of help that belong to no command.
var topics = []struct{ name, short, text string }{
	{"exit-codes", "What each exit code means", `Every command ends with one of these codes:

  0    done; all checks passed
  1    the operation failed
  2    usage error, or a confirmation was needed (--yes)
  3    accepted, but not ready within --timeout
  4    authentication or trust refused
  5    object not found
  6    check found errors
  7    check found only warnings, and --fail-on=warning was given
  8    validation refused an object or a file
  10   partial: some clusters were unreachable; what was reached is on standard output
  130  interrupted

The code of an error message (STR-1234) decides the exit code: strait explain CODE shows it.`},
	{"output", "Formats, streams and the shape of errors", `Data goes to standard output; progress, warnings and errors go to standard error. On an error, standard output is empty.

  -o table   columns for people (default)     -o wide   with more columns
  -o json    one indented document            -o jsonl  the same on one line
  -o yaml    the same as YAML                 -o name   names only, for scripts
  --jq EXPR  filters the JSON; strings are printed raw

Documents have apiVersion cli.strait.dev/v1 and a kind; objects of the configuration API keep their own. With -o json, jsonl or yaml an
error is a document too: code, title, what, why, fix, state, and retryable, cluster, object, field.
Nothing is ever coloured. --ascii replaces the signs ✓ ✗ … by + x and a dot; the word beside a sign says the same.`},
	{"environment", "Environment variables", `Every global flag has a variable: STRAIT_DATA_DIR, STRAIT_CONTEXT, STRAIT_NAMESPACE, STRAIT_OUTPUT, STRAIT_JQ, STRAIT_NO_HEADERS,
STRAIT_ASCII, STRAIT_QUIET, STRAIT_VERBOSE, STRAIT_YES, STRAIT_WAIT, STRAIT_TIMEOUT. A flag wins over its variable.
Every flag of the roles (controlplane, gateway, sidecar) has one too, and wins over the file: strait gateway config shows where each value
came from.

  STRAIT_DEMO_DIR   directory of strait demo (default: strait-demo-UID in the temporary directory)
  XDG_STATE_HOME    its strait/ is the default data directory of users other than root
  XDG_CONFIG_HOME   its strait/contexts.yaml holds the contexts (default: ~/.config)
  OTEL_*            where the control plane forwards spans, by the OpenTelemetry specification`},
	{"files", "Files and directories", `The data directory of a control plane (default: /var/lib/strait for root, else $XDG_STATE_HOME/strait or ~/.local/state/strait):

  strait.yaml   configuration: the section cluster is fixed at init; controlplane, gateway and sidecar take the flags of their role
  ca/           the cluster's keys            identity/   this process's own identity
  store/        the configuration API's data  snapshot/   the last good state, from which a restart begins
  bundles/ catalogs/ tokens/ spans/           what is known of peers, tokens, kept traces
  run/          sockets of this machine's commands (0600) and the bound addresses
  LOCK FORMAT   one process at a time; the version of the layout

Gateways and sidecars have a data directory of their own. strait backup writes all of the above that cannot be made again.
~/.config/strait/contexts.yaml says which control planes the command line knows.`},
}

// topicCommands are shown by strait help TOPIC.
func topicCommands() []*cobra.Command {
	var list []*cobra.Command
	for _, t := range topics {
		list = append(list, &cobra.Command{Use: t.name, Short: t.short, Long: t.text})
	}
	return list
}

func newHelpCmd(root *cobra.Command) *cobra.Command {
	return &cobra.Command{Use: "help [COMMAND|TOPIC]", Short: "Help about a command or a topic",
		Long:    "Help about a command or a topic: exit-codes, output, environment, files.",
		Example: "  strait help join\n  strait help exit-codes",
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			var names []string
			for _, c := range root.Commands() {
				names = append(names, c.Name()+"\t"+c.Short)
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			found, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				name := strings.Join(args, " ")
				if found != nil && len(rest) > 0 {
					name = rest[0]
				} else {
					found = root
				}
				p := problem.New(problem.Usage, "no command or topic is called %q", name)
				for _, s := range found.SuggestionsFor(name) {
					p = p.WithFix("did you mean: %s", strings.TrimSpace("strait help "+strings.TrimPrefix(found.CommandPath()+" "+s, "strait ")))
				}
				return p.WithFix("strait help")
			}
			return found.Help()
		}}
}

func newCompletionCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "completion bash|zsh|fish", Short: "Write a completion script for a shell", Args: cobra.ExactArgs(1),
		ValidArgs: []string{"bash", "zsh", "fish"},
		Example:   "  strait completion bash > /etc/bash_completion.d/strait\n  strait completion fish > ~/.config/fish/completions/strait.fish",
		RunE: func(cmd *cobra.Command, args []string) error {
			write := map[string]func(io.Writer) error{
				"bash": func(w io.Writer) error { return cmd.Root().GenBashCompletionV2(w, true) },
				"zsh":  cmd.Root().GenZshCompletion,
				"fish": func(w io.Writer) error { return cmd.Root().GenFishCompletion(w, true) },
			}[args[0]]
			if write == nil {
				return usageError(cmd, fmt.Errorf("%q is none of bash, zsh, fish", args[0]))
			}
			return write(e.out)
		}}
}
