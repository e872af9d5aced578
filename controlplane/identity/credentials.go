// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"errors"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// AuthInfo is what gRPC knows of a caller that came through a Listener.
type AuthInfo struct {
	credentials.CommonAuthInfo
	Peer trust.Peer
}

// AuthType names the scheme.
func (AuthInfo) AuthType() string { return "spiffe" }

// PeerFromContext returns the verified identity of an RPC's caller. It is false for calls that did not come through a Listener,
// such as those of a local socket.
func PeerFromContext(ctx context.Context) (trust.Peer, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return trust.Peer{}, false
	}
	info, ok := p.AuthInfo.(AuthInfo)
	return info.Peer, ok
}

// IDFromContext returns the caller's SPIFFE ID, or a status error.
func IDFromContext(ctx context.Context) (spiffeid.ID, error) {
	p, ok := PeerFromContext(ctx)
	if !ok {
		return spiffeid.ID{}, status.Error(codes.Unauthenticated, "no verified identity")
	}
	return p.ID, nil
}

// Limits of one connection and of the server. The client's keepalive (10 s) must be allowed.
const (
	maxStreams    = 64
	maxReceive    = 8 << 20
	minPing       = 5 * time.Second
	keepaliveTime = 15 * time.Second
	keepaliveWait = 10 * time.Second
	// maxAge makes proxies return with the identity of their last renewals, long before the one that they came with ends.
	maxAge      = 6 * time.Hour
	maxAgeGrace = 10 * time.Second
)

// ServerOptions are the options for a gRPC server that serves a Listener: its credentials, the table of roles, and limits.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(passCredentials{}),
		grpc.ChainUnaryInterceptor(RequireKindUnary),
		grpc.ChainStreamInterceptor(RequireKindStream),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxRecvMsgSize(maxReceive),
		grpc.ConnectionTimeout(trust.HandshakeTimeout),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: keepaliveTime, Timeout: keepaliveWait, MaxConnectionAge: maxAge, MaxConnectionAgeGrace: maxAgeGrace,
		}),
	}
}

// passCredentials hands on what the Listener has verified.
type passCredentials struct{}

var errNotOurs = errors.New("identity: the connection did not come through a Listener")

func (passCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*verifiedConn)
	if !ok {
		return nil, nil, errNotOurs
	}
	return c, AuthInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, c.peer}, nil
}

func (passCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("identity: server credentials used by a client")
}

func (passCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (p passCredentials) Clone() credentials.TransportCredentials { return p }

func (passCredentials) OverrideServerName(string) error { return nil }
