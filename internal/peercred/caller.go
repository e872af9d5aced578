// SPDX-License-Identifier: Apache-2.0

package peercred

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Caller is what the kernel says of the process that connected. UID and GID are those that it had when it connected.
type Caller struct {
	UID, GID uint32
	PID      int32 // 0: in no PID namespace of ours
	// Path is the executable that the process ran when Identify looked; empty: not known, and PathErr says why.
	Path    string
	PathErr error
}

// String names the caller for logs and messages.
func (c Caller) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "uid %d gid %d pid %d", c.UID, c.GID, c.PID)
	if c.Path != "" {
		fmt.Fprintf(&b, " (%s)", c.Path)
	}
	return b.String()
}

// Identify says who is at the other end of c. It fails only when the kernel does not say so; an executable that cannot be told
// leaves Path empty.
//
// The executable is that of the process that connected and of no other: SO_PEERPIDFD (Linux 6.5) refers to the process itself,
// and its number cannot be given to another one before it was reaped. The link in /proc is read while the process lives, and
// counts only when the path leads, in our own view of the file system, to the very file that runs: a process in a mount namespace
// of its own may otherwise give its file any name.
func Identify(c *net.UnixConn) (Caller, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return Caller{}, fmt.Errorf("peer credentials: %w", err)
	}
	var cred *unix.Ucred
	var credErr, fdErr error
	pidfd := -1
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		pidfd, fdErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	}); err != nil {
		return Caller{}, fmt.Errorf("peer credentials: %w", err)
	}
	if fdErr == nil {
		defer unix.Close(pidfd)
	}
	if credErr != nil {
		return Caller{}, fmt.Errorf("peer credentials: %w", credErr)
	}
	who := Caller{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}
	if fdErr != nil {
		who.PathErr = fmt.Errorf("no handle on the process (Linux 6.5 and later give one): %w", fdErr)
		return who, nil
	}
	who.Path, who.PathErr = executable(int(cred.Pid), pidfd)
	return who, nil
}

var errGone = errors.New("the process has ended")

// executable is the path of the file that the process behind pidfd runs. Its number is pid for as long as it lives.
func executable(pid, pidfd int) (string, error) {
	if pid <= 0 {
		return "", errors.New("the process is in no PID namespace of ours")
	}
	link := "/proc/" + strconv.Itoa(pid) + "/exe"
	path, err := os.Readlink(link)
	if err != nil {
		return "", fmt.Errorf("executable: %w", err)
	}
	running, err := os.Stat(link) // the file itself, wherever it lies
	if err != nil {
		return "", fmt.Errorf("executable: %w", err)
	}
	if err := alive(pidfd); err != nil {
		return "", err
	}
	named, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("executable: %w", err)
	}
	if !os.SameFile(running, named) {
		return "", fmt.Errorf("executable: %s is another file than the one that runs", path)
	}
	return path, nil
}

// alive reports an error once the process has ended. Until then nobody else has its number.
func alive(pidfd int) error {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("poll the process: %w", err)
		case n > 0:
			return errGone
		}
		return nil
	}
}
