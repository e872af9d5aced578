// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/lab"
	"github.com/strait-mesh/strait/internal/wan"
)

// Bin finds the built binaries: $STRAIT_BIN, else bin/ of the repository.
func Bin(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("STRAIT_BIN")
	if dir == "" {
		wd, err := os.Getwd()
		fail(t, err, "working directory")
		for wd != "/" {
			if _, err := os.Stat(filepath.Join(wd, "go.mod")); err == nil {
				break
			}
			wd = filepath.Dir(wd)
		}
		dir = filepath.Join(wd, "bin")
	}
	p := filepath.Join(dir, name)
	if _, err := os.Stat(p); err != nil {
		t.Fatalf("%v; run make build first", err)
	}
	return p
}

// Options of New.
type Options struct {
	Clusters   []string                 // default us-east, eu-west, ap-south
	RTT        map[string]time.Duration // "a-b" → round trip; default 20 ms for each pair
	CatalogTTL time.Duration            // default 60 s
	SVIDTTL    time.Duration            // default 36 h
	NoUDP      bool                     // the network drops all datagrams
	Gateways   int                      // of each cluster, default 1
	// Lab puts each cluster into a network namespace of its own (package lab; needs root). Federation.Lab then shapes the paths, and tests
	// dial and listen by Cluster.Dial and Cluster.Listen.
	Lab bool
}

// Federation is a set of clusters under one test.
type Federation struct {
	T        testing.TB
	Dir      string
	WAN      *wan.WAN // nil in a lab
	Lab      *lab.Net // nil outside of one
	Clusters map[string]*Cluster
	Names    []string
	opts     Options
}

// Cluster is one cluster: a control plane, gateways, sidecars.
type Cluster struct {
	Name         string
	fed          *Federation
	Dir          string // data directory of the control plane
	prefix       string // first three bytes of its addresses
	ControlPlane *Process
	Gateways     []*Process
	Sidecars     map[string]*Sidecar
	GRPC         string
	nextIP       int
}

// Sidecar is one sidecar process and where it listens.
type Sidecar struct {
	*Process
	Inbound   string
	Metrics   string
	HTTPProxy string
	Upstreams []string
	IP        string
}

// networks gives each federation of a test binary addresses of its own.
var networks atomic.Int32

// New starts nothing but the network between sites. Start what the test needs.
func New(t testing.TB, o Options) *Federation {
	t.Helper()
	if os.Getenv("STRAIT_E2E") == "" {
		t.Skip("end-to-end tests run with make e2e (STRAIT_E2E=1): they need the built binaries")
	}
	if len(o.Clusters) == 0 {
		o.Clusters = []string{"us-east", "eu-west", "ap-south"}
	}
	if o.Gateways == 0 {
		o.Gateways = 1
	}
	dir, err := os.MkdirTemp("", "strait-e2e-") // short: unix sockets live below it
	fail(t, err, "temporary directory")
	f := &Federation{T: t, Dir: dir, Clusters: map[string]*Cluster{}, Names: o.Clusters, opts: o}
	n := int(networks.Add(1))
	for i, name := range o.Clusters {
		prefix := fmt.Sprintf("127.%d.%d", 100+n%100, i+1)
		if o.Lab {
			prefix = fmt.Sprintf("198.18.%d", i+1)
		}
		f.Clusters[name] = &Cluster{Name: name, fed: f, Dir: filepath.Join(dir, name, "cp"), prefix: prefix, Sidecars: map[string]*Sidecar{}, nextIP: 30}
	}
	closeNetwork := f.network(uint64(n))
	t.Cleanup(func() {
		f.stop()
		closeNetwork()
		if t.Failed() && os.Getenv("STRAIT_E2E_KEEP") != "" {
			t.Logf("kept %s", dir)
			return
		}
		_ = os.RemoveAll(dir)
	})
	return f
}

// network makes what lies between the clusters.
func (f *Federation) network(seed uint64) (end func()) {
	f.T.Helper()
	var err error
	if f.opts.Lab {
		if os.Getuid() != 0 {
			f.T.Skip("the lab makes network namespaces: it needs root")
		}
		f.Lab, err = lab.New(seed, f.Names...)
		fail(f.T, err, "lab")
		f.Lab.Update(func(a, b string, s lab.Shape) lab.Shape {
			s.Delay, s.DropUDP = f.rtt(a, b)/2, f.opts.NoUDP
			return s
		})
		return func() { fail(f.T, f.Lab.Close(), "close lab") }
	}
	var sites []wan.Site
	for _, name := range f.Names {
		for g := 1; g <= f.opts.Gateways; g++ {
			sites = append(sites, wan.Site{Name: site(name, g), Outside: fmt.Sprintf("%s.%d:0", f.Clusters[name].prefix, 200+g)})
		}
	}
	f.WAN, err = wan.New(sites, seed, nil)
	fail(f.T, err, "network")
	f.Links(func(a, b string, l wan.Link) wan.Link {
		l.Delay, l.BlockUDP = f.rtt(a, b)/2, f.opts.NoUDP
		return l
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.WAN.Run(ctx) }()
	return func() { cancel(); <-done }
}

func site(cluster string, n int) string { return fmt.Sprintf("%s/gateway-%d", cluster, n) }

func (f *Federation) rtt(a, b string) time.Duration {
	for _, k := range []string{a + "-" + b, b + "-" + a} {
		if d, ok := f.opts.RTT[k]; ok {
			return d
		}
	}
	return 20 * time.Millisecond
}

// Links changes every link between different clusters.
func (f *Federation) Links(change func(from, to string, l wan.Link) wan.Link) {
	for _, a := range f.Names {
		for _, b := range f.Names {
			for g := 1; a != b && g <= f.opts.Gateways; g++ {
				for h := 1; h <= f.opts.Gateways; h++ {
					f.WAN.SetLink(site(a, g), site(b, h), change(a, b, f.WAN.Link(site(a, g), site(b, h))))
				}
			}
		}
	}
}

// Cut makes every link of a cluster drop everything silently, or heals them.
func (f *Federation) Cut(cluster string, dark bool) {
	if f.Lab != nil {
		f.Lab.Update(func(a, b string, s lab.Shape) lab.Shape {
			s.Down = s.Down && a != cluster && b != cluster || dark && (a == cluster || b == cluster)
			return s
		})
		return
	}
	f.Links(func(a, b string, l wan.Link) wan.Link {
		if a == cluster || b == cluster {
			l.Dark = dark
		}
		return l
	})
}

func (f *Federation) stop() {
	for _, c := range f.Clusters {
		for _, p := range c.Processes() {
			p.Kill()
		}
	}
	if f.T.Failed() {
		for _, c := range f.Clusters {
			for _, p := range c.Processes() {
				f.T.Logf("---- end of the log of %s\n%s", p.Name, p.Tail())
			}
		}
	}
}

// Processes are all of a cluster's, started or not.
func (c *Cluster) Processes() []*Process {
	var out []*Process
	for _, s := range c.Sidecars {
		out = append(out, s.Process)
	}
	out = append(out, c.Gateways...)
	if c.ControlPlane != nil {
		out = append(out, c.ControlPlane)
	}
	return out
}

// Result of one command line.
type Result struct {
	Out, Err string
	Code     int
}

func (f *Federation) env() []string {
	return []string{"HOME=" + f.Dir, "PATH=" + os.Getenv("PATH"), "XDG_CONFIG_HOME=" + filepath.Join(f.Dir, "config"), "GOGC=50"}
}

// Try runs one command line against the cluster and returns what happened.
func (c *Cluster) Try(args ...string) Result {
	c.fed.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, Bin(c.fed.T, "strait"), append([]string{"--data-dir", c.Dir}, args...)...)
	cmd.Env = c.fed.env()
	var out, errw bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errw
	err := cmd.Run()
	r := Result{Out: out.String(), Err: errw.String(), Code: cmd.ProcessState.ExitCode()}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.fed.T.Fatalf("%s: strait %s: %v", c.Name, strings.Join(args, " "), err)
	}
	return r
}

// CLI runs one command line that must succeed, and returns its standard output.
func (c *Cluster) CLI(args ...string) string {
	c.fed.T.Helper()
	r := c.Try(args...)
	if r.Code != 0 {
		c.fed.T.Fatalf("%s: strait %s: exit %d\n%s%s", c.Name, strings.Join(args, " "), r.Code, r.Out, r.Err)
	}
	return r.Out
}

// Init makes the cluster's data directory.
func (c *Cluster) Init() {
	c.fed.T.Helper()
	c.CLI("init", "acme", "--cluster", c.Name, "--region", c.Name+"-1")
}

// StartControlPlane starts the control plane and waits until it is ready.
func (c *Cluster) StartControlPlane(extra ...string) {
	c.fed.T.Helper()
	ip := c.prefix + ".1"
	args := []string{"controlplane", "--allow-loopback=" + strconv.FormatBool(c.fed.Lab == nil), "--data-dir", c.Dir, "--listen", ip + ":0", "--api-listen", ip + ":0", "--metrics-listen", ip + ":0"}
	if c.fed.opts.CatalogTTL > 0 {
		args = append(args, "--catalog-ttl", c.fed.opts.CatalogTTL.String())
	}
	if c.fed.opts.SVIDTTL > 0 {
		args = append(args, "--svid-ttl", c.fed.opts.SVIDTTL.String())
	}
	c.ControlPlane = &Process{
		site: c.site(), Name: c.Name + "/controlplane", t: c.fed.T, path: Bin(c.fed.T, "strait"), args: append(args, extra...), env: c.fed.env(), dir: c.Dir,
		Log: filepath.Join(c.fed.Dir, c.Name+"-controlplane.log"),
	}
	c.ControlPlane.Start()
	addrs := c.ControlPlane.Addrs()
	c.ControlPlane.Pin(addrs)
	c.GRPC, _ = addrs["Listen"].(string)
}

// StartGateway starts gateway number n, from 1, behind its address on the network.
func (c *Cluster) StartGateway(n int, extra ...string) *Process {
	c.fed.T.Helper()
	name := fmt.Sprintf("gateway-%d", n)
	token := filepath.Join(c.Dir, "tokens", "gateway-1.token")
	if n > 1 {
		token = filepath.Join(c.fed.Dir, c.Name+"-"+name+".token")
		c.CLI("token", "gateway", name, "--out", token)
	}
	ip := fmt.Sprintf("%s.%d", c.prefix, 10+n)
	dir := filepath.Join(c.fed.Dir, c.Name, name)
	listen, advertise := ip+":7443", ip+":7443"
	if c.fed.Lab == nil {
		listen, advertise = ip+":0", c.fed.WAN.Outside(site(c.Name, n))
	}
	p := &Process{
		site: c.site(), Name: c.Name + "/" + name, t: c.fed.T, path: Bin(c.fed.T, "strait-proxy"), env: c.fed.env(), dir: dir, Log: filepath.Join(c.fed.Dir, c.Name+"-"+name+".log"),
		args: append([]string{"gateway", "--data-dir", dir, "--token-file", token, "--control-plane", c.GRPC, "--listen", listen,
			"--advertise", advertise, "--local-listen", ip + ":0", "--metrics-listen", ip + ":0"}, extra...),
	}
	c.Gateways = append(c.Gateways, p)
	c.RestartGateway(p)
	return p
}

// RestartGateway starts a gateway and tells the network where it listens.
func (c *Cluster) RestartGateway(p *Process) {
	c.fed.T.Helper()
	p.Start()
	addrs := p.Addrs()
	p.Pin(addrs)
	if c.fed.Lab != nil {
		return
	}
	listen, _ := addrs["Listen"].(string)
	fail(c.fed.T, c.fed.WAN.Attach(p.Name, listen), "attach gateway")
}

// Up does all that a cluster needs before services: init, control plane, gateways.
func (c *Cluster) Up() {
	c.fed.T.Helper()
	c.Init()
	c.StartControlPlane()
	for n := 1; n <= c.fed.opts.Gateways; n++ {
		c.StartGateway(n)
	}
}

// Up brings all clusters up and joins each to the first, and all others to each other.
func (f *Federation) Up(sameness string) {
	f.T.Helper()
	for _, n := range f.Names {
		f.Clusters[n].Up()
	}
	for i, issuer := range f.Names {
		for _, joiner := range f.Names[i+1:] {
			f.Join(issuer, joiner, sameness)
		}
	}
}

// Token issues a join token at issuer for joiner and returns its file.
func (f *Federation) Token(issuer, joiner, sameness string, extra ...string) string {
	f.T.Helper()
	file := filepath.Join(f.Dir, fmt.Sprintf("%s-%s-%d.join", issuer, joiner, time.Now().UnixNano()))
	args := []string{"token", "issue", "--cluster", joiner, "--out", file}
	if sameness != "" {
		args = append(args, "--sameness", sameness)
	}
	f.Clusters[issuer].CLI(append(args, extra...)...)
	return file
}

// Join makes joiner a member with a token of issuer; sameness is granted both ways.
func (f *Federation) Join(issuer, joiner, sameness string) {
	f.T.Helper()
	args := []string{"join", f.Token(issuer, joiner, sameness)}
	if sameness != "" {
		args = append(args, "--sameness", sameness)
	}
	f.Clusters[joiner].CLI(args...)
}

// Workload is an application instance to register.
type Workload struct {
	Name    string // of the workload, in namespace shop
	Service string
	Address string // host:port of the application; empty: a client only
	Port    string // name and protocol, default "http"
	Proxy   string // default: Service
	Token   bool   // make a registration token for the sidecar
}

// Register registers a workload and returns the token file, if one was asked for.
func (c *Cluster) Register(w Workload) string {
	c.fed.T.Helper()
	if w.Proxy == "" {
		w.Proxy = w.Service
	}
	if w.Port == "" {
		w.Port = "http"
	}
	args := []string{"workload", "register", "shop/" + w.Name, "--service", w.Service, "--proxy", w.Proxy}
	if w.Address != "" {
		host, port, err := net.SplitHostPort(w.Address)
		fail(c.fed.T, err, "workload address")
		name, protocol, has := strings.Cut(w.Port, "/")
		value := name + "=" + port
		if has {
			value += "/" + protocol
		}
		args = append(args, "--address", host, "--port", value)
	}
	token := ""
	if w.Token {
		token = filepath.Join(c.fed.Dir, fmt.Sprintf("%s-%s-%d.token", c.Name, w.Proxy, time.Now().UnixNano()))
		args = append(args, "--token-out", token)
	}
	c.CLI(args...)
	return token
}

// StartSidecar starts the sidecar of a proxy with a token, and upstreams "<ns>/<svc>[:port][@cluster]".
func (c *Cluster) StartSidecar(proxy, token string, upstreams []string, extra ...string) *Sidecar {
	c.fed.T.Helper()
	c.nextIP++
	ip := fmt.Sprintf("%s.%d", c.prefix, c.nextIP)
	dir := filepath.Join(c.fed.Dir, c.Name, "sc-"+proxy)
	args := []string{"sidecar", "--data-dir", dir, "--token-file", token, "--control-plane", c.GRPC, "--inbound-listen", ip + ":0", "--metrics-listen", ip + ":0"}
	for _, u := range upstreams {
		args = append(args, "--upstream", u+"="+c.freePort(ip))
	}
	s := &Sidecar{IP: ip, Process: &Process{
		site: c.site(), Name: c.Name + "/" + proxy, t: c.fed.T, path: Bin(c.fed.T, "strait-proxy"), args: append(args, extra...), env: c.fed.env(), dir: dir,
		Log: filepath.Join(c.fed.Dir, c.Name+"-"+proxy+".log"),
	}}
	c.Sidecars[proxy] = s
	s.Restart()
	return s
}

// Restart starts the sidecar and reads where it listens.
func (s *Sidecar) Restart() {
	s.t.Helper()
	s.Start()
	addrs := s.Addrs()
	s.Pin(addrs)
	s.Inbound, _ = addrs["Inbound"].(string)
	s.Metrics, _ = addrs["Metrics"].(string)
	s.HTTPProxy, _ = addrs["HTTPProxy"].(string)
	s.Upstreams = nil
	list, _ := addrs["Upstreams"].([]any)
	for _, a := range list {
		text, _ := a.(string)
		s.Upstreams = append(s.Upstreams, text)
	}
}

// FreePort picks an address on ip that is free now.
func FreePort(t testing.TB, ip string) string {
	t.Helper()
	l, err := net.Listen("tcp", ip+":0")
	fail(t, err, "free port")
	defer l.Close()
	return l.Addr().String()
}

// FreeAddr is a free address among the cluster's own.
func (c *Cluster) FreeAddr() string { return c.freePort(c.prefix + ".2") }

func (c *Cluster) freePort(ip string) string {
	if c.fed.Lab == nil {
		return FreePort(c.fed.T, ip)
	}
	l := c.Listen(ip + ":0")
	defer l.Close()
	return l.Addr().String()
}

// site is the cluster's place in the lab; nil outside of one.
func (c *Cluster) site() *lab.Site {
	if c.fed.Lab == nil {
		return nil
	}
	return c.fed.Lab.Site(c.Name)
}

// Listen opens a TCP listener where the cluster's processes are; addr "" picks a free one.
func (c *Cluster) Listen(addr string) net.Listener {
	c.fed.T.Helper()
	if addr == "" {
		addr = c.prefix + ".3:0"
	}
	listen := func(addr string) (net.Listener, error) { return net.Listen("tcp", addr) }
	if s := c.site(); s != nil {
		listen = s.Listen
	}
	l, err := listen(addr)
	fail(c.fed.T, err, "listen")
	return l
}

// Dial connects from where the cluster's processes are.
func (c *Cluster) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if s := c.site(); s != nil {
		return s.DialContext(ctx, network, addr)
	}
	var d net.Dialer
	return d.DialContext(ctx, network, addr)
}
