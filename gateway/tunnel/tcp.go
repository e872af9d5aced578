// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"
)

// ErrReset says that the other end broke the stream off.
var ErrReset = errors.New("stream reset by the other end")

const (
	tcpFrame        = 16 << 10
	tcpWriteTimeout = 5 * time.Second
	tcpUserTimeout  = 10 * time.Second
)

func yamuxConfig(backlog int) *yamux.Config {
	return &yamux.Config{
		AcceptBacklog:          backlog,
		EnableKeepAlive:        true,
		KeepAliveInterval:      10 * time.Second,
		ConnectionWriteTimeout: tcpWriteTimeout,
		MaxStreamWindowSize:    streamWindow,
		StreamOpenTimeout:      tcpUserTimeout,
		StreamCloseTimeout:     30 * time.Second,
		LogOutput:              io.Discard,
	}
}

// tcpLink is a link over yamux over one TLS connection.
type tcpLink struct {
	conn  *tls.Conn
	bare  *net.TCPConn // nil when not TCP
	mux   *yamux.Session
	limit int
	in    atomic.Int64 // streams that the other end has open
	bytes countingConn
	once  sync.Once
}

// countingConn counts what passes beneath yamux.
type countingConn struct {
	net.Conn
	in, out atomic.Uint64
}

func (c *countingConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.in.Add(uint64(n))
	return n, err
}

func (c *countingConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.out.Add(uint64(n))
	return n, err
}

func newTCPLink(conn *tls.Conn, dialled bool, limit int) (*tcpLink, error) {
	l := &tcpLink{conn: conn, limit: limit}
	l.bare, _ = conn.NetConn().(*net.TCPConn)
	tuneTCP(l.bare)
	l.bytes.Conn = conn
	var err error
	if dialled {
		l.mux, err = yamux.Client(&l.bytes, yamuxConfig(limit))
	} else {
		l.mux, err = yamux.Server(&l.bytes, yamuxConfig(limit))
	}
	if err != nil {
		return nil, fmt.Errorf("start mux: %w", err)
	}
	return l, nil
}

// tuneTCP makes a vanished peer an error within seconds.
func tuneTCP(c *net.TCPConn) {
	if c == nil {
		return
	}
	_ = c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 3 * time.Second, Interval: 3 * time.Second, Count: 3})
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(tcpUserTimeout.Milliseconds()))
		})
	}
}

func (l *tcpLink) open(ctx context.Context) (counted, error) {
	// OpenStream blocks while the far end has its backlog of streams unaccepted: bounded by StreamOpenTimeout, after
	// which yamux ends the session.
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s, err := l.mux.OpenStream()
	if err != nil {
		return nil, err
	}
	return &tcpStream{y: s}, nil
}

func (l *tcpLink) accept(ctx context.Context) (counted, error) {
	for {
		s, err := l.mux.AcceptStreamWithContext(ctx)
		if err != nil {
			return nil, err
		}
		if l.in.Add(1) > int64(l.limit) {
			l.in.Add(-1)
			_ = s.Close() // without a length-0 frame: a reset
			continue
		}
		return &tcpStream{y: s, release: func() { l.in.Add(-1) }}, nil
	}
}

func (l *tcpLink) sendPacket([]byte) error { return errNoDatagrams }
func (l *tcpLink) packetSize() int         { return 0 }
func (l *tcpLink) receivePacket(ctx context.Context) ([]byte, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}
func (l *tcpLink) state() tls.ConnectionState { return l.conn.ConnectionState() }
func (l *tcpLink) remoteAddr() net.Addr       { return l.conn.RemoteAddr() }
func (l *tcpLink) done() <-chan struct{}      { return l.mux.CloseChan() }

func (l *tcpLink) stats() linkStats {
	out := linkStats{bytesIn: l.bytes.in.Load(), bytesOut: l.bytes.out.Load()}
	if l.bare == nil {
		return out
	}
	raw, err := l.bare.SyscallConn()
	if err != nil {
		return out
	}
	_ = raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			out.rtt = time.Duration(info.Rtt) * time.Microsecond
			out.sent, out.lost = uint64(info.Segs_out), uint64(info.Total_retrans)
			out.congestionWnd = uint64(info.Snd_cwnd) * uint64(info.Snd_mss)
		}
	})
	return out
}

func (l *tcpLink) close(closeCode, string) {
	// The connection goes first: yamux and TLS would otherwise wait for a writer that is stuck on a dead path.
	l.once.Do(func() {
		_ = l.conn.NetConn().Close()
		_ = l.mux.Close()
	})
}

// tcpStream frames the bytes of a yamux stream so that a clean end can be told from a reset: length 0 is the end, and a
// yamux end without it is a reset.
type tcpStream struct {
	y       *yamux.Stream
	release func() // of the link's count
	end     func()

	rmu  sync.Mutex
	left int   // of the current frame
	rerr error // sticky

	wmu    sync.Mutex
	wended bool

	gone sync.Once
}

var frames = sync.Pool{New: func() any { b := make([]byte, 2+tcpFrame); return &b }}

// Read implements Stream.
func (s *tcpStream) Read(b []byte) (int, error) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if err := s.nextFrame(); err != nil {
		return 0, err
	}
	if len(b) > s.left {
		b = b[:s.left]
	}
	n, err := s.y.Read(b)
	s.left -= n
	return n, s.readError(err)
}

// ReadPooled reads without holding a buffer while there is nothing to read.
func (s *tcpStream) ReadPooled(take func() []byte, _ func()) (int, error) {
	s.rmu.Lock()
	err := s.nextFrame()
	s.rmu.Unlock()
	if err != nil {
		return 0, err
	}
	return s.Read(take())
}

// nextFrame makes left positive, or returns how the stream ended.
func (s *tcpStream) nextFrame() error {
	if s.left > 0 || s.rerr != nil {
		return s.rerr
	}
	var head [2]byte
	if _, err := io.ReadFull(s.y, head[:]); err != nil {
		return s.readError(err)
	}
	n := int(binary.BigEndian.Uint16(head[:]))
	switch {
	case n == 0:
		s.rerr = io.EOF
	case n > tcpFrame:
		s.rerr = fmt.Errorf("%w: stream frame of %d bytes", ErrMalformed, n)
	}
	s.left = n
	return s.rerr
}

func (s *tcpStream) readError(err error) error {
	if err == nil || isTimeout(err) {
		return err
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = ErrReset
	}
	s.rerr = err
	return err
}

// Write implements Stream.
func (s *tcpStream) Write(b []byte) (int, error) {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if s.wended {
		return 0, io.ErrClosedPipe
	}
	buf := frames.Get().(*[]byte)
	defer frames.Put(buf)
	done := 0
	for done < len(b) {
		n := copy((*buf)[2:], b[done:])
		binary.BigEndian.PutUint16(*buf, uint16(n))
		if _, err := s.y.Write((*buf)[:2+n]); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// CloseWrite implements Stream.
func (s *tcpStream) CloseWrite() error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if s.wended {
		return nil
	}
	s.wended = true
	_, err := s.y.Write([]byte{0, 0})
	return err
}

// Reset implements Stream. It takes no lock that a blocked writer may hold.
func (s *tcpStream) Reset() {
	s.gone.Do(func() {
		past := time.Unix(1, 0)
		_ = s.y.SetDeadline(past)
		_ = s.y.Close()
		if s.release != nil {
			s.release()
		}
		if s.end != nil {
			s.end()
		}
	})
}

func (s *tcpStream) onEnd(f func()) { s.end = f }

// Close implements Stream.
func (s *tcpStream) Close() error {
	_ = s.CloseWrite()
	s.Reset()
	return nil
}

// SetDeadline implements Stream.
func (s *tcpStream) SetDeadline(t time.Time) error { return s.y.SetDeadline(t) }

// SetReadDeadline implements Stream.
func (s *tcpStream) SetReadDeadline(t time.Time) error { return s.y.SetReadDeadline(t) }

// SetWriteDeadline implements Stream.
func (s *tcpStream) SetWriteDeadline(t time.Time) error { return s.y.SetWriteDeadline(t) }

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}
