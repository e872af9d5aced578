// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"time"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/internal/relay"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

const (
	openDeadline    = 5 * time.Second  // for a stream to be answered, unless the caller says less
	maxOpenDeadline = 30 * time.Second // whatever the caller says
	statusTimeout   = 2 * time.Second
)

// outbound is one connection of a sidecar on its way to a far gateway.
type outbound struct {
	session *localSession
	preface *preface.Preface
	hello   *preface.Hello
	service federation.ServiceName
	port    federation.PortName
	peer    *peer
	stream  *tunnel.Outgoing
	count   relay.Counters
}

// endReason is why a pair was ended from outside, if it was.
type endReason struct{ p atomic.Pointer[string] }

func (e *endReason) set(reason string) { e.p.CompareAndSwap(nil, &reason) }

func (e *endReason) get() string {
	if p := e.p.Load(); p != nil {
		return *p
	}
	return ""
}

// refusal is a status that ends a connection before it began.
func refusal(code preface.Code, reason string) *preface.Refused {
	return &preface.Refused{Code: code, Reason: reason}
}

// servePreface takes one connection: judge the preface, open a stream, answer with one status frame, relay.
func (g *Gateway) servePreface(ctx context.Context, c *net.TCPConn, first []byte, proven func()) {
	p, hello, err := preface.Read(c, first, g.locals.key)
	if err != nil {
		// Who has no session gets the least answer there is, and only after a whole preface and hello.
		g.log.Debug("preface refused", "address", c.RemoteAddr().String(), "error", err.Error())
		g.metrics.refused("local", "preface")
		if errors.Is(err, preface.ErrHello) || errors.Is(err, preface.ErrMAC) {
			g.answer(c, preface.Status{Code: preface.CodeBadRequest, Reason: "preface"})
		}
		return
	}
	proven()
	_ = c.SetDeadline(time.Time{})
	o := &outbound{session: g.locals.get(p.Session), preface: p, hello: hello}
	if r := g.judgeOutbound(o); r != nil {
		g.refuseOutbound(c, o, r)
		return
	}
	// The far stream's Reset needs the registry to know it before it exists: ctx ends the opening.
	octx, cancel := context.WithCancel(ctx)
	defer cancel()
	var ended endReason
	remove := g.registry.Add(withdrawal.Subject{Peer: o.peer.td, Identity: o.session.identity, Issued: o.session.issued, Class: classOut,
		Export: exportOf(o.service, string(o.port))}, func(reason string) {
		ended.set(reason)
		cancel()
		relay.Abort(c)
	})
	defer remove()
	if !g.view.Load().ready(o.peer.td) {
		g.refuseOutbound(c, o, refusal(preface.CodePeerUnreachable, "peer_withdrawn"))
		return
	}
	done, ok := g.pairs.Add(func() { cancel(); relay.Abort(c) })
	if !ok {
		g.refuseOutbound(c, o, refusal(preface.CodeDraining, "gateway_draining"))
		return
	}
	defer done()
	started := g.cfg.Now()
	status, err := g.openOutbound(octx, o)
	if err != nil {
		var r *preface.Refused
		if !errors.As(err, &r) {
			r = refusal(preface.CodePeerUnreachable, "no_tunnel")
		}
		g.refuseOutbound(c, o, r)
		return
	}
	stop := context.AfterFunc(octx, o.stream.Reset)
	defer stop()
	defer o.stream.Reset()
	if !g.answer(c, status) {
		return
	}
	o.session.enter(p.Counter, o)
	defer o.session.leave(p.Counter)
	c0 := crossing{hopOut, o.stream.Session, o.service, o.session.identity.String()}
	g.connectSpan(p.Traceparent, c0, started, o.stream.Waited, "")
	key := markKey{o.stream.Session, o.stream.Tag, hopOut}
	g.marks.enter(key, c0)
	defer g.marks.leave(key)
	closed := g.metrics.opened("outbound", string(g.cluster), string(o.peer.cluster))
	result := relay.Pair(relay.TCP(c), o.stream, &o.count)
	closed(result, result.AtoB, result.BtoA, ended.get())
	g.log.Debug("connection ended", "peer", o.peer.td.String(), "service", o.service.String(), "tunnel", o.stream.Session.ID(),
		"sent", result.AtoB, "received", result.BtoA, "error", errString(result.Err), "reason", ended.get())
}

// judgeOutbound decides from the view whether and whither o may go.
func (g *Gateway) judgeOutbound(o *outbound) *preface.Refused {
	v := g.view.Load()
	if o.session == nil {
		return refusal(preface.CodeDenied, "session_ended")
	}
	if !o.session.window.Accept(o.preface.Counter) {
		return refusal(preface.CodeBadRequest, "replayed")
	}
	if g.closing.Load() {
		return refusal(preface.CodeDraining, "gateway_draining")
	}
	if _, denied := v.denied.Judge(o.session.identity, o.session.issued); denied {
		return refusal(preface.CodeDenied, "identity_withdrawn")
	}
	port, service, cluster, fed, err := federation.ParseSNI(o.preface.Authority)
	if err != nil || fed != g.federation || cluster == g.cluster {
		return refusal(preface.CodeBadRequest, "authority")
	}
	o.port, o.service = port, service
	if o.peer = v.byCluster[cluster]; o.peer == nil || !o.peer.ready {
		return refusal(preface.CodePeerUnreachable, "no_such_peer")
	}
	return nil
}

// openOutbound opens the stream, on a second session when the first breaks before it has answered.
func (g *Gateway) openOutbound(ctx context.Context, o *outbound) (preface.Status, error) {
	limit := o.preface.Deadline
	if limit <= 0 {
		limit = openDeadline
	}
	ctx, cancel := context.WithTimeout(ctx, min(limit, maxOpenDeadline))
	defer cancel()
	end, _ := ctx.Deadline()
	var tried []*tunnel.Session
	for {
		s := g.tun.Pick(o.peer.td, tried...)
		if s == nil {
			return preface.Status{}, refusal(preface.CodePeerUnreachable, "no_tunnel")
		}
		h := tunnel.Header{
			Service: o.service.String(), Port: string(o.port), Source: o.session.identity.String(),
			Traceparent: o.preface.Traceparent, Deadline: time.Until(end), Class: o.preface.Class, Hops: 1,
			Avoid: o.preface.Avoid,
		}
		out, err := s.Open(ctx, h, o.hello.Raw)
		switch {
		case err == nil && out.Status.Code == preface.CodeOK:
			o.stream = out
			return out.Status, nil
		case err == nil:
			out.Close()
			if out.Status.Code == preface.CodeDraining && len(tried) == 0 {
				tried = append(tried, s)
				continue
			}
			return preface.Status{}, &preface.Refused{Code: out.Status.Code, Reason: out.Status.Reason, Handle: out.Status.Handle}
		case errors.Is(ctx.Err(), context.DeadlineExceeded):
			return preface.Status{}, refusal(preface.CodeDeadline, "no_answer")
		case ctx.Err() != nil:
			return preface.Status{}, refusal(preface.CodeDenied, "withdrawn")
		}
		g.log.Debug("stream not opened", "peer", o.peer.td.String(), "tunnel", s.ID(), "error", err.Error())
		if tried = append(tried, s); len(tried) == 2 {
			return preface.Status{}, refusal(preface.CodePeerUnreachable, "tunnel_broken")
		}
	}
}

func (g *Gateway) refuseOutbound(c *net.TCPConn, o *outbound, r *preface.Refused) {
	g.metrics.refused("local", r.Code.String())
	g.log.Debug("connection refused", "authority", o.preface.Authority, "code", r.Code.String(), "reason", r.Reason)
	g.answer(c, preface.Status{Code: r.Code, Reason: r.Reason, Handle: r.Handle})
}

// answer writes the status frame; a refusal ends the connection in an orderly way, so that it arrives.
func (g *Gateway) answer(c *net.TCPConn, s preface.Status) bool {
	_ = c.SetWriteDeadline(time.Now().Add(statusTimeout))
	_, err := c.Write(preface.AppendStatus(nil, s))
	if err == nil && s.Code != preface.CodeOK {
		_ = c.CloseWrite()
		lingerClose(c)
	}
	_ = c.SetWriteDeadline(time.Time{})
	return err == nil
}

// lingerClose reads what still comes for a moment: closing over unread bytes would reset the answer away.
func lingerClose(c *net.TCPConn) {
	_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	var b [1024]byte
	for range 64 {
		if _, err := c.Read(b[:]); err != nil {
			return
		}
	}
}
