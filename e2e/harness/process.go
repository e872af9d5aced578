// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/lab"
)

// Process is a child process. Its methods may be called from the test's goroutine only.
type Process struct {
	Name string
	Log  string
	t    testing.TB
	path string
	args []string
	env  []string
	dir  string    // where run/addrs.json appears; may be empty
	site *lab.Site // in which it runs; nil: the host's network

	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// spawn runs on a thread that lives for ever: PR_SET_PDEATHSIG is bound to the thread that forked.
var spawn = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})

// Spawn starts a command that ends with this process, however that ends: a test that is killed leaves nothing behind.
func Spawn(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	spawn() <- func() { started <- cmd.Start() }
	return <-started
}

// Start starts the process, again if it ran before.
func (p *Process) Start() {
	p.t.Helper()
	f, err := os.OpenFile(p.Log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	if p.dir != "" {
		_ = os.Remove(filepath.Join(p.dir, "run", "addrs.json"))
	}
	cmd := exec.Command(p.path, p.args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = p.env, f, f
	start := Spawn
	if p.site != nil {
		start = p.site.Start
	}
	if err := start(cmd); err != nil {
		p.t.Fatalf("start %s: %v", p.Name, err)
	}
	done := make(chan struct{})
	p.cmd, p.done = cmd, done
	go func() { p.err = cmd.Wait(); close(done) }()
}

// PID is the process's id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Running reports whether the process has not ended.
func (p *Process) Running() bool {
	if p.done == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Kill ends the process by SIGKILL and waits.
func (p *Process) Kill() {
	if p.Running() {
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// Signal sends sig.
func (p *Process) Signal(sig syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatalf("signal %s: %v", p.Name, err)
	}
}

// Stop asks the process to end and waits for it.
func (p *Process) Stop(within time.Duration) {
	p.t.Helper()
	if !p.Running() {
		return
	}
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(within):
		p.t.Errorf("%s did not end within %v of SIGTERM:\n%s", p.Name, within, p.Tail())
		p.Kill()
	}
}

// Tail is the end of the process's log.
func (p *Process) Tail() string {
	data, err := os.ReadFile(p.Log)
	if err != nil {
		return err.Error()
	}
	if len(data) > 4000 {
		data = data[len(data)-4000:]
	}
	return string(data)
}

// Addrs waits for the addresses that the process bound.
func (p *Process) Addrs() map[string]any {
	p.t.Helper()
	name := filepath.Join(p.dir, "run", "addrs.json")
	var m map[string]any
	Eventually(p.t, 60*time.Second, p.Name+" to be ready", func() error {
		if !p.Running() {
			p.t.Fatalf("%s ended: %v\n%s", p.Name, p.err, p.Tail())
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		return json.Unmarshal(data, &m)
	})
	return m
}

var boundFlags = map[string]string{
	"--listen": "Listen", "--api-listen": "API", "--metrics-listen": "Metrics", "--local-listen": "Local", "--inbound-listen": "Inbound", "--http-proxy": "HTTPProxy",
}

// Pin replaces port 0 in the arguments by what was bound, so that a restart listens where it did.
func (p *Process) Pin(addrs map[string]any) {
	for i := 0; i+1 < len(p.args); i++ {
		if bound, _ := addrs[boundFlags[p.args[i]]].(string); bound != "" && strings.HasSuffix(p.args[i+1], ":0") {
			p.args[i+1] = bound
		}
	}
}

// Eventually waits until f returns nil, looking every 20 ms, and fails the test with f's last error after within.
func Eventually(t testing.TB, within time.Duration, what string, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("waited %v for %s: %v", within, what, err)
		case <-tick.C:
		}
	}
}

// Canary watches whether the host stalls: figures of a run during which it did mean nothing.
type Canary struct {
	mu     sync.Mutex
	worst  time.Duration
	stalls []stall
	stop   chan struct{}
	done   chan struct{}
}

// stall is a time during which the canary should have run and did not.
type stall struct {
	from, to time.Time
	late     time.Duration
}

// Stalled is how late the canary may be before a deadline is inconclusive.
const Stalled = 200 * time.Millisecond

// NewCanary starts one; it ends with the test.
func NewCanary(t testing.TB) *Canary {
	c := &Canary{stop: make(chan struct{}), done: make(chan struct{})}
	go c.run()
	t.Cleanup(func() { close(c.stop); <-c.done })
	return c
}

func (c *Canary) run() {
	defer close(c.done)
	const every = 20 * time.Millisecond
	t := time.NewTicker(every)
	defer t.Stop()
	last := time.Now()
	for {
		select {
		case <-c.stop:
			return
		case <-t.C:
			now := time.Now() // the tick's own time is when it was due, not when it came
			late := now.Sub(last) - every
			c.mu.Lock()
			c.worst = max(c.worst, late)
			if late >= Stalled/4 {
				c.stalls = append(c.stalls, stall{last, now, late})
			}
			c.mu.Unlock()
			last = now
		}
	}
}

// Worst is the longest delay since the last call.
func (c *Canary) Worst() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.worst
	c.worst = 0
	return w
}

// Between is the longest stall that touched the time from one moment to another.
func (c *Canary) Between(from, to time.Time) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	var worst time.Duration
	for _, s := range c.stalls {
		if s.to.After(from) && s.from.Before(to) {
			worst = max(worst, s.late)
		}
	}
	return worst
}

func fail(t testing.TB, err error, what string) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}
