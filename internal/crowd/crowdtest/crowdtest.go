// SPDX-License-Identifier: Apache-2.0

// Package crowdtest tests a listener under the weight of callers that connect and say nothing.
package crowdtest

import (
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

const (
	// Silent is how many say nothing.
	Silent = 2000
	// within is when the last of them has to be gone.
	within = 6 * time.Second
	// settle is when the process is back to what it was: its other business (a tunnel that was dialled anew beside a suspect one) takes longer
	// than the silent ones.
	settle = 30 * time.Second
	// extra is how many goroutines more than before may be left, of this process's other business.
	extra = 5
)

// Press connects Silent times to a listener of this process, "unix:" in front of a socket's path, and says nothing. Each connection has
// to be closed within 6 s, an honest caller has to get through meanwhile, and afterwards the goroutines are those of before.
func Press(t testing.TB, address string, honest func() error) {
	t.Helper()
	before := runtime.NumGoroutine()
	conns, since := Connect(t, address, Silent)
	start := time.Now()
	if err := honest(); err != nil {
		t.Errorf("an honest caller, %v after %d silent ones: %v", time.Since(start), Silent, err)
	}
	t.Logf("an honest caller got through in %v", time.Since(start))
	AwaitClosed(t, conns, since)
	for limit := time.Now().Add(settle); runtime.NumGoroutine() > before+extra; {
		if time.Now().After(limit) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
		}
		<-time.After(10 * time.Millisecond)
	}
}

// Connect makes that many connections, and says when each was made.
func Connect(t testing.TB, address string, n int) (conns []net.Conn, since []time.Time) {
	t.Helper()
	network := "tcp"
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		network, address = "unix", path
	}
	for range n {
		c, err := net.DialTimeout(network, address, within)
		if err != nil {
			t.Fatalf("connection %d of %d: %v", len(conns), n, err)
		}
		t.Cleanup(func() { _ = c.Close() })
		conns, since = append(conns, c), append(since, time.Now())
	}
	return conns, since
}

// AwaitClosed requires that the other end closes each connection within 6 s of its making, without a word beyond its greeting.
func AwaitClosed(t testing.TB, conns []net.Conn, since []time.Time) {
	t.Helper()
	open, longest := 0, time.Duration(0)
	b := make([]byte, 512)
	for i, c := range conns {
		_ = c.SetReadDeadline(since[i].Add(within))
		var err error
		for err == nil {
			_, err = c.Read(b)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			open++
		}
		longest = max(longest, time.Since(since[i]))
		_ = c.Close()
	}
	if open > 0 {
		t.Errorf("%d of %d silent connections are open after %v", open, len(conns), within)
	}
	t.Logf("%d silent connections were closed, the last seen after %v", len(conns)-open, longest.Round(time.Millisecond))
}
