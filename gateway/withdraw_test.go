// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/gateway"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// deny withdraws an identity in what a cluster's gateway is told; before zero: every certificate.
func (c *cluster) deny(id spiffeid.ID, before time.Time) {
	d := &controlpb.Denied{SpiffeId: id.String(), Reason: "evicted"}
	if !before.IsZero() {
		d.IssuedBeforeMs = before.UnixMilli()
	}
	c.client.set(controlpb.TypeDenied, id.String(), d)
}

// issued is when the certificate of a source was issued.
func issued(s *trust.Source) time.Time { return trust.Issued(s.Identity().Chain[0]) }

// tryTunnel makes one attempt at a tunnel with the identity of c's gateway.
func (c *cluster) tryTunnel(target *cluster, transport string) error {
	e, err := tunnel.Listen(tunnel.Config{Name: "gw-1", Source: c.client.source, Logger: logger(c.t), DisableUDP: transport == tunnel.TCP, HeadStart: 10 * time.Second})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = e.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	e.SetPeers([]tunnel.Peer{{TrustDomain: target.td, Cluster: string(target.name), Ready: true,
		Gateways: []tunnel.Gateway{{Name: "gw-1", Addresses: []string{target.addrs.Listen}}}}})
	why := ""
	within(c.t, 10*time.Second, "an attempt at a tunnel ends", func() bool {
		why = e.LastError(target.td)
		return why != "" || e.Pick(target.td) != nil
	})
	if why == "" {
		return nil
	}
	return errors.New(why)
}

// ended waits for a local session to end.
func (s *caller) ended(t *testing.T, what string) {
	t.Helper()
	limit := time.After(5 * time.Second)
	for {
		select {
		case _, open := <-s.notices:
			if !open {
				return
			}
		case <-limit:
			t.Fatalf("%s stands after 5 s", what)
		}
	}
}

// TestWithdrawnGateway: a tunnel ends when the gateway at either end of it is withdrawn, gossip, catalogs and streams with it, over
// both transports; it does not come back with the old certificate, and does with a new one.
func TestWithdrawnGateway(t *testing.T) {
	for _, transport := range []string{tunnel.QUIC, tunnel.TCP} {
		t.Run(transport, func(t *testing.T) {
			east, west, web, _ := pair(t, func(c *gateway.Config) { c.DisableUDP = transport == tunnel.TCP })
			web.awaitPeer(west, transport)
			tc, _, err := web.call(west, "checkout")
			if err != nil {
				t.Fatal(err)
			}
			gw := east.client.info.ID
			start := time.Now()
			west.deny(gw, time.Time{})
			_ = tc.SetReadDeadline(time.Now().Add(5 * time.Second))
			if _, err := tc.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) || time.Since(start) > 5*time.Second {
				t.Errorf("the stream through the tunnel: %v after %v", err, time.Since(start))
			}
			for range 100 {
				if err := east.tryTunnel(west, transport); err == nil {
					t.Fatal("a new session of the withdrawn gateway was accepted")
				}
			}
			west.deny(gw, issued(east.client.source).Add(time.Second))
			if err := east.tryTunnel(west, transport); err == nil {
				t.Error("after the readmission the old certificate was accepted")
			}
			west.deny(gw, issued(east.client.source)) // as if it had a certificate issued after that
			within(t, 20*time.Second, "calls work after the readmission", func() bool {
				_, _, err := web.call(west, "checkout")
				return err == nil
			})
		})
	}
}

// TestReadmittedWorkload: local sessions and what goes through them are judged by the certificate.
func TestReadmittedWorkload(t *testing.T) {
	east, west, web, _ := pair(t)
	web.awaitPeer(west, tunnel.QUIC)
	tc, _, err := web.call(west, "checkout")
	if err != nil {
		t.Fatal(err)
	}
	id := east.workload("web")
	at := issued(web.source)
	east.deny(id, at)
	if _, _, err := web.call(west, "checkout"); err != nil {
		t.Errorf("a certificate issued at that very time: %v", err)
	}
	east.deny(id, at.Add(time.Second))
	web.ended(t, "the session of the old certificate")
	_ = tc.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := tc.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("its stream: %v", err)
	}
	if _, err := east.dialLocal(web.source, east); !errors.Is(err, errSessionRefused) {
		t.Errorf("a new session with the old certificate: %v", err)
	}
}
