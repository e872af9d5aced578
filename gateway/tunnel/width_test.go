// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/strait-mesh/strait/internal/preface"
)

// drive asks as the pinger does; answers come at once where passes says so.
func drive(w *width, probes int, passes func(n uint64) bool) {
	for range probes {
		if n := w.ask(); passes(n) {
			w.answer(n)
		}
	}
}

func TestWidthIsJudged(t *testing.T) {
	all := func(uint64) bool { return true }
	none := func(uint64) bool { return false }
	const rtt = 50 * time.Millisecond

	var silent width
	if drive(&silent, 400, none); silent.narrow(rtt) {
		t.Error("a far end that never answered a probe was judged")
	}
	var w width
	if drive(&w, 40, all); w.narrow(rtt) {
		t.Error("narrow although every probe was answered")
	}
	if drive(&w, narrowAfter, none); w.narrow(rtt) {
		t.Errorf("narrow after %d probes without an answer", narrowAfter)
	}
	if drive(&w, 1, none); !w.narrow(rtt) || w.narrow(2*time.Second) {
		t.Error("one more is too many, but for a path where they may still be under way")
	}
	if w.rest(); w.narrow(rtt) { // the last stream ended
		t.Error("probes from before the rest count")
	}
	drive(&w, narrowAfter+1, none)
	w.answer(1 << 40) // never asked for
	if !w.narrow(rtt) {
		t.Error("an answer to nothing counts")
	}
	if drive(&w, 1, all); w.narrow(rtt) {
		t.Error("narrow after an answer")
	}
	// One probe in three passes: that is loss, and no hole.
	var lossy width
	for range 300 {
		if drive(&lossy, 1, func(n uint64) bool { return n%3 == 0 }); lossy.narrow(rtt) {
			t.Fatal("narrow where a third passes")
		}
	}
}

// TestReturnToQUIC: a minute, doubled by each relapse, ten at most, and a minute again after a return that lasted.
func TestReturnToQUIC(t *testing.T) {
	var r trial
	now := time.Unix(1_000_000_000, 0)
	expect := func(want time.Duration, why string) {
		t.Helper()
		if got := r.fell(now); got != want {
			t.Errorf("%s: %v, want %v", why, got, want)
		}
	}
	expect(time.Minute, "the first time")
	expect(time.Minute, "QUIC was tried and did not pass")
	for _, want := range []time.Duration{2, 4, 8, 10, 10} {
		now = now.Add(time.Hour)
		r.back(now)
		now = now.Add(time.Minute)
		expect(want*time.Minute, "a relapse")
	}
	r.back(now)
	now = now.Add(time.Hour)
	expect(time.Minute, "after an hour on QUIC")
}

// TestPathNarrows has a path swallow datagrams above 1,280 bytes under a live session with a stream that is full of bytes: within 4 s
// there is another session, the old one's stream is reset, and the new one carries as much as it is given.
func TestPathNarrows(t *testing.T) {
	a, b := newDomain(t, "aa"), newDomain(t, "bb")
	sink := make(chan error, 4)
	x := a.run(t, Config{HeadStart: tcpHeadStart}, b)
	y := b.run(t, Config{Stream: func(_ context.Context, s *Session, st Stream, _ Header) {
		_ = s.Reply(st, preface.Status{Code: preface.CodeOK})
		_ = st.SetReadDeadline(time.Time{})
		_, err := io.Copy(io.Discard, st)
		sink <- err
	}}, a)
	way := newPath(t, y.Addr().String())
	defer x.stop() // before the path waits for its connections
	defer y.stop()
	y.SetPeers([]Peer{{TrustDomain: a.td, Cluster: "aa", Ready: true}})
	x.SetPeers([]Peer{{TrustDomain: b.td, Cluster: "bb", Ready: true, Gateways: []Gateway{{Name: "gw-1", Addresses: []string{way.tcp.Addr().String()}}}}})
	x.await(t, "a session over QUIC", func() bool { s := x.up(y); return s != nil && s.Transport() == QUIC && s.RTT() > 0 })
	first := x.up(y)
	out, err := first.Open(t.Context(), Header{Service: "shop/site", Port: "http"}, []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	wrote := make(chan error, 1)
	go func() { _, err := io.Copy(out, endless{}); wrote <- err }()
	x.await(t, "packets to grow", func() bool { return first.links()[0].packetSize() > 1300 && first.width.seen() > 3 })
	way.widest.Store(1280)
	began := time.Now()
	x.await(t, "another session", func() bool { s := x.up(y); return s != nil && s != first })
	took := time.Since(began)
	t.Logf("another session after %v, over %s", took, x.up(y).Transport())
	if took > 4*time.Second {
		t.Errorf("took %v", took)
	}
	for what, end := range map[string]<-chan error{"the writer": wrote, "the reader": sink} {
		select {
		case err := <-end:
			if err == nil {
				t.Errorf("%s saw a clean end", what)
			}
		case <-time.After(6 * time.Second):
			t.Errorf("%s hangs on the old session", what)
		}
	}
	out, err = x.up(y).Open(t.Context(), Header{Service: "shop/site", Port: "http"}, []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	_ = out.SetWriteDeadline(time.Now().Add(20 * time.Second))
	if _, err := out.Write(make([]byte, 1<<20)); err != nil {
		t.Errorf("on the new session: %v", err)
	}
	_ = out.Close()
	if err := <-sink; err != nil {
		t.Errorf("on the new session, the reader: %v", err)
	}
}

func (w *width) seen() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.answered
}

type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }
