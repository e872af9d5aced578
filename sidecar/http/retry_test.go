// SPDX-License-Identifier: Apache-2.0

package http_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	nethttp "net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/sidecar/http"
)

// h2Server is a scripted callee's sidecar: it speaks frames, so that each way of failing can be made exactly.
type h2Server struct {
	*http2.Framer
	conn net.Conn
}

// scripted starts callees whose every connection runs script once the settings have been exchanged.
func scripted(t *testing.T, cluster federation.ClusterName, instance string, script func(*h2Server)) *place {
	address := listenTracked(t, func(c net.Conn) {
		secured := tls.Server(c, serverTLS())
		defer secured.Close()
		preface := make([]byte, len(http2.ClientPreface))
		if _, err := io.ReadFull(secured, preface); err != nil {
			return
		}
		s := &h2Server{http2.NewFramer(secured, secured), c}
		s.WriteSettings()
		script(s)
	})
	return &place{cluster: cluster, instance: instance, dial: dialTLS(address)}
}

// head waits for the head of the next request, answering settings and pings.
func (s *h2Server) head() (stream uint32, ok bool) {
	for {
		f, err := s.ReadFrame()
		if err != nil {
			return 0, false
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				s.WriteSettingsAck()
			}
		case *http2.PingFrame:
			s.WritePing(true, f.Data)
		case *http2.HeadersFrame:
			return f.StreamID, true
		}
	}
}

// data waits until n bytes of body have come.
func (s *h2Server) data(n int) {
	for n > 0 {
		f, err := s.ReadFrame()
		if err != nil {
			return
		}
		if d, ok := f.(*http2.DataFrame); ok && len(d.Data()) > 0 {
			n -= len(d.Data())
			s.WriteWindowUpdate(0, uint32(len(d.Data())))
			s.WriteWindowUpdate(d.StreamID, uint32(len(d.Data())))
		}
	}
}

// drained reads until the other side closes.
func (s *h2Server) drained() {
	for {
		if _, ok := s.head(); !ok {
			return
		}
	}
}

// good is a callee that counts what reaches its application.
func good(t *testing.T, e engine, cluster federation.ClusterName, instance string, hits *atomic.Int64) *place {
	r := &rig{t: t, engine: e}
	at := r.callee(rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
		hits.Add(1)
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "good %s", body)
	})}}, nil)
	at.cluster, at.instance = cluster, instance
	return at
}

// refuse is a callee without an instance: it answers with x-strait-refused.
func refuse(t *testing.T, e engine) *place { return (&rig{t: t, engine: e}).callee(rigOptions{}, nil) }

// respond is a callee whose application writes these bytes and closes.
func respond(answer string) func(*testing.T, engine) *place {
	return func(t *testing.T, e engine) *place {
		return (&rig{t: t, engine: e}).callee(rigOptions{backends: []string{rawBackend(t, answer)}}, nil)
	}
}

// frames is a callee's sidecar that does this.
func frames(script func(*h2Server)) func(*testing.T, engine) *place {
	return func(t *testing.T, _ engine) *place { return scripted(t, "us-east", "l1", script) }
}

// retries is the retry table of DESIGN.md: how the first way fails, and what becomes of a request that may be sent twice
// and of one that may not.
var retries = []struct {
	name    string
	reason  string // why the answer is what it is
	first   func(*testing.T, engine) *place
	safe    bool // any request is sent again
	never   bool // no request is
	status  int  // of a request that is not sent again
	outcome http.Result
}{{
	name: "dial error", reason: "nothing was sent", safe: true, outcome: http.Unsent,
	first: func(*testing.T, engine) *place {
		return &place{dial: func(context.Context, string) (net.Conn, error) { return nil, errors.New("no route") }}
	},
}, {
	name: "closed after the handshake", reason: "no head was ever looked at, but one may have been sent", status: 502, outcome: http.Broken,
	first: frames(func(s *h2Server) { s.head() }),
}, {
	name: "typed refusal of the callee's sidecar", reason: "it says so", safe: true, outcome: http.Refused, first: refuse,
}, {
	name: "REFUSED_STREAM", reason: "RFC 9113 §8.7", safe: true, outcome: http.Unsent,
	first: frames(func(s *h2Server) {
		if id, ok := s.head(); ok {
			s.WriteRSTStream(id, http2.ErrCodeRefusedStream)
			s.drained()
		}
	}),
}, {
	name: "GOAWAY below the stream", reason: "RFC 9113 §6.8", safe: true, outcome: http.Unsent,
	first: frames(func(s *h2Server) {
		if _, ok := s.head(); ok {
			s.WriteGoAway(0, http2.ErrCodeNo, nil)
			s.drained()
		}
	}),
}, {
	name: "GOAWAY at the stream, then the end", reason: "the stream was taken", status: 502, outcome: http.Broken,
	first: frames(func(s *h2Server) {
		if id, ok := s.head(); ok {
			s.WriteGoAway(id, http2.ErrCodeNo, nil)
		}
	}),
}, {
	name: "RST_STREAM INTERNAL_ERROR", reason: "the application may have it", status: 502, outcome: http.Broken,
	first: frames(func(s *h2Server) {
		if id, ok := s.head(); ok {
			s.WriteRSTStream(id, http2.ErrCodeInternal)
			s.drained()
		}
	}),
}, {
	name: "the application closes without an answer", reason: "it may have acted", status: 502, outcome: http.Answered, first: respond(""),
}, {
	name: "the application answers 503", reason: "an idempotent request may do better elsewhere", status: 503, outcome: http.Answered,
	first: respond("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"),
}, {
	name: "the application answers 500", reason: "its answer is an answer", never: true, status: 500, outcome: http.Answered,
	first: respond("HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"),
}, {
	name: "the application answers 429", reason: "its answer is an answer", never: true, status: 429, outcome: http.Answered,
	first: respond("HTTP/1.1 429 Slow\r\nContent-Length: 0\r\n\r\n"),
}, {
	name: "the application refuses with our header", reason: "its own x-strait-refused is not believed", status: 503, outcome: http.Answered,
	first: respond("HTTP/1.1 503 Busy\r\nX-Strait-Refused: no_healthy_instance\r\nContent-Length: 0\r\n\r\n"),
}}

// TestRetries: the second way is good and counts what reaches its application.
func TestRetries(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		for _, row := range retries {
			for _, method := range []string{"GET", "POST", "PUT", "PATCH"} {
				t.Run(row.name+"/"+method, func(t *testing.T) {
					var hits atomic.Int64
					first := row.first(t, e)
					first.cluster, first.instance = "us-east", "l1"
					r := newRig(t, e, rigOptions{places: []*place{first, good(t, e, "eu-west", "a1", &hits)}})
					var body io.Reader
					if method != "GET" {
						body = strings.NewReader("payload")
					}
					resp, err := r.client().Do(newRequest(method, "/", body))
					if err != nil {
						t.Fatal(err)
					}
					defer resp.Body.Close()
					got, _ := io.ReadAll(resp.Body)
					again := row.safe || !row.never && (method == "GET" || method == "PUT")
					wantHits, wantStatus, wantBody := int64(0), row.status, ""
					if again {
						wantHits, wantStatus, wantBody = 1, 200, "good "
						if body != nil {
							wantBody += "payload"
						}
					}
					if hits.Load() != wantHits || resp.StatusCode != wantStatus || again && string(got) != wantBody {
						t.Errorf("%s: status %d, %d hits, body %q; want %d, %d, %q", row.reason, resp.StatusCode, hits.Load(), got, wantStatus, wantHits, wantBody)
					}
					if h := resp.Header["X-Strait-Refused"]; h != nil {
						t.Errorf("the client sees x-strait-refused: %q", h)
					}
					if o := r.picker.await(t, 1)[0]; o.Result != row.outcome {
						t.Errorf("first outcome %v %v, want %v", o.Result, o.Err, row.outcome)
					}
				})
			}
		}
	})
}

// TestRetryBody: what was kept of a body is sent again from its beginning; what was too large is not; and a safe retry
// of a large body that nobody began to read works.
func TestRetryBody(t *testing.T) {
	rows := []struct {
		name  string
		size  int
		after int // bytes of body that the first way reads before it fails
		code  http2.ErrCode
		want  int
	}{
		{"kept, unread", 64 << 10, 0, http2.ErrCodeRefusedStream, 200},
		{"kept, read", 64 << 10, 64 << 10, http2.ErrCodeRefusedStream, 200},
		{"kept, half read, broken", 60 << 10, 30 << 10, http2.ErrCodeInternal, 200},
		{"too large, read", 256 << 10, 128 << 10, http2.ErrCodeInternal, 502},
		{"too large, read, refused", 256 << 10, 128 << 10, http2.ErrCodeRefusedStream, 503},
	}
	each(t, func(t *testing.T, e engine) {
		for _, row := range rows {
			for _, c := range clients {
				t.Run(row.name+"-"+c.name, func(t *testing.T) {
					var hits atomic.Int64
					first := scripted(t, "us-east", "l1", func(s *h2Server) {
						if id, ok := s.head(); ok {
							s.data(row.after)
							s.WriteRSTStream(id, row.code)
							s.drained()
						}
					})
					r := newRig(t, e, rigOptions{places: []*place{first, good(t, e, "eu-west", "a1", &hits)}})
					body := bytes.Repeat([]byte("0123456789abcdef"), row.size/16)
					resp, err := c.make(r).Do(newRequest("PUT", "/", io.MultiReader(bytes.NewReader(body))))
					if err != nil {
						t.Fatal(err)
					}
					defer resp.Body.Close()
					got, _ := io.ReadAll(resp.Body)
					if resp.StatusCode != row.want || row.want == 200 && !bytes.Equal(got, append([]byte("good "), body...)) {
						t.Errorf("status %d with %d bytes, want %d with %d", resp.StatusCode, len(got), row.want, len(body)+5)
					}
				})
			}
		}
	})
}

// TestRetrySilentClient: a stream that was refused is tried elsewhere even while the client waits for an answer before it
// sends more.
func TestRetrySilentClient(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		for _, c := range clients {
			t.Run(c.name, func(t *testing.T) {
				first := scripted(t, "us-east", "l1", func(s *h2Server) {
					if id, ok := s.head(); ok {
						s.data(5)
						s.WriteRSTStream(id, http2.ErrCodeRefusedStream)
						s.drained()
					}
				})
				second := (&rig{t: t, engine: e}).callee(rigOptions{protocol: http.H2C, backends: []string{backendH2C(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
					got := make([]byte, 5)
					io.ReadFull(r.Body, got)
					w.Write(append(got, " back"...))
					w.(nethttp.Flusher).Flush()
					rest, _ := io.ReadAll(r.Body)
					w.Write(rest)
				})}}, nil)
				r := newRig(t, e, rigOptions{places: []*place{first, second}})
				pr, pw := io.Pipe()
				defer pw.Close()
				go pw.Write([]byte("first")) // unblocked by the read of it, or by Close
				resp, err := c.make(r).Do(newRequest("POST", "/", pr))
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				got := make([]byte, len("first back"))
				if _, err := io.ReadFull(resp.Body, got); err != nil || string(got) != "first back" {
					t.Fatalf("got %q, %v", got, err)
				}
				pw.Write([]byte(" rest"))
				pw.Close()
				if rest, err := io.ReadAll(resp.Body); err != nil || string(rest) != " rest" {
					t.Errorf("got %q, %v", rest, err)
				}
			})
		}
	})
}

// TestRetryOrder: a retry is told which ways failed; when all have, the last failure is the answer.
func TestRetryOrder(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		unreachable := func(cluster federation.ClusterName, instance string) *place {
			return &place{cluster: cluster, instance: instance, dial: func(context.Context, string) (net.Conn, error) { return nil, errors.New("no route") }}
		}
		var hits atomic.Int64
		r := newRig(t, e, rigOptions{places: []*place{unreachable("us-east", "l1"), unreachable("us-east", "l2"), good(t, e, "eu-west", "a1", &hits)}})
		resp, err := r.client().Do(newRequest("POST", "/", strings.NewReader("x")))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 200 || hits.Load() != 1 {
			t.Errorf("status %d, %d hits", resp.StatusCode, hits.Load())
		}
		r = newRig(t, e, rigOptions{places: []*place{unreachable("us-east", "l1"), unreachable("eu-west", "a1")}})
		resp, err = r.client().Do(newRequest("GET", "/", nil))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if status := resp.Header.Get("Proxy-Status"); resp.StatusCode != 503 || !strings.Contains(status, "STR-4102 no_endpoints") {
			t.Errorf("status %d, %q", resp.StatusCode, status)
		}
		attempts := newRig(t, e, rigOptions{attempts: 2, places: []*place{unreachable("us-east", "l1"), unreachable("us-east", "l2"), good(t, e, "eu-west", "a1", &hits)}})
		if resp, err = attempts.client().Do(newRequest("GET", "/", nil)); err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 503 {
			t.Errorf("status %d after two attempts that failed", resp.StatusCode)
		}
	})
}

// TestNeverTwice: under connections that die at every moment, no POST reaches the backend twice, and each that was
// answered with 200 reached it.
func TestNeverTwice(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		var mu sync.Mutex
		seen, answered := map[string]int{}, map[string]bool{}
		backends := listenTracked(t, func(c net.Conn) {
			in := bufio.NewReader(c)
			for {
				r, err := nethttp.ReadRequest(in)
				if err != nil {
					return
				}
				io.Copy(io.Discard, r.Body)
				id := r.Header.Get("X-Id")
				mu.Lock()
				seen[id]++
				mu.Unlock()
				switch id[len(id)-1] {
				case '3':
					return // before the answer
				case '7':
					io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Le")
					return
				}
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
				if id[len(id)-1] == '5' {
					return // between requests, without saying so
				}
			}
		})
		at := (&rig{t: t, engine: e}).callee(rigOptions{backends: []string{backends}}, nil)
		other := &place{cluster: "ap-south", instance: "b1", dial: at.dial}
		r := newRig(t, e, rigOptions{places: []*place{at, other}})
		c := r.clientH2()
		var all sync.WaitGroup
		for worker := range 8 {
			all.Go(func() {
				for i := range 50 {
					id := fmt.Sprintf("post-%d-%d", worker, i)
					r := newRequest("POST", "/", strings.NewReader("pay"))
					r.Header.Set("X-Id", id)
					resp, err := c.Do(r)
					if err != nil {
						t.Error(err)
						continue
					}
					resp.Body.Close()
					mu.Lock()
					answered[id] = resp.StatusCode == 200
					mu.Unlock()
				}
			})
		}
		all.Wait()
		mu.Lock()
		defer mu.Unlock()
		for id, ok := range answered {
			if n := seen[id]; n > 1 || ok && n == 0 {
				t.Errorf("%s reached the backend %d times, answered with 200: %v", id, n, ok)
			}
		}
		if len(seen) < 300 {
			t.Errorf("only %d of 400 requests reached the backend", len(seen))
		}
	})
}

// TestBudget: a callee that fails half of its requests receives at most a fifth more (F31), and one that fails all of them
// too.
func TestBudget(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		for _, every := range []int64{2, 1} {
			t.Run(fmt.Sprintf("one in %d fails", every), func(t *testing.T) {
				var hits atomic.Int64
				at := (&rig{t: t, engine: e}).callee(rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
					if hits.Add(1)%every == 0 {
						w.WriteHeader(503)
					}
				})}}, nil)
				second := &place{cluster: "ap-south", instance: "b1", dial: at.dial}
				at.instance = "a1"
				frozen := time.Now()
				r := newRig(t, e, rigOptions{places: []*place{at, second}, budget: http.NewBudget(func() time.Time { return frozen })})
				c := r.clientH2()
				const requests = 1000
				var all sync.WaitGroup
				var failed atomic.Int64
				for range 10 {
					all.Go(func() {
						for range requests / 10 {
							resp, err := c.Do(newRequest("GET", "/", nil))
							if err != nil {
								t.Error(err)
								return
							}
							resp.Body.Close()
							if resp.StatusCode != 200 {
								failed.Add(1)
							}
						}
					})
				}
				all.Wait()
				if n := hits.Load(); n > requests*12/10+10 || n < requests*11/10 {
					t.Errorf("%d attempts for %d requests, want at most a fifth more", n, requests)
				}
				t.Logf("%d attempts, %d failed", hits.Load(), failed.Load())
			})
		}
	})
}

// TestChainBudget: a request that the chain before has left no retries for is not retried; one retry less is handed on
// with each retry.
func TestChainBudget(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		var hits atomic.Int64
		states := make(chan string, 10)
		count := (&rig{t: t, engine: e}).callee(rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
			hits.Add(1)
			states <- r.Header.Get("Tracestate")
			w.WriteHeader(503)
		})}}, nil)
		second := &place{cluster: "ap-south", instance: "b1", dial: count.dial}
		r := newRig(t, e, rigOptions{places: []*place{count, second}})
		do := func(state string) {
			req := newRequest("GET", "/", nil)
			req.Header.Set("Traceparent", "00-4b1f92ab3577b34da6a3ce929d0e0e47-00f067aa0ba902b7-01")
			req.Header.Set("Tracestate", state)
			resp, err := r.client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != 503 {
				t.Errorf("status %d", resp.StatusCode)
			}
		}
		do("strait=hop:2;c:us-east;r:0")
		if hits.Load() != 1 {
			t.Errorf("%d attempts with no retries left", hits.Load())
		}
		if s := <-states; !strings.Contains(s, ";r:0") {
			t.Errorf("handed on %q", s)
		}
		do("strait=hop:2;c:us-east;r:9")
		if hits.Load() != 3 {
			t.Errorf("%d attempts altogether, want 3", hits.Load())
		}
		if a, b := <-states, <-states; !strings.Contains(a, ";r:3") || !strings.Contains(b, ";r:2") {
			t.Errorf("handed on %q, then %q", a, b)
		}
	})
}

// TestInstances: an instance that does not accept connections is skipped for another one behind the same sidecar; with
// none left, the caller is told that nothing was seen.
func TestInstances(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := l.Addr().String()
	l.Close()
	each(t, func(t *testing.T, e engine) {
		for _, app := range apps {
			t.Run(app.name, func(t *testing.T) {
				var hits atomic.Int64
				alive := app.start(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
					hits.Add(1)
					io.Copy(w, r.Body)
				})
				r := newRig(t, e, rigOptions{protocol: appProtocol(app.proto), backends: []string{dead, alive}})
				resp, err := r.client().Do(newRequest("POST", "/", strings.NewReader("once")))
				if err != nil {
					t.Fatal(err)
				}
				body, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				if resp.StatusCode != 200 || string(body) != "once" || hits.Load() != 1 {
					t.Errorf("status %d, body %q, %d hits", resp.StatusCode, body, hits.Load())
				}
				r.picker.await(t, 1)
				r.mu.Lock()
				if len(r.app) != 2 || r.app[0].Result != http.Unsent || r.app[1].Result != http.Answered {
					t.Errorf("instances' outcomes %+v", r.app)
				}
				r.mu.Unlock()
				none := newRig(t, e, rigOptions{protocol: appProtocol(app.proto), backends: []string{dead}})
				if resp, err = none.client().Do(newRequest("POST", "/", strings.NewReader("x"))); err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				if o := none.picker.await(t, 1)[0]; resp.StatusCode != 503 || o.Result != http.Refused || o.Reason != federation.NoEndpoints {
					t.Errorf("status %d, outcome %+v", resp.StatusCode, o)
				}
			})
		}
	})
}

// TestAppRefuses: an HTTP/2 application that provably did not look at a request makes its sidecar say so, and the request
// goes elsewhere, whatever its method.
func TestAppRefuses(t *testing.T) {
	rows := map[string]func(*h2Server, uint32){
		"REFUSED_STREAM": func(s *h2Server, id uint32) { s.WriteRSTStream(id, http2.ErrCodeRefusedStream) },
		"GOAWAY":         func(s *h2Server, _ uint32) { s.WriteGoAway(0, http2.ErrCodeNo, nil) },
	}
	each(t, func(t *testing.T, e engine) {
		for name, refuse := range rows {
			t.Run(name, func(t *testing.T) {
				var seen atomic.Int64
				app := listenTracked(t, func(c net.Conn) {
					io.ReadFull(c, make([]byte, len(http2.ClientPreface)))
					s := &h2Server{http2.NewFramer(c, c), c}
					s.WriteSettings()
					for {
						id, ok := s.head()
						if !ok {
							return
						}
						seen.Add(1)
						refuse(s, id)
					}
				})
				var hits atomic.Int64
				first := (&rig{t: t, engine: e}).callee(rigOptions{protocol: http.H2C, backends: []string{app}}, nil)
				r := newRig(t, e, rigOptions{places: []*place{first, good(t, e, "ap-south", "b1", &hits)}})
				resp, err := r.client().Do(newRequest("POST", "/", strings.NewReader("once")))
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				if body, _ := io.ReadAll(resp.Body); resp.StatusCode != 200 || string(body) != "good once" || hits.Load() != 1 {
					t.Errorf("status %d, body %q, %d hits", resp.StatusCode, body, hits.Load())
				}
				if o := r.picker.await(t, 1)[0]; o.Result != http.Refused || seen.Load() > 3 {
					t.Errorf("outcome %+v after %d tries", o, seen.Load())
				}
			})
		}
	})
}
