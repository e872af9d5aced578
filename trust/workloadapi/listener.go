// SPDX-License-Identifier: Apache-2.0

package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/strait-mesh/strait/internal/peercred"
)

const (
	maxPath         = 107 // what fits into sockaddr_un
	maxConnections  = 512
	maxOfOneUID     = 64
	probeTimeout    = time.Second
	socketMode      = 0o666 // selectors say who is served
	worldWritable   = 0o002
	stickyDirectory = fs.ModeSticky
)

// Listener accepts connections on a unix socket, says who each is from, and bounds their number.
type Listener struct {
	inner *net.UnixListener
	log   *slog.Logger
	made  os.FileInfo

	mu    sync.Mutex
	total int
	byUID map[uint32]int
}

// Listen makes the socket, which every user may connect to. It refuses a directory in which anybody could put another socket in its
// place, and takes the place of a socket only when nobody listens on it any more.
func Listen(path string, log *slog.Logger) (*Listener, error) {
	l, err := listen(path, log)
	if err != nil {
		return nil, fmt.Errorf("workload API socket: %w", err)
	}
	return l, nil
}

func listen(path string, log *slog.Logger) (*Listener, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if len(path) > maxPath {
		return nil, fmt.Errorf("%s is longer than the %d bytes that a unix socket's path may have", path, maxPath)
	}
	if err := checkDirectory(filepath.Dir(path)); err != nil {
		return nil, err
	}
	if err := clearPlace(path); err != nil {
		return nil, err
	}
	inner, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	inner.SetUnlinkOnClose(false) // Close removes it if it still is ours
	l := &Listener{inner: inner, log: log, byUID: map[uint32]int{}}
	if err = os.Chmod(path, socketMode); err == nil {
		l.made, err = os.Lstat(path)
	}
	if err != nil {
		return nil, errors.Join(err, inner.Close())
	}
	return l, nil
}

// checkDirectory makes the directory if it is missing, and refuses one in which others may remove our socket.
func checkDirectory(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&worldWritable != 0 && info.Mode()&stickyDirectory == 0 {
		return fmt.Errorf("everybody may write into %s: another process could put its own socket there", dir)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to uid %d, who could put another socket there", dir, st.Uid)
	}
	return nil
}

// clearPlace removes a socket that nobody listens on.
func clearPlace(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is no socket", path)
	}
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err == nil {
		_ = c.Close()
		return fmt.Errorf("another process listens on %s", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%s may be in use: %w", path, err)
	}
	return os.Remove(path)
}

// Accept returns the next connection whose caller is known and within the bounds.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.inner.AcceptUnix()
		if err != nil {
			return nil, err
		}
		who, err := peercred.Identify(c)
		if err != nil {
			l.log.Debug("workload API: caller not known", "err", err)
			_ = c.Close()
			continue
		}
		if !l.admit(who.UID) {
			l.log.Debug("workload API: too many connections", "uid", who.UID)
			_ = c.Close()
			continue
		}
		return &callerConn{UnixConn: c, who: who, done: func() { l.leave(who.UID) }}, nil
	}
}

func (l *Listener) admit(uid uint32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.total >= maxConnections || l.byUID[uid] >= maxOfOneUID {
		return false
	}
	l.total++
	l.byUID[uid]++
	return true
}

func (l *Listener) leave(uid uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if l.byUID[uid]--; l.byUID[uid] <= 0 {
		delete(l.byUID, uid)
	}
}

// Close stops accepting and removes the socket, unless another one has taken its place.
func (l *Listener) Close() error {
	path := l.inner.Addr().String()
	if now, err := os.Lstat(path); err == nil && os.SameFile(now, l.made) {
		_ = os.Remove(path)
	}
	return l.inner.Close()
}

// Addr is the socket.
func (l *Listener) Addr() net.Addr { return l.inner.Addr() }

// callerConn is a connection that says who is calling.
type callerConn struct {
	*net.UnixConn
	who  peercred.Caller
	once sync.Once
	done func()
}

// Caller is who connected.
func (c *callerConn) Caller() peercred.Caller { return c.who }

func (c *callerConn) Close() error {
	c.once.Do(c.done)
	return c.UnixConn.Close()
}

// attested are the credentials of connections that say who is calling; there is no encryption on a unix socket.
type attested struct{}

type callerInfo struct {
	credentials.CommonAuthInfo
	who peercred.Caller
}

func (callerInfo) AuthType() string { return "peercred" }

func (attested) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	known, ok := c.(interface{ Caller() peercred.Caller })
	if !ok {
		return nil, nil, errors.New("a connection that does not say who is calling")
	}
	return c, callerInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}, known.Caller()}, nil
}

func (attested) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("for servers only")
}

func (attested) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}
func (a attested) Clone() credentials.TransportCredentials { return a }
func (attested) OverrideServerName(string) error           { return nil }
