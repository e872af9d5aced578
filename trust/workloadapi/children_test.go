// SPDX-License-Identifier: Apache-2.0

package workloadapi_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	upstream "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/trust/workloadapi"
)

const childEnv = "STRAIT_TEST_WORKLOAD_API"

// child asks for an identity as go-spiffe does, and prints what came of it.
func child(socket string) int {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	c, err := upstream.New(ctx, upstream.WithAddr(socket))
	if err != nil {
		fmt.Println("error", err)
		return 1
	}
	defer c.Close()
	svid, err := c.FetchX509SVID(ctx)
	if err != nil {
		fmt.Println(status.Code(err), status.Convert(err).Message())
		return 0
	}
	fmt.Println("OK", svid.ID)
	return 0
}

// ask runs the test program as another user and returns what it printed.
func ask(t *testing.T, exe, address string, uid, gid uint32) string {
	t.Helper()
	cmd := exec.Command(exe)
	cmd.Env = []string{childEnv + "=" + address}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	must(t, err)
	return strings.TrimSpace(string(out))
}

// program is a copy of the test program that everybody may run.
func program(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "wlapi")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	exe, err := os.Executable()
	must(t, err)
	in, err := os.Open(exe)
	must(t, err)
	defer in.Close()
	path := filepath.Join(dir, "app")
	out, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	must(t, err)
	_, err = io.Copy(out, in)
	must(t, err)
	must(t, out.Close())
	return path
}

// TestOtherUsers: each selector serves whom it names, and a process of another user is refused by name.
func TestOtherUsers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can start processes as other users")
	}
	exe := program(t)
	other := program(t)
	number := func(n uint32) *uint32 { return &n }
	const app, appGroup, stranger = 4711, 4712, 4713
	for name, c := range map[string]struct {
		selectors []workloadapi.Selector
		exe       string
		uid, gid  uint32
		want      string
	}{
		"uid":                        {[]workloadapi.Selector{{UID: number(app)}}, exe, app, appGroup, "OK"},
		"gid":                        {[]workloadapi.Selector{{GID: number(appGroup)}}, exe, stranger, appGroup, "OK"},
		"path":                       {[]workloadapi.Selector{{Path: exe}}, exe, stranger, stranger, "OK"},
		"all three":                  {[]workloadapi.Selector{{UID: number(app), GID: number(appGroup), Path: exe}}, exe, app, appGroup, "OK"},
		"second entry":               {[]workloadapi.Selector{{UID: number(1)}, {UID: number(app)}}, exe, app, appGroup, "OK"},
		"nobody":                     {nil, exe, app, appGroup, "PermissionDenied"},
		"another uid":                {[]workloadapi.Selector{{UID: number(app)}}, exe, stranger, appGroup, "PermissionDenied"},
		"root is nobody special":     {[]workloadapi.Selector{{UID: number(app)}}, exe, 0, 0, "PermissionDenied"},
		"uid right and gid wrong":    {[]workloadapi.Selector{{UID: number(app), GID: number(stranger)}}, exe, app, appGroup, "PermissionDenied"},
		"uid right and path wrong":   {[]workloadapi.Selector{{UID: number(app), Path: exe}}, other, app, appGroup, "PermissionDenied"},
		"path right and uid wrong":   {[]workloadapi.Selector{{UID: number(app), Path: exe}}, exe, stranger, appGroup, "PermissionDenied"},
		"selector without any field": {[]workloadapi.Selector{{}}, exe, app, appGroup, "PermissionDenied"},
	} {
		t.Run(name, func(t *testing.T) {
			r := serve(t, newAuthority(t, "us-east.acme.test"), "web", nil, c.selectors...)
			got := ask(t, c.exe, r.address(), c.uid, c.gid)
			if !strings.HasPrefix(got, c.want) {
				t.Fatalf("got %q", got)
			}
			if c.want == "OK" {
				if got != "OK "+r.id.String() {
					t.Errorf("got %q", got)
				}
				return
			}
			for _, word := range []string{fmt.Sprintf("uid %d ", c.uid), fmt.Sprintf("{uid: %d}", c.uid), "spec.attestation.unix", "shop/web"} {
				if !strings.Contains(got, word) {
					t.Errorf("the refusal does not say %q: %s", word, got)
				}
			}
			if lines := strings.Join(r.log.all(), "\n"); !strings.Contains(lines, fmt.Sprintf("WARN workload API: caller refused reason=not_selected uid=%d", c.uid)) &&
				!strings.Contains(lines, fmt.Sprintf("WARN workload API: caller refused reason=no_selector uid=%d", c.uid)) {
				t.Errorf("not logged: %s", lines)
			}
			if issued, _ := r.ca.count(); issued != 0 {
				t.Errorf("%d identities were asked for, for nobody", issued)
			}
		})
	}
}
