// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/internal/relay"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

const (
	maxStreamsPerPeer = 4096
	dialTimeout       = time.Second
	maxDials          = 3
)

// inbound is one stream of a peer on its way to a sidecar of this cluster.
type inbound struct {
	peer    spiffeid.TrustDomain
	service federation.ServiceName
	port    federation.PortName
	source  spiffeid.ID
	header  tunnel.Header
	hello   *preface.Hello
}

// serveStream judges a stream before a byte of it moves, and relays it.
func (g *Gateway) serveStream(ctx context.Context, s *tunnel.Session, st tunnel.Stream, h tunnel.Header) {
	started := g.cfg.Now()
	in, r := g.judgeHeader(s.Peer(), h)
	if r != nil {
		g.refuseStream(s, st, h, r)
		return
	}
	release, ok := g.perPeer.take(s.Peer())
	if !ok {
		g.refuseStream(s, st, h, refusal(preface.CodeOverloaded, "peer_stream_limit"))
		return
	}
	defer release()
	if r := g.readInnerHello(st, in); r != nil {
		g.refuseStream(s, st, h, r)
		return
	}
	done, ok := g.pairs.Add(st.Reset)
	if !ok {
		g.refuseStream(s, st, h, refusal(preface.CodeDraining, "gateway_draining"))
		return
	}
	defer done()
	var ended endReason
	withdrawn := func(reason string) { ended.set(reason); st.Reset() }
	// In the registry before the view is asked again: a withdrawal in between is seen by one of the two.
	remove := g.registry.Add(withdrawal.Subject{Peer: in.peer, Identity: in.source, Export: exportOf(in.service, string(in.port)),
		Class: classIn}, withdrawn)
	defer remove()
	if _, r := g.judgeHeader(s.Peer(), h); r != nil {
		g.refuseStream(s, st, h, r)
		return
	}
	conn, ep, r := g.dialLocal(ctx, in)
	if r != nil {
		g.refuseStream(s, st, h, r)
		return
	}
	if callee, err := spiffeid.Parse(ep.spiffeID); err == nil {
		defer g.registry.Add(withdrawal.Subject{Peer: in.peer, Identity: callee, Class: classCallee}, withdrawn)()
		if _, denied := g.view.Load().denied.Judge(callee, time.Time{}); denied {
			relay.Abort(conn)
			g.refuseStream(s, st, h, refusal(preface.CodeNoHealthyInstance, "identity_withdrawn"))
			return
		}
	}
	local := relay.TCP(conn)
	defer local.Reset()
	if _, err := conn.Write(in.hello.Raw); err != nil {
		g.failures.note(ep.address, g.cfg.Now())
		g.refuseStream(s, st, h, &preface.Refused{Code: preface.CodeNoHealthyInstance, Reason: "sidecar_reset", Handle: ep.handle})
		return
	}
	if err := s.Reply(st, preface.Status{Code: preface.CodeOK, Handle: ep.handle}); err != nil {
		return
	}
	_ = st.SetReadDeadline(time.Time{})
	c := crossing{hopIn, s, in.service, in.source.String()}
	g.connectSpan(h.Traceparent, c, started, 0, "")
	key := markKey{s, h.Tag, hopIn}
	g.marks.enter(key, c)
	defer g.marks.leave(key)
	closed := g.metrics.opened("inbound", g.clusterOf(in.peer), string(g.cluster))
	result := relay.Pair(st, local, nil)
	closed(result, result.AtoB, result.BtoA, ended.get())
	g.log.Debug("stream ended", "peer", s.Peer().String(), "service", h.Service, "tunnel", s.ID(), "sent", result.AtoB,
		"received", result.BtoA, "error", errString(result.Err), "reason", ended.get())
}

// judgeHeader is every check that needs no more than the header, in the order in which the answers tell least.
func (g *Gateway) judgeHeader(from spiffeid.TrustDomain, h tunnel.Header) (*inbound, *preface.Refused) {
	v := g.view.Load()
	if g.closing.Load() {
		return nil, refusal(preface.CodeDraining, "gateway_draining")
	}
	if !v.ready(from) {
		return nil, refusal(preface.CodeDenied, "not_a_peer")
	}
	if h.Hops < 1 || h.Hops > tunnel.MaxHops {
		return nil, refusal(preface.CodeBadRequest, "hops")
	}
	service, err := federation.ParseServiceName(h.Service)
	if err != nil {
		return nil, refusal(preface.CodeNotExported, "service")
	}
	port, err := federation.ParsePortName(h.Port)
	if err != nil || !v.granted(from, service, h.Port, h.Export) {
		return nil, refusal(preface.CodeNotExported, "")
	}
	source, err := spiffeid.Parse(h.Source)
	if err != nil || source.TrustDomain() != from {
		return nil, refusal(preface.CodeDenied, "source")
	}
	if _, _, ok := source.Workload(); !ok {
		return nil, refusal(preface.CodeDenied, "source")
	}
	if _, denied := v.denied.Judge(source, time.Time{}); denied {
		return nil, refusal(preface.CodeDenied, "identity_withdrawn")
	}
	return &inbound{peer: from, service: service, port: port, source: source, header: h}, nil
}

// readInnerHello requires that the inner TLS names what the header names, in this cluster.
func (g *Gateway) readInnerHello(st tunnel.Stream, in *inbound) *preface.Refused {
	_ = st.SetReadDeadline(time.Now().Add(preface.Timeout))
	hello, err := preface.ReadHello(st, nil)
	if err != nil {
		return refusal(preface.CodeBadRequest, "client_hello")
	}
	if hello.ServerName != federation.SNI(in.port, in.service, g.cluster, g.federation) {
		return refusal(preface.CodeBadRequest, "server_name")
	}
	in.hello = hello
	return nil
}

// dialLocal picks an instance and connects to its sidecar, trying others while time and candidates last.
func (g *Gateway) dialLocal(ctx context.Context, in *inbound) (*net.TCPConn, endpoint, *preface.Refused) {
	limit := in.header.Deadline
	if limit <= 0 {
		limit = openDeadline
	}
	ctx, cancel := context.WithTimeout(ctx, min(limit, openDeadline))
	defer cancel()
	candidates, r := g.candidates(in)
	for i := 0; r == nil && i < maxDials && len(candidates) > 0 && ctx.Err() == nil; i++ {
		var ep endpoint
		ep, candidates = draw(candidates)
		dctx, stop := context.WithTimeout(ctx, dialTimeout)
		c, err := (&net.Dialer{KeepAlive: 15 * time.Second}).DialContext(dctx, "tcp", ep.address)
		stop()
		if err == nil {
			return c.(*net.TCPConn), ep, nil
		}
		g.failures.note(ep.address, g.cfg.Now())
		g.log.Debug("sidecar not reached", "proxy", ep.proxy, "address", ep.address, "error", err.Error())
	}
	if r == nil {
		r = refusal(preface.CodeNoHealthyInstance, "sidecars_unreachable")
		if ctx.Err() != nil {
			r = refusal(preface.CodeDeadline, "sidecars_unreachable")
		}
	}
	return nil, endpoint{}, r
}

func (g *Gateway) refuseStream(s *tunnel.Session, st tunnel.Stream, h tunnel.Header, r *preface.Refused) {
	g.metrics.refused("peer", r.Code.String())
	g.log.Debug("stream refused", "peer", s.Peer().String(), "service", h.Service, "port", h.Port, "code", r.Code.String(),
		"reason", r.Reason)
	_ = s.Reply(st, preface.Status{Code: r.Code, Reason: r.Reason, Handle: r.Handle})
}

func (g *Gateway) clusterOf(td spiffeid.TrustDomain) string {
	if p := g.view.Load().peers[td]; p != nil {
		return string(p.cluster)
	}
	return ""
}

// peerLimits counts the open streams of each peer.
type peerLimits struct {
	mu   sync.Mutex
	open map[spiffeid.TrustDomain]int
}

func (p *peerLimits) take(td spiffeid.TrustDomain) (release func(), ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open == nil {
		p.open = make(map[spiffeid.TrustDomain]int)
	}
	if p.open[td] >= maxStreamsPerPeer {
		return nil, false
	}
	p.open[td]++
	return func() { p.release(td) }, true
}

func (p *peerLimits) release(td spiffeid.TrustDomain) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open[td]--; p.open[td] == 0 {
		delete(p.open, td)
	}
}
