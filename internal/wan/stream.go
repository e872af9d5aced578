// SPDX-License-Identifier: Apache-2.0

package wan

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

// accept relays TCP connections that arrive at the outside of s.
func (w *WAN) accept(ctx context.Context, s *site) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := s.tcp.AcceptTCP()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		from := w.byAddress(c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr())
		if from == nil || from == s {
			_ = c.Close()
			continue
		}
		wg.Go(func() { w.stream(ctx, from, s, c) })
	}
}

func (w *WAN) byAddress(a netip.Addr) *site {
	for _, s := range w.sites {
		if in := s.inside.Load(); in != nil && in.Addr() == a.Unmap() {
			return s
		}
	}
	return nil
}

// stream relays one connection: the handshake costs one delay there, and each chunk its own.
func (w *WAN) stream(ctx context.Context, from, to *site, near *net.TCPConn) {
	defer near.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if !w.pass(ctx, from.Name, to.Name) || !sleepUntil(ctx, time.Now().Add(w.Link(from.Name, to.Name).Delay)) {
		return
	}
	in := to.inside.Load()
	if in == nil {
		_ = near.SetLinger(0)
		return
	}
	local := from.tcp.Addr().(*net.TCPAddr)
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: local.IP}, Timeout: 5 * time.Second}
	c, err := d.DialContext(ctx, "tcp", in.String())
	if err != nil {
		_ = near.SetLinger(0)
		return
	}
	far := c.(*net.TCPConn)
	defer far.Close()
	stop := context.AfterFunc(ctx, func() { _ = near.Close(); _ = far.Close() })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { w.pump(ctx, cancel, from.Name, to.Name, near, far) })
	wg.Go(func() { w.pump(ctx, cancel, to.Name, from.Name, far, near) })
	wg.Wait()
}

type chunk struct {
	due  time.Time
	data []byte
	err  error // the stream's end, in order with its bytes
}

// pump moves bytes one way. An end of stream arrives as one, anything else as a reset of both ways.
func (w *WAN) pump(ctx context.Context, cancel context.CancelFunc, from, to string, src, dst *net.TCPConn) {
	q := make(chan chunk, 256)
	var wg sync.WaitGroup
	wg.Go(func() { w.readChunks(ctx, from, to, src, q) })
	defer wg.Wait()
	for c := range q {
		if !sleepUntil(ctx, c.due) || !w.pass(ctx, from, to) {
			cancel()
			continue
		}
		switch {
		case c.err == nil:
			if _, err := dst.Write(c.data); err != nil {
				_ = src.SetLinger(0)
				cancel()
			}
		case errors.Is(c.err, io.EOF):
			_ = dst.CloseWrite()
		default:
			_ = dst.SetLinger(0)
			cancel()
		}
	}
}

func (w *WAN) readChunks(ctx context.Context, from, to string, src *net.TCPConn, q chan<- chunk) {
	defer close(q)
	for {
		buf := make([]byte, 32<<10)
		n, err := src.Read(buf)
		l := w.Link(from, to)
		due := time.Now().Add(l.Delay + w.jitter(l))
		if n > 0 && !push(ctx, q, chunk{due: due, data: buf[:n]}) {
			return
		}
		if err != nil {
			push(ctx, q, chunk{due: due, err: err})
			return
		}
	}
}

func push(ctx context.Context, q chan<- chunk, c chunk) bool {
	select {
	case q <- c:
		return true
	case <-ctx.Done():
		return false
	}
}

// pass waits while the link is dark.
func (w *WAN) pass(ctx context.Context, from, to string) bool {
	for {
		l, changed := w.link(from, to)
		if !l.Dark {
			return ctx.Err() == nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}
