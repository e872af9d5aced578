// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"bytes"
	"context"
	"errors"
	"io"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/strait-mesh/strait/internal/preface"
)

func fullHeader() Header {
	return Header{Service: "shop/checkout", Port: "http", Export: "e-1", Source: "spiffe://us-east.acme/ns/shop/sa/web",
		Traceparent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", Deadline: 5 * time.Second, Class: "interactive",
		Hops: 1, Avoid: []preface.Handle{{1}, {2}}, Tag: 7}
}

func TestHeaderRoundTrip(t *testing.T) {
	for _, h := range []Header{fullHeader(), {}, {Service: "a/b", Hops: 255, Tag: ^uint64(0)}} {
		b, err := h.Append([]byte("before"))
		if err != nil || len(b) > MaxHeader {
			t.Fatal(len(b), err)
		}
		got, err := ReadHeader(io.MultiReader(bytes.NewReader(b[6:]), strings.NewReader("after")))
		if err != nil || !reflect.DeepEqual(got, h) {
			t.Errorf("got %+v, %v", got, err)
		}
	}
}

func TestHeaderThatDoesNotFit(t *testing.T) {
	for name, f := range map[string]func(*Header){
		"long source":  func(h *Header) { h.Source = strings.Repeat("s", 1100) },
		"many handles": func(h *Header) { h.Avoid = make([]preface.Handle, 9) },
	} {
		h := fullHeader()
		f(&h)
		if _, err := h.Append(nil); err == nil {
			t.Errorf("%s: encoded", name)
		}
	}
}

func TestHeaderBytesThatAreRefused(t *testing.T) {
	rec := func(b ...byte) []byte { return append([]byte{byte(len(b) >> 8), byte(len(b))}, b...) }
	cases := map[string][]byte{
		"nothing":            {},
		"empty record":       {0, 0},
		"other version":      rec(2),
		"too long":           rec(append([]byte{1}, make([]byte, 1100)...)...),
		"cut short":          {0, 9, 1, 1},
		"unknown tag":        rec(1, 99, 0, 1, 'x'),
		"tag zero":           rec(1, 0, 0, 1, 'x'),
		"empty field":        rec(1, 1, 0, 0),
		"twice":              rec(1, 1, 0, 1, 'x', 1, 0, 1, 'y'),
		"descending":         rec(1, 2, 0, 1, 'x', 1, 0, 1, 'y'),
		"field past the end": rec(1, 1, 0, 9, 'x'),
		"newline":            rec(1, 1, 0, 1, '\n'),
		"NUL":                rec(1, 1, 0, 1, 0),
		"zero number":        rec(1, 8, 0, 1, 0),
		"number too wide":    rec(1, 8, 0, 2, 0, 1),
		"half a handle":      rec(1, 9, 0, 4, 1, 2, 3, 4),
		"nine handles":       rec(append([]byte{1, 9, 0, 72}, make([]byte, 72)...)...),
	}
	for name, b := range cases {
		if h, err := ReadHeader(bytes.NewReader(b)); err == nil {
			t.Errorf("%s: accepted as %+v", name, h)
		}
	}
}

func TestHelloSkipsWhatItDoesNotKnow(t *testing.T) {
	h := hello{Version: 1, Features: 3, Name: "gw-1", Cluster: "us-east", Lane: 1, Nonce: [16]byte{1}, Refusal: "version"}
	b, err := h.append()
	if err != nil {
		t.Fatal(err)
	}
	b = append(b[2:], 200, 0, 3, 'n', 'e', 'w')
	if got, err := parseHello(b); err != nil || got != h {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := parseHello([]byte{1}); err == nil {
		t.Error("hello without version accepted")
	}
}

func TestFrameTakesMemoryAsBytesCome(t *testing.T) {
	if _, err := ReadFrame(bytes.NewReader([]byte{0, 0, 1, 1}), 256); !errors.Is(err, ErrMalformed) {
		t.Errorf("too long: %v", err)
	}
	allocated := testing.AllocsPerRun(10, func() {
		_, err := ReadFrame(bytes.NewReader([]byte{0, 0xff, 0xff, 0xff, 1}), 16<<20)
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut short: %v", err)
		}
	})
	if allocated > 8 {
		t.Errorf("%v allocations for one byte", allocated)
	}
}

func TestJudge(t *testing.T) {
	for _, c := range []struct {
		silence, rtt time.Duration
		want         State
	}{
		{0, 0, StateUp}, {time.Second, 0, StateUp}, {1001 * time.Millisecond, 0, StateSuspect},
		{1100 * time.Millisecond, 300 * time.Millisecond, StateUp}, {1300 * time.Millisecond, 300 * time.Millisecond, StateSuspect},
		{3 * time.Second, 0, StateSuspect}, {3001 * time.Millisecond, 80 * time.Millisecond, StateDown},
		{3500 * time.Millisecond, time.Second, StateUp}, {9 * time.Second, time.Second, StateDown},
	} {
		if got := judge(c.silence, c.rtt); got != c.want {
			t.Errorf("judge(%v, %v) = %v, want %v", c.silence, c.rtt, got, c.want)
		}
	}
}

func TestPulse(t *testing.T) {
	now := time.Unix(1000, 0)
	p := newPulse(now)
	id := p.ping(now)
	p.pong(id+1, now.Add(time.Second)) // never asked
	if rtt, _ := p.figures(); rtt != 0 || p.state(now.Add(1500*time.Millisecond)) != StateSuspect {
		t.Error("an answer that was never asked for counts")
	}
	p.pong(id, now.Add(80*time.Millisecond))
	p.pong(id, now.Add(5*time.Second)) // again
	if rtt, _ := p.figures(); rtt != 80*time.Millisecond {
		t.Errorf("rtt %v", rtt)
	}
	id = p.ping(now)
	p.pong(id, now.Add(160*time.Millisecond))
	if rtt, _ := p.figures(); rtt != 90*time.Millisecond {
		t.Errorf("smoothed rtt %v", rtt)
	}
	p.totals(100, 50)
	if _, loss := p.figures(); loss != 0.5/8 {
		t.Errorf("loss %v", loss)
	}
}

// TestRace reads as a trace: what each attempt does, who wins and when.
func TestRace(t *testing.T) {
	type act struct {
		takes time.Duration
		fails bool
	}
	list := attempts([]string{"a"}, true, true, tcpHeadStart) // QUIC at 0, TCP at 400 ms
	for _, c := range []struct {
		name      string
		quic, tcp act
		want      string
		at        time.Duration
		discarded int32
	}{
		{name: "QUIC answers before TCP starts", quic: act{takes: 300 * time.Millisecond}, tcp: act{}, want: QUIC, at: 300 * time.Millisecond},
		{name: "QUIC is refused at once: TCP does not wait", quic: act{fails: true}, tcp: act{takes: 50 * time.Millisecond}, want: TCP, at: 50 * time.Millisecond},
		{name: "QUIC is swallowed: TCP carries after its head start", quic: act{takes: time.Hour}, tcp: act{takes: 100 * time.Millisecond}, want: TCP, at: 500 * time.Millisecond},
		{name: "QUIC is slow but faster than TCP", quic: act{takes: 500 * time.Millisecond}, tcp: act{takes: time.Second}, want: QUIC, at: 500 * time.Millisecond},
		{name: "both fail", quic: act{fails: true}, tcp: act{takes: time.Second, fails: true}, at: time.Second},
		{name: "nobody answers", quic: act{takes: time.Hour}, tcp: act{takes: time.Hour}, at: dialTimeout},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var discarded atomic.Int32
				began := time.Now()
				got, err := raceAttempts(t.Context(), list, func(ctx context.Context, a attempt) (string, error) {
					what := map[string]act{QUIC: c.quic, TCP: c.tcp}[a.transport]
					select {
					case <-time.After(what.takes):
					case <-ctx.Done():
						return "", ctx.Err()
					}
					if what.fails {
						return "", errors.New("refused")
					}
					return a.transport, nil
				}, func(string) { discarded.Add(1) })
				if got != c.want || (err == nil) != (c.want != "") || time.Since(began) != c.at || discarded.Load() != c.discarded {
					t.Errorf("%q, %v after %v with %d discarded; want %q after %v", got, err, time.Since(began), discarded.Load(), c.want, c.at)
				}
			})
		})
	}
}

func FuzzStreamHeader(f *testing.F) {
	b, err := fullHeader().Append(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte{0, 1, 1})
	f.Add([]byte{0, 9, 1, 9, 0, 4, 1, 2, 3, 4})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ReadHeader(bytes.NewReader(b))
		if err != nil {
			return
		}
		out, err := h.Append(nil)
		if err != nil || !bytes.HasPrefix(b, out) {
			t.Fatalf("accepted bytes are not canonical: %x, %v", out, err)
		}
	})
}

func FuzzRecords(f *testing.F) {
	h, _ := hello{Version: 1, Name: "gw", Nonce: [16]byte{1}}.append()
	n, _ := notice{Kind: noticeDrain, Deadline: time.Second}.append()
	m, _ := Marker{Tag: 1, Direction: 1, Offset: 9, Traceparent: "00-x", End: true}.append()
	for _, b := range [][]byte{h, n, m} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := readRecord(bytes.NewReader(b), 1024)
		if err != nil {
			return
		}
		_, _ = parseHello(p)
		if v, err := parseNotice(p); err == nil {
			if out, err := v.append(); err != nil || !bytes.HasPrefix(b, out) {
				t.Fatal("notice is not canonical")
			}
		}
		if v, err := parseMarker(p); err == nil {
			if out, err := v.append(); err != nil || !bytes.HasPrefix(b, out) {
				t.Fatal("marker is not canonical")
			}
		}
	})
}
