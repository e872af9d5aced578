// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// process is one child: a role of Strait.
type process struct {
	name string
	args []string
	dir  string // its data directory, where run/addrs.json appears
	log  string

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{}
}

// spawner starts children from one thread that lives as long as the demo: PR_SET_PDEATHSIG is bound to the thread that forked.
type spawner struct {
	binary string
	env    []string
	pids   string // file

	work chan func()

	mu      sync.Mutex
	running map[int]string // pid → start time in clock ticks
}

func newSpawner(binary string, env []string, pids string) *spawner {
	s := &spawner{binary: binary, env: env, pids: pids, work: make(chan func()), running: map[int]string{}}
	go s.loop()
	return s
}

// loop ends with the process: its thread must outlive every child.
func (s *spawner) loop() {
	runtime.LockOSThread()
	for f := range s.work {
		f()
	}
}

func (s *spawner) start(p *process) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	f, err := os.OpenFile(p.log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	_ = os.Remove(filepath.Join(p.dir, "run", "addrs.json"))
	// The proxies directly: when "strait gateway" executes strait-proxy, the kernel forgets PR_SET_PDEATHSIG with the main thread.
	binary := s.binary
	if p.args[0] == "gateway" || p.args[0] == "sidecar" {
		binary = filepath.Join(filepath.Dir(binary), "strait-proxy")
	}
	cmd := exec.Command(binary, p.args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = s.env, f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	s.work <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	p.cmd, p.done = cmd, make(chan struct{})
	s.note(cmd.Process.Pid, true)
	go func(done chan struct{}) {
		_ = cmd.Wait()
		s.note(cmd.Process.Pid, false)
		close(done)
	}(p.done)
	return nil
}

// note keeps the pid file: pid and start time of every child, so that Down never signals a stranger.
func (s *spawner) note(pid int, alive bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if alive {
		s.running[pid] = startTime(pid)
	} else {
		delete(s.running, pid)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d %s\n", os.Getpid(), startTime(os.Getpid()))
	for pid, at := range s.running {
		fmt.Fprintf(&b, "%d %s\n", pid, at)
	}
	tmp := s.pids + ".tmp"
	if os.WriteFile(tmp, []byte(b.String()), 0o600) == nil {
		_ = os.Rename(tmp, s.pids)
	}
}

// startTime is field 22 of /proc/<pid>/stat, or empty when no such process runs.
func startTime(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, rest, _ := bytes.Cut(data, []byte(") "))
	f := strings.Fields(string(rest))
	if len(f) < 20 || f[0] == "Z" { // a zombie has ended
		return ""
	}
	return f[19]
}

// killListed ends every process of a pid file that is still the same process.
func killListed(file string) int {
	f, err := os.Open(file)
	if err != nil {
		return 0
	}
	defer f.Close()
	n := 0
	for sc := bufio.NewScanner(f); sc.Scan(); {
		pid, at, _ := strings.Cut(sc.Text(), " ")
		id, err := strconv.Atoi(pid)
		if err != nil || id <= 1 || id == os.Getpid() || at == "" || startTime(id) != at {
			continue
		}
		if syscall.Kill(id, syscall.SIGKILL) == nil {
			n++
		}
	}
	return n
}

// wait reads the addresses that the process bound, as soon as it has.
func (p *process) wait(ctx context.Context) (map[string]any, error) {
	name := filepath.Join(p.dir, "run", "addrs.json")
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if data, err := os.ReadFile(name); err == nil {
			var m map[string]any
			if json.Unmarshal(data, &m) == nil {
				return m, nil
			}
		}
		select {
		case <-p.exited():
			return nil, fmt.Errorf("%s ended: %s", p.name, p.tail())
		case <-ctx.Done():
			return nil, fmt.Errorf("%s is not ready: %s", p.name, p.tail())
		case <-tick.C:
		}
	}
}

// boundFlags says under which name run/addrs.json reports what a flag bound.
var boundFlags = map[string]string{
	"--listen": "Listen", "--api-listen": "API", "--metrics-listen": "Metrics", "--local-listen": "Local", "--inbound-listen": "Inbound",
}

// pin replaces port 0 in the arguments by what was bound, so that a restarted process is found where it was.
func (p *process) pin(addrs map[string]any) {
	for i := 0; i+1 < len(p.args); i++ {
		if bound, _ := addrs[boundFlags[p.args[i]]].(string); bound != "" && strings.HasSuffix(p.args[i+1], ":0") {
			p.args[i+1] = bound
		}
	}
}

func (p *process) exited() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.done
}

// tail is the end of the process's log.
func (p *process) tail() string {
	data, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	if len(data) > 2000 {
		data = data[len(data)-2000:]
	}
	return strings.TrimSpace(string(data))
}

func (p *process) signal(sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return errors.New(p.name + " does not run")
	}
	return p.cmd.Process.Signal(sig)
}

func (p *process) kill() {
	if done := p.exited(); done != nil {
		_ = p.signal(syscall.SIGKILL)
		<-done
	}
}

// pid is the process's id, 0 when it does not run.
func (p *process) pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return 0
	}
	return p.cmd.Process.Pid
}
