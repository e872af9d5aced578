// SPDX-License-Identifier: Apache-2.0

package sidecar_test

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// deny withdraws certificates issued before a time; zero: all.
func (r *running) deny(id spiffeid.ID, before time.Time) {
	r.t.Helper()
	d := &controlpb.Denied{SpiffeId: id.String(), Reason: "evicted"}
	if !before.IsZero() {
		d.IssuedBeforeMs = before.UnixMilli()
	}
	check(r.t, r.snap.Put(d))
}

func issued(s *trust.Source) time.Time { return trust.Issued(s.Identity().Chain[0]) }

// TestReadmittedCaller: an identity that was readmitted gets in with certificates that were issued since, and with no other; resumed
// or new makes no difference.
func TestReadmittedCaller(t *testing.T) {
	c := newCluster(t, "us-east")
	far := callee(t, c, "checkout-1", tcp, []string{newTCPApp(t, "one").Addr().String()})
	old := c.source(c.id("web"))
	dial := func() (net.Conn, error) {
		conn, err := attacker(old, far.addrs.Inbound, c.sni("checkout", "main"))
		if err != nil {
			return nil, err
		}
		if _, err := sayOn(conn, "hi"); err != nil {
			conn.Close()
			return nil, err
		}
		return conn, nil
	}
	conn, err := dial()
	check(t, err)
	defer conn.Close()
	far.deny(c.id("web"), issued(old)) // admitted from the second in which this certificate was issued
	again, err := dial()
	check(t, err)
	again.Close()
	if _, err := sayOn(conn, "still there?"); err != nil {
		t.Errorf("what stood was ended: %v", err)
	}
	far.deny(c.id("web"), issued(old).Add(time.Second))
	began := time.Now()
	if _, err := io.Copy(io.Discard, conn); time.Since(began) > 4*time.Second {
		t.Errorf("an old connection lived on: %v", err)
	}
	accepted := 0
	for range 100 {
		if conn, err := dial(); err == nil {
			conn.Close()
			accepted++
		}
	}
	if accepted > 0 {
		t.Errorf("%d of 100 new connections with the old certificate were served", accepted)
	}
}

// TestReadmittedCallee: callers judge whom they call in the same way.
func TestReadmittedCallee(t *testing.T) {
	c := newCluster(t, "us-east")
	far := callee(t, c, "checkout-1", tcp, []string{newTCPApp(t, "one").Addr().String()})
	near := caller(t, c, service("checkout", "main", tcp, endpoint(far, "checkout-1", c.id("checkout"), 1)))
	var conn net.Conn
	eventually(t, "a call works", func() bool {
		var err error
		if conn, err = net.Dial("tcp", near.up()); err != nil {
			return false
		}
		if _, err = sayOn(conn, "hi"); err != nil {
			conn.Close()
		}
		return err == nil
	})
	defer conn.Close()
	near.deny(c.id("checkout"), time.Now().Add(time.Hour).Truncate(time.Second))
	began := time.Now()
	if _, err := io.Copy(io.Discard, conn); time.Since(began) > 4*time.Second {
		t.Errorf("an old connection lived on: %v", err)
	}
	if got, err := say(near.up(), "hi"); err == nil {
		t.Errorf("the old certificate was believed: %q", got)
	}
	near.deny(c.id("checkout"), time.Now().Add(-time.Hour).Truncate(time.Second))
	eventually(t, "a callee whose certificate is newer is called", func() bool { _, err := say(near.up(), "hi"); return err == nil })
}
