// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"context"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/strait-mesh/strait/trust"
)

const (
	maxMessage       = 16 << 20 // of one message from the control plane
	handshakeTimeout = 5 * time.Second
	// A control plane that was cut off silently is noticed after keepaliveTime+keepaliveTimeout. The server must allow it.
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 5 * time.Second
)

// dial makes the one connection. It connects when something is first asked of it, and again whenever it is lost.
func (c *Client) dial() (*grpc.ClientConn, error) {
	addresses := make([]resolver.Address, 0, len(c.addresses))
	for _, a := range c.addresses {
		addresses = append(addresses, resolver.Address{Addr: a})
	}
	replicas := manual.NewBuilderWithScheme("strait")
	replicas.InitialState(resolver.State{Addresses: addresses})
	creds := &recordingCredentials{
		TransportCredentials: credentials.NewTLS(c.source.ClientTLS(trust.TLSOptions{
			Authorize: trust.AuthorizeControlPlane(c.info.TrustDomain), ALPN: []string{"h2"},
		})),
		health: &c.health,
	}
	return grpc.NewClient("strait:///controlplane",
		grpc.WithResolvers(replicas),
		grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(c.dialAddress),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
		grpc.WithIdleTimeout(0),
		grpc.WithUserAgent("strait-proxy/"+c.cfg.Version),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: minReconnect, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxReconnect},
			MinConnectTimeout: handshakeTimeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout, PermitWithoutStream: true}),
	)
}

func (c *Client) dialAddress(ctx context.Context, addr string) (net.Conn, error) {
	conn, err := c.cfg.Dial(ctx, addr)
	if err != nil {
		if ctx.Err() == nil {
			c.health.failed(err)
		}
		return nil, err
	}
	return c.wires.add(conn), nil
}

// wires are the open connections to the control plane. One that was opened under another ID than the present one must go: the control
// plane judges who is at its other end by the certificate of then.
type wires struct {
	mu   sync.Mutex
	open map[*wired]struct{}
}

type wired struct {
	net.Conn
	of *wires
}

func (w *wires) add(c net.Conn) net.Conn {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.open == nil {
		w.open = map[*wired]struct{}{}
	}
	one := &wired{c, w}
	w.open[one] = struct{}{}
	return one
}

// cut closes what is open; the client connects anew by itself.
func (w *wires) cut() {
	w.mu.Lock()
	all := slices.Collect(maps.Keys(w.open))
	w.mu.Unlock()
	for _, one := range all {
		_ = one.Close()
	}
}

// Close implements net.Conn.
func (w *wired) Close() error {
	w.of.mu.Lock()
	delete(w.of.open, w)
	w.of.mu.Unlock()
	return w.Conn.Close()
}

// recordingCredentials keeps the reason of a failed handshake, which waiting RPCs do not show.
type recordingCredentials struct {
	credentials.TransportCredentials
	health *health
}

func (r *recordingCredentials) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := r.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil && ctx.Err() == nil {
		r.health.failed(err)
	}
	return conn, info, err
}

func (r *recordingCredentials) Clone() credentials.TransportCredentials {
	return &recordingCredentials{r.TransportCredentials.Clone(), r.health}
}
