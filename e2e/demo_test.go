// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/strait-mesh/strait/cmd/strait/demo"
	"github.com/strait-mesh/strait/e2e/harness"
)

// demoRun drives one demo by its command line, in a directory and with contexts of its own.
type demoRun struct {
	t   *testing.T
	dir string
	env []string
	cmd *exec.Cmd
	out *bytes.Buffer
}

func newDemo(t *testing.T) *demoRun {
	t.Helper()
	if os.Getenv("STRAIT_E2E") == "" {
		t.Skip("end-to-end tests run with make e2e (STRAIT_E2E=1): they need the built binaries")
	}
	base, err := os.MkdirTemp("", "sd-") // short: unix sockets live below it
	if err != nil {
		t.Fatal(err)
	}
	d := &demoRun{t: t, dir: filepath.Join(base, "d"), out: &bytes.Buffer{}}
	d.env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + base, "XDG_CONFIG_HOME=" + filepath.Join(base, "config"), "STRAIT_DEMO_DIR=" + d.dir}
	t.Cleanup(func() {
		_, _, _ = d.strait("demo", "down")
		if d.cmd != nil {
			_ = d.cmd.Wait()
		}
		_ = os.RemoveAll(base)
	})
	return d
}

func (d *demoRun) strait(args ...string) (string, string, int) {
	d.t.Helper()
	cmd := exec.Command(harness.Bin(d.t, "strait"), args...)
	var out, errw bytes.Buffer
	cmd.Env, cmd.Stdout, cmd.Stderr = d.env, &out, &errw
	_ = cmd.Run()
	return out.String(), errw.String(), cmd.ProcessState.ExitCode()
}

func (d *demoRun) must(args ...string) string {
	d.t.Helper()
	out, errw, code := d.strait(args...)
	if code != 0 {
		d.t.Fatalf("strait %s: exit %d\n%s%s", strings.Join(args, " "), code, out, errw)
	}
	return out
}

func (d *demoRun) up() demo.Report {
	d.t.Helper()
	d.cmd = exec.Command(harness.Bin(d.t, "strait"), "demo", "up")
	d.cmd.Env, d.cmd.Stdout, d.cmd.Stderr = d.env, d.out, d.out
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	var r demo.Report
	harness.Eventually(d.t, 90*time.Second, "the demo to be ready", func() error {
		var err error
		r, err = d.status()
		return err
	})
	return r
}

func (d *demoRun) status() (r demo.Report, err error) {
	out, errw, code := d.strait("demo", "status", "-o", "json")
	if code != 0 {
		return r, fmt.Errorf("exit %d: %s", code, errw)
	}
	return r, json.Unmarshal([]byte(out), &r)
}

// TestDemo walks through the demo as its README does: it is up within its budget, survives what it breaks, and leaves nothing.
func TestDemo(t *testing.T) {
	d := newDemo(t)
	r := d.up()
	t.Logf("ready in %.1f s, %d MiB, %.1f CPU-seconds", r.Took, r.RSS>>20, r.CPU)
	if r.CPU > 20 {
		t.Errorf("it took %.1f CPU-seconds to be ready; at most 20", r.CPU)
	}
	if r.RSS > 900<<20 {
		t.Errorf("all processes together have %d MiB; at most 900", r.RSS>>20)
	}
	d.trafficOK("at the start")

	why := func(want ...string) {
		t.Helper()
		harness.Eventually(t, 15*time.Second, "why to say "+strings.Join(want, " and "), func() error {
			out, errw, _ := d.strait("why", "checkout")
			for _, w := range want {
				if !strings.Contains(out, w) {
					return fmt.Errorf("%s%s", out, errw)
				}
			}
			return nil
		})
	}
	why("us-east 100%", "local_ok")
	d.must("demo", "break", "checkout@us-east")
	why("eu-west 100%", "below_min_healthy", "1/4")
	d.must("demo", "break", "eu-west", "--how", "paused")
	why("ap-south 100%")
	d.trafficOK("after checkout@us-east and eu-west were broken")
	d.must("demo", "heal")
	why("4/4", "6/6", "2/2")
	d.must("demo", "break", "tunnel:us-east-eu-west")
	harness.Eventually(t, 10*time.Second, "status to show the cut tunnel", func() error {
		out, _, code := d.strait("status")
		if code != 10 || !strings.Contains(out, "unreachable") {
			return fmt.Errorf("exit %d\n%s", code, out)
		}
		return nil
	})
	d.must("demo", "heal")
	if _, errw, code := d.strait("demo", "break", "nowhere"); code == 0 || !strings.Contains(errw, "us-east") {
		t.Errorf("breaking a cluster that does not exist: exit %d, %s", code, errw)
	}
	if _, errw, code := d.strait("demo", "up"); code != 1 || !strings.Contains(errw, "STR-7101") {
		t.Errorf("a second demo: exit %d, %s", code, errw)
	}
	d.must("demo", "down")
	_ = d.cmd.Wait()
	d.nothingLeft(r)
}

// trafficOK waits until requests of five seconds in a row were all answered.
func (d *demoRun) trafficOK(when string) {
	d.t.Helper()
	harness.Eventually(d.t, 30*time.Second, "all requests to succeed "+when, func() error {
		r, err := d.status()
		if err == nil && (r.OK < 1 || r.RPS < 10) {
			err = fmt.Errorf("%.1f%% of %.0f rps, last failure %s", r.OK*100, r.RPS, r.LastFail)
		}
		return err
	})
}

func (d *demoRun) nothingLeft(r demo.Report) {
	d.t.Helper()
	harness.Eventually(d.t, 5*time.Second, "every process of the demo to be gone", func() error {
		for _, region := range r.Regions {
			for name, pid := range region.PIDs {
				if data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && bytes.Contains(data, []byte(d.dir)) {
					return fmt.Errorf("%s/%s (%d) still runs", region.Cluster, name, pid)
				}
			}
		}
		return nil
	})
	for _, name := range []string{d.dir, d.dir + ".lock"} {
		if _, err := os.Stat(name); err == nil {
			d.t.Errorf("%s is left behind", name)
		}
	}
	if out := d.must("context", "ls", "-o", "name"); strings.Contains(out, "demo") {
		d.t.Errorf("contexts are left behind: %s", out)
	}
}

// TestDemoKilled: kill -9 of the demo itself leaves no process, and demo down removes the rest.
func TestDemoKilled(t *testing.T) {
	d := newDemo(t)
	r := d.up()
	if err := syscall.Kill(r.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = d.cmd.Wait()
	d.must("demo", "down")
	d.nothingLeft(r)
}
