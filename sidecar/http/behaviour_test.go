// SPDX-License-Identifier: Apache-2.0

package http_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	nethttp "net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const base = "http://checkout.shop"

// clients are the two kinds of application in front of the sidecar.
var clients = []struct {
	name  string
	major int
	make  func(*rig) *nethttp.Client
}{
	{"http1", 1, (*rig).client},
	{"h2c", 2, (*rig).clientH2},
}

// apps are the two kinds of application behind the sidecar.
var apps = []struct {
	name  string
	start func(*testing.T, nethttp.HandlerFunc) string
	proto int
}{
	{"http1", backend, 0},
	{"h2c", backendH2C, 1},
}

// payload is what large bodies carry, and sum is its checksum.
var payload, sum = func() ([]byte, string) {
	p := make([]byte, 10<<20)
	rand.NewChaCha8([32]byte{7}).Read(p)
	return p, fmt.Sprintf("%x", sha256.Sum256(p))
}()

// exchanges: each row is what a backend does with a request and what the client must see.
var exchanges = []struct {
	name    string
	backend nethttp.HandlerFunc
	request func() *nethttp.Request
	check   func(*testing.T, *nethttp.Response, []byte)
}{{
	name: "get with query and headers",
	backend: func(w nethttp.ResponseWriter, r *nethttp.Request) {
		w.Header().Set("X-App", "yes")
		w.Header().Add("Set-Cookie", "a=1")
		w.Header().Add("Set-Cookie", "b=2")
		fmt.Fprintf(w, "%s %s %s %s", r.Method, r.Host, r.RequestURI, strings.Join(r.Header["X-Multi"], "|"))
	},
	request: func() *nethttp.Request {
		r := newRequest("GET", "/a%20b/c?x=1&y=%2F;z", nil)
		r.Header["X-Multi"] = []string{"1", "2"}
		return r
	},
	check: func(t *testing.T, resp *nethttp.Response, body []byte) {
		if got, want := string(body), "GET checkout.shop /a%20b/c?x=1&y=%2F;z 1|2"; got != want {
			t.Errorf("backend saw %q, want %q", got, want)
		}
		if resp.Header.Get("X-App") != "yes" || len(resp.Header["Set-Cookie"]) != 2 {
			t.Errorf("response headers: %v", resp.Header)
		}
	},
}, {
	name: "no content type is not guessed",
	backend: func(w nethttp.ResponseWriter, r *nethttp.Request) {
		w.Header()["Content-Type"] = nil
		io.WriteString(w, "<html>")
	},
	request: func() *nethttp.Request { return newRequest("GET", "/", nil) },
	check: func(t *testing.T, resp *nethttp.Response, body []byte) {
		if _, ok := resp.Header["Content-Type"]; ok || string(body) != "<html>" {
			t.Errorf("content type %q, body %q", resp.Header.Get("Content-Type"), body)
		}
	},
}, {
	name: "no user agent is invented",
	backend: func(w nethttp.ResponseWriter, r *nethttp.Request) {
		fmt.Fprintf(w, "%q", r.Header["User-Agent"])
	},
	request: func() *nethttp.Request {
		r := newRequest("GET", "/", nil)
		r.Header["User-Agent"] = []string{""}
		return r
	},
	check: func(t *testing.T, _ *nethttp.Response, body []byte) {
		if string(body) != "[]" {
			t.Errorf("user agent %s", body)
		}
	},
}, {
	name: "10 MiB both ways with declared length",
	backend: func(w nethttp.ResponseWriter, r *nethttp.Request) {
		h := sha256.New()
		n, err := io.Copy(h, r.Body)
		w.Header().Set("X-Sum", fmt.Sprintf("%x %d %v", h.Sum(nil), n, err))
		w.Header().Set("Content-Length", fmt.Sprint(len(payload)))
		w.Write(payload)
	},
	request: func() *nethttp.Request { return newRequest("POST", "/", bytes.NewReader(payload)) },
	check: func(t *testing.T, resp *nethttp.Response, body []byte) {
		if got, want := resp.Header.Get("X-Sum"), fmt.Sprintf("%s %d <nil>", sum, len(payload)); got != want {
			t.Errorf("backend received %s, want %s", got, want)
		}
		if got := fmt.Sprintf("%x", sha256.Sum256(body)); got != sum || resp.ContentLength != int64(len(payload)) {
			t.Errorf("client received %d bytes of %s, declared %d", len(body), got, resp.ContentLength)
		}
	},
}, {
	name: "10 MiB both ways without length",
	backend: func(w nethttp.ResponseWriter, r *nethttp.Request) {
		nethttp.NewResponseController(w).EnableFullDuplex()
		io.Copy(w, r.Body)
	},
	request: func() *nethttp.Request { return newRequest("PUT", "/", io.MultiReader(bytes.NewReader(payload))) },
	check: func(t *testing.T, _ *nethttp.Response, body []byte) {
		if got := fmt.Sprintf("%x", sha256.Sum256(body)); got != sum {
			t.Errorf("echoed %d bytes, sum %s", len(body), got)
		}
	},
}, {
	name: "trailers both ways",
	backend: func(w nethttp.ResponseWriter, r *nethttp.Request) {
		w.Header().Set("Trailer", "X-Declared")
		io.Copy(io.Discard, r.Body)
		fmt.Fprintf(w, "got %s", r.Trailer.Get("X-Up"))
		w.Header().Set("X-Declared", "one")
		w.Header().Set(nethttp.TrailerPrefix+"X-Undeclared", "two")
	},
	request: func() *nethttp.Request {
		r := newRequest("POST", "/", io.MultiReader(strings.NewReader("body")))
		r.Trailer = nethttp.Header{"X-Up": {"sent"}}
		return r
	},
	check: func(t *testing.T, resp *nethttp.Response, body []byte) {
		if string(body) != "got sent" || resp.Trailer.Get("X-Declared") != "one" || resp.Trailer.Get("X-Undeclared") != "two" {
			t.Errorf("body %q, trailers %v", body, resp.Trailer)
		}
	},
}, {
	name:    "head",
	backend: func(w nethttp.ResponseWriter, r *nethttp.Request) { w.Header().Set("Content-Length", "1234") },
	request: func() *nethttp.Request { return newRequest("HEAD", "/", nil) },
	check: func(t *testing.T, resp *nethttp.Response, body []byte) {
		if resp.StatusCode != 200 || resp.ContentLength != 1234 || len(body) != 0 {
			t.Errorf("status %d, length %d, body %d", resp.StatusCode, resp.ContentLength, len(body))
		}
	},
}, {
	name:    "204",
	backend: func(w nethttp.ResponseWriter, r *nethttp.Request) { w.WriteHeader(204) },
	request: func() *nethttp.Request { return newRequest("DELETE", "/", nil) },
	check:   status(204, ""),
}, {
	name: "304",
	backend: func(w nethttp.ResponseWriter, r *nethttp.Request) {
		w.Header().Set("Etag", `"x"`)
		w.WriteHeader(304)
	},
	request: func() *nethttp.Request { return newRequest("GET", "/", nil) },
	check:   status(304, ""),
}, {
	name: "redirects are the client's business",
	backend: func(w nethttp.ResponseWriter, r *nethttp.Request) {
		nethttp.Redirect(w, r, "/else", nethttp.StatusFound)
	},
	request: func() *nethttp.Request { return newRequest("POST", "/", strings.NewReader("x")) },
	check:   func(t *testing.T, resp *nethttp.Response, _ []byte) { status(302, "-")(t, resp, nil) },
}, {
	name:    "an application's own 500 and body",
	backend: func(w nethttp.ResponseWriter, r *nethttp.Request) { nethttp.Error(w, "mine", 500) },
	request: func() *nethttp.Request { return newRequest("GET", "/", nil) },
	check:   status(500, "mine\n"),
}, {
	name: "empty chunked post",
	backend: func(w nethttp.ResponseWriter, r *nethttp.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n, err)
	},
	request: func() *nethttp.Request { return newRequest("POST", "/", io.MultiReader(strings.NewReader(""))) },
	check:   status(200, "0 <nil>"),
}, {
	name: "early hints",
	backend: func(w nethttp.ResponseWriter, r *nethttp.Request) {
		w.Header().Set("Link", "</style.css>")
		w.WriteHeader(103)
		w.Header().Del("Link")
		io.WriteString(w, "after")
	},
	request: func() *nethttp.Request {
		r := newRequest("GET", "/", nil)
		got := &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			r.Header["Seen"] = append(r.Header["Seen"], fmt.Sprint(code, h.Get("Link")))
			return nil
		}}
		*r = *r.WithContext(httptrace.WithClientTrace(r.Context(), got))
		return r
	},
	check: func(t *testing.T, resp *nethttp.Response, body []byte) {
		if seen := resp.Request.Header["Seen"]; len(seen) != 1 || seen[0] != "103</style.css>" || string(body) != "after" || resp.Header.Get("Link") != "" {
			t.Errorf("informational %q, body %q, link %q", seen, body, resp.Header.Get("Link"))
		}
	},
}, {
	name: "early answer to a large body",
	backend: func(w nethttp.ResponseWriter, r *nethttp.Request) {
		w.Header().Set("Connection", "close")
		w.WriteHeader(413)
		io.WriteString(w, "too large")
	},
	request: func() *nethttp.Request { return newRequest("POST", "/", bytes.NewReader(payload)) },
	check:   status(413, "too large"),
}}

// TestExchanges runs the rows for every pairing of protocols in front and behind.
func TestExchanges(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		for _, c := range clients {
			for _, app := range apps {
				t.Run(c.name+"-"+app.name, func(t *testing.T) {
					for _, row := range exchanges {
						t.Run(row.name, func(t *testing.T) {
							if row.name == "early answer to a large body" && c.major == 1 {
								t.Log("over HTTP/1.1 the client may also see its connection closed while it writes")
							}
							r := newRig(t, e, rigOptions{backends: []string{app.start(t, row.backend)}, protocol: appProtocol(app.proto)})
							resp, err := c.make(r).Do(row.request())
							if err != nil {
								t.Fatal(err)
							}
							defer resp.Body.Close()
							body, err := io.ReadAll(resp.Body)
							if err != nil {
								t.Fatalf("read body after %d bytes: %v", len(body), err)
							}
							if resp.ProtoMajor != c.major {
								t.Errorf("protocol HTTP/%d, want HTTP/%d", resp.ProtoMajor, c.major)
							}
							row.check(t, resp, body)
						})
					}
				})
			}
		}
	})
}

func newRequest(method, target string, body io.Reader) *nethttp.Request {
	r, err := nethttp.NewRequest(method, base+target, body)
	if err != nil {
		panic(err)
	}
	return r
}

// status checks status and body; the body "-" is any.
func status(code int, want string) func(*testing.T, *nethttp.Response, []byte) {
	return func(t *testing.T, resp *nethttp.Response, body []byte) {
		t.Helper()
		if resp.StatusCode != code || want != "-" && string(body) != want {
			t.Errorf("status %d, body %q, want %d, %q", resp.StatusCode, body, code, want)
		}
	}
}

// TestStreaming: a byte written by one side arrives at the other before anything more is written by either.
func TestStreaming(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		for _, c := range clients {
			for _, app := range apps {
				t.Run(c.name+"-"+app.name, func(t *testing.T) {
					echo := func(w nethttp.ResponseWriter, r *nethttp.Request) {
						rc := nethttp.NewResponseController(w)
						rc.EnableFullDuplex()
						w.WriteHeader(200)
						rc.Flush()
						buf := make([]byte, 1)
						for {
							if _, err := io.ReadFull(r.Body, buf); err != nil {
								return
							}
							w.Write(buf)
							rc.Flush()
						}
					}
					r := newRig(t, e, rigOptions{backends: []string{app.start(t, echo)}, protocol: appProtocol(app.proto)})
					pr, pw := io.Pipe()
					resp, err := c.make(r).Do(newRequest("POST", "/", pr))
					if err != nil {
						t.Fatal(err)
					}
					defer resp.Body.Close()
					for i := range 20 {
						pw.Write([]byte{byte(i)})
						var got [1]byte
						if _, err := io.ReadFull(resp.Body, got[:]); err != nil || got[0] != byte(i) {
							t.Fatalf("byte %d came back as %d, %v", i, got[0], err)
						}
					}
					pw.Close()
					if n, err := resp.Body.Read(make([]byte, 1)); n != 0 || err != io.EOF {
						t.Errorf("after the end: %d, %v", n, err)
					}
				})
			}
		}
	})
}

// TestKeepAlive: an HTTP/1.1 connection of the application carries many requests, also pipelined, and the connection to
// the backend is used again.
func TestKeepAlive(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		var mu sync.Mutex
		remotes := map[string]bool{}
		r := newRig(t, e, rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
			mu.Lock()
			defer mu.Unlock()
			remotes[r.RemoteAddr] = true
			body, _ := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%s %s", r.URL.Path, body)
		})}})
		c := r.dial()
		in := bufio.NewReader(c)
		for i := range 5 {
			fmt.Fprintf(c, "POST /%d HTTP/1.1\r\nHost: checkout.shop\r\nContent-Length: 2\r\n\r\nab", i)
			expectBody(t, in, fmt.Sprintf("/%d ab", i))
		}
		var pipelined strings.Builder
		for i := range 10 {
			fmt.Fprintf(&pipelined, "GET /p%d HTTP/1.1\r\nHost: checkout.shop\r\n\r\n", i)
		}
		io.WriteString(c, pipelined.String())
		for i := range 10 {
			expectBody(t, in, fmt.Sprintf("/p%d ", i))
		}
		mu.Lock()
		defer mu.Unlock()
		if len(remotes) != 1 {
			t.Errorf("%d connections to the backend, want 1", len(remotes))
		}
	})
}

func expectBody(t *testing.T, in *bufio.Reader, want string) {
	t.Helper()
	resp, err := nethttp.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != want {
		t.Fatalf("body %q, %v, want %q", body, err, want)
	}
}

// TestHTTP10: a client of HTTP/1.0 gets an answer that it can read to its end.
func TestHTTP10(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		r := newRig(t, e, rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
			io.WriteString(w, "one ")
			w.(nethttp.Flusher).Flush()
			io.WriteString(w, "two")
		})}})
		c := r.dial()
		io.WriteString(c, "GET / HTTP/1.0\r\nHost: checkout.shop\r\n\r\n")
		all, err := io.ReadAll(c)
		if err != nil || !bytes.HasPrefix(all, []byte("HTTP/1.0 200")) || !bytes.HasSuffix(all, []byte("\r\n\r\none two")) {
			t.Errorf("got %q, %v", all, err)
		}
	})
}

// TestContinue: 100 Continue is the backend's to give, through both sidecars; a refusal comes without the body.
func TestContinue(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		for _, app := range apps {
			t.Run(app.name, func(t *testing.T) {
				r := newRig(t, e, rigOptions{protocol: appProtocol(app.proto), backends: []string{app.start(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
					if r.URL.Path == "/refuse" {
						w.WriteHeader(417)
						return
					}
					body, _ := io.ReadAll(r.Body)
					w.Write(body)
				})}})
				c := r.dial()
				in := bufio.NewReader(c)
				io.WriteString(c, "POST /take HTTP/1.1\r\nHost: checkout.shop\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
				if line, err := in.ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 100") {
					t.Fatalf("got %q, %v, want 100", line, err)
				}
				in.ReadString('\n')
				io.WriteString(c, "body")
				expectBody(t, in, "body")
				io.WriteString(c, "POST /refuse HTTP/1.1\r\nHost: checkout.shop\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
				line, err := in.ReadString('\n')
				if err != nil || !strings.HasPrefix(line, "HTTP/1.1 417") {
					t.Errorf("got %q, %v, want 417 without 100", line, err)
				}
			})
		}
	})
}

// TestSlowReader: a client that reads slowly gets everything, and the sidecars do not take in what it does not read.
func TestSlowReader(t *testing.T) {
	const size = 64 << 20
	each(t, func(t *testing.T, e engine) {
		for _, c := range clients {
			t.Run(c.name, func(t *testing.T) {
				var written atomic.Int64
				r := newRig(t, e, rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
					chunk := make([]byte, 64<<10)
					for range size / len(chunk) {
						n, err := w.Write(chunk)
						if written.Add(int64(n)); err != nil {
							return
						}
					}
				})}})
				resp, err := c.make(r).Do(newRequest("GET", "/", nil))
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				// Wait until the backend is stuck, then look at how much is on the way.
				last := int64(-1)
				for stuck := 0; stuck < 20; {
					now := written.Load()
					if now == last && now > 0 {
						stuck++
					} else {
						stuck = 0
					}
					last = now
					<-time.After(10 * time.Millisecond)
				}
				if last > 40<<20 {
					t.Errorf("%d MiB taken in for a client that reads nothing", last>>20)
				}
				n, err := io.Copy(io.Discard, resp.Body)
				if err != nil || n != size {
					t.Errorf("read %d, %v", n, err)
				}
			})
		}
	})
}

// TestClientAbort: a client that goes away ends the backend's request, and the attempt is not blamed on the callee.
func TestClientAbort(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		for _, c := range clients {
			for _, app := range apps {
				t.Run(c.name+"-"+app.name, func(t *testing.T) {
					began, ended := make(chan struct{}), make(chan struct{})
					r := newRig(t, e, rigOptions{protocol: appProtocol(app.proto), backends: []string{app.start(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
						close(began)
						<-r.Context().Done()
						close(ended)
					})}})
					ctx, cancel := context.WithCancel(context.Background())
					go func() {
						<-began
						cancel()
					}()
					if _, err := c.make(r).Do(newRequest("GET", "/", nil).WithContext(ctx)); !errors.Is(err, context.Canceled) {
						t.Fatalf("got %v", err)
					}
					wait(t, ended, "the backend's request did not end")
					if o := r.picker.await(t, 1)[0]; o.Result.String() != "cancelled" {
						t.Errorf("outcome %+v, want cancelled", o)
					}
				})
			}
		}
	})
}

func wait(t *testing.T, c <-chan struct{}, otherwise string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatal(otherwise)
	}
}

// TestBackendAbort: a response that the backend breaks off is never ended cleanly towards the client.
func TestBackendAbort(t *testing.T) {
	chunked := "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
	rows := map[string]string{
		"in a chunk":       chunked + "5\r\nwo",
		"between chunks":   chunked,
		"before trailers":  chunked + "0\r\n",
		"of known length":  "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
		"an invalid chunk": chunked + "zz\r\n",
	}
	each(t, func(t *testing.T, e engine) {
		for name, answer := range rows {
			for _, c := range clients {
				t.Run(name+"-"+c.name, func(t *testing.T) {
					r := newRig(t, e, rigOptions{backends: []string{rawBackend(t, answer)}})
					resp, err := c.make(r).Do(newRequest("GET", "/", nil))
					if err != nil {
						t.Fatal(err)
					}
					defer resp.Body.Close()
					body, err := io.ReadAll(resp.Body)
					if err == nil {
						t.Errorf("read %q and a clean end", body)
					}
					if o := r.picker.await(t, 1)[0]; o.Result.String() != "broken" || o.Status != 200 {
						t.Errorf("outcome %+v, want broken after 200", o)
					}
				})
			}
			t.Run(name+"-http10", func(t *testing.T) {
				r := newRig(t, e, rigOptions{backends: []string{rawBackend(t, answer)}})
				c := r.dial()
				io.WriteString(c, "GET / HTTP/1.0\r\nHost: checkout.shop\r\n\r\n")
				if all, err := io.ReadAll(c); err == nil && !bytes.Contains(all, []byte("Content-Length: 10")) {
					t.Errorf("read %q and a clean end", all)
				}
			})
		}
	})
}

// rawBackend reads one request's head on each connection, writes the bytes given, and closes.
func rawBackend(t *testing.T, answer string) string {
	return listenTracked(t, func(c net.Conn) {
		if _, err := nethttp.ReadRequest(bufio.NewReader(c)); err == nil {
			io.WriteString(c, answer)
		}
	})
}

// TestMultiplexing: many requests at once on one HTTP/2 connection; a slow one holds up none of the others.
func TestMultiplexing(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		release := make(chan struct{})
		r := newRig(t, e, rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
			if r.URL.Path == "/slow" {
				w.WriteHeader(200)
				w.(nethttp.Flusher).Flush()
				<-release
			}
			io.WriteString(w, r.URL.Path)
		})}})
		c := r.clientH2()
		slow, err := c.Do(newRequest("GET", "/slow", nil))
		if err != nil {
			t.Fatal(err)
		}
		defer slow.Body.Close()
		var all sync.WaitGroup
		for i := range 100 {
			all.Go(func() {
				resp, err := c.Do(newRequest("GET", fmt.Sprintf("/%d", i), nil))
				if err != nil {
					t.Error(err)
					return
				}
				defer resp.Body.Close()
				if body, err := io.ReadAll(resp.Body); err != nil || string(body) != fmt.Sprintf("/%d", i) {
					t.Errorf("request %d: %q, %v", i, body, err)
				}
			})
		}
		all.Wait()
		close(release)
		if body, err := io.ReadAll(slow.Body); err != nil || string(body) != "/slow" {
			t.Errorf("slow: %q, %v", body, err)
		}
	})
}
