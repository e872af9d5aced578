// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/sidecar/inner"
	"github.com/strait-mesh/strait/sidecar/local"
	"github.com/strait-mesh/strait/sidecar/pool"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"

	sidecarhttp "github.com/strait-mesh/strait/sidecar/http"
)

var alpnHTTP = []string{"h2"}

// pooledConn is an HTTP connection in a pool.
type pooledConn struct {
	*sidecarhttp.Conn
	inner *inner.Conn

	mu     sync.Mutex // orders Retire before Close: the engine waits in Close for what Retire has started
	closed bool
}

func (c *pooledConn) Retire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.Conn.Retire()
	}
}

func (c *pooledConn) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	return c.Conn.Close()
}

func (c *pooledConn) Usable() bool { return c.Conn.Ready() }

func (c *pooledConn) Done() <-chan struct{} { return c.Conn.Closed() }

// dialFor returns the dial of a group: an h2 connection where it pools, a probe of the handshake where it does not.
func (s *Sidecar) dialFor(svc *service, key groupKey) func(context.Context, pool.Want) (pool.Conn, string, error) {
	return func(ctx context.Context, want pool.Want) (pool.Conn, string, error) {
		var alpn []string
		if key.http {
			alpn = alpnHTTP
		}
		c, instance, err := s.dialInner(ctx, svc, key, want, alpn, "")
		if err != nil {
			return nil, "", err
		}
		if !key.http {
			c.Close() // it was reached: that is all a probe wants to know
			return nil, instance, nil
		}
		hc, err := s.clientConn(c, "h2")
		if err != nil {
			c.Close()
			return nil, "", &pool.Failure{Key: instance, Reason: federation.UpstreamReset, Err: err}
		}
		return hc, instance, nil
	}
}

func (s *Sidecar) clientConn(c *inner.Conn, protocol string) (*pooledConn, error) {
	hc, err := sidecarhttp.NewClientConn(c, sidecarhttp.ConnConfig{
		Protocol: protocol, PingEvery: pingEvery, PingTimeout: pingTimeout, SuspectAfter: suspectAfter,
	})
	if err != nil {
		return nil, err
	}
	return &pooledConn{Conn: hc, inner: c}, nil
}

// dialInner makes one inner connection and says which instance it reached: a proxy's name, or "<handle>@<gateway>".
func (s *Sidecar) dialInner(ctx context.Context, svc *service, key groupKey, want pool.Want, alpn []string, traceparent string,
) (*inner.Conn, string, error) {
	r, p := svc.route.Load(), s.place.Load()
	if r == nil || r.svc == nil || p == nil {
		return nil, "", &pool.Failure{Neutral: true, Reason: federation.ConfigMissing, Err: errNoService}
	}
	t := inner.Target{
		ALPN: alpn, Traceparent: traceparent, Class: preface.ClassInteractive,
		Export: exportName(svc.name, key.port, key.cluster),
	}
	if key.cluster == p.cluster {
		return s.dialLocal(ctx, svc, r, p, key, want, t)
	}
	return s.dialRemote(ctx, svc, r, key, want, t)
}

func exportName(name federation.ServiceName, port string, cluster federation.ClusterName) string {
	return name.String() + ":" + port + "@" + cluster.String()
}

func (s *Sidecar) dialLocal(ctx context.Context, svc *service, r *route, p *place, key groupKey, want pool.Want, t inner.Target,
) (*inner.Conn, string, error) {
	i := slices.IndexFunc(r.svc.GetLocal(), func(e *controlpb.LocalEndpoint) bool { return e.GetProxy() == want.Key })
	if i < 0 {
		return nil, "", &pool.Failure{Neutral: true, Reason: federation.NoEndpoints, Err: errors.New("endpoint is gone")}
	}
	e := r.svc.GetLocal()[i]
	id, err := spiffeid.Parse(e.GetSpiffeId())
	if err != nil {
		return nil, "", &pool.Failure{Key: want.Key, Reason: federation.TrustRefused, Err: err}
	}
	if reason, denied := s.isDenied(id, time.Time{}); denied {
		return nil, "", &pool.Failure{Key: want.Key, Reason: federation.TrustRefused, Err: fmt.Errorf("identity withdrawn: %s", reason)}
	}
	t.Address, t.IDs = e.GetInboundAddress(), []spiffeid.ID{id}
	t.SNI = federation.SNI(federation.PortName(key.port), svc.name, p.cluster, p.federation)
	c, err := s.dialer.Dial(ctx, t)
	if err != nil {
		return nil, "", s.failure(err, want.Key, "")
	}
	return s.admit(c, t, want.Key)
}

func (s *Sidecar) dialRemote(ctx context.Context, svc *service, r *route, key groupKey, want pool.Want, t inner.Target,
) (*inner.Conn, string, error) {
	remote := findRemote(r.svc, key.cluster)
	if remote == nil {
		return nil, "", &pool.Failure{Cluster: true, Reason: federation.NotExported, Err: errors.New("not offered any more")}
	}
	td, err := spiffeid.ParseTrustDomain(remote.GetTrustDomain())
	if err != nil {
		return nil, "", &pool.Failure{Cluster: true, Reason: federation.TrustRefused, Err: err}
	}
	for _, text := range remote.GetSpiffeIds() {
		id, err := spiffeid.Parse(text)
		if err != nil || id.TrustDomain() != td {
			continue // a peer is believed only about its own trust domain
		}
		if _, denied := s.isDenied(id, time.Time{}); denied {
			continue
		}
		t.IDs = append(t.IDs, id)
	}
	t.SNI = federation.SNI(federation.PortName(key.port), svc.name, key.cluster, federation.FederationName(remote.GetFederation()))
	for _, k := range want.Avoid {
		if h, ok := parseHandle(k); ok && len(t.Avoid) < preface.MaxAvoid && !slices.Contains(t.Avoid, h) {
			t.Avoid = append(t.Avoid, h)
		}
	}
	if !s.locals.Known() { // just started, or every gateway is restarting: worth a moment
		wait, cancel := context.WithTimeout(ctx, local.Grace)
		s.locals.Await(wait)
		cancel()
	}
	last := &pool.Failure{Neutral: true, Reason: federation.PeerUnreachable, Err: errors.New("no session to a gateway")}
	for _, session := range s.gatewaysFor(td) {
		t.Via = session
		c, err := s.dialer.Dial(ctx, t)
		if err == nil {
			return s.admit(c, t, handleKey(c.Handle, session))
		}
		f := s.failure(err, "", session.Gateway().Name)
		if f.Cluster && f.Reason == federation.NoEndpoints && len(t.Avoid) > 0 {
			f.Cluster, f.Neutral = false, true // there is none besides those that we did not want
		}
		last = f
		if ctx.Err() != nil || !otherGateway(err) {
			break
		}
	}
	return nil, "", last
}

// gatewaysFor lists the sessions to try, at most three, in turn: those first whose gateway has a tunnel up, and of these the ones that
// do not drain.
func (s *Sidecar) gatewaysFor(td spiffeid.TrustDomain) []*local.Session {
	sessions := s.locals.Sessions()
	if len(sessions) == 0 {
		return nil
	}
	n := int(s.turn.Add(1) % uint64(len(sessions)))
	sessions = append(slices.Clone(sessions[n:]), sessions[:n]...)
	rank := func(x *local.Session) int {
		t, known := x.Tunnel(td)
		switch {
		case s.locals.Draining(x):
			if t.Up {
				return 1
			}
			return 5
		case t.Up:
			return 0
		case t.Suspect:
			return 2
		case !known:
			return 3
		}
		return 4
	}
	slices.SortStableFunc(sessions, func(a, b *local.Session) int { return rank(a) - rank(b) })
	return sessions[:min(3, len(sessions))]
}

// otherGateway says whether another gateway of this cluster may do better.
func otherGateway(err error) bool {
	var e *inner.Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Kind {
	case inner.Gateway:
		return true
	case inner.Refused:
		return e.Code == preface.CodePeerUnreachable || e.Code == preface.CodeDraining || e.Code == preface.CodeOverloaded
	}
	return false
}

// failure says what a failed dial means to the books.
func (s *Sidecar) failure(err error, key, gateway string) *pool.Failure {
	f := &pool.Failure{Key: key, Reason: federation.UpstreamReset, Err: err}
	var e *inner.Error
	if !errors.As(err, &e) {
		return f
	}
	if gateway != "" && !e.Handle.IsZero() {
		f.Key = hex.EncodeToString(e.Handle[:]) + "@" + gateway
	}
	switch e.Kind {
	case inner.NoIdentity:
		f.Neutral, f.Reason = true, federation.IdentityExpired
	case inner.Untrusted:
		f.Reason = federation.TrustRefused
	case inner.Gateway:
		f.Neutral, f.Reason = true, federation.PeerUnreachable
	case inner.Refused:
		switch e.Code {
		case preface.CodeNoHealthyInstance:
			f.Cluster, f.Reason = true, federation.NoEndpoints
		case preface.CodeNotExported:
			f.Cluster, f.Reason = true, federation.NotExported
		case preface.CodeDenied:
			f.Cluster, f.Reason = true, federation.TrustRefused
		case preface.CodePeerUnreachable:
			f.Cluster, f.Reason = true, federation.PeerUnreachable
		case preface.CodeOverloaded:
			f.Neutral, f.Reason = true, federation.ShedOverload
		case preface.CodeDraining:
			f.Neutral, f.Reason = true, federation.PeerUnreachable
		case preface.CodeDeadline:
			f.Reason = federation.DeadlineExceeded
		}
	}
	return f
}

func handleKey(h preface.Handle, session *local.Session) string {
	return hex.EncodeToString(h[:]) + "@" + session.Gateway().Name
}

func parseHandle(key string) (preface.Handle, bool) {
	text, _, _ := strings.Cut(key, "@")
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != len(preface.Handle{}) {
		return preface.Handle{}, false
	}
	return preface.Handle(b), true
}

// sameInstance compares keys without the gateway they were reached through.
func sameInstance(a, b string) bool {
	a, _, _ = strings.Cut(a, "@")
	b, _, _ = strings.Cut(b, "@")
	return a == b
}

func findRemote(svc *controlpb.Service, cluster federation.ClusterName) *controlpb.RemoteCluster {
	for _, r := range svc.GetRemote() {
		if r.GetCluster() == string(cluster) {
			return r
		}
	}
	return nil
}

// admit judges a new connection, which stands in the ledger by now: what was withdrawn while it was made ends here.
func (s *Sidecar) admit(c *inner.Conn, t inner.Target, key string) (*inner.Conn, string, error) {
	if c.Via != nil {
		s.mu.Lock()
		s.inners[c] = struct{}{}
		s.mu.Unlock()
		c.OnClose(func() {
			s.mu.Lock()
			delete(s.inners, c)
			s.mu.Unlock()
		})
	}
	reason, ok := s.judge(withdrawal.Subject{
		Peer: c.Peer.ID.TrustDomain(), Identity: c.Peer.ID, Export: t.Export, Class: withdrawal.Outbound, Issued: c.Peer.Issued(),
	})
	if !ok {
		c.Close()
		return nil, "", &pool.Failure{Key: key, Reason: federation.TrustRefused, Err: errors.New(reason)}
	}
	return c, key, nil
}

// notice takes a gateway's word about connections through one of its sessions.
func (s *Sidecar) notice(n local.Notice) {
	match := func(c *inner.Conn) bool {
		if c.Via != n.Session || !n.Peer.IsZero() && c.Peer.ID.TrustDomain() != n.Peer {
			return false
		}
		return len(n.Connections) == 0 || slices.Contains(n.Connections, c.Counter)
	}
	if n.Withdrawn {
		s.mu.Lock()
		var cut []*inner.Conn
		for c := range s.inners {
			if match(c) {
				cut = append(cut, c)
			}
		}
		s.mu.Unlock()
		for _, c := range cut {
			c.Withdraw(fmt.Sprintf("gateway: %s", n.Reason))
		}
		return
	}
	s.retire(match)
}

// retire lets the pooled connections that match end with what is on them.
func (s *Sidecar) retire(match func(*inner.Conn) bool) {
	for _, svc := range s.services.list() {
		svc.mu.Lock()
		groups := make([]*pool.Group, 0, len(svc.groups))
		for _, g := range svc.groups {
			groups = append(groups, g)
		}
		svc.mu.Unlock()
		for _, g := range groups {
			g.RetireIf(func(c pool.Conn) bool {
				p, ok := c.(*pooledConn)
				return ok && match(p.inner)
			})
		}
	}
}
