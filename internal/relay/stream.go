// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"crypto/tls"
	"io"
	"net"
	"sync/atomic"
	"syscall"
)

// Wrap makes a Stream of any connection: the best kind for *net.TCPConn and *tls.Conn, and otherwise one that uses
// CloseWrite and Reset where c has them.
func Wrap(c net.Conn) Stream {
	switch c := c.(type) {
	case *net.TCPConn:
		return TCP(c)
	case *tls.Conn:
		return TLS(c)
	case Stream:
		return c
	}
	return &connStream{Conn: c}
}

// Abort ends c so that the other end sees a reset: linger 0 on the TCP connection beneath it, without close_notify.
func Abort(c net.Conn) {
	for inner := c; ; {
		switch v := inner.(type) {
		case *net.TCPConn:
			v.SetLinger(0)
			v.Close()
			return
		case interface{ Reset() }:
			v.Reset()
			return
		case interface{ NetConn() net.Conn }:
			inner = v.NetConn()
		default:
			inner.Close()
			return
		}
	}
}

// tcpStream is a bare TCP connection.
type tcpStream struct {
	*net.TCPConn
	raw   syscall.RawConn
	reset atomic.Bool
}

// TCP makes a Stream of a bare TCP connection.
func TCP(c *net.TCPConn) Stream {
	raw, err := c.SyscallConn()
	if err != nil {
		raw = nil
	}
	return &tcpStream{TCPConn: c, raw: raw}
}

// Reset implements Stream: RST on the wire.
func (s *tcpStream) Reset() {
	if s.reset.CompareAndSwap(false, true) {
		s.SetLinger(0)
		s.TCPConn.Close()
	}
}

// ReadPooled reads without holding a buffer while there is nothing to read.
func (s *tcpStream) ReadPooled(take func() []byte, give func()) (int, error) {
	if s.raw == nil {
		return s.Read(take())
	}
	n, rerr := 0, error(nil)
	err := s.raw.Read(func(fd uintptr) bool {
		b := take()
		for {
			n, rerr = syscall.Read(int(fd), b)
			if rerr != syscall.EINTR {
				break
			}
		}
		if rerr == syscall.EAGAIN {
			give()
			return false
		}
		return true
	})
	switch {
	case err != nil:
		return 0, err
	case rerr != nil:
		return 0, &net.OpError{Op: "read", Net: "tcp", Source: s.LocalAddr(), Addr: s.RemoteAddr(), Err: rerr}
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// spliceTo lets the kernel move the bytes. An error of either side counts as one of reading: both are reset anyway.
func (s *tcpStream) spliceTo(d *tcpStream, n *atomic.Int64) (rerr, werr error) {
	m, err := io.Copy(d.TCPConn, s.TCPConn)
	n.Add(m)
	return err, nil
}

// EndConn remembers whether the connection beneath TLS has ended. crypto/tls reports an end without close_notify at a
// record border as a clean io.EOF; a Stream of a *tls.Conn over an EndConn reports it as io.ErrUnexpectedEOF.
type EndConn struct {
	net.Conn
	ended atomic.Bool
}

// WatchEnd wraps c, to be put beneath tls.Client or tls.Server.
func WatchEnd(c net.Conn) *EndConn { return &EndConn{Conn: c} }

// Read implements net.Conn.
func (c *EndConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.ended.Store(true)
	}
	return n, err
}

// NetConn returns the connection beneath.
func (c *EndConn) NetConn() net.Conn { return c.Conn }

// CloseWrite half-closes the connection beneath.
func (c *EndConn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

// tlsStream is a TLS connection: close_notify is its half-close.
type tlsStream struct {
	*tls.Conn
	end   *EndConn // nil when nobody watches
	reset atomic.Bool
}

// TLS makes a Stream of a TLS connection over TCP (or over wrappers with NetConn). Put an EndConn beneath it, or a
// truncated stream may look like a finished one.
func TLS(c *tls.Conn) Stream {
	end, _ := c.NetConn().(*EndConn)
	return &tlsStream{Conn: c, end: end}
}

// Read implements Stream.
func (s *tlsStream) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	if err == io.EOF && s.end != nil && s.end.ended.Load() {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// Reset implements Stream.
func (s *tlsStream) Reset() {
	if s.reset.CompareAndSwap(false, true) {
		Abort(s.Conn.NetConn())
	}
}

// connStream is any other connection.
type connStream struct {
	net.Conn
	reset atomic.Bool
}

func (s *connStream) CloseWrite() error {
	if w, ok := s.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

func (s *connStream) Reset() {
	if s.reset.CompareAndSwap(false, true) {
		Abort(s.Conn)
	}
}
