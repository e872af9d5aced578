// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/strait-mesh/strait/cmd/strait/demo"
	"github.com/strait-mesh/strait/internal/problem"
)

const demoContextPrefix = "demo-"

func demoCommands(e *env) []*cobra.Command {
	c := &cobra.Command{Use: "demo", Short: "A multi-region federation of real processes on this machine",
		Example: "  strait demo up\n  strait demo break checkout@us-east"}
	c.AddCommand(newDemoUp(e), newDemoStatus(e), newDemoBreak(e), newDemoHeal(e), newDemoDown(e))
	return []*cobra.Command{c}
}

// demoDir is where the demo lives: short, since it holds unix sockets.
func (e *env) demoDir() string {
	if d := e.lookup("STRAIT_DEMO_DIR"); d != "" {
		return d
	}
	return filepath.Join(os.TempDir(), "strait-demo-"+strconv.Itoa(os.Getuid()))
}

func newDemoUp(e *env) *cobra.Command {
	var rps int
	c := &cobra.Command{Use: "up", Short: "Start it, and keep it until Ctrl-C or strait demo down", Args: cobra.NoArgs,
		Example: "  strait demo up\n  strait demo up --rps 0",
		RunE:    func(cmd *cobra.Command, _ []string) error { return demoUpRun(cmd.Context(), e, rps) }}
	c.Flags().IntVar(&rps, "rps", 50, "requests per second of the load source; 0 for none")
	return c
}

func demoUpRun(ctx context.Context, e *env, rps int) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(self), "strait-proxy")); err != nil {
		return problem.New(problem.Usage, "strait-proxy does not lie beside %s", self).WithFix("make build")
	}
	dir := e.demoDir()
	return demo.Up(ctx, demo.Config{
		Dir: dir, Binary: self, RPS: rps,
		Command: func(ctx context.Context, dataDir string, args ...string) (string, error) {
			return e.inProcess(ctx, dir, dataDir, args)
		},
		Contexts: e.demoContexts,
		Ready:    e.demoReady,
	})
}

// inProcess runs one command line as a user would, with contexts of its own, and returns its standard output.
func (e *env) inProcess(ctx context.Context, dir, dataDir string, args []string) (string, error) {
	var out, errw bytes.Buffer
	sub := &env{in: strings.NewReader(""), out: &out, err: &errw, now: e.now, getenv: func(key string) (string, bool) {
		switch {
		case key == "XDG_CONFIG_HOME":
			return filepath.Join(dir, "config", filepath.Base(filepath.Dir(dataDir))), true
		case strings.HasPrefix(key, "STRAIT_"):
			return "", false
		}
		return e.getenv(key)
	}}
	root := newRoot(sub)
	root.SetArgs(append([]string{"--data-dir", dataDir}, args...))
	root.SetOut(&out)
	root.SetErr(&errw)
	if err := root.ExecuteContext(ctx); err != nil {
		return out.String(), fmt.Errorf("%w\n%s", err, strings.TrimSpace(errw.String()))
	}
	return out.String(), nil
}

// demoContexts adds a context per region and makes the first cluster's the current one; nil takes them away again.
func (e *env) demoContexts(regions map[string]string) error {
	f, err := e.readContexts()
	if err != nil {
		return err
	}
	const before = demoContextPrefix + "before"
	if regions == nil {
		for name := range f.Contexts {
			if strings.HasPrefix(name, demoContextPrefix) && name != before {
				delete(f.Contexts, name)
			}
		}
		if strings.HasPrefix(f.Current, demoContextPrefix) {
			f.Current = f.Contexts[before].Namespace // where the name of the user's own context was kept
		}
		delete(f.Contexts, before)
		return e.writeContexts(f)
	}
	if !strings.HasPrefix(f.Current, demoContextPrefix) && f.Current != "" {
		f.Contexts[before] = cliContext{Namespace: f.Current}
	}
	for name, dataDir := range regions {
		f.Contexts[demoContextPrefix+name] = cliContext{DataDir: dataDir, Namespace: "shop"}
	}
	f.Current = demoContextPrefix + "us-east"
	return e.writeContexts(f)
}

func (e *env) demoReady(r demo.Report) {
	for _, reg := range r.Regions {
		gateways := "gateway"
		if reg.Gateways > 1 {
			gateways += fmt.Sprintf(" ×%d", reg.Gateways)
		}
		fmt.Fprintf(e.out, "  %s %-10s control plane, %-52s %s\n", e.glyph("ok"), reg.Cluster, strings.Join(append([]string{gateways}, reg.Services...), ", "), reg.Prefix)
	}
	fmt.Fprintf(e.out, "  %s %-10s 3 members, 6 directed tunnels proven (80 / 130 / 198 ms simulated)\n", e.glyph("ok"), "joined")
	fmt.Fprintf(e.out, "  %s %-10s web → checkout → payments at %s\n", e.glyph("ok"), "traffic", r.Web)
	fmt.Fprintf(e.out, "ready in %.1fs, %d MiB, %.1f CPU-seconds\n", r.Took, r.RSS>>20, r.CPU)
	fmt.Fprintf(e.out, "Try:  strait demo break checkout@us-east   then   strait why checkout      Stop: Ctrl-C\n")
}

func newDemoStatus(e *env) *cobra.Command {
	return &cobra.Command{Use: "status", Short: "Show what runs, what is broken, and how the load fares", Args: cobra.NoArgs,
		Example: "  strait demo status\n  strait demo status -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := demo.Call(cmd.Context(), e.demoDir(), demo.Request{Op: "status"})
			if err != nil {
				return err
			}
			return e.demoReport(a.Report)
		}}
}

func (e *env) demoReport(r *demo.Report) error {
	if e.output != "table" && e.output != "wide" || e.jq != "" {
		return e.print("DemoStatus", r, &table{names: []string{r.Dir}})
	}
	rows := [][]string{{"CLUSTER", "PROCESSES", "INSTANCES", "DOWN", "SERVED"}}
	for _, reg := range r.Regions {
		var served int64
		for _, n := range reg.Served {
			served += n
		}
		down := strings.Join(reg.Down, ", ")
		if down == "" {
			down = "-"
		}
		rows = append(rows, []string{reg.Cluster, fmt.Sprint(len(reg.PIDs)), fmt.Sprint(len(reg.Served)), down, fmt.Sprint(served)})
	}
	writeColumns(e.out, rows, "")
	fmt.Fprintf(e.out, "\ntraffic  %.0f rps, %.1f%% ok in the last 5 s (%d sent, %d failed)\n", r.RPS, r.OK*100, r.Sent, r.Failed)
	if r.Failed > 0 {
		fmt.Fprintf(e.out, "         last failure: %s\n", r.LastFail)
	}
	fmt.Fprintf(e.out, "memory   %d MiB in all processes, %.1f CPU-seconds\n", r.RSS>>20, r.CPU)
	faults := "nothing"
	if len(r.Faults) > 0 {
		sort.Strings(r.Faults)
		faults = strings.Join(r.Faults, ", ")
	}
	fmt.Fprintf(e.out, "broken   %s\n", faults)
	return nil
}

func newDemoBreak(e *env) *cobra.Command {
	var req demo.Request
	var share string
	c := &cobra.Command{Use: "break TARGET", Short: "Inject a fault: SERVICE@CLUSTER, CLUSTER or tunnel:A-B", Args: cobra.ExactArgs(1),
		Long: `Inject a fault:

  SERVICE@CLUSTER   its instances stop, all but one (--instances N), or answer 500 (--errors 50%)
  CLUSTER           --how cut (silently, the default), paused or killed
  tunnel:A-B        everything between two clusters is dropped`,
		Example: "  strait demo break checkout@us-east\n  strait demo break eu-west --how paused\n  strait demo break tunnel:us-east-eu-west",
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Op, req.Target = "break", args[0]
			if share != "" {
				n, err := strconv.ParseFloat(strings.TrimSuffix(share, "%"), 64)
				if err != nil || n <= 0 || n > 100 {
					return problem.New(problem.Usage, "--errors %s: want a percentage like 50%%", share)
				}
				req.Errors = n / 100
			}
			return demoCall(cmd.Context(), e, req)
		}}
	c.Flags().StringVar(&req.How, "how", "", "of a cluster: cut, paused or killed")
	c.Flags().StringVar(&share, "errors", "", "of a service: share of requests that fail, like 50%")
	c.Flags().IntVar(&req.Instances, "instances", 0, "of a service: how many instances stop")
	return c
}

func newDemoHeal(e *env) *cobra.Command {
	return &cobra.Command{Use: "heal [TARGET]", Short: "Undo a fault, or all of them", Args: cobra.MaximumNArgs(1),
		Example: "  strait demo heal\n  strait demo heal checkout@us-east",
		RunE: func(cmd *cobra.Command, args []string) error {
			req := demo.Request{Op: "heal"}
			if len(args) == 1 {
				req.Target = args[0]
			}
			return demoCall(cmd.Context(), e, req)
		}}
}

func demoCall(ctx context.Context, e *env, req demo.Request) error {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	a, err := demo.Call(ctx, e.demoDir(), req)
	if err != nil {
		return err
	}
	fmt.Fprintln(e.out, a.Text)
	return nil
}

func newDemoDown(e *env) *cobra.Command {
	return &cobra.Command{Use: "down", Short: "Stop the demo and remove everything it made, even after it was killed", Args: cobra.NoArgs,
		Example: "  strait demo down\n  strait demo down --timeout 10s",
		RunE:    func(cmd *cobra.Command, _ []string) error { return demoDownRun(cmd.Context(), e) }}
}

func demoDownRun(ctx context.Context, e *env) error {
	dir := e.demoDir()
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	if _, err := demo.Call(ctx, dir, demo.Request{Op: "down"}); err == nil {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			if _, err := os.Stat(dir); os.IsNotExist(err) {
				fmt.Fprintln(e.out, "the demo has ended")
				return nil
			}
			select {
			case <-ctx.Done():
				return problem.New(problem.Internal, "the demo did not end in %s", e.timeout).WithFix("strait demo down, again")
			case <-tick.C:
			}
		}
	}
	killed, err := demo.Clean(dir)
	if err != nil {
		return err
	}
	if err := e.demoContexts(nil); err != nil {
		return err
	}
	fmt.Fprintf(e.out, "the demo was not running any more; %d processes ended, its files removed\n", killed)
	return nil
}
