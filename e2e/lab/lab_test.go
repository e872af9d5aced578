// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/e2e/lab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, sites ...string) *lab.Net {
	t.Helper()
	if os.Getenv("STRAIT_E2E") == "" || os.Getuid() != 0 {
		t.Skip("the lab needs root, and runs with make e2e (STRAIT_E2E=1)")
	}
	n, err := lab.New(1, sites...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func both(n *lab.Net, s lab.Shape) {
	n.Update(func(string, string, lab.Shape) lab.Shape { return s })
}

// echo answers every datagram inside a site.
func echo(t *testing.T, s *lab.Site) string {
	t.Helper()
	c, err := s.ListenPacket(s.IP(9).String() + ":0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 2048)
		for {
			size, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(buf[:size], from)
		}
	}()
	t.Cleanup(func() { _ = c.Close(); <-done })
	return c.LocalAddr().String()
}

func dial(t *testing.T, s *lab.Site, network, addr string) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	c, err := s.DialContext(ctx, network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// TestAccuracy: what the lab does is what it was asked for. The lab's own figures of lateness tell a stalled host apart.
func TestAccuracy(t *testing.T) {
	n := open(t, "a", "b")
	conn := dial(t, n.Site("a"), "udp4", echo(t, n.Site("b")))
	buf := make([]byte, 2048)

	trip := func() time.Duration {
		begin := time.Now()
		if _, err := conn.Write([]byte("ping")); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(begin.Add(2 * time.Second))
		if _, err := conn.Read(buf); err != nil {
			t.Fatal(err)
		}
		return time.Since(begin)
	}
	for _, rtt := range []time.Duration{0, 20 * time.Millisecond, 80 * time.Millisecond} {
		both(n, lab.Shape{Delay: rtt / 2})
		n.Late()
		var trips []time.Duration
		for range 15 {
			trips = append(trips, trip())
		}
		slices.Sort(trips)
		if p50, late := trips[7], n.Late(); p50 < rtt || p50 > rtt+5*time.Millisecond {
			if late > 5*time.Millisecond {
				t.Skipf("inconclusive: the host delivered %v late", late)
			}
			t.Errorf("round trip %v, want %v", p50, rtt)
		}
	}

	// Loss, duplicates and corruption, counted by the receiver.
	both(n, lab.Shape{})
	n.Set("a", "b", lab.Shape{Loss: 0.1, Duplicate: 0.05, Corrupt: 0.02})
	const sent = 5000
	got := map[uint32]int{}
	for i := range uint32(sent) {
		if _, err := conn.Write(binary.BigEndian.AppendUint32(make([]byte, 60), i)); err != nil {
			t.Fatal(err)
		}
		if i%100 == 99 || i == sent-1 {
			for {
				_ = conn.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
				size, err := conn.Read(buf)
				if errors.Is(err, os.ErrDeadlineExceeded) {
					break
				} else if err != nil {
					t.Fatal(err)
				}
				got[binary.BigEndian.Uint32(buf[size-4:])]++
			}
		}
	}
	twice := 0
	for _, c := range got {
		if c > 1 {
			twice++
		}
	}
	if share := float64(len(got)) / sent; math.Abs(share-0.9*0.98) > 0.02 {
		t.Errorf("%.3f arrived, want 0.9 × 0.98: what is corrupt is dropped by the kernel", share)
	}
	if share := float64(twice) / float64(len(got)); math.Abs(share-0.05) > 0.015 {
		t.Errorf("%.3f arrived twice, want 0.05", share)
	}
}

// TestRate: a TCP stream over a slow path takes as long as it must.
func TestRate(t *testing.T) {
	n := open(t, "a", "b")
	both(n, lab.Shape{Delay: 5 * time.Millisecond, Rate: 40_000_000})
	l, err := n.Site("b").Listen(n.Site("b").IP(9).String() + ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const size = 5 << 20
	received := make(chan time.Duration, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		begin := time.Now()
		_, _ = io.CopyN(io.Discard, c, size)
		received <- time.Since(begin)
	}()
	conn := dial(t, n.Site("a"), "tcp4", l.Addr().String())
	if _, err := conn.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	took := <-received
	rate := size * 8 / took.Seconds()
	t.Logf("%.1f Mbit/s of payload over 40 Mbit/s; worst lateness %v", rate/1e6, n.Late())
	if rate > 40e6 || rate < 25e6 {
		t.Errorf("%.1f Mbit/s over a path of 40", rate/1e6)
	}
}

// TestHoles: large packets vanish, small ones pass; with an answer the sender learns the path's MTU.
func TestHoles(t *testing.T) {
	n := open(t, "a", "b")
	conn := dial(t, n.Site("a"), "udp4", echo(t, n.Site("b")))
	raw, err := conn.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) { // IP_MTU_DISCOVER = IP_PMTUDISC_DO: don't fragment
		if err := syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, 10, 2); err != nil {
			t.Error(err)
		}
	})
	buf := make([]byte, 2048)
	passes := func(size int) error {
		if _, err := conn.Write(make([]byte, size-28)); err != nil {
			return err
		}
		_ = conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		_, err := conn.Read(buf)
		return err
	}
	both(n, lab.Shape{MTU: 1280})
	if err := passes(1280); err != nil {
		t.Errorf("1280 bytes: %v", err)
	}
	if err := passes(1281); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("1281 bytes: %v, want silence", err)
	}
	both(n, lab.Shape{MTU: 1280, TooBig: true})
	first, second := passes(1400), passes(1400)
	if !errors.Is(first, syscall.EMSGSIZE) && !errors.Is(second, syscall.EMSGSIZE) {
		t.Errorf("with answers: %v, then %v; want EMSGSIZE", first, second)
	}
}

// TestIslands: sites reach each other through the lab alone, one direction can be dark, and commands run inside.
func TestIslands(t *testing.T) {
	n := open(t, "a", "b", "c")
	addr := echo(t, n.Site("b"))
	reach := func(from string) error {
		c := dial(t, n.Site(from), "udp4", addr)
		_, _ = c.Write([]byte("hello"))
		_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		_, err := c.Read(make([]byte, 16))
		return err
	}
	if a, c := reach("a"), reach("c"); a != nil || c != nil {
		t.Fatalf("from a: %v; from c: %v", a, c)
	}
	n.Set("b", "a", lab.Shape{Down: true})
	if a, c := reach("a"), reach("c"); !errors.Is(a, os.ErrDeadlineExceeded) || c != nil {
		t.Errorf("with b→a dark, from a: %v; from c: %v", a, c)
	}
	if in, dark := n.Counters("a", "b"), n.Counters("b", "a"); in.Delivered == 0 || dark.Dark == 0 {
		t.Errorf("counters: a→b %+v, b→a %+v", in, dark)
	}
	var text strings.Builder
	cmd := exec.Command("cat", "/proc/self/net/dev")
	cmd.Stdout = &text
	err := n.Site("a").Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil || !strings.Contains(text.String(), "wan0") || strings.Contains(text.String(), "eth0") {
		t.Errorf("a command inside a: %v\n%s", err, text.String())
	}
	if c, err := net.DialTimeout("udp4", addr, time.Second); err == nil { // from outside of the lab
		_, _ = c.Write([]byte("hello"))
		_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if _, err := c.Read(make([]byte, 16)); err == nil {
			t.Error("the lab can be reached from outside")
		}
		_ = c.Close()
	}
}
