// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/wan"
)

// Config of Up.
type Config struct {
	Dir    string // everything lives below it and is removed at the end
	Binary string // strait; strait-proxy lies beside it
	RPS    int    // of the load source; 0: none
	Log    *slog.Logger
	// Command runs one command line of strait against a data directory and returns its standard output.
	Command func(ctx context.Context, dataDir string, args ...string) (string, error)
	// Contexts makes the command line's contexts for the regions (name → data directory), and undoes it with nil.
	Contexts func(map[string]string) error
	// Ready is called when everything has been proven.
	Ready func(Report)
}

// Report is what the demo is now.
type Report struct {
	PID      int            `json:"pid"`
	Dir      string         `json:"dir"`
	Regions  []RegionReport `json:"regions"`
	Web      string         `json:"web"`
	RPS      float64        `json:"rps"`
	OK       float64        `json:"ok"` // share of requests of the last 5 s
	Sent     int64          `json:"sent"`
	Failed   int64          `json:"failed"`
	LastFail string         `json:"lastFailure,omitempty"`
	Faults   []string       `json:"faults"`
	RSS      int64          `json:"rssBytes"` // of all processes together
	CPU      float64        `json:"cpuSeconds"`
	Took     float64        `json:"readySeconds"`
}

// RegionReport is one region.
type RegionReport struct {
	Cluster  string           `json:"cluster"`
	DataDir  string           `json:"dataDir"`
	Prefix   string           `json:"prefix"`
	GRPC     string           `json:"grpc"`
	API      string           `json:"api"`
	Gateways int              `json:"gateways"`
	Services []string         `json:"services"` // "checkout ×4"
	Down     []string         `json:"down,omitempty"`
	PIDs     map[string]int   `json:"pids"`
	Served   map[string]int64 `json:"served"`
}

// Demo is a running demo.
type Demo struct {
	cfg     Config
	dir     string
	lock    *os.File
	spawn   *spawner
	wan     *wan.WAN
	regions []*region
	load    *load
	began   time.Time
	took    time.Duration

	mu     sync.Mutex
	faults map[string]func(context.Context) error // target → how to heal it
}

// Socket is where a demo in dir is driven.
func Socket(dir string) string { return filepath.Join(dir, "demo.sock") }

// Up builds the demo, calls cfg.Ready, and keeps it up until ctx ends or Down is called. It removes everything before it
// returns.
func Up(ctx context.Context, cfg Config) (err error) {
	d := &Demo{cfg: cfg, dir: cfg.Dir, began: time.Now(), faults: map[string]func(context.Context) error{}}
	if d.cfg.Log == nil {
		d.cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := d.claim(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var background sync.WaitGroup
	defer func() {
		_ = d.cfg.Contexts(nil)
		d.stopAll()
		cancel()
		background.Wait()
		d.remove()
	}()
	if err := d.network(); err != nil {
		return err
	}
	background.Go(func() { _ = d.wan.Run(ctx) })
	if err := d.build(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	down, err := d.control(ctx, &background)
	if err != nil {
		return err
	}
	d.took = time.Since(d.began)
	d.cfg.Ready(d.report())
	select {
	case <-ctx.Done():
	case <-down:
	}
	return nil
}

// claim takes the lock, and cleans up after a demo that was killed.
func (d *Demo) claim() error {
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return problem.New(problem.Usage, "%v", err)
	}
	f, err := os.OpenFile(d.dir+".lock", os.O_RDWR|os.O_CREATE|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return problem.New(problem.Usage, "%v", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		return problem.New(problem.DemoRunning, "its files are in %s", d.dir).WithFix("strait demo down").WithFix("strait demo status").Wrap(err)
	}
	d.lock = f
	killListed(filepath.Join(d.dir, "pids"))
	if err := os.RemoveAll(d.dir); err != nil {
		return err
	}
	for _, sub := range []string{"log", "tokens"} {
		if err := os.MkdirAll(filepath.Join(d.dir, sub), 0o700); err != nil {
			return err
		}
	}
	d.spawn = newSpawner(d.cfg.Binary, childEnv(d.dir), filepath.Join(d.dir, "pids"))
	return nil
}

// childEnv is the environment of children: no STRAIT_ variable of the user may change the demo.
func childEnv(dir string) []string {
	return []string{"HOME=" + dir, "PATH=" + os.Getenv("PATH"), "XDG_CONFIG_HOME=" + filepath.Join(dir, "config"), "GOGC=50", "GOMAXPROCS=2"}
}

func (d *Demo) remove() {
	_ = os.RemoveAll(d.dir)
	_ = os.Remove(d.dir + ".lock")
	_ = d.lock.Close()
}

// network opens the simulated WAN with one site per gateway.
func (d *Demo) network() error {
	var sites []wan.Site
	for _, p := range plan {
		for n := 1; n <= p.gateways; n++ {
			sites = append(sites, wan.Site{Name: fmt.Sprintf("%s/gateway-%d", p.cluster, n), Outside: fmt.Sprintf("%s.%d:0", p.prefix, 100+n)})
		}
	}
	w, err := wan.New(sites, 1, d.cfg.Log)
	if err != nil {
		return fmt.Errorf("simulated network: %w", err)
	}
	d.wan = w
	for pair, ms := range rtts {
		d.links(pair[0], pair[1], func(wan.Link) wan.Link { return wan.Link{Delay: time.Duration(ms) * time.Millisecond / 2} })
	}
	return nil
}

// links changes every link between the gateways of two clusters, both ways.
func (d *Demo) links(a, b string, change func(wan.Link) wan.Link) {
	for _, x := range sitesOf(a) {
		for _, y := range sitesOf(b) {
			d.wan.SetLink(x, y, change(d.wan.Link(x, y)))
			d.wan.SetLink(y, x, change(d.wan.Link(y, x)))
		}
	}
}

func sitesOf(cluster string) []string {
	var out []string
	for _, p := range plan {
		for n := 1; p.cluster == cluster && n <= p.gateways; n++ {
			out = append(out, fmt.Sprintf("%s/gateway-%d", cluster, n))
		}
	}
	return out
}

// strait runs one command line against a region's control plane.
func (d *Demo) strait(ctx context.Context, r *region, args ...string) (string, error) {
	out, err := d.cfg.Command(ctx, r.dir, args...)
	if err != nil {
		return "", fmt.Errorf("%s: strait %s: %w", r.cluster, args[0], err)
	}
	return out, nil
}

// build starts everything, joins the regions, and waits until a request has crossed.
func (d *Demo) build(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	for _, p := range plan {
		d.regions = append(d.regions, &region{regionPlan: p, dir: filepath.Join(d.dir, p.cluster, "controlplane"),
			sidecars: map[string]*process{}, instances: map[string][]*instance{}, upstreams: map[string]map[string]string{}})
	}
	if err := each(d.regions, func(r *region) error { return d.buildRegion(ctx, r) }); err != nil {
		return err
	}
	if err := d.join(ctx); err != nil {
		return err
	}
	contexts := map[string]string{}
	for _, r := range d.regions {
		contexts[r.cluster] = r.dir
	}
	if err := d.cfg.Contexts(contexts); err != nil {
		return err
	}
	return d.firstTraffic(ctx)
}

func each(regions []*region, f func(*region) error) error {
	errs := make([]error, len(regions))
	var wg sync.WaitGroup
	for i, r := range regions {
		wg.Go(func() { errs[i] = f(r) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (d *Demo) buildRegion(ctx context.Context, r *region) error {
	if err := d.startControlPlane(ctx, r); err != nil {
		return err
	}
	for n := 1; n <= r.regionPlan.gateways; n++ {
		if err := d.startGateway(ctx, r, n); err != nil {
			return err
		}
	}
	for i, s := range r.services {
		if err := d.startService(ctx, r, i, s); err != nil {
			return err
		}
	}
	return nil
}

// join makes the three regions members of one federation and exports the shop between them.
func (d *Demo) join(ctx context.Context) error {
	us, eu, ap := d.regions[0], d.regions[1], d.regions[2]
	joinAt := func(issuer, joiner *region) error {
		token := filepath.Join(d.dir, "tokens", issuer.cluster+"-"+joiner.cluster+".join")
		if _, err := d.strait(ctx, issuer, "token", "issue", "--cluster", joiner.cluster, "--sameness", namespace, "--out", token); err != nil {
			return err
		}
		_, err := d.strait(ctx, joiner, "join", token, "--sameness", namespace)
		return err
	}
	for _, pair := range [][2]*region{{us, eu}, {us, ap}, {eu, ap}} {
		if err := joinAt(pair[0], pair[1]); err != nil {
			return err
		}
	}
	return each(d.regions, func(r *region) error {
		for _, s := range r.services {
			if s.name == "web" {
				continue
			}
			if _, err := d.strait(ctx, r, "export", namespace+"/"+s.name, "--to", "*", "--wait", "none"); err != nil {
				return err
			}
		}
		return nil
	})
}

// firstTraffic waits for one request through the whole shop, then starts the load.
func (d *Demo) firstTraffic(ctx context.Context) error {
	web := d.regions[0].instances["web"][0]
	url := "http://" + web.addr + "/"
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		body, code, err := call(ctx, url, nil)
		if err == nil && code == 200 {
			break
		}
		select {
		case <-ctx.Done():
			return problem.New(problem.Internal, "no request passes through the shop: %d %.300s %v", code, body, err).WithFix("look into %s", filepath.Join(d.dir, "log"))
		case <-tick.C:
		}
	}
	if d.cfg.RPS > 0 {
		d.load = &load{url: url, every: time.Second / time.Duration(d.cfg.RPS)}
	}
	return nil
}

// stopAll ends every child, sidecars first.
func (d *Demo) stopAll() {
	var wg sync.WaitGroup
	for _, r := range d.regions {
		for _, list := range r.instances {
			for _, i := range list {
				i.stop()
			}
		}
		for _, p := range r.processes() {
			wg.Go(func() { p.kill() })
		}
	}
	wg.Wait()
	killListed(filepath.Join(d.dir, "pids"))
}

// listen opens the control socket.
func (d *Demo) listen() (net.Listener, error) {
	l, err := net.Listen("unix", Socket(d.dir))
	if err != nil {
		return nil, err
	}
	return l, os.Chmod(Socket(d.dir), 0o600)
}
