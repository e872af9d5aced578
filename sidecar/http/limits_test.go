// SPDX-License-Identifier: Apache-2.0

package http_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	nethttp "net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/strait-mesh/strait/sidecar/http"
)

// TestLimits (T21): silence and drip-feeding end a connection in time; a head that is too large is refused.
func TestLimits(t *testing.T) {
	limits := http.Limits{HeaderTimeout: 100 * time.Millisecond, Idle: 100 * time.Millisecond, BodyStall: 100 * time.Millisecond, HeaderBytes: 8 << 10}
	rows := []struct {
		name string
		send string
		want string // prefix of what comes back before the end
	}{
		{"nothing", "", ""},
		{"half a preface", "PRI * HTTP/2.0\r\n", ""},
		{"half a head", "GET / HTTP/1.1\r\nHost: che", ""},
		{"half a body", "POST / HTTP/1.1\r\nHost: checkout.shop\r\nContent-Length: 10\r\n\r\nhalf", "HTTP/1.1 408"},
		{"half a chunk", "POST / HTTP/1.1\r\nHost: checkout.shop\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nha", "HTTP/1.1 408"},
		{"idle", "GET / HTTP/1.1\r\nHost: checkout.shop\r\n\r\n", "HTTP/1.1 200"},
		{"large head", "GET / HTTP/1.1\r\nHost: checkout.shop\r\nX: " + strings.Repeat("x", 20<<10) + "\r\n\r\n", "HTTP/1.1 431"},
		{"garbage", "\x16\x03\x01\x02\x00\x01\x00", "HTTP/1.1 400"},
		{"two lengths", "POST / HTTP/1.1\r\nHost: checkout.shop\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "HTTP/1.1 400"},
		{"two hosts", "GET / HTTP/1.1\r\nHost: checkout.shop\r\nHost: other.shop\r\n\r\n", "HTTP/1.1 400"},
	}
	each(t, func(t *testing.T, e engine) {
		for _, row := range rows {
			t.Run(row.name, func(t *testing.T) {
				r := newRig(t, e, rigOptions{limits: limits, backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) { io.Copy(io.Discard, r.Body) })}})
				c := r.dial()
				io.WriteString(c, row.send)
				got, err := io.ReadAll(c)
				if ne, ok := err.(net.Error); ok && ne.Timeout() {
					t.Fatalf("the connection is still open after %q", got)
				}
				if !strings.HasPrefix(string(got), row.want) || row.want == "" && len(got) > 0 {
					t.Errorf("got %.60q, want %q", got, row.want)
				}
			})
		}
	})
}

// TestStreamLimit: an HTTP/2 client that opens more streams than allowed is told so and the others go on.
func TestStreamLimit(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		release := make(chan struct{})
		began := make(chan struct{}, 100)
		r := newRig(t, e, rigOptions{limits: http.Limits{Streams: 10}, backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
			began <- struct{}{}
			<-release
		})}})
		c := r.dial()
		io.WriteString(c, http2.ClientPreface)
		f := http2.NewFramer(c, c)
		f.WriteSettings()
		max := uint32(0)
		for max == 0 {
			frame, err := f.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			if s, ok := frame.(*http2.SettingsFrame); ok && !s.IsAck() {
				max, _ = s.Value(http2.SettingMaxConcurrentStreams)
				f.WriteSettingsAck()
			}
		}
		if max != 10 {
			t.Errorf("advertised %d streams", max)
		}
		close(release)
	})
}

// TestDrain: when its context ends, a connection finishes what is in progress, takes nothing new, and ends.
func TestDrain(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		for _, c := range clients {
			t.Run(c.name, func(t *testing.T) {
				began, release := make(chan struct{}), make(chan struct{})
				r := newRig(t, e, rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
					close(began)
					<-release
					io.WriteString(w, "whole")
				})}})
				result := make(chan error, 1)
				go func() {
					resp, err := c.make(r).Do(newRequest("GET", "/", nil))
					if err == nil {
						var body []byte
						body, err = io.ReadAll(resp.Body)
						resp.Body.Close()
						if err == nil && string(body) != "whole" {
							err = fmt.Errorf("body %q", body)
						}
						if err == nil && c.major == 1 && !resp.Close {
							err = fmt.Errorf("no Connection: close in %v", resp.Header)
						}
					}
					result <- err
				}()
				wait(t, began, "the request did not arrive")
				r.cancel()
				close(release)
				if err := <-result; err != nil {
					t.Error(err)
				}
			})
		}
		t.Run("idle connections end at once", func(t *testing.T) {
			r := newRig(t, e, rigOptions{backends: []string{backend(t, func(nethttp.ResponseWriter, *nethttp.Request) {})}})
			fresh, used := r.dial(), r.dial()
			io.WriteString(used, "GET / HTTP/1.1\r\nHost: checkout.shop\r\n\r\n")
			in := bufio.NewReader(used)
			expectBody(t, in, "")
			r.cancel()
			for _, c := range []net.Conn{fresh, used} {
				if _, err := io.ReadAll(c); err != nil {
					t.Errorf("got %v, want an end", err)
				}
			}
		})
		t.Run("the grace period ends what does not end", func(t *testing.T) {
			began := make(chan struct{})
			r := newRig(t, e, rigOptions{limits: http.Limits{Grace: 50 * time.Millisecond}, backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
				w.WriteHeader(200)
				w.(nethttp.Flusher).Flush()
				close(began)
				<-r.Context().Done()
			})}})
			resp, err := r.client().Do(newRequest("GET", "/", nil))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			wait(t, began, "the request did not arrive")
			r.cancel()
			if body, err := io.ReadAll(resp.Body); err == nil {
				t.Errorf("read %q and a clean end", body)
			}
		})
	})
}

// TestClientConn: readiness, retirement and closing of the connection between sidecars.
func TestClientConn(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		for _, alpn := range []string{"h2", "http/1.1"} {
			t.Run(alpn, func(t *testing.T) {
				began, release := make(chan struct{}, 1), make(chan struct{})
				at := (&rig{t: t, engine: e}).callee(rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
					began <- struct{}{}
					<-release
				})}}, nil)
				open := func() clientConn {
					raw, err := at.dial(context.Background(), alpn)
					if err != nil {
						t.Fatal(err)
					}
					c, err := e.client(raw, http.ConnConfig{})
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { c.Close() })
					return c
				}
				c := open()
				if !c.Ready() || c.Active() != 0 {
					t.Errorf("fresh: ready %v, active %d", c.Ready(), c.Active())
				}
				result := make(chan error, 1)
				go func() {
					resp, err := c.RoundTrip(newRequest("GET", "/", nil))
					if err == nil {
						io.ReadAll(resp.Body)
						resp.Body.Close()
					}
					result <- err
				}()
				<-began
				if c.Active() != 1 || c.Ready() != (alpn == "h2") {
					t.Errorf("busy: ready %v, active %d", c.Ready(), c.Active())
				}
				c.Retire()
				if _, err := c.RoundTrip(newRequest("GET", "/", nil)); err == nil || c.Ready() {
					t.Errorf("retired: ready %v, %v", c.Ready(), err)
				}
				close(release)
				if err := <-result; err != nil {
					t.Errorf("the request in progress: %v", err)
				}
				wait(t, c.Closed(), "a retired connection did not close after its last request")

				c = open()
				c.Close()
				wait(t, c.Closed(), "not closed")
				if _, err := c.RoundTrip(newRequest("GET", "/", nil)); err == nil || c.Ready() {
					t.Errorf("closed: ready %v, %v", c.Ready(), err)
				}
			})
		}
		t.Run("a silent peer", func(t *testing.T) {
			near, far := net.Pipe()
			defer far.Close()
			go io.Copy(io.Discard, far) // until far is closed
			c, err := e.client(near, http.ConnConfig{PingEvery: 20 * time.Millisecond, PingTimeout: 20 * time.Millisecond})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			wait(t, c.Closed(), "a peer that answers no ping counts as alive")
		})
	})
}

// TestWithoutTLS: the pair also works over a plain connection, where the first bytes decide the protocol.
func TestWithoutTLS(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		r := &rig{t: t, engine: e}
		at := r.callee(rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) { io.WriteString(w, r.Proto) })}}, nil)
		c, err := at.dial(t.Context(), "acme/1")
		if err == nil {
			c.Close()
			t.Error("an unknown protocol was negotiated")
		}
		c, err = (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}).DialContext(t.Context(), "tcp", r.inboundAddress)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: checkout.shop\r\n\r\n")
		expectBody(t, bufio.NewReader(c), "HTTP/1.1")
	})
}

// TestUnreadBody: what the application did not read of a body is never taken for the next request.
func TestUnreadBody(t *testing.T) {
	const inner = "GET /smuggled HTTP/1.1\r\nHost: checkout.shop\r\n\r\n"
	rows := map[string]string{
		"declared": fmt.Sprintf("POST /early HTTP/1.1\r\nHost: checkout.shop\r\nContent-Length: %d\r\n\r\n", len(inner)+4),
		"chunked":  "POST /early HTTP/1.1\r\nHost: checkout.shop\r\nTransfer-Encoding: chunked\r\n\r\n",
		"refused":  fmt.Sprintf("POST /early HTTP/1.1\r\nHost: nowhere.shop\r\nContent-Length: %d\r\n\r\n", len(inner)+4),
	}
	each(t, func(t *testing.T, e engine) {
		for name, head := range rows {
			t.Run(name, func(t *testing.T) {
				r := newRig(t, e, rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
					if r.URL.Path != "/early" {
						t.Errorf("the backend saw %s", r.URL.Path)
					}
					nethttp.NewResponseController(w).EnableFullDuplex()
					w.Header().Set("Connection", "close")
					w.WriteHeader(403)
				})}})
				c := r.dial()
				in := bufio.NewReader(c)
				io.WriteString(c, head+"abc")
				resp, err := nethttp.ReadResponse(in, nil)
				if err != nil {
					t.Fatal(err)
				}
				io.Copy(io.Discard, resp.Body)
				io.WriteString(c, "d"+inner+inner)
				if rest, err := io.ReadAll(in); len(rest) > 0 && !strings.HasPrefix(string(rest), "HTTP/1.1 400") {
					t.Errorf("after the answer came %q, %v", rest, err)
				}
			})
		}
	})
}
