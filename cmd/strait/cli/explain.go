// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/version"
)

func newExplainCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "explain CODE|KIND[.FIELD]", Short: "Offline help for a message code or a resource field", Args: cobra.ExactArgs(1),
		Long: `Explain a message code: its cause and its fix. Or a kind of the configuration API, or a field of it: its type, its limits and its
default, by the schema that objects are judged by. Both come from the binary; nothing needs to run.`,
		Example: "  strait explain STR-2104\n  strait explain failoverpolicy.spec.return",
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			codes := allCodes()
			for _, k := range api.Kinds() {
				codes = append(codes, strings.ToLower(k.Kind)+"\tkind")
			}
			return codes, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error { return explainRun(e, args[0]) }}
}

func allCodes() []string {
	var codes []string
	for _, en := range problem.Entries() {
		codes = append(codes, string(en.Code)+"\t"+en.Title)
	}
	return codes
}

func kindNames() []string {
	var names []string
	for _, k := range resourceKinds {
		names = append(names, strings.ToLower(k.kind))
	}
	return names
}

func explainRun(e *env, code string) error {
	path := strings.Split(code, ".")
	if k, ok := api.KindNamed(path[0]); ok {
		return explainField(e, k, path[1:])
	}
	given := code
	if code = strings.ToUpper(code); !strings.HasPrefix(code, "STR-") {
		code = "STR-" + code
	}
	en, ok := problem.Lookup(problem.Code(code))
	if !ok {
		return problem.New(problem.NotFound, "%s is neither a message code nor a kind", given).
			WithWhy("codes look like STR-2104; kinds are %s", strings.Join(kindNames(), ", ")).WithFix("docs/reference/codes.md lists all codes")
	}
	if e.output != "table" && e.output != "wide" || e.jq != "" {
		return e.print("MessageCode", en, &table{names: []string{code}})
	}
	fmt.Fprintf(e.out, "%s  %s\n\n", en.Code, en.Title)
	fmt.Fprintf(e.out, "  severity  %s (exit %d)\n  why       %s\n", en.Severity, en.Exit, en.Why)
	for i, f := range en.Fix {
		label := "fix"
		if i > 0 {
			label = ""
		}
		fmt.Fprintf(e.out, "  %-8s  %s\n", label, f)
	}
	fmt.Fprintf(e.out, "  since     %s\n", en.Since)
	return nil
}

func newVersionCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Example: "  strait version\n  strait version -o json",
		RunE: func(*cobra.Command, []string) error {
			t := &table{}
			t.add(version.String(), "strait "+version.String(), version.Go(), fmt.Sprintf("wire %d", version.Wire))
			return e.print("Version", map[string]any{
				"version": version.String(), "go": version.Go(), "revision": version.Revision(), "wire": version.Wire,
			}, t)
		}}
}
