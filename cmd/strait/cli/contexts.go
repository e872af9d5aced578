// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/strait-mesh/strait/internal/problem"
)

// cliContext says how to reach one control plane: over the sockets of its data directory, or remotely with an
// operator's certificate.
type cliContext struct {
	DataDir    string `json:"dataDir,omitempty"`
	Server     string `json:"server,omitempty"`     // 7400, with Credentials
	APIServer  string `json:"apiServer,omitempty"`  // 7401
	Credential string `json:"credential,omitempty"` // directory that strait access issue wrote
	Namespace  string `json:"namespace,omitempty"`
}

type contextFile struct {
	Current  string                `json:"current,omitempty"`
	Contexts map[string]cliContext `json:"contexts,omitempty"`
}

func (e *env) contextPath() string { return filepath.Join(e.configHome(), "contexts.yaml") }

func (e *env) readContexts() (contextFile, error) {
	f := contextFile{Contexts: map[string]cliContext{}}
	data, err := os.ReadFile(e.contextPath())
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return f, err
	}
	if err := yaml.UnmarshalStrict(data, &f); err != nil {
		return f, problem.New(problem.ConfigInvalid, "%s: %v", e.contextPath(), err)
	}
	if f.Contexts == nil {
		f.Contexts = map[string]cliContext{}
	}
	return f, nil
}

func (e *env) writeContexts(f contextFile) error {
	data, err := yaml.Marshal(f)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(e.configHome(), 0o700); err != nil {
		return err
	}
	tmp := e.contextPath() + ".tmp"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, e.contextPath())
}

// current is the context in force: --data-dir, then --context, then the file's current one, then the default directory.
func (e *env) current() (cliContext, error) {
	if e.dataDir != "" {
		return cliContext{DataDir: e.dataDir}, nil
	}
	f, err := e.readContexts()
	if err != nil {
		return cliContext{}, err
	}
	name := e.context
	if name == "" {
		name = f.Current
	}
	if name == "" {
		return cliContext{DataDir: e.defaultDataDir()}, nil
	}
	c, ok := f.Contexts[name]
	if !ok {
		return c, problem.New(problem.NotFound, "context %q is not in %s", name, e.contextPath()).WithFix("strait context ls")
	}
	return c, nil
}

func newContextCmd(e *env) *cobra.Command {
	c := &cobra.Command{Use: "context", Short: "Choose which control plane the command line talks to",
		Example: "  strait context ls\n  strait context use us-east"}
	c.AddCommand(
		&cobra.Command{Use: "ls", Short: "List the contexts", Args: cobra.NoArgs,
			Example: "  strait context ls\n  strait context ls -o json",
			RunE:    func(*cobra.Command, []string) error { return contextList(e) }},
		&cobra.Command{Use: "use NAME", Short: "Make a context the current one", Args: cobra.ExactArgs(1),
			Example: "  strait context use us-east\n  strait context use eu-west",
			RunE:    func(_ *cobra.Command, args []string) error { return contextUse(e, args[0]) }},
		newContextAdd(e),
	)
	return c
}

func newContextAdd(e *env) *cobra.Command {
	var add cliContext
	c := &cobra.Command{Use: "add NAME", Short: "Add a context", Args: cobra.ExactArgs(1),
		Example: "  strait context add lab --dir /var/lib/strait\n  strait context add us-east --server 10.0.0.1:7400 --api-server 10.0.0.1:7401 --credential ./ada",
		RunE: func(_ *cobra.Command, args []string) error {
			if add.DataDir == "" && add.Server == "" {
				return problem.New(problem.Usage, "a context needs --dir or --server")
			}
			return e.addContext(args[0], add, true)
		}}
	c.Flags().StringVar(&add.DataDir, "dir", "", "data directory whose sockets to use")
	c.Flags().StringVar(&add.Server, "server", "", "address of the control plane's gRPC port (7400)")
	c.Flags().StringVar(&add.APIServer, "api-server", "", "address of the configuration API (7401)")
	c.Flags().StringVar(&add.Credential, "credential", "", "directory that strait access issue wrote")
	return c
}

func contextList(e *env) error {
	f, err := e.readContexts()
	if err != nil {
		return err
	}
	t := &table{head: []string{"CURRENT", "NAME", "TARGET"}}
	names := make([]string, 0, len(f.Contexts))
	for name := range f.Contexts {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		mark, target := "", f.Contexts[name].DataDir
		if name == f.Current {
			mark = "*"
		}
		if target == "" {
			target = f.Contexts[name].Server
		}
		t.add(name, mark, name, target)
	}
	return e.print("ContextList", f, t)
}

func contextUse(e *env, name string) error {
	f, err := e.readContexts()
	if err != nil {
		return err
	}
	if _, ok := f.Contexts[name]; !ok {
		return problem.New(problem.NotFound, "context %q is not in %s", name, e.contextPath()).WithFix("strait context ls")
	}
	f.Current = name
	if err := e.writeContexts(f); err != nil {
		return err
	}
	fmt.Fprintf(e.out, "current context is %s\n", name)
	return nil
}

func (e *env) addContext(name string, c cliContext, use bool) error {
	f, err := e.readContexts()
	if err != nil {
		return err
	}
	f.Contexts[name] = c
	if use {
		f.Current = name
	}
	return e.writeContexts(f)
}
