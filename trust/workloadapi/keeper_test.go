// SPDX-License-Identifier: Apache-2.0

package workloadapi

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// issuer hands out identities that live for 36 h, as the CA's do, unless it is away.
type issuer struct {
	mu       sync.Mutex
	away     bool
	refused  error
	attempts int
	at       []time.Time // of each identity
}

func (i *issuer) issue(context.Context) (*trust.Identity, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.attempts++
	if i.away {
		return nil, errors.New("away")
	}
	if i.refused != nil {
		return nil, i.refused
	}
	now := time.Now()
	i.at = append(i.at, now)
	leaf := &x509.Certificate{NotBefore: now.Add(-trust.Backdate).Truncate(time.Second), NotAfter: now.Add(36 * time.Hour)}
	return &trust.Identity{Chain: []*x509.Certificate{leaf}, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter}, nil
}

func (i *issuer) set(away bool) (attempts, issued int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.away = away
	return i.attempts, len(i.at)
}

func virtual(t *testing.T, f func(k *keeper, i *issuer)) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{}
		cfg := Config{RenewEvery: time.Hour, Now: time.Now, Logger: slog.New(slog.DiscardHandler), Denied: func(spiffeid.ID, time.Time) (string, bool) { return "", false }}
		k := &keeper{issue: i.issue, denied: cfg.Denied, every: cfg.RenewEvery, now: cfg.Now, log: cfg.Logger, wake: make(chan struct{}, 1), changed: make(chan struct{})}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { k.run(ctx) })
		f(k, i)
		cancel()
		wg.Wait()
		if id, _, _ := k.current(); id != nil {
			t.Error("the identity outlives the keeper")
		}
	})
}

// TestTwoDays: 48 h of hourly renewals without a gap, none earlier than 54 min or later than 66.
func TestTwoDays(t *testing.T) {
	virtual(t, func(k *keeper, i *issuer) {
		time.Sleep(24 * time.Hour)
		if attempts, _ := i.set(false); attempts != 0 {
			t.Fatalf("%d attempts before anybody wanted an identity", attempts)
		}
		k.want()
		for range 48 * 60 {
			synctest.Wait()
			if id, _, err := k.current(); id == nil {
				t.Fatalf("no identity: %v", err)
			}
			time.Sleep(time.Minute)
		}
		for n := 1; n < len(i.at); n++ {
			if d := i.at[n].Sub(i.at[n-1]); d < 54*time.Minute || d > 66*time.Minute+maxBackoff {
				t.Errorf("renewed after %v", d)
			}
		}
		if len(i.at) < 43 || len(i.at) > 54 {
			t.Errorf("%d identities in 48 h", len(i.at))
		}
		k.stop()
		synctest.Wait()
		_, before := i.set(false)
		time.Sleep(24 * time.Hour)
		if _, after := i.set(false); after != before {
			t.Error("renewed though nobody is allowed any more")
		}
	})
}

// TestDayWithoutControlPlane: served for the 35 h that are left, then not any more, and again within a minute and a half once it is back.
func TestDayWithoutControlPlane(t *testing.T) {
	virtual(t, func(k *keeper, i *issuer) {
		k.want()
		synctest.Wait()
		i.set(true)
		time.Sleep(35*time.Hour + 59*time.Minute)
		if id, _, err := k.current(); id == nil {
			t.Fatalf("not served within its life: %v", err)
		}
		time.Sleep(time.Minute)
		if id, _, err := k.current(); id != nil || err == nil {
			t.Fatalf("served after its end, until %v (%v)", id.NotAfter, err)
		}
		attempts, _ := i.set(false)
		if attempts > 35*60*2+100 {
			t.Errorf("%d attempts in 35 h", attempts)
		}
		time.Sleep(90 * time.Second)
		if id, _, err := k.current(); id == nil {
			t.Fatalf("not served again: %v", err)
		}
	})
}

// TestRefusedIsNotAway: a control plane that answers that the identity was withdrawn ends what is served at once.
func TestRefusedIsNotAway(t *testing.T) {
	virtual(t, func(k *keeper, i *issuer) {
		k.want()
		synctest.Wait()
		i.mu.Lock()
		i.refused = problem.New(problem.IdentityWithdrawn, "it was withdrawn")
		i.mu.Unlock()
		k.recall(time.Now().Add(time.Second))
		time.Sleep(maxRecall + time.Second)
		if id, _, err := k.current(); id != nil || !errors.Is(err, errWithdrawn) {
			t.Errorf("served although refused (%v)", err)
		}
	})
}

// TestRecall: what was issued before a time is renewed within 30 s, once; a time that lies before that changes nothing.
func TestRecall(t *testing.T) {
	virtual(t, func(k *keeper, i *issuer) {
		k.want()
		time.Sleep(10 * time.Minute)
		k.recall(time.Now())
		time.Sleep(maxRecall + time.Second)
		if _, issued := i.set(false); issued != 2 {
			t.Fatalf("%d identities after a recall", issued)
		}
		k.recall(time.Now().Add(-time.Hour))
		k.recall(time.Now().Add(-time.Hour))
		time.Sleep(10 * time.Minute)
		if _, issued := i.set(false); issued != 2 {
			t.Errorf("%d identities: one recall counts once", issued)
		}
	})
}
