// SPDX-License-Identifier: Apache-2.0

package inner_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/sidecar/inner"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func workload(t testing.TB, td spiffeid.TrustDomain, sa string) spiffeid.ID {
	id, err := spiffeid.Workload(td, "shop", sa)
	check(t, err)
	return id
}

func TestDial(t *testing.T) {
	td, err := spiffeid.ParseTrustDomain("us-east.acme")
	check(t, err)
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "data"))
	check(t, err)
	defer dir.Close()
	authority, err := ca.Create(dir, ca.Config{TrustDomain: td})
	check(t, err)
	source := func(sa string) *trust.Source {
		s := trust.NewSource(trust.SourceConfig{})
		identity, err := authority.IssueKey(workload(t, td, sa), time.Hour)
		check(t, err)
		s.SetIdentity(identity)
		b, err := trust.NewBundles(authority.Bundle())
		check(t, err)
		s.SetBundles(b)
		return s
	}
	good := serve(t, source("checkout").ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"h2"}}))
	silent := serve(t, nil)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	closed.Close()

	ids := []spiffeid.ID{workload(t, td, "checkout")}
	for name, tc := range map[string]struct {
		target inner.Target
		source *trust.Source
		kind   inner.Kind
	}{
		"nothing listens":       {inner.Target{Address: closed.Addr().String(), IDs: ids}, source("web"), inner.Unreachable},
		"silence":               {inner.Target{Address: silent, IDs: ids}, source("web"), inner.Unreachable},
		"another identity":      {inner.Target{Address: good, IDs: []spiffeid.ID{workload(t, td, "cart")}}, source("web"), inner.Untrusted},
		"no identity listed":    {inner.Target{Address: good}, source("web"), inner.Untrusted},
		"none of our own":       {inner.Target{Address: good, IDs: ids}, trust.NewSource(trust.SourceConfig{}), inner.NoIdentity},
		"our own has expired":   {inner.Target{Address: good, IDs: ids}, expired(source("web")), inner.NoIdentity},
		"no protocol in common": {inner.Target{Address: good, IDs: ids, ALPN: []string{"smtp"}}, source("web"), inner.Unreachable},
	} {
		t.Run(name, func(t *testing.T) {
			tc.target.SNI = "main.checkout.shop.svc.us-east.acme"
			d := inner.Dialer{Source: tc.source, Timeout: 300 * time.Millisecond}
			c, err := d.Dial(t.Context(), tc.target)
			var e *inner.Error
			if !errors.As(err, &e) || e.Kind != tc.kind {
				t.Fatalf("got %v, %v, want kind %v", c, err, tc.kind)
			}
		})
	}
	t.Run("registered until closed", func(t *testing.T) {
		r := withdrawal.New(withdrawal.Config{})
		d := inner.Dialer{Source: source("web"), Enter: func(s withdrawal.Subject, _ *trust.Peer, end func(string)) func() { return r.Add(s, end) }}
		target := inner.Target{Address: good, IDs: ids, ALPN: []string{"h2"}, SNI: "main.checkout.shop.svc.us-east.acme", Export: "shop/checkout:main@us-east"}
		a, err := d.Dial(t.Context(), target)
		check(t, err)
		b, err := d.Dial(t.Context(), target)
		check(t, err)
		defer b.Close()
		if got := r.Snapshot(); len(got) != 2 || got[0].Export != target.Export || got[0].Identity != ids[0] || got[0].Class != withdrawal.Outbound {
			t.Fatalf("registry %+v", got)
		}
		if a.Offset() == 0 {
			t.Error("nothing was counted as written")
		}
		a.Close()
		a.Close()
		if r.Len() != 1 {
			t.Errorf("%d stand after a close", r.Len())
		}
		r.Judge(func(withdrawal.Subject) (string, bool) { return "stolen", false })
		if _, err := b.Read(make([]byte, 1)); err == nil || b.Reason() != "stolen" {
			t.Errorf("withdrawn: %v, reason %q", err, b.Reason())
		}
	})
	t.Run("the context ends a dial", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		d := inner.Dialer{Source: source("web")}
		if _, err := d.Dial(ctx, inner.Target{Address: silent, IDs: ids, SNI: "x"}); err == nil {
			t.Error("dialled")
		}
	})
}

// serve accepts, and with a config shakes hands; it reads until the other end is gone.
func serve(t testing.TB, cfg *tls.Config) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				if cfg != nil {
					c = tls.Server(c, cfg)
				}
				b := make([]byte, 1024)
				for {
					if _, err := c.Read(b); err != nil {
						return
					}
				}
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

// expired is a source with the same identity and bundles, in a time after their end.
func expired(s *trust.Source) *trust.Source {
	late := trust.NewSource(trust.SourceConfig{Now: func() time.Time { return time.Now().Add(1000 * time.Hour) }})
	late.SetIdentity(s.Identity())
	late.SetBundles(s.Bundles())
	return late
}
