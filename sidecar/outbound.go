// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"errors"
	"net"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/relay"
	"github.com/strait-mesh/strait/internal/span"
	"github.com/strait-mesh/strait/sidecar/inner"
	"github.com/strait-mesh/strait/sidecar/pool"

	sidecarhttp "github.com/strait-mesh/strait/sidecar/http"
)

// newEngine makes the HTTP engine of one outbound listener.
func (s *Sidecar) newEngine(resolve sidecarhttp.Resolve) (*sidecarhttp.Outbound, error) {
	return sidecarhttp.NewOutbound(sidecarhttp.OutboundConfig{
		Name: s.engineName(), Self: s.engineSelf(), Picker: picker{s}, Resolve: resolve, Budget: s.budget,
		Recorder: s.cfg.Recorder, Metrics: s.metrics.requests, Now: s.cfg.Now, Logger: s.log,
		Limits: sidecarhttp.Limits{Grace: s.cfg.DrainGrace},
	})
}

// resolveHost maps a Host to a service: mesh names only.
func (s *Sidecar) resolveHost(host, port string) (sidecarhttp.Target, error) {
	p := s.place.Load()
	if p == nil {
		return sidecarhttp.Target{}, &sidecarhttp.Refusal{
			Reason: federation.ConfigMissing, Code: problem.UnknownService, Status: 503, Message: "this sidecar has no configuration yet",
		}
	}
	name, pinned, ok := federation.ParseHost(host, p.federation)
	if !ok {
		return sidecarhttp.Target{}, &sidecarhttp.Refusal{
			Reason: federation.ConfigMissing, Code: problem.UnknownService, Status: 404, Message: "the host is no service of this mesh",
		}
	}
	return sidecarhttp.Target{Service: name, Pinned: pinned, Port: federation.PortName(port)}, nil
}

func isHTTP(p controlpb.Protocol) bool {
	switch p {
	case controlpb.Protocol_PROTOCOL_HTTP1, controlpb.Protocol_PROTOCOL_HTTP2, controlpb.Protocol_PROTOCOL_GRPC:
		return true
	}
	return false
}

// serveUpstream carries one connection of the application to an explicit upstream, as HTTP or as bytes.
func (s *Sidecar) serveUpstream(u Upstream, engine *sidecarhttp.Outbound, c net.Conn) {
	call, err := s.newCall(s.connCtx, u.Service, u.Port, u.Pinned, false)
	if err != nil { // nobody knows whether this port speaks HTTP: only a reset says no to both
		s.log.Debug("upstream not served", "service", u.Service, "error", err)
		relay.Abort(c)
		return
	}
	if isHTTP(call.port.GetProtocol()) {
		engine.ServeConn(s.graceCtx, c)
		return
	}
	s.serveTCP(call, c)
}

// serveTCP finds a way and relays. No byte of c is read before a way stands, so every failed way can be replaced by another.
func (s *Sidecar) serveTCP(c *call, app net.Conn) {
	ctx, cancel := context.WithTimeout(s.connCtx, pickWait)
	defer cancel()
	for {
		cluster, force, ok := c.next()
		if !ok {
			r := c.refuse()
			s.metrics.refused(c.svc.name, r.Reason)
			s.log.Debug("connection refused", "service", c.svc.name, "reason", r.Reason, "error", r)
			relay.Abort(app)
			return
		}
		ic, lease, err := c.open(ctx, cluster, force, nil, span.Context{})
		if err != nil {
			c.failed(cluster, force, err)
			if ctx.Err() != nil {
				relay.Abort(app)
				return
			}
			continue
		}
		cancel()
		self := s.clusterName()
		closed := s.metrics.requests.Open("outbound", "tcp", self, cluster.String())
		res := relay.Pair(relay.Wrap(app), ic.Stream(), nil)
		reason, out := tcpEnd(res, ic.Reason())
		if out == pool.OK {
			lease.Latency = 1 // says nothing about latency
		} else if out == pool.Reset && wayBroke(ic) {
			out = pool.Neutral
		}
		lease.Done(out, res.Err)
		s.metrics.requests.Bytes("sent", "tcp", self, cluster.String(), res.AtoB)
		s.metrics.requests.Bytes("received", "tcp", self, cluster.String(), res.BtoA)
		s.metrics.requests.Observe(metric.Request{
			Reporter: metric.Source, SrcService: s.cfg.Proxy, SrcCluster: self, DstService: c.svc.name.String(),
			DstCluster: cluster.String(), Protocol: "tcp", GRPCCode: -1, Failure: res.Err != nil, Reason: c.reason(cluster),
			Scope: c.scope(s.place.Load(), cluster, lease.Key), MTLS: true,
		})
		closed(reason)
		return
	}
}

func (c *call) reason(cluster federation.ClusterName) string {
	if c.pinned != "" {
		return federation.HeaderOverride.String()
	}
	m, _, _ := c.route.decision.Member(cluster)
	return m.Reason.String()
}

// tcpEnd words how a relayed connection ended, and whether the far end is to blame: only an end without a single byte of answer is.
func tcpEnd(res relay.Result, withdrawn string) (reason string, o pool.Outcome) {
	switch {
	case withdrawn != "":
		return "withdrawn", pool.Neutral
	case res.Err == nil:
		return "end", pool.OK
	case res.FromA:
		return "reset_by_caller", pool.Neutral
	case isAlert(res.Err):
		return "refused_by_callee", pool.Neutral // it judged our identity, or its policy did: that is not ill health
	case res.BtoA == 0:
		return "reset_by_callee", pool.Reset
	default:
		return "reset_by_callee", pool.Neutral
	}
}

// wayBroke says that a connection's gateway has gone, or that its tunnel does not answer: what breaks then says nothing about the
// callee, which would be ejected for 30 s although it may be back with the tunnel.
func wayBroke(c *inner.Conn) bool {
	if c.Via == nil {
		return false
	}
	t, known := c.Via.Tunnel(c.Peer.ID.TrustDomain())
	return c.Via.Reason() != "" || known && (!t.Up || t.Suspect)
}

// isAlert says that the other end sent a TLS alert, which is how a callee refuses after our side of the handshake was done.
func isAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}
