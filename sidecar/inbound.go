// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/crowd"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/relay"
	"github.com/strait-mesh/strait/sidecar/access"
	"github.com/strait-mesh/strait/sidecar/health"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"

	sidecarhttp "github.com/strait-mesh/strait/sidecar/http"
)

// port is one inbound port. Its policy may change under open connections; protocol and service may not.
type port struct {
	sni     string
	service federation.ServiceName
	name    string
	proto   controlpb.Protocol
	policy  atomic.Pointer[access.Policy]
	engine  *sidecarhttp.Inbound // nil for TCP
	tls     *tls.Config
}

// inbound is the listener for other sidecars: it tells ports apart by SNI, exactly, and has no default.
type inbound struct {
	s     *Sidecar
	crowd *crowd.Crowd // callers that have not said who they are
	base  *tls.Config
	ports atomic.Pointer[map[string]*port]

	mu     sync.Mutex // serialises set
	closed bool
	ending sync.WaitGroup // engines of ports that have gone
}

// maxHandshakes bounds callers that have not said who they are; the oldest gives way. They never take all connections of the listener.
const maxHandshakes = 1024

var (
	errUnknownName = errors.New("no port of that name here")
	errNoInstance  = errors.New("no healthy instance")
)

func newInbound(s *Sidecar) *inbound {
	in := &inbound{s: s, crowd: crowd.New(min(maxHandshakes, s.cfg.MaxConnections/2+1), nil)}
	empty := map[string]*port{}
	in.ports.Store(&empty)
	// The base has no certificate: a hello that names no port of ours ends here, before anything is proven to anybody.
	in.base = &tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true, GetConfigForClient: in.configFor}
	return in
}

// configFor chooses by the hello's server name as it was sent: no folding of case, no trailing dot.
func (in *inbound) configFor(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	p := (*in.ports.Load())[hello.ServerName]
	if p == nil {
		return nil, errUnknownName
	}
	if !in.s.health.Routable(p.sni) {
		return nil, errNoInstance // the caller sees a failed handshake and goes elsewhere: nothing was sent
	}
	return p.tls, nil
}

// prepare compiles what Self lists; an error refuses all of it.
func (in *inbound) prepare(self *controlpb.Self, own spiffeid.TrustDomain) (map[string]*access.Policy, error) {
	policies := make(map[string]*access.Policy, len(self.GetInbound()))
	for _, ip := range self.GetInbound() {
		portName, name, cluster, fed, err := federation.ParseSNI(ip.GetSni())
		if err != nil {
			return nil, fmt.Errorf("inbound port: %w", err)
		}
		if name.Namespace != ip.GetService().GetNamespace() || name.Name != ip.GetService().GetName() || portName.String() != ip.GetPortName() ||
			cluster.String() != self.GetCluster() || fed.String() != self.GetFederation() {
			return nil, fmt.Errorf("inbound port: server name %q does not name %s/%s:%s here", ip.GetSni(),
				ip.GetService().GetNamespace(), ip.GetService().GetName(), ip.GetPortName())
		}
		if policies[ip.GetSni()] != nil {
			return nil, fmt.Errorf("inbound port: server name %q twice", ip.GetSni())
		}
		policy, err := access.Compile(ip.GetAccess(), own)
		if err != nil {
			return nil, fmt.Errorf("inbound port %s: %w", ip.GetSni(), err)
		}
		policies[ip.GetSni()] = policy
	}
	return policies, nil
}

// set makes the ports those of self. A port that stays keeps its engine and its connections.
func (in *inbound) set(self *controlpb.Self, policies map[string]*access.Policy) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return
	}
	old := *in.ports.Load()
	next := make(map[string]*port, len(policies))
	for _, ip := range self.GetInbound() {
		p := old[ip.GetSni()]
		if p == nil || p.proto != ip.GetProtocol() {
			var err error
			if p, err = in.newPort(ip); err != nil {
				in.s.log.Error("inbound port not served", "sni", ip.GetSni(), "error", err)
				continue
			}
		}
		p.policy.Store(policies[ip.GetSni()])
		next[ip.GetSni()] = p
	}
	in.ports.Store(&next)
	for sni, p := range old {
		if next[sni] != p && p.engine != nil {
			engine := p.engine
			in.ending.Go(func() { engine.Close() })
		}
	}
}

func (in *inbound) newPort(ip *controlpb.InboundPort) (*port, error) {
	p := &port{
		sni: ip.GetSni(), name: ip.GetPortName(), proto: ip.GetProtocol(),
		service: federation.ServiceName{Namespace: ip.GetService().GetNamespace(), Name: ip.GetService().GetName()},
	}
	opts := trust.TLSOptions{Authorize: func(id spiffeid.ID) error { return in.authorize(p, id) }}
	if isHTTP(p.proto) {
		opts.ALPN = []string{"h2", "http/1.1"}
		app := sidecarhttp.H2C
		if p.proto == controlpb.Protocol_PROTOCOL_HTTP1 {
			app = sidecarhttp.HTTP1
		}
		engine, err := sidecarhttp.NewInbound(sidecarhttp.InboundConfig{
			Name: in.s.engineName(), Self: in.s.engineSelf(), SelfID: in.s.ownID, Service: p.service, Port: federation.PortName(p.name), Protocol: app,
			Authorize:    func(c sidecarhttp.Call) *sidecarhttp.Refusal { return in.authorizeCall(p, c) },
			PickInstance: func(_ context.Context, tried []string) (*sidecarhttp.Instance, error) { return in.pickHTTP(p, tried) },
			PeerCluster:  in.s.peerCluster, Recorder: in.s.cfg.Recorder, Metrics: in.s.metrics.requests,
			Limits: sidecarhttp.Limits{Grace: in.s.cfg.DrainGrace}, Now: in.s.cfg.Now, Logger: in.s.log,
		})
		if err != nil {
			return nil, err
		}
		p.engine = engine
	}
	p.tls = in.s.source.ServerTLS(opts)
	return p, nil
}

// authorize judges an identity inside the handshake: withdrawn ones, and whoever could do nothing on this port.
func (in *inbound) authorize(p *port, id spiffeid.ID) error {
	if reason, denied := in.s.isDenied(id, time.Time{}); denied {
		return fmt.Errorf("identity withdrawn: %s", reason)
	}
	if p.engine != nil {
		return nil // each request is judged, and told why
	}
	v := p.policy.Load().Judge(access.Request{Caller: id})
	in.count(p, id, v)
	if !v.Allowed {
		return errors.New("access denied by policy")
	}
	return nil
}

func (in *inbound) authorizeCall(p *port, c sidecarhttp.Call) *sidecarhttp.Refusal {
	if _, denied := in.s.isDenied(c.Peer, time.Time{}); denied {
		return &sidecarhttp.Refusal{Reason: federation.TrustRefused, Code: problem.TrustRefused, Message: "identity withdrawn"}
	}
	v := p.policy.Load().Judge(access.Request{Caller: c.Peer, HTTP: true, Method: c.Method, Path: c.Path})
	in.count(p, c.Peer, v)
	if v.Allowed {
		return nil
	}
	return &sidecarhttp.Refusal{Reason: federation.PolicyDenied, Code: problem.PolicyDenied, Message: "no rule allows this call"}
}

func (in *inbound) count(p *port, id spiffeid.ID, v access.Verdict) {
	action := "allow"
	switch {
	case v.Audited:
		action = "audit_deny"
		// callers make these lines: one a second is enough, the counter has them all
		now := in.s.cfg.Now().UnixNano()
		if last := in.s.audited.Load(); now-last < int64(time.Second) || !in.s.audited.CompareAndSwap(last, now) {
			break
		}
		in.s.log.Info("access would be denied", "caller", id, "service", p.service, "port", p.name, "policy", v.Policy)
	case !v.Allowed:
		action = "deny"
	}
	in.s.metrics.requests.Access(v.Policy, action, p.service.String(), in.s.peerCluster(id))
}

func (in *inbound) pickHTTP(p *port, tried []string) (*sidecarhttp.Instance, error) {
	lease, err := in.s.health.Pick(p.sni, func(workload string) bool { return slices.Contains(tried, workload) })
	if err != nil {
		return nil, err
	}
	return &sidecarhttp.Instance{
		Name: lease.Workload, Address: lease.Address,
		Done: func(o sidecarhttp.Outcome) { lease.Done(instanceOutcome(o), o.Err) },
	}, nil
}

func instanceOutcome(o sidecarhttp.Outcome) health.Outcome {
	switch o.Result {
	case sidecarhttp.Answered:
		if o.Status >= 500 {
			return health.ServerError
		}
		return health.Succeeded
	case sidecarhttp.Unsent:
		var op *net.OpError
		if errors.As(o.Err, &op) && op.Op == "dial" || health.Definite(o.Err) {
			return health.NotReached
		}
		return health.ServerError // a kept connection that had ended says less
	case sidecarhttp.Broken, sidecarhttp.TimedOut:
		return health.ServerError
	}
	return health.Abandoned
}

// serve owns one connection from another sidecar.
func (in *inbound) serve(raw net.Conn) {
	done, ok := in.s.callers.Add(func() { relay.Abort(raw) })
	if !ok {
		relay.Abort(raw)
		return
	}
	defer done()
	known := in.crowd.Add(raw.RemoteAddr(), func() { raw.Close() })
	ctx, cancel := context.WithTimeout(in.s.connCtx, in.s.cfg.Handshake)
	conn := tls.Server(relay.WatchEnd(raw), in.base)
	err := conn.HandshakeContext(ctx)
	cancel()
	known()
	if err != nil {
		in.s.metrics.handshake(err)
		in.s.log.Debug("inbound handshake failed", "remote", raw.RemoteAddr().String(), "error", err)
		raw.Close()
		return
	}
	state := conn.ConnectionState()
	peer, err := trust.PeerFromState(state)
	p := (*in.ports.Load())[state.ServerName]
	if err != nil || p == nil {
		relay.Abort(raw)
		return
	}
	var withdrawn atomic.Pointer[string]
	end := func(reason string) {
		withdrawn.CompareAndSwap(nil, &reason)
		relay.Abort(raw)
	}
	subject := withdrawal.Subject{
		Peer: peer.ID.TrustDomain(), Identity: peer.ID, Export: p.sni, Class: withdrawal.Inbound, Issued: peer.Issued(), NotAfter: peer.NotAfter,
	}
	if own := in.s.source.Identity(); own != nil && own.NotAfter.Before(subject.NotAfter) {
		subject.NotAfter = own.NotAfter // neither end outlives what it has proven
	}
	remove := in.s.ledger.enter(subject, peer, end)
	defer remove()
	if reason, ok := in.s.judge(subject); !ok { // it changed between handshake and entry
		end(reason)
		return
	}
	if p.engine != nil {
		p.engine.ServeConn(in.s.graceCtx, conn, peer.ID)
		return
	}
	in.serveTCP(p, conn, peer.ID, &withdrawn)
}

// serveTCP relays to a healthy instance; an instance that does not answer is replaced by another.
func (in *inbound) serveTCP(p *port, conn *tls.Conn, caller spiffeid.ID, withdrawn *atomic.Pointer[string]) {
	var tried []string
	for {
		lease, err := in.s.health.Pick(p.sni, func(workload string) bool { return slices.Contains(tried, workload) })
		if err != nil {
			in.s.metrics.refused(p.service, federation.NoEndpoints)
			relay.Abort(conn.NetConn())
			return
		}
		tried = append(tried, lease.Workload)
		d := net.Dialer{Timeout: 2 * time.Second}
		app, err := d.DialContext(in.s.connCtx, "tcp", lease.Address)
		if err != nil {
			lease.Done(health.NotReached, err)
			continue
		}
		src, self := in.s.peerCluster(caller), in.s.clusterName()
		closed := in.s.metrics.requests.Open("inbound", "tcp", src, self)
		res := relay.Pair(relay.TLS(conn), relay.Wrap(app), nil)
		outcome, reason := health.Succeeded, "end"
		switch {
		case withdrawn.Load() != nil:
			outcome, reason = health.Abandoned, "withdrawn"
		case res.Err == nil:
		case res.FromA:
			outcome, reason = health.Abandoned, "reset_by_caller"
		case res.BtoA == 0:
			outcome, reason = health.ServerError, "reset_by_application"
		default:
			outcome, reason = health.Abandoned, "reset_by_application"
		}
		lease.Done(outcome, res.Err)
		in.s.metrics.requests.Bytes("received", "tcp", src, self, res.AtoB)
		in.s.metrics.requests.Bytes("sent", "tcp", src, self, res.BtoA)
		in.s.metrics.requests.Observe(metric.Request{
			Reporter: metric.Destination, SrcCluster: src, DstService: p.service.String(), DstCluster: self,
			Protocol: "tcp", GRPCCode: -1, Failure: res.Err != nil, Scope: in.s.scopeOf(caller), MTLS: true,
		})
		closed(reason)
		return
	}
}

// close ends every port's engine and waits. No port is served afterwards.
func (in *inbound) close() {
	in.mu.Lock()
	in.closed = true
	old := *in.ports.Load()
	empty := map[string]*port{}
	in.ports.Store(&empty)
	in.mu.Unlock()
	for _, p := range old {
		if p.engine != nil {
			p.engine.Close()
		}
	}
	in.ending.Wait()
}
