// SPDX-License-Identifier: Apache-2.0

package proxyclient_test

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/internal/memnet"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
)

// memory is a network of pipes with one address, where somebody listens or nobody does.
type memory struct {
	mu sync.Mutex
	at *memoryListener
}

type memoryListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (m *memory) listen() net.Listener {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.at = &memoryListener{conns: make(chan net.Conn), done: make(chan struct{})}
	return m.at
}

func (m *memory) dial(ctx context.Context, _ string) (net.Conn, error) {
	m.mu.Lock()
	l := m.at
	m.mu.Unlock()
	near, far := memnet.Pipe()
	var err error
	select {
	case l.conns <- far:
		return near, nil
	case <-l.done:
		err = errors.New("connection refused")
	case <-ctx.Done():
		err = ctx.Err()
	}
	near.Close()
	far.Close()
	return nil, err
}

func (l *memoryListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *memoryListener) Close() error { l.once.Do(func() { close(l.done) }); return nil }
func (l *memoryListener) Addr() net.Addr {
	return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 7400}
}

// TestTwoDays is F20, F22 and F23 on virtual time, with the real CA, listener and client: 48 hours of hourly renewals with a rotation of the
// root among them, then 35 hours without a control plane, then the end and the way back.
func TestTwoDays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.net, c.grace = &memory{}, 168*time.Hour
		publish := func() {
			b := c.ca.Bundle()
			must(t, c.discovery.Replace(controlpb.TypeBundle, map[string]proto.Message{c.td.String(): &controlpb.Bundle{
				TrustDomain: c.td.String(), Jwks: b.Marshal(), Sequence: b.Sequence(), RenewIssuedBeforeMs: max(c.ca.State().RenewIssuedBefore.UnixMilli(), 0),
			}}))
			c.source.SetBundles(c.source.Bundles().With(b))
			c.renewOwn()
		}
		publish()
		c.serve()
		cfg := c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), newDir(t))
		cfg.Dial = c.net.dial
		client, stop := open(t, cfg)
		began := time.Now()
		holds := func(least time.Duration) {
			t.Helper()
			synctest.Wait()
			at := time.Since(began)
			if err := client.Expired(); err != nil {
				t.Fatalf("after %s: %v", at, err)
			}
			if left := time.Until(client.Source().Identity().NotAfter); left < least {
				t.Fatalf("after %s: the identity ends in %s; want %s and more", at, left, least)
			}
			if err := handshake(t, c, client.Source()); err != nil {
				t.Fatalf("after %s: %v", at, err)
			}
		}

		root := c.ca.Bundle().Roots()[0]
		seen := map[string]bool{}
		for step := 1; step <= 48*6; step++ {
			time.Sleep(10 * time.Minute)
			switch step {
			case 12 * 6:
				must(t, c.ca.Prepare())
				publish()
			case 18 * 6:
				must(t, c.ca.Activate())
				publish()
			case 24 * 6:
				must(t, c.ca.Retire())
				publish()
			}
			if step%6 == 0 {
				c.renewOwn()
			}
			time.Sleep(time.Second)
			holds(36*time.Hour - 67*time.Minute)
			seen[serial(client)] = true
		}
		if n := len(seen); n < 43 || n > 57 {
			t.Errorf("%d identities in 48 hours", n)
		}
		if b := client.Source().Bundles().Get(c.td); len(b.Roots()) != 1 || b.Roots()[0].Equal(root) {
			t.Error("the root was not rotated")
		}

		held := serial(client)
		for serial(client) == held { // just renewed
			time.Sleep(time.Second)
		}
		c.stop()
		last := time.Now()
		for time.Since(last) < 35*time.Hour {
			time.Sleep(30 * time.Minute)
			holds(0)
		}
		held = serial(client)
		time.Sleep(2 * time.Hour)
		if err := client.Expired(); !problem.Is(err, problem.IdentityExpired) {
			t.Errorf("after 37 hours: %v", err)
		}
		c.renewOwn()
		if err := handshake(t, c, client.Source()); err == nil {
			t.Error("an ended identity was used")
		}
		c.serve()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if serial(client) == held || client.Expired() != nil {
			t.Errorf("not renewed 5 s after the control plane came back: %v", client.Status().LastError)
		}
		holds(35 * time.Hour)
		stop()
		c.stop()
		time.Sleep(time.Minute) // what was closed ends
	})
}

// TestSteps is F25 on the injected clock: steps of the wall clock that end an identity fail closed by name and recover; ±5 min cost
// nothing; and no step brings back what was withdrawn.
func TestSteps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.net, c.grace = &memory{}, 168*time.Hour
		c.serve()
		own := &clock{}
		cfg := c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), newDir(t))
		cfg.Dial, cfg.Now = c.net.dial, own.Now
		client, stop := open(t, cfg)
		time.Sleep(time.Minute)
		for _, step := range []struct {
			by      time.Duration
			expired bool
		}{{5 * time.Minute, false}, {-5 * time.Minute, false}, {time.Hour, false}, {-time.Hour, false}, {25 * time.Hour, false}, {40 * time.Hour, true}, {-25 * time.Hour, false}} {
			own.Advance(step.by)
			time.Sleep(time.Second)
			synctest.Wait()
			if err := client.Expired(); (err != nil) != step.expired || err != nil && !problem.Is(err, problem.IdentityExpired) {
				t.Errorf("a step of %s: %v", step.by, err)
			}
			err := handshake(t, c, client.Source())
			var v *trust.VerifyError
			switch {
			case step.by.Abs() <= 5*time.Minute && err != nil:
				t.Errorf("a step of %s: %v", step.by, err)
			case step.expired && (!errors.As(err, &v) || v.Reason != "identity_expired" && v.Reason != "expired"):
				t.Errorf("a step of %s: %v", step.by, err)
			case step.by == -25*time.Hour && (!errors.As(err, &v) || v.Reason != "not_yet_valid"):
				t.Errorf("a step of %s: %v", step.by, err)
			}
			own.Advance(-step.by)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if err := errors.Join(client.Expired(), handshake(t, c, client.Source())); err != nil {
				t.Errorf("after a step of %s and back: %v", step.by, err)
			}
		}

		must(t, c.denied.Add(client.Info().ID, "laptop lost"))
		c.withdrawals.Judge(c.judge)
		held := serial(client)
		for _, by := range []time.Duration{-25 * time.Hour, 50 * time.Hour, 15 * time.Hour, -40 * time.Hour} { // of everybody's clock
			c.clock.Advance(by)
			own.Advance(by)
			if c.clock.Now().After(c.source.Identity().NotAfter) {
				c.renewOwn()
			}
			time.Sleep(30 * time.Second)
			synctest.Wait()
			if _, denied := c.denied.Denied(client.Info().ID, c.clock.Now()); !denied || client.Status().Connected || serial(client) != held {
				t.Errorf("a step of %s revived what was withdrawn: denied %v, %+v", by, denied, client.Status())
			}
		}
		stop()
		c.stop()
		time.Sleep(time.Minute)
	})
}
