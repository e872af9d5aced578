// SPDX-License-Identifier: Apache-2.0

package sidecar_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	upstreamid "github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/sidecar"
	"github.com/strait-mesh/strait/trust"
)

// issuing is a Client that asks the cluster's CA for what applications get.
type issuing struct {
	*sidecar.Snapshot
	c *testCluster
	t testing.TB
}

func (i issuing) RequestIdentity(context.Context) (*trust.Identity, error) {
	return i.c.ca.IssueKey(i.Source().Identity().ID, 0)
}

func (i issuing) RequestJWT(_ context.Context, audience []string) (string, time.Time, error) {
	return i.c.ca.SignJWT(i.Source().Identity().ID, audience)
}

// publish gives the sidecar the bundle of a cluster, as discovery does.
func (r *running) publish(c *testCluster, recall time.Time) {
	r.t.Helper()
	b := &controlpb.Bundle{TrustDomain: c.td.String(), Jwks: c.ca.Bundle().Marshal(), Sequence: c.ca.Bundle().Sequence(), Cluster: c.name}
	if !recall.IsZero() {
		b.RenewIssuedBeforeMs = recall.UnixMilli()
	}
	check(r.t, r.snap.Put(b))
}

// withAPI runs a sidecar of a cluster with the Workload API on, for this process alone, and returns it with its Self.
func withAPI(t *testing.T, c *testCluster, account string, others ...*testCluster) (*running, *controlpb.Self) {
	t.Helper()
	dir, err := os.MkdirTemp("", "wlapi")
	check(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	snap := sidecar.NewSnapshot(c.source(c.id(account), others...))
	uid := uint32(os.Getuid())
	self := c.self(account, account)
	self.WorkloadApi = []*controlpb.UnixSelector{{Uid: &uid}}
	check(t, snap.Put(self))
	r := start(t, account, snap, func(cfg *sidecar.Config) {
		cfg.Client = issuing{snap, c, t}
		cfg.WorkloadAPI, cfg.RenewEvery = filepath.Join(dir, "api.sock"), time.Second
	})
	return r, self
}

func apiSource(t *testing.T, r *running) *workloadapi.X509Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(r.addrs.WorkloadAPI)))
	check(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func fetch(t *testing.T, r *running) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(r.addrs.WorkloadAPI))
	return err
}

// TestWorkloadAPIRotation: applications of two clusters hold what each other accepts, at every step of a rotation of one cluster's
// real CA; each step is learnt late by the other.
func TestWorkloadAPIRotation(t *testing.T) {
	east, west := newCluster(t, "us-east"), newCluster(t, "eu-west")
	web, _ := withAPI(t, east, "web", west)
	checkout, _ := withAPI(t, west, "checkout", east)
	a, b := apiSource(t, web), apiSource(t, checkout)
	eastTD, err := upstreamid.TrustDomainFromString(east.td.String())
	check(t, err)
	// accepted is what go-spiffe's own configuration for TLS asks of a peer, both ways round.
	accepted := func(when string, from, at *workloadapi.X509Source) {
		t.Helper()
		svid, err := from.GetX509SVID()
		check(t, err)
		raw := make([][]byte, len(svid.Certificates))
		for i, c := range svid.Certificates {
			raw[i] = c.Raw
		}
		if err := tlsconfig.VerifyPeerCertificate(at, tlsconfig.AuthorizeAny())(raw, nil); err != nil {
			t.Errorf("%s: %d certificates: %v", when, len(raw), err)
		}
	}
	both := func(when string) {
		t.Helper()
		accepted(when, a, b)
		accepted(when, b, a)
	}
	chain := func(want int) {
		t.Helper()
		eventually(t, "an identity of the new issuer", func() bool {
			svid, err := a.GetX509SVID()
			check(t, err)
			current := east.ca.State().RenewIssuedBefore
			return len(svid.Certificates) == want && !trust.Issued(svid.Certificates[0]).Before(current.Truncate(time.Second))
		})
	}
	keysAt := func(s *workloadapi.X509Source, want int) {
		t.Helper()
		eventually(t, "roots pushed", func() bool {
			set, err := s.GetX509BundleForTrustDomain(eastTD)
			return err == nil && len(set.X509Authorities()) == want
		})
	}
	audience := []string{checkout.snap.Source().Identity().ID.String()}
	token := func(when string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience[0]}, workloadapi.WithAddr(web.addrs.WorkloadAPI))
		check(t, err)
		if _, err := workloadapi.ValidateJWTSVID(ctx, svid.Marshal(), audience[0], workloadapi.WithAddr(checkout.addrs.WorkloadAPI)); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	both("at first")
	token("at first")

	check(t, east.ca.Prepare())
	web.publish(east, time.Time{})
	keysAt(a, 2)
	both("prepared, and the other has not heard")
	token("prepared, and the other has not heard")
	check(t, east.ca.Activate())
	web.publish(east, east.ca.State().RenewIssuedBefore)
	chain(3)
	both("activated, and the other knows the old root alone")
	checkout.publish(east, time.Time{})
	keysAt(b, 2)
	both("activated")
	token("activated")
	check(t, east.ca.Retire())
	web.publish(east, east.ca.State().RenewIssuedBefore)
	chain(2)
	both("retired, and the other has not heard")
	checkout.publish(east, time.Time{})
	keysAt(b, 1)
	both("retired")
	token("retired")
}

// TestWorkloadAPIWithdrawal: what discovery says of the identity, and of who may take it, holds for open streams within 5 s.
func TestWorkloadAPIWithdrawal(t *testing.T) {
	c := newCluster(t, "us-east")
	r, self := withAPI(t, c, "web")
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr(r.addrs.WorkloadAPI))
	check(t, err)
	defer client.Close()
	watch := func(what, word string, change func()) {
		t.Helper()
		w := &watcher{ended: make(chan error, 1), first: make(chan struct{}, 1)}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = client.WatchX509Context(ctx, w) }()
		<-w.first
		began := time.Now()
		change()
		err := <-w.ended
		cancel()
		<-done
		if took := time.Since(began); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), word) || took > 5*time.Second {
			t.Errorf("%s: %v after %v", what, err, took)
		}
		if err := fetch(t, r); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s, afterwards: %v", what, err)
		}
	}
	denied := &controlpb.Denied{SpiffeId: c.id("web").String(), Reason: "stolen"}
	back := func() {
		t.Helper()
		eventually(t, "served again", func() bool { return fetch(t, r) == nil })
	}
	watch("identity withdrawn", "stolen", func() { check(t, r.snap.Put(denied)) })
	r.snap.Remove(controlpb.TypeDenied, denied.SpiffeId)
	back()
	watch("selectors removed", "no process is allowed", func() { check(t, r.snap.Put(c.self("web", "web"))) })
	check(t, r.snap.Put(self))
	back()
	watch("workload removed", "no workload", func() { r.snap.Remove(controlpb.TypeSelf, self.Name) })
	check(t, r.snap.Put(self))
	back()
	for _, reason := range []string{"withdrawn", "no_selector", "no_workload"} {
		if n := metricValue(t, r.reg, "strait_workload_api_refused_total", map[string]string{"reason": reason}); n == 0 {
			t.Errorf("refusals for %s are not counted", reason)
		}
	}

	// Admitted again: only what is issued from now on. The certificate in use is not served any more.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	before, err := client.FetchX509SVID(ctx)
	check(t, err)
	denied.IssuedBeforeMs = trust.Issued(before.Certificates[0]).Add(time.Second).UnixMilli()
	check(t, r.snap.Put(denied))
	eventually(t, "a certificate that was issued since", func() bool {
		svid, err := client.FetchX509SVID(ctx)
		return err == nil && trust.Issued(svid.Certificates[0]).UnixMilli() >= denied.IssuedBeforeMs
	})
}

// watcher keeps the first answer and the first error.
type watcher struct {
	first chan struct{}
	ended chan error
}

func (w *watcher) OnX509ContextUpdate(*workloadapi.X509Context) {
	select {
	case w.first <- struct{}{}:
	default:
	}
}

func (w *watcher) OnX509ContextWatchError(err error) {
	select {
	case w.ended <- err:
	default:
	}
}

func TestWorkloadAPINeedsAnIssuer(t *testing.T) {
	c := newCluster(t, "us-east")
	snap := sidecar.NewSnapshot(c.source(c.id("web")))
	if _, err := sidecar.New(sidecar.Config{Proxy: "shop/web", Client: snap, WorkloadAPI: filepath.Join(t.TempDir(), "s")}); err == nil {
		t.Error("a snapshot issues nothing, and the sidecar did not say so")
	}
}

// TestWorkloadAPISocket: a socket that cannot be had fails the start, and one that was had is gone afterwards.
func TestWorkloadAPISocket(t *testing.T) {
	c := newCluster(t, "us-east")
	r, _ := withAPI(t, c, "web")
	path := strings.TrimPrefix(r.addrs.WorkloadAPI, "unix://")
	snap := sidecar.NewSnapshot(c.source(c.id("web")))
	second, err := sidecar.New(sidecar.Config{
		Proxy: "shop/web", Client: issuing{snap, c, t}, WorkloadAPI: path, InboundListen: "127.0.0.1:0", MetricsListen: "127.0.0.1:0",
	})
	check(t, err)
	if err := second.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("a second sidecar on the same socket: %v", err)
	}
	r.end()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}
