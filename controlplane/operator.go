// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/controlplane/rotation"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/version"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/register"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// operator answers the command line. Callers were authorized before: by the socket's credentials or by roles.go.
type operator struct {
	controlpb.UnimplementedOperatorServer
	c *ControlPlane
}

const (
	defaultTokenTTL = 15 * time.Minute
	maxTokenTTL     = 7 * 24 * time.Hour
	maxAccessTTL    = 90 * 24 * time.Hour
	// certificateHorizon is how near an end may come before status warns of it.
	certificateHorizon = 14 * 24 * time.Hour
)

// Status implements controlpb.OperatorServer.
func (o *operator) Status(ctx context.Context, _ *controlpb.StatusRequest) (*controlpb.StatusResponse, error) {
	c := o.c
	view := c.federate.View()
	r := &controlpb.StatusResponse{
		Federation: c.facts.Federation, Cluster: c.facts.Cluster, Region: c.facts.Region, TrustDomain: c.facts.TrustDomain,
		Version: version.String(), Members: members(view, c.now()), Services: o.services(""), Revision: c.revision.Load(),
		Certificates: c.certificates(),
	}
	for _, g := range view.Gateways {
		r.Gateways = append(r.Gateways, &controlpb.Gateway{Name: g.Name, LocalAddress: g.LocalAddress, SpiffeId: g.ID.String()})
	}
	for _, s := range c.discovery.Subscribers() {
		r.Proxies++
		if s.Current {
			r.ProxiesAcked++
		}
	}
	for _, p := range view.Peers {
		for _, t := range p.Tunnels {
			r.Tunnels = append(r.Tunnels, t.Tunnel)
		}
	}
	for _, it := range c.check(certificateHorizon) {
		if it.State == "warn" || it.State == "fail" {
			r.Warnings = append(r.Warnings, &controlpb.Warning{Severity: it.State, Text: it.Text, Code: it.Code, Why: it.Why, Fix: it.Fix})
		}
	}
	return r, nil
}

// members lists the federation, and says unreachable where no tunnel is up: broken things keep their row.
func members(view *federate.View, now time.Time) []*controlpb.Member {
	list := view.Members(now)
	for _, m := range list {
		if m.State != string(federate.StateReady) {
			continue
		}
		up := false
		for _, t := range m.Tunnels {
			up = up || t.State == "up"
		}
		if !up {
			m.State = "unreachable"
			if m.Reason == "" {
				m.Reason = string(federation.PeerUnreachable)
			}
		}
	}
	return list
}

// TokenIssue implements controlpb.OperatorServer.
func (o *operator) TokenIssue(ctx context.Context, req *controlpb.TokenIssueRequest) (*controlpb.TokenIssueResponse, error) {
	r, err := o.c.federate.TokenIssue(ctx, req)
	return r, wire.ToStatus(err)
}

// TokenList implements controlpb.OperatorServer: join tokens and registration tokens.
func (o *operator) TokenList(ctx context.Context, _ *controlpb.TokenListRequest) (*controlpb.TokenListResponse, error) {
	list, err := o.c.federate.TokenList(ctx)
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	for _, r := range o.c.tokens.List() {
		list = append(list, &controlpb.TokenInfo{
			Id: r.ID, Kind: "register", Cluster: o.c.facts.Cluster, ExpiresUnix: r.Expires.Unix(), State: r.State(o.c.now()),
			BoundTo: strings.TrimSpace(r.Grant.Kind + " " + r.Grant.Name),
		})
	}
	return &controlpb.TokenListResponse{Tokens: list}, nil
}

// TokenRevoke implements controlpb.OperatorServer.
func (o *operator) TokenRevoke(ctx context.Context, req *controlpb.TokenRevokeRequest) (*controlpb.TokenRevokeResponse, error) {
	err := o.c.tokens.Revoke(req.Id)
	if problem.Is(err, problem.NotFound) {
		err = o.c.federate.TokenRevoke(ctx, req.Id)
	}
	return &controlpb.TokenRevokeResponse{}, wire.ToStatus(err)
}

// Join implements controlpb.OperatorServer.
func (o *operator) Join(req *controlpb.JoinRequest, stream grpc.ServerStreamingServer[controlpb.JoinProgress]) error {
	ctx, cancel := withTimeout(stream.Context(), req.TimeoutMs)
	defer cancel()
	return o.progress(stream, func(send func(*controlpb.JoinProgress)) error {
		return o.c.federate.Join(ctx, req.Token, req.Sameness, req.CheckOnly, send)
	})
}

// Leave implements controlpb.OperatorServer.
func (o *operator) Leave(req *controlpb.LeaveRequest, stream grpc.ServerStreamingServer[controlpb.JoinProgress]) error {
	ctx, cancel := withTimeout(stream.Context(), req.TimeoutMs)
	defer cancel()
	return o.progress(stream, func(send func(*controlpb.JoinProgress)) error { return o.c.federate.Leave(ctx, send) })
}

// progress forwards messages; the last one carries the problem, and the call ends with it, too, unless a message has said it.
func (o *operator) progress(stream grpc.ServerStreamingServer[controlpb.JoinProgress], run func(func(*controlpb.JoinProgress)) error) error {
	said := false
	var sendErr error
	err := run(func(p *controlpb.JoinProgress) {
		said = said || p.Problem != nil
		if sendErr == nil {
			sendErr = stream.Send(p)
		}
	})
	if sendErr != nil {
		return sendErr
	}
	if said {
		return nil
	}
	return wire.ToStatus(err)
}

func withTimeout(ctx context.Context, ms int64) (context.Context, context.CancelFunc) {
	if ms <= 0 || ms > int64(time.Hour/time.Millisecond) {
		ms = int64(time.Minute / time.Millisecond)
	}
	return context.WithTimeout(ctx, time.Duration(ms)*time.Millisecond)
}

// MemberList implements controlpb.OperatorServer.
func (o *operator) MemberList(context.Context, *controlpb.MemberListRequest) (*controlpb.MemberListResponse, error) {
	return &controlpb.MemberListResponse{Members: members(o.c.federate.View(), o.c.now())}, nil
}

// MemberApprove implements controlpb.OperatorServer.
func (o *operator) MemberApprove(ctx context.Context, req *controlpb.MemberRequest) (*controlpb.Member, error) {
	name, err := federation.ParseClusterName(req.Cluster)
	if err != nil {
		return nil, wire.ToStatus(problem.New(problem.Usage, "%v", err))
	}
	m, err := o.c.federate.Approve(ctx, name)
	return m, wire.ToStatus(err)
}

// MemberEvict implements controlpb.OperatorServer.
func (o *operator) MemberEvict(ctx context.Context, req *controlpb.MemberRequest) (*controlpb.Member, error) {
	name, err := federation.ParseClusterName(req.Cluster)
	if err != nil {
		return nil, wire.ToStatus(problem.New(problem.Usage, "%v", err))
	}
	m, err := o.c.federate.Evict(ctx, name)
	return m, wire.ToStatus(err)
}

// GatewayToken implements controlpb.OperatorServer.
func (o *operator) GatewayToken(_ context.Context, req *controlpb.GatewayTokenRequest) (*controlpb.WorkloadTokenResponse, error) {
	id, err := spiffeid.Gateway(o.c.self.trustDomain, req.Name)
	if err != nil {
		return nil, wire.ToStatus(problem.New(problem.Usage, "gateway name: %v", err))
	}
	return o.registration(register.Grant{Kind: register.KindGateway, Name: req.Name, SPIFFEID: id}, req.TtlSeconds)
}

// WorkloadToken implements controlpb.OperatorServer.
func (o *operator) WorkloadToken(_ context.Context, req *controlpb.WorkloadTokenRequest) (*controlpb.WorkloadTokenResponse, error) {
	id, err := spiffeid.Workload(o.c.self.trustDomain, req.Namespace, req.ServiceAccount)
	if err != nil {
		return nil, wire.ToStatus(problem.New(problem.Usage, "service account: %v", err))
	}
	proxy, err := federation.ParseServiceName(req.Namespace + "/" + req.Proxy)
	if err != nil {
		return nil, wire.ToStatus(problem.New(problem.Usage, "sidecar name: %v", err))
	}
	return o.registration(register.Grant{Kind: register.KindSidecar, Name: proxy.String(), SPIFFEID: id}, req.TtlSeconds)
}

func (o *operator) registration(g register.Grant, ttlSeconds int64) (*controlpb.WorkloadTokenResponse, error) {
	ttl := time.Duration(ttlSeconds) * time.Second
	if ttl == 0 {
		ttl = defaultTokenTTL
	}
	if ttl < 0 || ttl > maxTokenTTL {
		return nil, wire.ToStatus(problem.New(problem.Usage, "a token lives at most %s", maxTokenTTL))
	}
	g.Region, g.Zone = o.c.facts.Region, o.c.facts.Zone
	if err := o.c.mayIssue(g.SPIFFEID); err != nil {
		return nil, wire.ToStatus(err)
	}
	tok, err := o.c.tokens.Issue(g, ttl)
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	if err := o.c.mayIssue(g.SPIFFEID); err != nil { // withdrawn meanwhile, which may have missed this token
		return nil, wire.ToStatus(errors.Join(err, o.c.tokens.Revoke(tok.ID)))
	}
	sum := o.c.issuer.Bundle().Hash()
	tok.BundleSHA256 = sum[:]
	tok.Addresses = o.c.advertised()
	return &controlpb.WorkloadTokenResponse{Token: tok.Encode(), Id: tok.ID, ExpiresUnix: tok.Expires.Unix()}, nil
}

// advertised are the addresses of 7400 that tokens name.
func (c *ControlPlane) advertised() []string {
	if len(c.cfg.Advertise) > 0 {
		return c.cfg.Advertise
	}
	return []string{dialable(c.addrs.Listen)}
}

// dialable replaces an unspecified host by loopback: better than an address that nobody can dial.
func dialable(addr string) string {
	for _, any := range []string{"0.0.0.0:", "[::]:", ":"} {
		if port, ok := strings.CutPrefix(addr, any); ok {
			return "127.0.0.1:" + port
		}
	}
	return addr
}

// AccessIssue implements controlpb.OperatorServer.
func (o *operator) AccessIssue(_ context.Context, req *controlpb.AccessIssueRequest) (*controlpb.AccessIssueResponse, error) {
	c := o.c
	if roleNames[req.Role] == roleNone {
		return nil, wire.ToStatus(problem.New(problem.Usage, "role %q: want viewer, operator or admin", req.Role))
	}
	ttl := time.Duration(req.TtlSeconds) * time.Second
	if ttl <= 0 || ttl > maxAccessTTL {
		return nil, wire.ToStatus(problem.New(problem.Usage, "the certificate may live up to %d days", int(maxAccessTTL.Hours()/24)))
	}
	id, err := spiffeid.Operator(c.self.trustDomain, req.Name)
	if err != nil {
		return nil, wire.ToStatus(problem.New(problem.Usage, "name: %v", err))
	}
	chain, err := guardedIssuer{c, "access issue"}.IssueCSR(req.CsrDer, id, ttl)
	if problem.Is(err, problem.IdentityWithdrawn) {
		return nil, wire.ToStatus(err)
	}
	if err != nil {
		return nil, wire.ToStatus(problem.New(problem.Usage, "%v", err))
	}
	api, err := c.apiCA.IssueAPIClient(req.CsrDer, req.Name, []string{req.Role}, ttl)
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	if err := c.roles.grant(req.Name, req.Role, leaf.NotAfter); err != nil {
		return nil, wire.ToStatus(err)
	}
	c.judgeAPI() // the role may be a lower one than before
	c.rotation.Issued(rotation.OperatorName(req.Name), id, false, rotation.Identity{Issued: trust.Issued(leaf), NotAfter: leaf.NotAfter})
	return &controlpb.AccessIssueResponse{
		ChainDer: chain, BundleJwks: c.issuer.Bundle().Marshal(), SpiffeId: id.String(), ApiCaPem: c.apiCA.APIRootPEM(),
		ApiAddress: dialable(c.addrs.API), GrpcAddress: c.advertised()[0], ApiChainPem: api,
	}, nil
}

// Backup implements controlpb.OperatorServer.
func (o *operator) Backup(_ *controlpb.BackupRequest, stream grpc.ServerStreamingServer[controlpb.BackupChunk]) error {
	return wire.ToStatus(writeBackup(stream.Context(), o.c.dir, o.c.caFiles, o.c.api.Snapshot, chunks{stream}))
}

// chunks writes into a stream of messages.
type chunks struct {
	stream grpc.ServerStreamingServer[controlpb.BackupChunk]
}

func (w chunks) Write(p []byte) (int, error) {
	const most = 256 << 10
	for n := 0; n < len(p); n += most {
		if err := w.stream.Send(&controlpb.BackupChunk{Data: p[n:min(n+most, len(p))]}); err != nil {
			return n, err
		}
	}
	return len(p), nil
}

// Ping implements controlpb.OperatorServer: probes that a peer's control plane answers.
func (o *operator) Ping(req *controlpb.PingRequest, stream grpc.ServerStreamingServer[controlpb.PingReply]) error {
	name, err := federation.ParseClusterName(req.Target)
	if err != nil {
		return wire.ToStatus(problem.New(problem.Usage, "%v", err).WithFix("strait ping CLUSTER; strait member list names them"))
	}
	peer := o.c.federate.View().ByCluster(name)
	if peer == nil {
		return wire.ToStatus(problem.New(problem.NotFound, "no member is called %s", name).WithFix("strait member list"))
	}
	interval := max(time.Duration(req.IntervalMs)*time.Millisecond, 10*time.Millisecond)
	t := time.NewTicker(interval)
	defer t.Stop()
	for seq := range min(max(req.Count, 1), 1000) {
		if seq > 0 {
			select {
			case <-stream.Context().Done():
				return stream.Context().Err()
			case <-t.C:
			}
		}
		if err := stream.Send(o.probe(stream.Context(), peer, seq+1)); err != nil {
			return err
		}
	}
	return nil
}

func (o *operator) probe(ctx context.Context, peer *federate.Peer, seq uint32) *controlpb.PingReply {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	r := &controlpb.PingReply{Seq: seq, Path: fmt.Sprintf("%s → %s", o.c.self.cluster, peer.Cluster)}
	reply, err := o.c.federate.Ask(ctx, peer.TrustDomain, "probe", nil)
	if err != nil {
		p := problem.From(err)
		r.ErrorCode, r.ErrorMessage = string(p.Code), p.Error()
		return r
	}
	r.RttSeconds, r.Transport, r.Gateway, r.EndToEnd = reply.Elapsed.Seconds(), reply.Transport, reply.Gateway, true
	if now := o.c.federate.View().Peer(peer.TrustDomain); now != nil {
		for _, t := range now.Tunnels {
			if t.Gateway == reply.Gateway && t.State == "up" {
				r.LossRatio = t.LossRatio
			}
		}
	}
	return r
}
