// SPDX-License-Identifier: Apache-2.0

// Package peercred listens on a unix socket that only the process's own user, and root, may use: mode 0600, and each
// connection is checked by the peer's credentials (SO_PEERCRED, unix(7)).
package peercred

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"syscall"
)

// maxPath is what fits into sockaddr_un.
const maxPath = 107

// Listener accepts connections of the own user and of root, and closes others.
type Listener struct {
	*net.UnixListener
	log *slog.Logger
}

// Listen makes the socket, in place of one that a dead process left.
func Listen(path string, log *slog.Logger) (*Listener, error) {
	if len(path) > maxPath {
		return nil, fmt.Errorf("listen: %s is longer than the %d bytes that a unix socket's path may have; choose a shorter data directory", path, maxPath)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Listener{l, log}, nil
}

// Accept waits for a connection that may be served.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(c)
		if err == nil && (uid == 0 || uid == os.Getuid()) {
			return c, nil
		}
		l.log.Warn("connection of another user refused", "socket", l.Addr().String(), "uid", uid, "err", err)
		_ = c.Close()
	}
}

func peerUID(c *net.UnixConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	var cred *syscall.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil {
		return -1, err
	}
	if credErr != nil {
		return -1, credErr
	}
	return int(cred.Uid), nil
}
