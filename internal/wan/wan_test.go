// SPDX-License-Identifier: Apache-2.0

package wan_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/internal/wan"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ends are two sites with a UDP socket and a TCP listener inside each, and the WAN between them.
type ends struct {
	wan      *wan.WAN
	udp      map[string]*net.UDPConn
	listener map[string]*net.TCPListener
}

func newEnds(t *testing.T) *ends {
	t.Helper()
	e := &ends{udp: map[string]*net.UDPConn{}, listener: map[string]*net.TCPListener{}}
	sites := []wan.Site{{Name: "a", Outside: "127.71.0.9:0"}, {Name: "b", Outside: "127.72.0.9:0"}}
	for i, ip := range []string{"127.71.0.1", "127.72.0.1"} {
		l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.ParseIP(ip)})
		if err != nil {
			t.Fatal(err)
		}
		u, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(ip), Port: l.Addr().(*net.TCPAddr).Port})
		if err != nil {
			t.Fatal(err)
		}
		sites[i].Inside = l.Addr().String()
		e.udp[sites[i].Name], e.listener[sites[i].Name] = u, l
		t.Cleanup(func() { _ = u.Close(); _ = l.Close() })
	}
	w, err := wan.New(sites, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	e.wan = w
	return e
}

func (e *ends) send(t *testing.T, from, to, text string) {
	t.Helper()
	dst, err := net.ResolveUDPAddr("udp", e.wan.Outside(to))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.udp[from].WriteToUDP([]byte(text), dst); err != nil {
		t.Fatal(err)
	}
}

func (e *ends) receive(t *testing.T, at string, within time.Duration) (string, *net.UDPAddr, error) {
	t.Helper()
	buf := make([]byte, 2048)
	_ = e.udp[at].SetReadDeadline(time.Now().Add(within))
	n, from, err := e.udp[at].ReadFromUDP(buf)
	return string(buf[:n]), from, err
}

func TestDatagramsKeepTheirPairAndTakeTheirTime(t *testing.T) {
	e := newEnds(t)
	e.wan.SetBoth("a", "b", wan.Link{Delay: 40 * time.Millisecond})
	start := time.Now()
	e.send(t, "a", "b", "there")
	text, from, err := e.receive(t, "b", 5*time.Second)
	if err != nil || text != "there" {
		t.Fatalf("received %q, %v", text, err)
	}
	if d := time.Since(start); d < 40*time.Millisecond {
		t.Errorf("arrived after %v, before its delay", d)
	}
	if from.String() != e.wan.Outside("a") {
		t.Errorf("source is %v, want a's outside address %s", from, e.wan.Outside("a"))
	}
	if _, err := e.udp["b"].WriteToUDP([]byte("back"), from); err != nil {
		t.Fatal(err)
	}
	if text, _, err := e.receive(t, "a", 5*time.Second); err != nil || text != "back" {
		t.Errorf("answer %q, %v", text, err)
	}
}

func TestDarkLinkDropsDatagramsAndHoldsStreams(t *testing.T) {
	e := newEnds(t)
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.71.0.1")}}
	c, err := d.DialContext(t.Context(), "tcp", e.wan.Outside("b"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := e.listener["b"].Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()

	e.wan.SetBoth("a", "b", wan.Link{Dark: true})
	e.send(t, "a", "b", "lost")
	if _, err := c.Write([]byte("held")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4)
	_ = s.SetReadDeadline(time.Now().Add(150 * time.Millisecond))
	if _, err := io.ReadFull(s, buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a dark link let bytes pass: %q, %v", buf, err)
	}
	e.wan.SetBoth("a", "b", wan.Link{})
	_ = s.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(s, buf); err != nil || string(buf) != "held" {
		t.Errorf("after healing: %q, %v", buf, err)
	}
	e.send(t, "a", "b", "kept")
	if text, _, err := e.receive(t, "b", 5*time.Second); err != nil || text != "kept" {
		t.Errorf("first datagram after healing is %q, %v; the one sent into the dark must be lost", text, err)
	}
}

func TestStreamEndsArriveAsTheyWere(t *testing.T) {
	for name, end := range map[string]func(*net.TCPConn){
		"half-close": func(c *net.TCPConn) { _ = c.CloseWrite() },
		"reset":      func(c *net.TCPConn) { _ = c.SetLinger(0); _ = c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnds(t)
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.71.0.1")}}
			c, err := d.DialContext(t.Context(), "tcp", e.wan.Outside("b"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			s, err := e.listener["b"].Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			end(c.(*net.TCPConn))
			_ = s.SetReadDeadline(time.Now().Add(5 * time.Second))
			_, err = s.Read(make([]byte, 1))
			if clean := errors.Is(err, io.EOF); clean != (name == "half-close") {
				t.Errorf("the far end sees %v", err)
			}
			if name == "half-close" {
				if _, err := s.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
				if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
					t.Errorf("the other direction is closed too: %v", err)
				}
			}
		})
	}
}
