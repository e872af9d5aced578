// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
)

// backend is an HTTP application that says who it is and counts its requests. It can go away and come back.
type backend struct {
	name   string
	addr   string
	served atomic.Int64
	handle func(http.ResponseWriter, *http.Request)

	mu     sync.Mutex
	server *http.Server
}

func newBackend(t testing.TB, name string) *backend {
	t.Helper()
	b := &backend{name: name, addr: "127.0.0.1:0"}
	b.start(t)
	t.Cleanup(b.stop)
	return b
}

func (b *backend) start(t testing.TB) {
	t.Helper()
	l, err := net.Listen("tcp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.addr = l.Addr().String()
	b.server = &http.Server{Handler: b}
	go func(s *http.Server) { _ = s.Serve(l) }(b.server)
}

func (b *backend) stop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.server != nil {
		_ = b.server.Close()
		b.server = nil
	}
}

func (b *backend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.served.Add(1)
	if b.handle != nil {
		b.handle(w, r)
		return
	}
	_, _ = io.Copy(io.Discard, r.Body)
	fmt.Fprintf(w, "%s\n", b.name)
}

// get makes one GET through base and returns body and status.
func get(ctx context.Context, client *http.Client, url string) (string, int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", 0, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return strings.TrimSpace(string(body)), resp.StatusCode, err
}

// reaches waits until a GET of url answers 200 with a body that contains want.
func reaches(t testing.TB, url, want string) {
	t.Helper()
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	harness.Eventually(t, 20*time.Second, url+" to answer "+want, func() error {
		body, code, err := get(t.Context(), client, url)
		if err != nil || code != 200 || !strings.Contains(body, want) {
			return fmt.Errorf("status %d, body %.200q, %v", code, body, err)
		}
		return nil
	})
}

// nginx runs Debian's nginx with its default site and returns its address.
func nginx(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("nginx")
	if err != nil {
		path = "/usr/sbin/nginx"
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("nginx is missing: %v; sh e2e/setup.sh installs it", err)
	}
	dir := t.TempDir()
	addr := harness.FreePort(t, "127.0.0.1")
	conf := fmt.Sprintf(`daemon off; master_process off; pid %[1]s/pid; error_log %[1]s/error.log;
events { worker_connections 256; }
http {
  access_log off; client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  include /etc/nginx/mime.types;
  server { listen %[2]s; root /var/www/html; index index.html index.htm index.nginx-debian.html; location / { try_files $uri $uri/ =404; } }
}`, dir, addr)
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "-c", file, "-e", filepath.Join(dir, "error.log"))
	if err := harness.Spawn(cmd); err != nil { // one process: a worker would outlive a master that is killed
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Signal(os.Interrupt); _ = cmd.Wait() })
	harness.Eventually(t, 10*time.Second, "nginx", func() error {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			_ = c.Close()
		}
		return err
	})
	return addr
}

// call is one request of a load.
type call struct {
	at     time.Time // when it was issued
	took   time.Duration
	status int
	body   string
	err    error
}

func (c call) ok() bool { return c.err == nil && c.status == http.StatusOK }

// load sends GETs at a steady rate until it is stopped, whatever the answers do, and keeps every outcome.
type load struct {
	mu    sync.Mutex
	calls []call
	stop  context.CancelFunc
	done  chan struct{}
}

func startLoad(t testing.TB, url string, rps int) *load {
	t.Helper()
	return startLoadOver(t, &http.Transport{MaxIdleConnsPerHost: 128}, url, rps)
}

// startLoadOver is startLoad over a transport of the caller's.
func startLoadOver(t testing.TB, transport http.RoundTripper, url string, rps int) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{stop: cancel, done: make(chan struct{})}
	client := &http.Client{Timeout: 10 * time.Second, Transport: transport}
	go l.run(ctx, client, url, time.Second/time.Duration(rps))
	t.Cleanup(func() { cancel(); <-l.done })
	return l
}

func (l *load) run(ctx context.Context, client *http.Client, url string, every time.Duration) {
	defer close(l.done)
	defer client.CloseIdleConnections()
	var wg sync.WaitGroup
	defer wg.Wait()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		wg.Go(func() {
			c := call{at: time.Now()}
			c.body, c.status, c.err = get(context.WithoutCancel(ctx), client, url)
			c.took = time.Since(c.at)
			l.mu.Lock()
			defer l.mu.Unlock()
			l.calls = append(l.calls, c)
		})
	}
}

// since copies the calls issued at or after t.
func (l *load) since(t time.Time) []call {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []call
	for _, c := range l.calls {
		if !c.at.Before(t) {
			out = append(out, c)
		}
	}
	return out
}

// failures describes up to five calls that failed.
func failures(calls []call) (n int, text string) {
	for _, c := range calls {
		if c.ok() {
			continue
		}
		if n++; n <= 5 {
			text += fmt.Sprintf("\n  at %s after %v: %d %.200q %v", c.at.Format("15:04:05.000"), c.took.Round(time.Millisecond), c.status, c.body, c.err)
		}
	}
	return n, text
}
