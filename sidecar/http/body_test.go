// SPDX-License-Identifier: Apache-2.0

package http

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// TestKeptBodyModel: whatever the sequence of readers, each sees the body from its beginning, unless more than the limit
// was read, and then none but the last is possible.
func TestKeptBodyModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(0, 300<<10).Draw(t, "size")
		limit := rapid.IntRange(0, 200<<10).Draw(t, "limit")
		data := make([]byte, size)
		rand.NewChaCha8([32]byte{}).Read(data)
		ended := false
		b := newKeptBody(iotest.OneByteReader(bytes.NewReader(data)), int64(size), limit, 0, nil, func() { ended = true })
		defer b.stop()
		if size > 4096 {
			b.src = bytes.NewReader(data)
		}
		most := 0
		for range rapid.IntRange(1, 4).Draw(t, "attempts") {
			if !b.replayable() {
				if most <= limit {
					t.Fatalf("not replayable after %d bytes of at most %d", most, limit)
				}
				break
			}
			r := b.attempt()
			want := rapid.IntRange(0, size).Draw(t, "read")
			got := make([]byte, want)
			if n, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, data[:want]) {
				t.Fatalf("read %d of %d: %v", n, want, err)
			}
			// A read from the source may bring up to one chunk more than was asked for.
			most = max(most, min(want+32<<10, size))
			if len(b.buf) > limit+32<<10 {
				t.Fatalf("%d bytes held, may keep %d", len(b.buf), limit)
			}
			if rapid.Bool().Draw(t, "close") {
				r.Close()
				if _, err := r.Read(make([]byte, 1)); err != errBodyEnded {
					t.Fatalf("read after close: %v", err)
				}
			}
		}
		if b.replayable() {
			all, err := io.ReadAll(b.attempt())
			if err != nil || !bytes.Equal(all, data) || !ended || !b.finished() || b.received() != int64(size) {
				t.Fatalf("last reader: %d bytes, %v, trailers %v", len(all), err, ended)
			}
		}
	})
}

// TestKeptBodyDetach: giving up an attempt does not wait for a source that is silent, and what comes later is the next
// attempt's.
func TestKeptBodyDetach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pr, pw := io.Pipe()
		b := newKeptBody(pr, -1, 64<<10, 0, nil, func() {})
		first := b.attempt()
		var wait sync.WaitGroup
		var err error
		wait.Go(func() { _, err = first.Read(make([]byte, 10)) })
		synctest.Wait()
		first.Close()
		wait.Wait()
		if err != errBodyEnded {
			t.Errorf("first: %v", err)
		}
		second := b.attempt()
		wait.Go(func() { pw.Write([]byte("late")) })
		got := make([]byte, 10)
		if n, err := second.Read(got); err != nil || string(got[:n]) != "late" {
			t.Errorf("second: %q, %v", got[:n], err)
		}
		wait.Wait()
		b.release()
		wait.Go(func() { pw.Write([]byte("more")) })
		if n, err := second.Read(got); err != nil || string(got[:n]) != "more" || b.replayable() {
			t.Errorf("after release: %q, %v, replayable %v", got[:n], err, b.replayable())
		}
		wait.Wait()
		pw.CloseWithError(errors.New("reset"))
		if _, err := second.Read(got); err == nil || b.broken() == nil {
			t.Errorf("broken source: %v, %v", err, b.broken())
		}
		b.stop()
	})
}

// TestBudget: exact figures under a fake clock.
func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBudget(nil)
		take := func(n int) (got int) {
			for range n {
				if b.Retry() {
					got++
				}
			}
			return got
		}
		step := func(reason string, got, want int) {
			t.Helper()
			if got != want {
				t.Errorf("%s: %d, want %d", reason, got, want)
			}
		}
		step("ten a second with no requests", take(100), 10)
		step("none left", b.Left(), 0)
		time.Sleep(time.Second)
		step("ten more in the next second", take(100), 10)
		for range 1000 {
			b.Request()
		}
		step("a fifth of 1000, less the 20 already used", take(1000), 180)
		if r := b.Ratio(); r != 1 {
			t.Errorf("ratio %v, want 1", r)
		}
		time.Sleep(9 * time.Second)
		step("the requests still count, and so do the retries after them", take(1000), 10)
		time.Sleep(time.Second)
		step("both have left the window", take(1000), 10)
		time.Sleep(time.Hour)
		step("after a long silence", b.Left(), 10)
		if r := b.Ratio(); r != 0 {
			t.Errorf("ratio %v, want 0", r)
		}
	})
}

func TestClockGoesBack(t *testing.T) {
	now := time.Unix(1000, 0)
	b := NewBudget(func() time.Time { return now })
	b.Request()
	now = time.Unix(10, 0)
	b.Request()
	if !b.Retry() {
		t.Error("no retry after the clock went back")
	}
}
