// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
)

// Request is one line of JSON on the demo's socket; the answer is one line, too.
type Request struct {
	Op        string  `json:"op"` // status, break, heal, down
	Target    string  `json:"target,omitempty"`
	How       string  `json:"how,omitempty"`
	Errors    float64 `json:"errors,omitempty"` // share, for instances
	Instances int     `json:"instances,omitempty"`
}

// Answer to a Request.
type Answer struct {
	Error  string  `json:"error,omitempty"`
	Text   string  `json:"text,omitempty"`
	Report *Report `json:"report,omitempty"`
}

// Call drives the demo in dir.
func Call(ctx context.Context, dir string, req Request) (*Answer, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", Socket(dir))
	if err != nil {
		return nil, problem.New(problem.DemoNotRunning, "%s does not answer", Socket(dir)).Wrap(err)
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(deadline)
	}
	if err := json.NewEncoder(c).Encode(req); err != nil {
		return nil, err
	}
	var a Answer
	if err := json.NewDecoder(io.LimitReader(c, 1<<20)).Decode(&a); err != nil {
		return nil, fmt.Errorf("demo: %w", err)
	}
	if a.Error != "" {
		return nil, problem.New(problem.Usage, "%s", a.Error).WithFix("strait demo break --help")
	}
	return &a, nil
}

// Clean ends a demo that does not answer any more and removes what it left.
func Clean(dir string) (killed int, err error) {
	killed = killListed(filepath.Join(dir, "pids"))
	if _, statErr := os.Stat(dir); statErr != nil && killed == 0 {
		return 0, problem.New(problem.DemoNotRunning, "%s does not exist", dir)
	}
	return killed, errors.Join(os.RemoveAll(dir), removeIfThere(dir+".lock"))
}

func removeIfThere(name string) error {
	if err := os.Remove(name); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}

// control serves the socket and starts the load; down is closed when a client asked for the end.
func (d *Demo) control(ctx context.Context, background *sync.WaitGroup) (down <-chan struct{}, err error) {
	l, err := d.listen()
	if err != nil {
		return nil, err
	}
	stop := make(chan struct{})
	var once sync.Once
	background.Go(func() { <-ctx.Done(); _ = l.Close() })
	background.Go(func() { d.accept(ctx, l, func() { once.Do(func() { close(stop) }) }) })
	if d.load != nil {
		background.Go(func() { d.load.run(ctx) })
	}
	return stop, nil
}

func (d *Demo) accept(ctx context.Context, l net.Listener, down func()) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(time.Minute))
			var req Request
			line, err := bufio.NewReader(io.LimitReader(c, 64<<10)).ReadBytes('\n')
			if err != nil || json.Unmarshal(line, &req) != nil {
				return
			}
			a := d.answer(ctx, req)
			_ = json.NewEncoder(c).Encode(a)
			if req.Op == "down" {
				down()
			}
		})
	}
}

func (d *Demo) answer(ctx context.Context, req Request) *Answer {
	var text string
	var err error
	switch req.Op {
	case "status":
		r := d.report()
		return &Answer{Report: &r}
	case "down":
		return &Answer{Text: "the demo is ending"}
	case "break":
		text, err = d.breakIt(ctx, req)
	case "heal":
		text, err = d.heal(ctx, req.Target)
	default:
		err = fmt.Errorf("unknown request %q", req.Op)
	}
	if err != nil {
		return &Answer{Error: err.Error()}
	}
	return &Answer{Text: text}
}

// report gathers what the demo is now.
func (d *Demo) report() Report {
	r := Report{PID: os.Getpid(), Dir: d.dir, Took: d.took.Seconds(), Faults: []string{}}
	usage := func(pid int) {
		rss, cpu := processUsage(pid)
		r.RSS += rss
		r.CPU += cpu
	}
	usage(os.Getpid())
	for _, reg := range d.regions {
		rr := RegionReport{Cluster: reg.cluster, DataDir: reg.dir, Prefix: reg.prefix + ".0/24", GRPC: reg.grpc, API: reg.api, Gateways: len(reg.gateways), PIDs: map[string]int{}, Served: map[string]int64{}}
		for _, s := range reg.services {
			text := s.name
			if s.instances > 1 {
				text += fmt.Sprintf(" ×%d", s.instances)
			}
			rr.Services = append(rr.Services, text)
			for _, i := range reg.instances[s.name] {
				rr.Served[i.name] = i.served.Load()
				if !i.running() {
					rr.Down = append(rr.Down, i.name)
				}
			}
		}
		for _, p := range reg.processes() {
			rr.PIDs[strings.TrimPrefix(p.name, reg.cluster+"/")] = p.pid()
			usage(p.pid())
		}
		r.Regions = append(r.Regions, rr)
	}
	if len(d.regions) > 0 && len(d.regions[0].instances["web"]) > 0 {
		r.Web = "http://" + d.regions[0].instances["web"][0].addr
	}
	if d.load != nil {
		r.RPS, r.OK = d.load.last(5)
		r.Sent, r.Failed = d.load.sent.Load(), d.load.failed.Load()
		d.load.mu.Lock()
		r.LastFail = d.load.lastError
		d.load.mu.Unlock()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for t := range d.faults {
		r.Faults = append(r.Faults, t)
	}
	sort.Strings(r.Faults)
	return r
}

// processUsage is resident memory in bytes, and CPU seconds with those of ended threads.
func processUsage(pid int) (rss int64, cpu float64) {
	if data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid)); err == nil {
		if f := strings.Fields(string(data)); len(f) > 1 {
			pages, _ := strconv.ParseInt(f[1], 10, 64)
			rss = pages * int64(os.Getpagesize())
		}
	}
	if data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
		_, rest, _ := strings.Cut(string(data), ") ")
		if f := strings.Fields(rest); len(f) > 13 {
			user, _ := strconv.ParseFloat(f[11], 64)
			system, _ := strconv.ParseFloat(f[12], 64)
			cpu = (user + system) / 100
		}
	}
	return rss, cpu
}

// signalAll sends sig to every process of a region.
func (r *region) signalAll(sig syscall.Signal) error {
	var errs []error
	for _, p := range r.processes() {
		errs = append(errs, p.signal(sig))
	}
	return errors.Join(errs...)
}
