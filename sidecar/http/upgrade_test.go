// SPDX-License-Identifier: Apache-2.0

package http_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	nethttp "net/http"
	"strings"
	"testing"
)

// switching is a backend that accepts an upgrade and then runs script with the raw connection.
func switching(t *testing.T, script func(net.Conn, *bufio.Reader)) string {
	return listenTracked(t, func(c net.Conn) {
		in := bufio.NewReader(c)
		r, err := nethttp.ReadRequest(in)
		if err != nil {
			return
		}
		if !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") || !strings.EqualFold(r.Header.Get("Connection"), "upgrade") || r.Header.Get("Sec-Websocket-Key") != "k" {
			io.WriteString(c, "HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n")
			return
		}
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: v\r\n\r\nhello")
		script(c, in)
	})
}

func (r *rig) upgrade(early string) (net.Conn, *bufio.Reader) {
	r.t.Helper()
	c := r.dial()
	io.WriteString(c, "GET /ws HTTP/1.1\r\nHost: checkout.shop\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n"+early)
	in := bufio.NewReader(c)
	resp, err := nethttp.ReadResponse(in, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	if resp.StatusCode != 101 || resp.Header.Get("Sec-Websocket-Accept") != "v" || resp.Header.Get("Upgrade") != "websocket" {
		r.t.Fatalf("got %d %v", resp.StatusCode, resp.Header)
	}
	return c, in
}

// TestUpgrade: after 101 the bytes of both sides pass unchanged, those sent early included; an end passes as an end.
func TestUpgrade(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		r := newRig(t, e, rigOptions{backends: []string{switching(t, func(c net.Conn, in *bufio.Reader) {
			io.Copy(c, in)
			io.WriteString(c, "bye")
		})}})
		c, in := r.upgrade("early")
		expect(t, in, "helloearly")
		for i := range 100 {
			frame := fmt.Sprintf("\x81\x85frame %d \x00\xff", i)
			io.WriteString(c, frame)
			expect(t, in, frame)
		}
		c.(*net.TCPConn).CloseWrite()
		if rest, err := io.ReadAll(in); err != nil || string(rest) != "bye" {
			t.Errorf("after half-close: %q, %v", rest, err)
		}
		if o := r.picker.await(t, 1)[0]; o.Status != 101 || o.Err != nil {
			t.Errorf("outcome %+v", o)
		}
	})
}

func expect(t *testing.T, in *bufio.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(in, got); err != nil || string(got) != want {
		t.Fatalf("got %q, %v, want %q", got, err, want)
	}
}

// TestUpgradeBroken: a connection that is reset on one side is reset on the other, never ended.
func TestUpgradeBroken(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		t.Run("by the backend", func(t *testing.T) {
			r := newRig(t, e, rigOptions{backends: []string{switching(t, func(c net.Conn, in *bufio.Reader) {
				in.ReadByte()
				c.(*net.TCPConn).SetLinger(0)
				c.Close()
			})}})
			c, in := r.upgrade("")
			expect(t, in, "hello")
			c.Write([]byte("x"))
			if rest, err := io.ReadAll(in); err == nil {
				t.Errorf("read %q and a clean end", rest)
			}
		})
		t.Run("by the client", func(t *testing.T) {
			result := make(chan error, 1)
			r := newRig(t, e, rigOptions{backends: []string{switching(t, func(c net.Conn, in *bufio.Reader) {
				_, err := io.ReadAll(in)
				result <- err
			})}})
			c, in := r.upgrade("")
			expect(t, in, "hello")
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
			if err := <-result; err == nil {
				t.Error("the backend saw a clean end")
			}
		})
	})
}

// TestUpgradeDeclined: an answer other than 101 is an ordinary answer; h2c is not upgraded to; CONNECT is refused.
func TestUpgradeDeclined(t *testing.T) {
	rows := []struct{ name, request, want string }{
		{"declined", "GET / HTTP/1.1\r\nHost: checkout.shop\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", "HTTP/1.1 200 OK"},
		{"h2c", "GET / HTTP/1.1\r\nHost: checkout.shop\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", "HTTP/1.1 200 OK"},
		{"connect", "CONNECT checkout.shop:80 HTTP/1.1\r\nHost: checkout.shop:80\r\n\r\n", "HTTP/1.1 405 Method Not Allowed"},
	}
	each(t, func(t *testing.T, e engine) {
		for _, row := range rows {
			t.Run(row.name, func(t *testing.T) {
				r := newRig(t, e, rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
					if row.name != "declined" && (r.Header["Upgrade"] != nil || r.Header["Http2-Settings"] != nil) {
						t.Errorf("forwarded %v", r.Header)
					}
					io.WriteString(w, "plain")
				})}})
				c := r.dial()
				io.WriteString(c, row.request)
				if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || strings.TrimSpace(line) != row.want {
					t.Errorf("got %q, %v, want %q", line, err, row.want)
				}
			})
		}
	})
}
