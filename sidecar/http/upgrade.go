// SPDX-License-Identifier: Apache-2.0

package http

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	nethttp "net/http"
	"sync"
)

var errNotSwitched = errors.New("101 without a connection to switch")

// switchedBody is what a 101 response turned its connection into.
type switchedBody struct {
	io.ReadWriteCloser
	conn net.Conn // the same bytes' connection, for half-close and reset
	done func()
}

func (b *switchedBody) Close() error {
	defer b.done()
	return b.ReadWriteCloser.Close()
}

// closeWrite ends the direction towards the other side and leaves the other open, at whatever depth that is possible.
func closeWrite(c net.Conn) error {
	for range 8 {
		if h, ok := c.(interface{ CloseWrite() error }); ok {
			return h.CloseWrite()
		}
		n, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		c = n.NetConn()
	}
	return c.Close()
}

// tunnel hands the client's connection over to what the callee switched to, and relays until both directions have
// ended. An end is passed on as a half-close, an error as a reset of both. It returns the bytes carried each way.
func (x *exchange) tunnel(ctx context.Context, resp *nethttp.Response) (sent, received int64, err error) {
	far, ok := resp.Body.(*switchedBody)
	if !ok {
		return 0, 0, errNotSwitched
	}
	defer far.Close()
	near, buffered, err := x.rc.Hijack()
	if err != nil {
		return 0, 0, fmt.Errorf("hijack: %w", err)
	}
	x.hijacked = true
	defer near.Close()
	stop := context.AfterFunc(ctx, func() {
		reset(near)
		reset(far.conn)
	})
	defer stop()
	if err := writeSwitch(near, resp); err != nil {
		reset(far.conn)
		return 0, 0, err
	}
	var wait sync.WaitGroup
	var up, down error
	wait.Add(1)
	go func() { // waited for below
		defer wait.Done()
		sent, up = pipe(far, far.conn, io.MultiReader(io.LimitReader(buffered.Reader, int64(buffered.Reader.Buffered())), near), near)
	}()
	received, down = pipe(near, near, far, far.conn)
	wait.Wait()
	return sent, received, errors.Join(up, down)
}

// pipe copies one direction. After an error both connections are reset: neither side may take it for an end.
func pipe(dst io.Writer, dstConn net.Conn, src io.Reader, srcConn net.Conn) (int64, error) {
	n, err := io.Copy(struct{ io.Writer }{dst}, src)
	if err == nil {
		err = closeWrite(dstConn)
	}
	if err != nil {
		reset(dstConn)
		reset(srcConn)
	}
	return n, err
}

// writeSwitch writes the head of the 101 response.
func writeSwitch(c net.Conn, resp *nethttp.Response) error {
	w := bufio.NewWriter(c)
	h := endToEnd(resp.Header)
	stripIdentity(h)
	h.Set("Connection", "Upgrade")
	h.Set("Upgrade", resp.Header.Get("Upgrade"))
	fmt.Fprintf(w, "HTTP/1.1 101 %s\r\n", nethttp.StatusText(nethttp.StatusSwitchingProtocols))
	if err := h.Write(w); err != nil {
		return fmt.Errorf("write 101: %w", err)
	}
	_, _ = w.WriteString("\r\n") // the error stays with the writer
	if err := w.Flush(); err != nil {
		return fmt.Errorf("write 101: %w", err)
	}
	return nil
}
