// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/e2e/harness"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// redTeam holds the root of one member: it is that member, wholly compromised, and speaks every protocol as it likes.
type redTeam struct {
	t       testing.TB
	td      spiffeid.TrustDomain
	ca      *ca.CA
	bundles *trust.Bundles
	stops   []func() // of its tunnels
}

// hangUp ends its tunnels.
func (r *redTeam) hangUp() {
	for _, stop := range r.stops {
		stop()
	}
}

func openCA(t testing.TB, c *harness.Cluster) *ca.CA {
	t.Helper()
	dir, err := datadir.Open(c.Dir, datadir.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dir.Close() })
	a, err := ca.Open(dir, ca.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// newRedTeam takes over a member; targets are the clusters that it attacks.
func newRedTeam(t testing.TB, member *harness.Cluster, targets ...*harness.Cluster) *redTeam {
	t.Helper()
	return redTeamOf(t, openCA(t, member), targets...)
}

func redTeamOf(t testing.TB, a *ca.CA, targets ...*harness.Cluster) *redTeam {
	t.Helper()
	var bundles []*trust.Bundle
	for _, c := range targets {
		bundles = append(bundles, openCA(t, c).Bundle())
	}
	if !slices.ContainsFunc(bundles, func(b *trust.Bundle) bool { return b.TrustDomain() == a.TrustDomain() }) { // else it poses as a target
		bundles = append(bundles, a.Bundle())
	}
	set, err := trust.NewBundles(bundles...)
	if err != nil {
		t.Fatal(err)
	}
	return &redTeam{t: t, td: a.TrustDomain(), ca: a, bundles: set}
}

func (r *redTeam) identity(path string) spiffeid.ID {
	r.t.Helper()
	id, err := spiffeid.Parse("spiffe://" + r.td.String() + path)
	if err != nil {
		r.t.Fatal(err)
	}
	return id
}

// source is the member's identity of that path, freshly issued.
func (r *redTeam) source(path string) *trust.Source {
	r.t.Helper()
	id, err := r.ca.IssueKey(r.identity(path), time.Hour)
	if err != nil {
		r.t.Fatal(err)
	}
	s := trust.NewSource(trust.SourceConfig{})
	s.SetIdentity(id)
	s.SetBundles(r.bundles)
	return s
}

// tunnel opens a session with the gateway of target as the identity of that path, or says why there is none.
func (r *redTeam) tunnel(target *harness.Cluster, path string) (*tunnel.Session, error) {
	r.t.Helper()
	failed := make(chan string, 64)
	e, err := tunnel.Listen(tunnel.Config{Name: "red", Source: r.source(path), Failed: func(_ spiffeid.TrustDomain, transport, reason string) {
		select {
		case failed <- transport + ": " + reason:
		default:
		}
	}})
	if err != nil {
		r.t.Fatal(err)
	}
	run, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = e.Run(run) })
	stop := sync.OnceFunc(func() { cancel(); wg.Wait() })
	r.stops = append(r.stops, stop)
	r.t.Cleanup(stop)
	td, err := spiffeid.ParseTrustDomain(target.Name + ".acme")
	if err != nil {
		r.t.Fatal(err)
	}
	listen, _ := target.Gateways[0].Addrs()["Listen"].(string)
	e.SetPeers([]tunnel.Peer{{TrustDomain: td, Cluster: target.Name, Ready: true, Gateways: []tunnel.Gateway{{Name: "gateway-1", Addresses: []string{listen}}}}})
	timeout := time.NewTimer(15 * time.Second)
	defer timeout.Stop()
	for {
		changed := e.Changed()
		if s := e.Pick(td); s != nil {
			return s, nil
		}
		select {
		case <-changed:
		case why := <-failed:
			return nil, errors.New(why)
		case <-timeout.C:
			return nil, fmt.Errorf("no session and no refusal: %s", e.LastError(td))
		}
	}
}

// ask sends one query of the control lane.
func ask(ctx context.Context, s *tunnel.Session, method string, body []byte) (*controlpb.Answer, error) {
	st, err := s.OpenQuery(ctx)
	if err != nil {
		return nil, err
	}
	defer st.Reset()
	_ = st.SetDeadline(time.Now().Add(10 * time.Second))
	b, err := proto.Marshal(&controlpb.Query{Method: method, Body: body, TimeoutMs: 8000})
	if err != nil {
		return nil, err
	}
	if err := tunnel.WriteFrame(st, b); err != nil {
		return nil, err
	}
	if b, err = tunnel.ReadFrame(st, 2<<20); err != nil {
		return nil, err
	}
	a := &controlpb.Answer{}
	return a, proto.Unmarshal(b, a)
}

// clientHello is what a TLS client sends first for that server name, taken as it is: "" sends none.
func clientHello(t testing.TB, sni string) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer client.Close()
	defer server.Close()
	name := strings.Map(func(r rune) rune { // what crypto/tls sends unchanged: patched below
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '.' {
			return r
		}
		return 'x'
	}, strings.ToLower(sni))
	if strings.HasSuffix(name, ".") {
		name = name[:len(name)-1] + "x"
	}
	go func() {
		_ = tls.Client(client, &tls.Config{ServerName: name, InsecureSkipVerify: true}).Handshake()
	}()
	b := make([]byte, 16<<10)
	n, err := server.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Replace(b[:n], []byte(name), []byte(sni), 1)
}

// probe opens a stream and returns the gateway's answer and what came behind it until the stream ended.
func probe(t testing.TB, s *tunnel.Session, h tunnel.Header, hello []byte) (preface.Status, []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	out, err := s.Open(ctx, h, hello)
	if err != nil {
		t.Errorf("%+v: no answer: %v", h, err)
		return preface.Status{Code: 255}, nil
	}
	defer out.Reset()
	if out.Status.Code == preface.CodeOK {
		return out.Status, nil
	}
	_ = out.SetReadDeadline(time.Now().Add(5 * time.Second))
	rest, err := io.ReadAll(out)
	if err != nil {
		t.Errorf("%+v: the stream did not end after the refusal: %v", h, err)
	}
	return out.Status, rest
}

// streamConn is a stream through a tunnel as the net.Conn of an inner TLS client.
type streamConn struct {
	ctx context.Context
	s   *tunnel.Session
	h   tunnel.Header
	out *tunnel.Outgoing
}

func (c *streamConn) Write(b []byte) (int, error) {
	if c.out != nil {
		return c.out.Write(b)
	}
	out, err := c.s.Open(c.ctx, c.h, b) // crypto/tls writes its hello in one piece
	if err != nil {
		return 0, err
	}
	if c.out = out; out.Status.Code != preface.CodeOK {
		return 0, fmt.Errorf("refused: %s %s", out.Status.Code, out.Status.Reason)
	}
	return len(b), nil
}

func (c *streamConn) Read(b []byte) (int, error) {
	if c.out == nil {
		return 0, errors.New("nothing was written yet")
	}
	return c.out.Read(b)
}

func (c *streamConn) Close() error {
	if c.out != nil {
		c.out.Reset()
	}
	return nil
}

func (c *streamConn) LocalAddr() net.Addr  { return &net.TCPAddr{} }
func (c *streamConn) RemoteAddr() net.Addr { return &net.TCPAddr{} }

func (c *streamConn) SetDeadline(t time.Time) error {
	if c.out == nil {
		return nil
	}
	return c.out.SetDeadline(t)
}

func (c *streamConn) SetReadDeadline(t time.Time) error  { return c.SetDeadline(t) }
func (c *streamConn) SetWriteDeadline(t time.Time) error { return c.SetDeadline(t) }

// inner speaks to a callee's sidecar as the workload of that path, over any connection.
func (r *redTeam) inner(ctx context.Context, raw net.Conn, path, sni string) (*tls.Conn, error) {
	r.t.Helper()
	config := r.source(path).ClientTLS(trust.TLSOptions{Authorize: func(spiffeid.ID) error { return nil }, ALPN: []string{"http/1.1"}, ServerName: sni})
	c := tls.Client(raw, config)
	if err := c.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, err
	}
	return c, nil
}
