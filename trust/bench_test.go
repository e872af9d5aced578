// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	gospiffe "github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/strait-mesh/strait/trust"
)

// BenchmarkVerify: one operation judges one chain of P-256 keys: leaf and issuer, or leaf, issuer and sibling for one who knows the old
// root. The two signature checks dominate; a stranger's chain costs none, or one when it borrows the name and key identifier of a root. It
// cannot show what the handshake itself costs. Run with -bench Verify.
func BenchmarkVerify(b *testing.B) {
	root, next := newRoot(b, "root"), newRoot(b, "root")
	bundles := set(b, root.bundle("a.mesh", 1))
	issuer := next.issuer("issuer")
	for _, bb := range []struct {
		name string
		id   *trust.Identity
		ok   bool
	}{
		{"own", root.issuer("issuer").identity(web, t0.Add(time.Hour)), true},
		{"sibling", issuer.identity(web, t0.Add(time.Hour), root.again(issuer)), true},
		{"stranger", next.issuer("issuer").identity(web, t0.Add(time.Hour)), false},
	} {
		b.Run("chain="+bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := trust.Verify(bb.id.Chain, bundles, t0); (err == nil) != bb.ok {
					b.Fatal(err)
				}
			}
		})
	}
}

// link is both sides' configurations of one connection.
type link struct{ client, server *tls.Config }

// benchEnds are the same two workloads, keys and chains, once with this package and once with go-spiffe's tlsconfig.
func benchEnds(b *testing.B) (ours, theirs link) {
	now := time.Now()
	current := life(now.Add(-time.Hour), now.Add(24*time.Hour)) // go-spiffe judges by the real clock
	rootA, rootB := newRoot(b, "root a", current), newRoot(b, "root b", current)
	leaf := now.Add(time.Hour)
	idA, idB := rootA.issuer("issuer a", current).identity("spiffe://a.mesh/ns/shop/sa/web", leaf), rootB.issuer("issuer b", current).identity("spiffe://b.mesh/ns/shop/sa/checkout", leaf)
	both := set(b, rootA.bundle("a.mesh", 1), rootB.bundle("b.mesh", 1))
	sources := map[*trust.Identity]*trust.Source{}
	for _, id := range []*trust.Identity{idA, idB} {
		s := trust.NewSource(trust.SourceConfig{})
		s.SetIdentity(id)
		s.SetBundles(both)
		sources[id] = s
	}
	ours = link{sources[idA].ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeID(idB.ID)}), sources[idB].ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeID(idA.ID)})}
	set := x509bundle.NewSet(
		x509bundle.FromX509Authorities(gospiffe.RequireTrustDomainFromString("a.mesh"), both.Get(domain(b, "a.mesh")).Roots()),
		x509bundle.FromX509Authorities(gospiffe.RequireTrustDomainFromString("b.mesh"), both.Get(domain(b, "b.mesh")).Roots()))
	svid := func(id *trust.Identity) *x509svid.SVID {
		return &x509svid.SVID{ID: gospiffe.RequireFromString(id.ID.String()), Certificates: id.Chain, PrivateKey: id.Key}
	}
	theirs = link{
		tlsconfig.MTLSClientConfig(svid(idA), set, tlsconfig.AuthorizeID(gospiffe.RequireFromString(idB.ID.String()))),
		tlsconfig.MTLSServerConfig(svid(idB), set, tlsconfig.AuthorizeID(gospiffe.RequireFromString(idA.ID.String()))),
	}
	return ours, theirs
}

func (e link) with(curve tls.CurveID) link {
	e.client, e.server = e.client.Clone(), e.server.Clone()
	e.client.CurvePreferences, e.server.CurvePreferences = []tls.CurveID{curve}, []tls.CurveID{curve}
	return e
}

// handshake is a whole mutual handshake between two goroutines, and one byte back, without which a client does not know that it was let in.
func (e link) handshake(b *testing.B) {
	far, near := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		c := tls.Server(near, e.server)
		if err := c.HandshakeContext(context.Background()); err != nil {
			b.Error(err)
		}
		_, _ = c.Write([]byte{1})
	})
	c := tls.Client(far, e.client)
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		b.Error(err)
	}
	wg.Wait()
	near.Close()
	far.Close()
}

// cpu is what this process has used so far.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkHandshake: one operation is one mutual TLS 1.3 handshake with P-256 leaves under one issuer each, both ends in this process, over
// a pipe, with this package and with crypto/tls under go-spiffe's tlsconfig in turn, 16 of each at a time. Signatures and key exchange
// dominate it, so it cannot show what lies between the two but for that. cpu-µs/op is of both ends of ours, spiffe-cpu-µs/op of go-spiffe's, and
// x-spiffe the ratio, which survives a noisy machine. go-spiffe's server also makes session tickets, which ours does not. Run with
// -bench Handshake -benchtime 2000x.
func BenchmarkHandshake(b *testing.B) {
	ours, theirs := benchEnds(b)
	for _, curve := range []tls.CurveID{tls.X25519, tls.X25519MLKEM768} {
		b.Run("kx="+curve.String(), func(b *testing.B) {
			const batch = 16
			ours, theirs := ours.with(curve), theirs.with(curve)
			var spent [2]time.Duration
			done := 0
			for b.Loop() {
				if done++; done%batch != 1 {
					continue // the batch's first operation stands for all of it
				}
				for i, e := range []link{ours, theirs} {
					start := cpu(b)
					for range batch {
						e.handshake(b)
					}
					spent[i] += cpu(b) - start
				}
			}
			n := float64((done + batch - 1) / batch * batch)
			b.ReportMetric(float64(spent[0].Nanoseconds())/1e3/n, "cpu-µs/op")
			b.ReportMetric(float64(spent[1].Nanoseconds())/1e3/n, "spiffe-cpu-µs/op")
			b.ReportMetric(float64(spent[0])/float64(spent[1]), "x-spiffe")
			b.ReportMetric(0, "ns/op") // of both together: it says nothing
		})
	}
}

// BenchmarkHandshakeAllocs: one operation is one handshake of one kind of configuration; compare B/op. Run with -bench HandshakeAllocs.
func BenchmarkHandshakeAllocs(b *testing.B) {
	ours, theirs := benchEnds(b)
	for name, e := range map[string]link{"ours": ours, "go-spiffe": theirs} {
		b.Run("config="+name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				e.handshake(b)
			}
		})
	}
}
