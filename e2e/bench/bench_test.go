// SPDX-License-Identifier: Apache-2.0

package bench_test

import (
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	loadTime = 6 * time.Second
	rtt      = 50 * time.Millisecond
)

// row is one line of the table.
type row struct{ what, ours, baseline, ratio string }

// TestBench prints the table that the README quotes.
func TestBench(t *testing.T) {
	if os.Getenv("STRAIT_BENCH") == "" {
		t.Skip("make bench runs it: it loads the machine for a minute")
	}
	t.Setenv("STRAIT_E2E", "1")
	for _, tool := range []string{"wrk", "h2load", "haproxy"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v; sh e2e/setup.sh bench installs it", err)
		}
	}
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west"}, RTT: map[string]time.Duration{"us-east-eu-west": rtt}})
	f.Up("shop")
	us, eu := f.Clusters["us-east"], f.Clusters["eu-west"]
	site := backend(t)
	proxies := map[string]*harness.Sidecar{}
	for _, c := range []*harness.Cluster{us, eu} {
		proxies[c.Name] = c.StartSidecar("site", c.Register(harness.Workload{Name: "site-1", Service: "site", Address: site, Token: true}), nil)
		c.CLI("export", "shop/site", "--to", "*")
	}
	web := us.StartSidecar("web", us.Register(harness.Workload{Name: "web", Service: "web", Token: true}),
		[]string{"shop/site:http@us-east", "shop/site:http@eu-west"})
	local, remote := web.Upstreams[0], web.Upstreams[1]
	ready(t, local)
	ready(t, remote)
	ha, haPID := haproxy(t, site)
	ready(t, ha)

	var rows []row
	pair := []int{web.PID(), proxies["us-east"].PID()}
	for _, conns := range []int{16, 64} {
		direct := wrk(t, site, conns)
		ours := perRequest(t, pair, func() float64 { return wrk(t, local, conns) })
		base := perRequest(t, []int{haPID}, func() float64 { return wrk(t, ha, conns) })
		rows = append(rows, ratioRow(fmt.Sprintf("HTTP/1.1 1 KiB, sidecar pair, %d connections: CPU/request", conns), ours, base, "µs", "HAProxy pair with TLS"))
		t.Logf("direct: %.0f requests/s at %d connections", direct/loadTime.Seconds(), conns)
	}
	ours := perRequest(t, pair, func() float64 { return h2load(t, local) })
	base := perRequest(t, []int{haPID}, func() float64 { return h2load(t, ha) })
	rows = append(rows, ratioRow("HTTP/2 4 connections × 16 streams, sidecar pair: CPU/request", ours, base, "µs", "HAProxy pair with TLS"))

	across := []int{web.PID(), us.Gateways[0].PID(), eu.Gateways[0].PID(), proxies["eu-west"].PID()}
	cross := perRequest(t, across, func() float64 { return wrk(t, remote, 64) })
	rows = append(rows, ratioRow("HTTP/1.1 1 KiB, sidecar → 2 gateways → sidecar, 64 connections: CPU/request", cross, base1(t, haPID, ha), "µs", "HAProxy pair with TLS"))

	oursP50, directP50 := p50(t, local), p50(t, site)
	haP50 := p50(t, ha)
	rows = append(rows, ratioRow("added p50 at one connection", oursP50-directP50, haP50-directP50, "µs", "HAProxy pair with TLS"))

	pooled := p50(t, remote)
	rows = append(rows, ratioRow("first byte of a cross-region call, pooled connection", pooled, float64(rtt.Microseconds()), "µs", "path RTT"))
	fresh := freshCall(t, f, us)
	rows = append(rows, ratioRow("first byte of a cross-region call, new inner connection", fresh, float64(rtt.Microseconds()), "µs", "path RTT"))

	rows = append(rows, handshakes(t)...)

	for name, pid := range map[string]int{"control plane": us.ControlPlane.PID(), "gateway": us.Gateways[0].PID(), "sidecar after load": web.PID(), "sidecar fresh": freshSidecar(t, us)} {
		rows = append(rows, row{"RSS, " + name, fmt.Sprintf("%.0f MiB", float64(rss(t, pid))/(1<<20)), "-", "-"})
	}
	print(t, rows)
}

func base1(t *testing.T, pid int, addr string) float64 {
	return perRequest(t, []int{pid}, func() float64 { return wrk(t, addr, 64) })
}

func ratioRow(what string, ours, base float64, unit, name string) row {
	return row{what, fmt.Sprintf("%.0f %s", ours, unit), fmt.Sprintf("%s %.0f %s", name, base, unit), fmt.Sprintf("%.2f", ours/base)}
}

func print(t *testing.T, rows []row) {
	sort.SliceStable(rows, func(i, j int) bool {
		return strings.HasPrefix(rows[j].what, "RSS") && !strings.HasPrefix(rows[i].what, "RSS")
	})
	var b strings.Builder
	b.WriteString("\n| What | Strait | Baseline | Ratio |\n|---|---|---|---|\n")
	for _, r := range rows {
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", r.what, r.ours, r.baseline, r.ratio)
	}
	fmt.Println(b.String())
	if dir := os.Getenv("STRAIT_BENCH_OUT"); dir != "" {
		if err := os.WriteFile(dir, []byte(b.String()), 0o644); err != nil {
			t.Error(err)
		}
	}
}

// backend is nginx with one file of 1 KiB: the same for all.
func backend(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	addr := harness.FreePort(t, "127.0.0.1")
	root := filepath.Join(dir, "root")
	_ = os.Chmod(dir, 0o755)
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "index.html"), []byte(strings.Repeat("strait..", 128)), 0o644); err != nil {
		t.Fatal(err)
	}
	conf := fmt.Sprintf(`daemon off; master_process off; pid %[1]s/pid; error_log %[1]s/error.log; worker_processes 1; user root;
events { worker_connections 1024; }
http { access_log off; keepalive_requests 1000000; sendfile on; open_file_cache max=16;
  client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  server { listen %[2]s; root %[3]s; } }`, dir, addr, root)
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, "nginx", "-c", file, "-e", filepath.Join(dir, "error.log"))
	ready(t, addr)
	return addr
}

func start(t *testing.T, name string, args ...string) int {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path = "/usr/sbin/" + name
	}
	cmd := exec.Command(path, args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd.Process.Pid
}

// haproxy does what a sidecar pair does: plain HTTP in, mTLS between two of its frontends, plain HTTP out. Its certificates come
// from a CA like ours, on the same curve.
func haproxy(t *testing.T, site string) (addr string, pid int) {
	t.Helper()
	dir := t.TempDir()
	cert, root := certificate(t)
	for name, data := range map[string][]byte{"cert.pem": cert, "ca.pem": root} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	addr, inner := harness.FreePort(t, "127.0.0.1"), harness.FreePort(t, "127.0.0.1")
	conf := fmt.Sprintf(`global
  nbthread 2
  maxconn 4000
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  http-reuse always
frontend out
  bind %[1]s
  default_backend far
backend far
  server far %[2]s ssl verify none crt %[4]s/cert.pem alpn h2
frontend in
  bind %[2]s ssl crt %[4]s/cert.pem ca-file %[4]s/ca.pem verify required alpn h2
  default_backend app
backend app
  server app %[3]s
`, addr, inner, site, dir)
	file := filepath.Join(dir, "haproxy.cfg")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	return addr, start(t, "haproxy", "-db", "-f", file)
}

func certificate(t *testing.T) (pemChain, root []byte) {
	t.Helper()
	dir, err := datadir.Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	td, err := spiffeid.ParseTrustDomain("bench.acme")
	if err != nil {
		t.Fatal(err)
	}
	authority, err := ca.Create(dir, ca.Config{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	id, err := spiffeid.Workload(td, "bench", "haproxy")
	if err != nil {
		t.Fatal(err)
	}
	own, err := authority.IssueKey(id, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	pemChain, err = own.MarshalPEM()
	if err != nil {
		t.Fatal(err)
	}
	return pemChain, rootPEM(authority.Bundle())
}

func ready(t *testing.T, addr string) {
	t.Helper()
	harness.Eventually(t, 30*time.Second, addr, func() error {
		resp, err := http.Get("http://" + addr + "/")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != 200 || len(body) != 1024 {
			return fmt.Errorf("status %d, %d bytes, %v", resp.StatusCode, len(body), err)
		}
		return nil
	})
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
	return string(out)
}

var (
	wrkRequests = regexp.MustCompile(`(\d+) requests in`)
	wrkErrors   = regexp.MustCompile(`Non-2xx or 3xx responses: (\d+)|Socket errors: (.*)`)
	wrkP50      = regexp.MustCompile(`50%\s+([\d.]+)(us|ms|s)`)
	h2Requests  = regexp.MustCompile(`(\d+) succeeded, (\d+) failed`)
)

// wrk returns how many requests were answered.
func wrk(t *testing.T, addr string, conns int) float64 {
	t.Helper()
	out := run(t, "wrk", "-t", "1", "-c", strconv.Itoa(conns), "-d", strconv.Itoa(int(loadTime.Seconds()))+"s", "http://"+addr+"/")
	if m := wrkErrors.FindString(out); m != "" {
		t.Errorf("%s: %s", addr, m)
	}
	m := wrkRequests.FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("wrk said\n%s", out)
	}
	n, _ := strconv.ParseFloat(m[1], 64)
	return n
}

// p50 is the median latency of one connection, in microseconds.
func p50(t *testing.T, addr string) float64 {
	t.Helper()
	out := run(t, "wrk", "-t", "1", "-c", "1", "-d", "3s", "--latency", "http://"+addr+"/")
	m := wrkP50.FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("wrk said\n%s", out)
	}
	v, _ := strconv.ParseFloat(m[1], 64)
	return v * map[string]float64{"us": 1, "ms": 1e3, "s": 1e6}[m[2]]
}

func h2load(t *testing.T, addr string) float64 {
	t.Helper()
	out := run(t, "h2load", "-c", "4", "-m", "16", "-t", "1", "-D", strconv.Itoa(int(loadTime.Seconds())), "http://"+addr+"/")
	m := h2Requests.FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("h2load said\n%s", out)
	}
	if m[2] != "0" {
		t.Errorf("%s: %s requests failed", addr, m[2])
	}
	n, _ := strconv.ParseFloat(m[1], 64)
	return n
}

// perRequest is CPU of the processes over the requests of f, in microseconds.
func perRequest(t *testing.T, pids []int, f func() float64) float64 {
	t.Helper()
	before := cpu(t, pids)
	n := f()
	return (cpu(t, pids) - before) * 1e6 / n
}

func cpu(t *testing.T, pids []int) (seconds float64) {
	t.Helper()
	for _, pid := range pids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(data), ") ")
		f := strings.Fields(rest)
		user, _ := strconv.ParseFloat(f[11], 64)
		system, _ := strconv.ParseFloat(f[12], 64)
		seconds += (user + system) / 100
	}
	return seconds
}

func rss(t *testing.T, pid int) int64 {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, _ := strconv.ParseInt(strings.Fields(string(data))[1], 10, 64)
	return pages * int64(os.Getpagesize())
}

// freshCall is the time to the first byte of the first request of a sidecar that has no inner connection yet, in microseconds:
// the median over several sidecars.
func freshCall(t *testing.T, f *harness.Federation, us *harness.Cluster) float64 {
	t.Helper()
	var took []float64
	for i := range 5 {
		name := fmt.Sprintf("fresh-%d", i)
		sc := us.StartSidecar(name, us.Register(harness.Workload{Name: name, Service: name, Token: true}), []string{"shop/site:http@eu-west"})
		harness.Eventually(t, 20*time.Second, "readiness", func() error {
			resp, err := http.Get("http://" + sc.Metrics + "/readyz")
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			if resp.StatusCode != 200 {
				return fmt.Errorf("status %d", resp.StatusCode)
			}
			return nil
		})
		c, err := net.Dial("tcp", sc.Upstreams[0])
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: site\r\nConnection: close\r\n\r\n")
		buf := make([]byte, 12)
		if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "HTTP/1.1 200" {
			t.Fatalf("first call: %q %v", buf, err)
		}
		took = append(took, float64(time.Since(start).Microseconds()))
		_ = c.Close()
		sc.Kill()
	}
	sort.Float64s(took)
	return took[len(took)/2]
}

func freshSidecar(t *testing.T, us *harness.Cluster) int {
	t.Helper()
	return us.StartSidecar("idle", us.Register(harness.Workload{Name: "idle", Service: "idle", Token: true}), nil).PID()
}

func rootPEM(b *trust.Bundle) []byte {
	var out []byte
	for _, c := range b.Roots() {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}
