// SPDX-License-Identifier: Apache-2.0

package sidecar_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
)

// TestUpgrade: a WebSocket gets a connection of its own, which ends with it.
func TestUpgrade(t *testing.T) {
	c := newCluster(t, "us-east")
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		nc, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer nc.Close()
		io.WriteString(nc, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		for {
			line, err := rw.ReadString('\n')
			if err != nil {
				return
			}
			fmt.Fprintf(nc, "echo:%s", line)
		}
	}))
	t.Cleanup(app.Close)
	far := callee(t, c, "checkout-1", http1, []string{app.Listener.Addr().String()})
	near := caller(t, c, service("checkout", "main", http1, endpoint(far, "checkout-1", c.id("checkout"), 1)))
	nc, err := net.Dial("tcp", near.up())
	check(t, err)
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(10 * time.Second))
	_, err = io.WriteString(nc, "GET /ws HTTP/1.1\r\nHost: checkout.shop\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	check(t, err)
	r := bufio.NewReader(nc)
	resp, err := http.ReadResponse(r, nil)
	check(t, err)
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("status %d", resp.StatusCode)
	}
	for range 3 {
		_, err := io.WriteString(nc, "hello\n")
		check(t, err)
		if line, err := r.ReadString('\n'); err != nil || line != "echo:hello\n" {
			t.Fatalf("got %q, %v", line, err)
		}
	}
}

// TestSelfGoes: without its Self a sidecar answers for nothing, is not ready, and what was open ends.
func TestSelfGoes(t *testing.T) {
	c := newCluster(t, "us-east")
	far := callee(t, c, "checkout-1", tcp, []string{newTCPApp(t, "one").Addr().String()})
	near := caller(t, c, service("checkout", "main", tcp, endpoint(far, "checkout-1", c.id("checkout"), 1)))
	nc, err := net.Dial("tcp", near.up())
	check(t, err)
	defer nc.Close()
	if _, err := sayOn(nc, "hi"); err != nil {
		t.Fatal(err)
	}
	far.snap.Remove(controlpb.TypeSelf, "shop/checkout-1")
	eventually(t, "what was open ends", func() bool { _, err := sayOn(nc, "still?"); return err != nil })
	if got, err := say(near.up(), "hi"); err == nil {
		t.Errorf("answered %q", got)
	}
	if ready(far)() {
		t.Error("still ready")
	}
}

// TestIdentityEnds: connections end when the certificate that opened them does, and come back with the next one.
func TestIdentityEnds(t *testing.T) {
	c := newCluster(t, "us-east")
	far := callee(t, c, "checkout-1", tcp, []string{newTCPApp(t, "one").Addr().String()})
	near := caller(t, c, service("checkout", "main", tcp, endpoint(far, "checkout-1", c.id("checkout"), 1)))
	brief, err := c.ca.IssueKey(c.id("web"), 1500*time.Millisecond)
	check(t, err)
	near.snap.Source().SetIdentity(brief)
	nc, err := net.Dial("tcp", near.up())
	check(t, err)
	defer nc.Close()
	if _, err := sayOn(nc, "hi"); err != nil {
		t.Fatal(err)
	}
	nc.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := nc.Read(make([]byte, 1)); err == nil || time.Now().Before(brief.NotAfter) || time.Since(brief.NotAfter) > 2*time.Second {
		t.Errorf("ended with %v, %v after the certificate did", err, time.Since(brief.NotAfter))
	}
	if got, err := say(near.up(), "hi"); err == nil {
		t.Errorf("a call under an expired identity was answered: %q", got)
	}
	next, err := c.ca.IssueKey(c.id("web"), time.Hour)
	check(t, err)
	near.snap.Source().SetIdentity(next)
	eventually(t, "calls work again", func() bool { _, err := say(near.up(), "hi"); return err == nil })
}
