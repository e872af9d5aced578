// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"sync"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/span"
)

// hop is which end of a tunnel this gateway is for a stream.
type hop string

const (
	hopOut hop = span.GatewayOut
	hopIn  hop = span.GatewayIn
)

// crossing is what the spans of one stream have in common.
type crossing struct {
	hop     hop
	tunnel  *tunnel.Session
	service federation.ServiceName
	source  string
}

// startSpan begins the span of a crossing under the trace in traceparent. Without a valid one there is no span: gateways
// cannot read requests and never begin a trace.
func (g *Gateway) startSpan(traceparent string, c crossing, at time.Time) *span.Active {
	parent, err := span.ParseTraceparent(traceparent)
	if err != nil || !parent.IsValid() {
		return nil
	}
	src, dst := string(g.cluster), g.clusterOf(c.tunnel.Peer())
	if c.hop == hopIn {
		src, dst = dst, src
	}
	a := g.cfg.Recorder.StartAt(parent, "tunnel "+src+"→"+dst, span.Internal, at)
	a.Set(
		span.String(span.HopKind, string(c.hop)), span.String(span.SrcCluster, src), span.String(span.DstCluster, dst),
		span.String(span.DstService, c.service.String()), span.String(span.MTLSPeerID, c.source),
		span.String(span.TunnelID, c.tunnel.ID()), span.String(span.TunnelTransport, c.tunnel.Transport()),
		span.String(span.TunnelLane, "interactive"), span.Millis(span.TunnelRTT, c.tunnel.RTT()),
		span.Float(span.TunnelLoss, c.tunnel.Loss()), span.Int(span.TunnelStreams, c.tunnel.Streams()),
		span.Int(span.TunnelWindow, int(c.tunnel.Window())),
		span.String(span.TunnelGatewayLocal, g.cfg.Name), span.String(span.TunnelGatewayRemote, c.tunnel.Gateway()),
	)
	return a
}

// connectSpan is the span of making a connection: from its first byte here to the answer. Later requests on the same
// connection have spans of their own, by markers.
func (g *Gateway) connectSpan(traceparent string, c crossing, began time.Time, waited time.Duration, refused string) {
	a := g.startSpan(traceparent, c, began)
	if a == nil {
		return
	}
	if waited > 0 {
		a.Set(span.Millis(span.TunnelWait, waited))
	}
	if refused != "" {
		a.Fail(refused, "")
	}
	a.End()
}

// markKey is one relayed stream in markers.
type markKey struct {
	tunnel *tunnel.Session
	tag    uint64
	hop    hop
}

const maxOpenMarks = 128 // requests at a time on one connection whose spans are kept

// openMarks are the spans of requests on pooled connections that have begun and not ended.
type openMarks struct {
	mu      sync.Mutex
	streams map[markKey]*markedStream
}

type markedStream struct {
	crossing crossing
	open     map[string]*span.Active // by traceparent
}

// enter makes a stream known; markers of others are ignored.
func (m *openMarks) enter(k markKey, c crossing) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.streams == nil {
		m.streams = make(map[markKey]*markedStream)
	}
	m.streams[k] = &markedStream{crossing: c, open: make(map[string]*span.Active)}
}

// leave ends what is open on a stream.
func (m *openMarks) leave(k markKey) {
	m.mu.Lock()
	s := m.streams[k]
	delete(m.streams, k)
	m.mu.Unlock()
	if s == nil {
		return
	}
	for _, a := range s.open {
		a.End()
	}
}

// take applies one marker; at is when what an end marker tells of happened here.
func (m *openMarks) take(k markKey, traceparent string, end bool, at time.Time, start func(crossing) *span.Active) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.streams[k]
	if s == nil {
		return
	}
	a := s.open[traceparent]
	switch {
	case end && a != nil:
		delete(s.open, traceparent)
		a.EndAt(at)
	case !end && a == nil && len(s.open) < maxOpenMarks:
		if a = start(s.crossing); a != nil {
			s.open[traceparent] = a
		}
	}
}

// localMarker takes a sidecar's marker, and passes it on to the far gateway.
func (g *Gateway) localMarker(s *localSession, m *controlpb.TraceMarker) {
	o := s.connection(m.GetConnection())
	if o == nil {
		return
	}
	g.mark(markKey{o.stream.Session, o.stream.Tag, hopOut}, m.Traceparent, m.End)
	o.stream.Session.SendMarker(tunnel.Marker{Tag: o.stream.Tag, Direction: uint8(m.Direction & 1), Offset: m.Offset,
		Traceparent: m.Traceparent, End: m.End})
}

// remoteMarker takes a far gateway's marker.
func (g *Gateway) remoteMarker(s *tunnel.Session, m tunnel.Marker) {
	g.mark(markKey{s, m.Tag, hopIn}, m.Traceparent, m.End)
}

func (g *Gateway) mark(k markKey, traceparent string, end bool) {
	at := g.cfg.Now()
	if k.hop == hopIn {
		at = at.Add(-k.tunnel.RTT()) // the response has gone to the caller's sidecar, and the marker has come from there
	}
	g.marks.take(k, traceparent, end, at, func(c crossing) *span.Active {
		return g.startSpan(traceparent, c, g.cfg.Now())
	})
}
