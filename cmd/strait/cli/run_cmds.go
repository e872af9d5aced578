// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/settings"
	"github.com/strait-mesh/strait/trust/endpoint"
)

// sections of strait.yaml.
var sections = []string{"cluster", "controlplane", "gateway", "sidecar"}

func runCommands(e *env) []*cobra.Command {
	cp := &cobra.Command{Use: "controlplane", Short: "Run the control plane of a cluster", DisableFlagParsing: true,
		Example: "  strait controlplane --data-dir /var/lib/strait\n  strait controlplane config --data-dir /var/lib/strait",
		RunE: func(cmd *cobra.Command, args []string) error {
			if asksHelp(args) {
				e.roleHelp(cmd)
			}
			return controlPlaneRun(cmd.Context(), e, args)
		}}
	cmds := []*cobra.Command{cp}
	for _, role := range []struct{ name, short, example string }{
		{"gateway", "Run a gateway (executes strait-proxy)", "  strait gateway --data-dir ./gateway --token-file ./us-east/tokens/gateway-1.token --control-plane 127.0.0.1:7400\n  strait gateway config"},
		{"sidecar", "Run a sidecar (executes strait-proxy)", "  strait sidecar --data-dir ./web --token-file web.token --upstream shop/checkout=127.0.0.1:9001\n  strait sidecar config"},
	} {
		cmds = append(cmds, &cobra.Command{Use: role.name, Short: role.short, Example: role.example, DisableFlagParsing: true,
			RunE: func(cmd *cobra.Command, args []string) error {
				if asksHelp(args) {
					e.roleHelp(cmd)
				}
				return execProxy(append([]string{role.name}, args...))
			}})
	}
	return cmds
}

func asksHelp(args []string) bool {
	return slices.ContainsFunc(args, func(a string) bool { return a == "-h" || a == "--help" || a == "-help" })
}

// roleHelp prints what the settings of a role do not say of themselves.
func (e *env) roleHelp(cmd *cobra.Command) {
	fmt.Fprintf(e.out, "%s\n\nExamples:\n%s\n\nEXIT CODES\n%s\n\n", cmd.Long, cmd.Example, exitCodeTable)
}

// execProxy replaces this process by strait-proxy, which lies beside it.
func execProxy(args []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	proxy := filepath.Join(filepath.Dir(self), "strait-proxy")
	if _, err := os.Stat(proxy); err != nil {
		if proxy, err = exec.LookPath("strait-proxy"); err != nil {
			return problem.New(problem.Usage, "strait-proxy lies neither beside %s nor in PATH", self).WithFix("install both binaries into one directory")
		}
	}
	return syscall.Exec(proxy, append([]string{proxy}, args...), os.Environ())
}

// resolveRole binds and merges a role's settings; done is true when help or the configuration was printed.
func (e *env) resolveRole(role string, cfg any, args []string) (done bool, err error) {
	err = settings.Bind(role, cfg).Resolve(args, endpoint.StandardEnv(e.getenv), sections, e.out)
	if errors.Is(err, settings.ErrHelp) || errors.Is(err, settings.ErrPrinted) {
		return true, nil
	}
	return false, err
}

func metaCommands(e *env) []*cobra.Command {
	return []*cobra.Command{newVersionCmd(e), newContextCmd(e), newCompletionCmd(e), newReferenceCmd(e)}
}
