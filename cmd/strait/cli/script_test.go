// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/strait-mesh/strait/cmd/strait-proxy/role"
	"github.com/strait-mesh/strait/cmd/strait/cli"
)

// TestMain makes this test's binary the two commands that the scripts run: strait and strait-proxy.
func TestMain(m *testing.M) {
	command := func(run func(context.Context) int) func() {
		return func() {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			code := run(ctx)
			stop()
			os.Exit(code)
		}
	}
	testscript.Main(m, map[string]func(){
		"strait": command(func(ctx context.Context) int { return cli.Run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr) }),
		"strait-proxy": command(func(ctx context.Context) int {
			return role.Run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr)
		}),
	})
}

// TestScript runs testdata/script/*.txt. Beside testscript's own commands there are:
//
//	controlplane DIR [FLAG...]  starts the control plane of a data directory on free ports of 127.0.0.1, waits until it answers, and
//	                            sets $GRPC and $API to where it listens; it is stopped, and must end with 0, at the script's end
//	gateway DIR [FLAG...]       starts the first gateway of the cluster in DIR and waits until the control plane lists it
//	stop                        stops what was started, now
//	like FILE WANT              compares line by line; in WANT the sign … stands for any text
//	mode MODE FILE              compares the permission bits of a file
//	until REGEXP COMMAND...     runs a command until its standard output matches: what was written is compiled a moment later
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: false,
		Setup: func(e *testscript.Env) error {
			e.Setenv("HOME", filepath.Join(e.WorkDir, "home"))
			e.Values[started{}] = &processes{}
			return os.Mkdir(filepath.Join(e.WorkDir, "home"), 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"controlplane": startControlPlane, "gateway": startGateway, "like": like, "mode": mode, "until": until,
			"stop": func(ts *testscript.TestScript, _ bool, _ []string) { ts.Value(started{}).(*processes).stop(ts) },
		},
	})
}

type started struct{}

// processes are what a script has started, stopped in the opposite order.
type processes struct{ list []*exec.Cmd }

func (p *processes) start(ts *testscript.TestScript, args ...string) {
	name, err := exec.LookPath("strait")
	ts.Check(err)
	cmd := exec.Command(name, args...)
	cmd.Dir = ts.MkAbs(".")
	for _, key := range []string{"PATH", "HOME", "TMPDIR"} {
		cmd.Env = append(cmd.Env, key+"="+ts.Getenv(key))
	}
	log, err := os.Create(ts.MkAbs(args[0] + ".log"))
	ts.Check(err)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ts.Check(cmd.Start())
	if len(p.list) == 0 {
		ts.Defer(func() { p.stop(ts) })
	}
	p.list = append(p.list, cmd)
}

func (p *processes) stop(ts *testscript.TestScript) {
	for len(p.list) > 0 {
		last := p.list[len(p.list)-1]
		p.list = p.list[:len(p.list)-1]
		_ = last.Process.Signal(syscall.SIGTERM)
		if err := last.Wait(); err != nil {
			ts.Logf("%q ended: %v", last.Args[1:], err)
			ts.Check(err)
		}
	}
}

// within waits for a condition of another process.
func within(ts *testscript.TestScript, what string, ready func() error) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	end := time.NewTimer(30 * time.Second)
	defer end.Stop()
	for {
		err := ready()
		if err == nil {
			return
		}
		select {
		case <-end.C:
			ts.Fatalf("%s: not within 30s: %v", what, err)
		case <-tick.C:
		}
	}
}

func until(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: until REGEXP COMMAND...")
	}
	re, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	within(ts, args[0], func() error {
		if err := ts.Exec(args[1], args[2:]...); err != nil {
			return err
		}
		if out := ts.ReadFile("stdout"); !re.MatchString(out) {
			return fmt.Errorf("got %q", out)
		}
		return nil
	})
}

func startControlPlane(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: controlplane DIR [FLAG...]")
	}
	run := ts.MkAbs(filepath.Join(args[0], "run"))
	_ = os.Remove(filepath.Join(run, "addrs.json"))
	free := []string{"controlplane", "--data-dir", args[0], "--listen", "127.0.0.1:0", "--api-listen", "127.0.0.1:0", "--metrics-listen", "off"}
	ts.Value(started{}).(*processes).start(ts, append(free, args[1:]...)...)
	var addrs struct{ Listen, API string }
	within(ts, "control plane", func() error {
		data, err := os.ReadFile(filepath.Join(run, "addrs.json"))
		if err == nil {
			err = json.Unmarshal(data, &addrs)
		}
		return err
	})
	ts.Setenv("GRPC", addrs.Listen)
	ts.Setenv("API", addrs.API)
	within(ts, "operator socket", func() error { return ts.Exec("strait", "--data-dir", args[0], "status") })
}

func startGateway(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: gateway DIR [FLAG...]")
	}
	dir := args[0]
	ts.Value(started{}).(*processes).start(ts, append([]string{"gateway", "--data-dir", filepath.Join(dir, "gateway"), "--token-file", filepath.Join(dir, "tokens/gateway-1.token"),
		"--control-plane", ts.Getenv("GRPC"), "--listen", "127.0.0.1:0", "--local-listen", "127.0.0.1:0", "--metrics-listen", "off"}, args[1:]...)...)
	within(ts, "gateway", func() error {
		if err := ts.Exec("strait", "--data-dir", dir, "status"); err != nil {
			return err
		}
		if !strings.Contains(ts.ReadFile("stdout"), "1 gateway,") || strings.Contains(ts.ReadFile("stdout"), "STR-2105") {
			return errors.New("it is not connected")
		}
		return nil
	})
}

func like(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: like FILE WANT")
	}
	got, want := strings.Split(ts.ReadFile(args[0]), "\n"), strings.Split(ts.ReadFile(args[1]), "\n")
	for i := range max(len(got), len(want)) {
		var g, w string
		if i < len(got) {
			g = got[i]
		}
		if i < len(want) {
			w = want[i]
		}
		if !alike(g, w) {
			ts.Fatalf("%s line %d:\n  got  %s\n  want %s\n\nwhole:\n%s", args[0], i+1, g, w, ts.ReadFile(args[0]))
		}
	}
}

// alike reports whether the parts of want around … stand in got in their order, from its begin to its end.
func alike(got, want string) bool {
	parts := strings.Split(want, "…")
	if len(parts) == 1 {
		return got == want
	}
	if !strings.HasPrefix(got, parts[0]) {
		return false
	}
	got = got[len(parts[0]):]
	for _, p := range parts[1 : len(parts)-1] {
		_, after, ok := strings.Cut(got, p)
		if !ok {
			return false
		}
		got = after
	}
	return strings.HasSuffix(got, parts[len(parts)-1])
}

func mode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: mode MODE FILE")
	}
	st, err := os.Stat(ts.MkAbs(args[1]))
	ts.Check(err)
	if got := st.Mode().Perm().String(); got != args[0] {
		ts.Fatalf("%s: mode %s, want %s", args[1], got, args[0])
	}
}
