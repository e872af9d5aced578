// SPDX-License-Identifier: Apache-2.0

package peercred_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/strait-mesh/strait/internal/peercred"
)

// TestMain also is the program that the tests start: with STRAIT_CONNECT it connects, says so, and lives as long as its input.
func TestMain(m *testing.M) {
	if path := os.Getenv("STRAIT_CONNECT"); path != "" {
		c, err := net.Dial("unix", path)
		if err != nil {
			os.Exit(1)
		}
		_, _ = os.Stdin.Read(make([]byte, 1))
		_ = c.Close()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func listen(t *testing.T) *net.UnixListener {
	t.Helper()
	dir, err := os.MkdirTemp("", "peercred")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	if err := os.Chmod(l.Addr().String(), 0o666); err != nil {
		t.Fatal(err)
	}
	return l
}

// start runs exe so that it connects to l, and returns the connection. stop ends it and waits.
func start(t *testing.T, l *net.UnixListener, exe string, attr *syscall.SysProcAttr) (c *net.UnixConn, pid int, stop func()) {
	t.Helper()
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "STRAIT_CONNECT="+l.Addr().String())
	cmd.SysProcAttr = attr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = func() { _ = in.Close(); _ = cmd.Wait() }
	if c, err = l.AcceptUnix(); err != nil {
		stop()
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c, cmd.Process.Pid, stop
}

func self(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// copyOf is the test program under another name that everybody may run.
func copyOf(t *testing.T, dir, name string) string {
	t.Helper()
	data, err := os.ReadFile(self(t))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestIdentify(t *testing.T) {
	l := listen(t)
	c, pid, stop := start(t, l, self(t), nil)
	defer stop()
	who, err := peercred.Identify(c)
	if err != nil {
		t.Fatal(err)
	}
	if int(who.UID) != os.Getuid() || int(who.GID) != os.Getgid() || int(who.PID) != pid || who.Path != self(t) {
		t.Errorf("%+v", who)
	}
}

// A process that has ended is not taken for the one that has its number now.
func TestEndedProcessHasNoPath(t *testing.T) {
	l := listen(t)
	c, _, stop := start(t, l, self(t), nil)
	stop()
	who, err := peercred.Identify(c)
	if err != nil {
		t.Fatal(err)
	}
	if who.Path != "" || who.PathErr == nil {
		t.Errorf("a process that has ended runs %q (%v)", who.Path, who.PathErr)
	}
}

// A file that was replaced is not the one that runs, though its path is the same.
func TestReplacedExecutableHasNoPath(t *testing.T) {
	l := listen(t)
	dir := t.TempDir()
	exe := copyOf(t, dir, "app")
	c, _, stop := start(t, l, exe, nil)
	defer stop()
	if who, err := peercred.Identify(c); err != nil || who.Path != exe {
		t.Fatalf("before: %+v %v", who, err)
	}
	if err := os.Rename(copyOf(t, dir, "next"), exe); err != nil {
		t.Fatal(err)
	}
	who, err := peercred.Identify(c)
	if err != nil {
		t.Fatal(err)
	}
	if who.Path != "" || who.PathErr == nil {
		t.Errorf("a replaced file counts as %q", who.Path)
	}
}

func TestIdentifyOtherUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can start a process as another user")
	}
	l := listen(t)
	dir, err := os.MkdirTemp("", "peercred")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	exe := copyOf(t, dir, "app")
	c, _, stop := start(t, l, exe, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4711, Gid: 4712}})
	defer stop()
	who, err := peercred.Identify(c)
	if err != nil {
		t.Fatal(err)
	}
	if who.UID != 4711 || who.GID != 4712 || who.Path != exe || !strings.Contains(who.String(), "uid 4711") {
		t.Errorf("%s (%v)", who, who.PathErr)
	}
}
