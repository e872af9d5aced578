// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/e2e/harness"
)

// spiffeAppEnv makes TestSPIFFEApp an application that uses go-spiffe, unmodified, with this socket.
const spiffeAppEnv = "STRAIT_E2E_SPIFFE_APP"

// TestSPIFFEApp is no test but the application of TestWorkloadAPI: it reads commands from its input, one a line, and answers with one line.
func TestSPIFFEApp(t *testing.T) {
	socket := os.Getenv(spiffeAppEnv)
	if socket == "" {
		t.Skip("the application that TestWorkloadAPI starts")
	}
	a := &spiffeApp{socket: socket}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		answer, err := a.do(strings.Fields(in.Text()))
		if err != nil {
			answer = fmt.Sprintf("error %s %s", status.Code(err), strings.ReplaceAll(err.Error(), "\n", " "))
		}
		fmt.Println("app: " + answer)
	}
}

type spiffeApp struct {
	socket string
	source *workloadapi.X509Source
}

func (a *spiffeApp) do(args []string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(a.socket))
	if err != nil {
		return "", err
	}
	defer client.Close()
	if a.source == nil && args[0] != "fetch" {
		if a.source, err = workloadapi.NewX509Source(context.Background(), workloadapi.WithClientOptions(workloadapi.WithAddr(a.socket))); err != nil {
			return "", err
		}
	}
	switch args[0] {
	case "fetch":
		svid, err := client.FetchX509SVID(ctx)
		if err != nil {
			return "", err
		}
		return svid.ID.String(), nil
	case "serial":
		svid, err := a.source.GetX509SVID()
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("%s of %d", svid.Certificates[0].SerialNumber, len(svid.Certificates)), nil
	case "listen": // PEER
		l, err := spiffetls.ListenWithMode(context.Background(), "tcp", "127.0.0.1:0",
			spiffetls.MTLSServerWithSource(tlsconfig.AuthorizeID(spiffeid.RequireFromString(args[1])), a.source))
		if err != nil {
			return "", err
		}
		go echoTo(l)
		return l.Addr().String(), nil
	case "dial": // ADDRESS PEER
		c, err := spiffetls.DialWithMode(ctx, "tcp", args[1],
			spiffetls.MTLSClientWithSource(tlsconfig.AuthorizeID(spiffeid.RequireFromString(args[2])), a.source))
		if err != nil {
			return "", err
		}
		defer c.Close()
		if _, err := io.WriteString(c, "ping\n"); err != nil {
			return "", err
		}
		answer, err := bufio.NewReader(c).ReadString('\n')
		return strings.TrimSpace(answer), err
	case "jwt": // AUDIENCE
		svid, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: args[1]})
		if err != nil {
			return "", err
		}
		return svid.Marshal(), nil
	case "validate": // AUDIENCE TOKEN: by the sidecar, and by the bundles of a source of its own
		svid, err := client.ValidateJWTSVID(ctx, args[2], args[1])
		if err != nil {
			return "", err
		}
		bundles, err := client.FetchJWTBundles(ctx)
		if err != nil {
			return "", err
		}
		own, err := jwtsvid.ParseAndValidate(args[2], bundles, []string{args[1]})
		if err != nil {
			return "", err
		}
		return svid.ID.String() + " " + own.ID.String(), nil
	}
	return "", errors.New("no such command")
}

func echoTo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c)
		}()
	}
}

// runningApp is an application in a process of its own.
type runningApp struct {
	t   *testing.T
	in  io.WriteCloser
	out *bufio.Scanner
}

// startApp runs exe as another user.
func startApp(t *testing.T, exe, socket string, uid uint32) *runningApp {
	t.Helper()
	cmd := exec.Command(exe, "-test.run", "^TestSPIFFEApp$")
	cmd.Env = []string{spiffeAppEnv + "=unix://" + socket}
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr
	if os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	in, err := cmd.StdinPipe()
	if err == nil {
		var out io.Reader
		if out, err = cmd.StdoutPipe(); err == nil {
			err = cmd.Start()
			a := &runningApp{t, in, bufio.NewScanner(out)}
			a.out.Buffer(nil, 1<<20)
			if err == nil {
				t.Cleanup(func() { _ = in.Close(); _ = cmd.Wait() })
				return a
			}
		}
	}
	t.Fatal(err)
	return nil
}

// try gives the application a command and returns its answer.
func (a *runningApp) try(format string, args ...any) string {
	a.t.Helper()
	if _, err := fmt.Fprintf(a.in, format+"\n", args...); err != nil {
		a.t.Fatal(err)
	}
	for a.out.Scan() {
		if answer, ok := strings.CutPrefix(a.out.Text(), "app: "); ok {
			return answer
		}
	}
	a.t.Fatalf("the application has ended: %v", a.out.Err())
	return ""
}

func (a *runningApp) do(format string, args ...any) string {
	a.t.Helper()
	answer := a.try(format, args...)
	if strings.HasPrefix(answer, "error") {
		a.t.Fatalf(format+": %s", append(args, answer)...)
	}
	return answer
}

// TestWorkloadAPI: applications in processes of their own, as users of their own, use go-spiffe at the sidecars of two clusters: mutual TLS
// and tokens work across the clusters' bundles and through renewals, and processes that nobody named are refused by name.
func TestWorkloadAPI(t *testing.T) {
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west"}})
	f.Up("shop")
	us, eu := f.Clusters["us-east"], f.Clusters["eu-west"]

	// Sockets and the program lie where other users can reach them.
	dir, err := os.MkdirTemp("", "strait-spiffe-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	exe := filepath.Join(dir, "app")
	copyProgram(t, exe)
	uid, stranger := uint32(4711), uint32(4713)
	if os.Getuid() != 0 {
		uid, stranger = uint32(os.Getuid()), uint32(os.Getuid())
	}

	const webID, checkoutID = "spiffe://us-east.acme/ns/shop/sa/web", "spiffe://eu-west.acme/ns/shop/sa/checkout"
	webSocket, checkoutSocket := filepath.Join(dir, "web.sock"), filepath.Join(dir, "checkout.sock")
	us.StartSidecar("web", us.Register(harness.Workload{Name: "web", Service: "web", Token: true}), nil, "--workload-api", webSocket, "--renew-every", "2s")
	checkout := eu.StartSidecar("checkout", eu.Register(harness.Workload{Name: "checkout", Service: "checkout", Token: true}), nil,
		"--workload-api", checkoutSocket, "--renew-every", "2s")

	// Nobody is served by default.
	web := startApp(t, exe, webSocket, uid)
	harness.Eventually(t, 20*time.Second, "the sidecar to know what it is, and to refuse", func() error {
		if got := web.try("fetch"); !strings.HasPrefix(got, "error PermissionDenied") || !strings.Contains(got, fmt.Sprintf("{uid: %d}", uid)) {
			return errors.New(got)
		}
		return nil
	})
	us.CLI("workload", "register", "shop/web", "--service", "web", "--unix-uid", fmt.Sprint(uid))
	eu.CLI("workload", "register", "shop/checkout", "--service", "checkout", "--unix-uid", fmt.Sprint(uid))
	checkoutApp := startApp(t, exe, checkoutSocket, uid)
	for app, want := range map[*runningApp]string{web: webID, checkoutApp: checkoutID} {
		harness.Eventually(t, 20*time.Second, "an identity for the application", func() error {
			if got := app.try("fetch"); got != want {
				return errors.New(got)
			}
			return nil
		})
	}
	if stranger != uid {
		got := startApp(t, exe, webSocket, stranger).try("fetch")
		if !strings.HasPrefix(got, "error PermissionDenied") || !strings.Contains(got, fmt.Sprintf("uid %d ", stranger)) {
			t.Errorf("a process of uid %d: %s", stranger, got)
		}
		if log := us.Sidecars["web"].Tail(); !strings.Contains(log, fmt.Sprintf("uid=%d", stranger)) {
			t.Errorf("the sidecar's log does not name uid %d:\n%s", stranger, log)
		}
	}

	// Mutual TLS across the clusters' bundles, through renewals on both ends.
	addr := checkoutApp.do("listen %s", webID)
	talk := func() error {
		if got := web.try("dial %s %s", addr, checkoutID); got != "ping" {
			return errors.New(got)
		}
		return nil
	}
	harness.Eventually(t, 20*time.Second, "go-spiffe's mutual TLS between two clusters", talk)
	seen := map[string]bool{}
	harness.Eventually(t, 60*time.Second, "three renewals of the application's certificate", func() error {
		seen[web.do("serial")] = true
		if err := talk(); err != nil {
			t.Fatalf("after %d certificates: %v", len(seen), err)
		}
		if len(seen) < 4 {
			return fmt.Errorf("%d certificates", len(seen))
		}
		return nil
	})
	if got := web.try("dial %s %s", addr, webID); !strings.HasPrefix(got, "error") {
		t.Errorf("checkout was taken for web: %s", got)
	}

	// The root of the caller's cluster is rotated: the chain grows by the sibling, and nothing fails.
	for _, step := range []struct {
		name  string
		chain string
	}{{"prepare", " of 2"}, {"activate", " of 3"}, {"retire", " of 2"}} {
		us.CLI("trust", "rotate", step.name, "--wait")
		harness.Eventually(t, 60*time.Second, "a chain"+step.chain+" after "+step.name, func() error {
			if err := talk(); err != nil {
				t.Fatalf("%s: %v", step.name, err)
			}
			if got := web.do("serial"); !strings.HasSuffix(got, step.chain) {
				return errors.New(got)
			}
			return nil
		})
		if step.name == "prepare" {
			continue // a token of the old key would hold retire up for as long as it is valid
		}
		token := web.do("jwt %s", checkoutID)
		if got := checkoutApp.do("validate %s %s", checkoutID, token); got != webID+" "+webID {
			t.Errorf("%s: validated as %s", step.name, got)
		}
	}

	// Tokens.
	token := web.do("jwt %s", checkoutID)
	if got := checkoutApp.do("validate %s %s", checkoutID, token); got != webID+" "+webID {
		t.Errorf("validated as %s", got)
	}
	if got := checkoutApp.try("validate another %s", token); !strings.HasPrefix(got, "error InvalidArgument") {
		t.Errorf("valid for another audience: %s", got)
	}

	// The control plane is away: what is there is served on.
	eu.ControlPlane.Kill()
	if err := talk(); err != nil {
		t.Errorf("without checkout's control plane: %v", err)
	}
	if got := checkoutApp.do("fetch"); got != checkoutID {
		t.Errorf("without its control plane checkout is %s", got)
	}
	eu.ControlPlane.Start()

	// A selector that is taken back.
	file := f.File("web.yaml") // registering again would keep it
	if err := os.WriteFile(file, []byte(`apiVersion: strait.dev/v1alpha1
kind: Workload
metadata: {namespace: shop, name: web, labels: {app: web}}
spec: {address: 127.0.0.1, serviceAccount: web, proxy: web}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	us.CLI("apply", "-f", file)
	began := time.Now()
	harness.Eventually(t, 10*time.Second, "the refusal", func() error {
		if got := web.try("fetch"); !strings.HasPrefix(got, "error PermissionDenied") {
			return errors.New(got)
		}
		return nil
	})
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("refused only after %v", d)
	}

	// An identity that is withdrawn.
	us.CLI("workload", "register", "shop/web", "--service", "web", "--unix-uid", fmt.Sprint(uid))
	harness.Eventually(t, 10*time.Second, "the identity again", func() error {
		if got := web.try("fetch"); got != webID {
			return errors.New(got)
		}
		return nil
	})
	us.CLI("workload", "evict", "shop/web", "--yes")
	for what, refused := range map[string]func() string{
		"its certificate":                        func() string { return web.try("fetch") },
		"another token for a withdrawn identity": func() string { return web.try("jwt another") },
		"its token, in the other cluster":        func() string { return checkoutApp.try("validate %s %s", checkoutID, token) },
	} {
		harness.Eventually(t, 10*time.Second, "the refusal of "+what, func() error {
			if got := refused(); !strings.HasPrefix(got, "error") {
				return errors.New(got)
			}
			return nil
		})
	}

	checkout.Stop(10 * time.Second)
	if _, err := os.Lstat(checkoutSocket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

func copyProgram(t *testing.T, to string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(exe)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err == nil {
		_, err = io.Copy(out, in)
		err = errors.Join(err, out.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}
