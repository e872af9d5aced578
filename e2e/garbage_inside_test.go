// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/e2e/harness"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// insideGarbage comes from those who have a valid identity: a member's gateway, a workload and a gateway of the own cluster.
func insideGarbage(t *testing.T, us, eu *harness.Cluster, web *harness.Sidecar) {
	t.Helper()
	own, peer := newRedTeam(t, us), newRedTeam(t, eu, us)
	for _, path := range []string{"/ns/shop/sa/ghost", "/strait/gateway/ghost"} {
		rpcGarbage(t, own, us.GRPC, path)
	}
	local, _ := us.Gateways[0].Addrs()["Local"].(string)
	many(copies/2, func() { localSessionGarbage(t, own, local) })
	many(copies/2, func() { inboundGarbage(t, own, web.Inbound, "h2") })
	many(copies/2, func() { inboundGarbage(t, own, web.Inbound, "http/1.1") })
	s, err := peer.tunnel(us, "/strait/gateway/red")
	if err != nil {
		t.Errorf("a member's gateway identity got no session: %v", err)
		return
	}
	tunnelGarbage(t, s)
	if s.State() != tunnel.StateUp {
		t.Errorf("garbage on streams ended the session of its sender: %v", s.State())
	}
	peer.hangUp()
}

func garbage(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

// mtls makes a connection as the identity of that path.
func (r *redTeam) mtls(address, path, alpn, sni string) (*tls.Conn, error) {
	raw, err := net.DialTimeout("tcp", address, 10*time.Second)
	if err != nil {
		return nil, err
	}
	c := tls.Client(raw, r.source(path).ClientTLS(trust.TLSOptions{Authorize: func(spiffeid.ID) error { return nil }, ALPN: []string{alpn}, ServerName: sni}))
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if err := c.Handshake(); err != nil {
		_ = raw.Close()
		return nil, err
	}
	return c, nil
}

// bytesCodec sends bytes as they are, as if they were a message.
type bytesCodec struct{}

func (bytesCodec) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }
func (bytesCodec) Name() string                  { return "proto" }
func (bytesCodec) Unmarshal(b []byte, v any) error {
	*v.(*[]byte) = b
	return nil
}

// rpcGarbage calls every method of 7400 with messages that mean nothing. Nothing of the operator's is for such a caller.
func rpcGarbage(t *testing.T, r *redTeam, address, path string) {
	config := r.source(path).ClientTLS(trust.TLSOptions{Authorize: func(spiffeid.ID) error { return nil }, ALPN: []string{"h2"}})
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithDefaultCallOptions(grpc.ForceCodec(bytesCodec{})))
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	methods := []string{"/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources",
		"/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources", "/opentelemetry.proto.collector.trace.v1.TraceService/Export", "/strait.v1.Nothing/Nothing"}
	for _, d := range []grpc.ServiceDesc{controlpb.Operator_ServiceDesc, controlpb.Identity_ServiceDesc, controlpb.Sessions_ServiceDesc, controlpb.Gateways_ServiceDesc} {
		for _, m := range d.Methods {
			methods = append(methods, "/"+d.ServiceName+"/"+m.MethodName)
		}
		for _, m := range d.Streams {
			methods = append(methods, "/"+d.ServiceName+"/"+m.StreamName)
		}
	}
	messages := [][]byte{nil, garbage(300), {0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f}, append([]byte{0x0a, 0x80, 0x80, 0x20}, make([]byte, 512<<10)...), {0x08, 1}, {0x0a, 0}, {0x12, 2, 0x0a, 0}}
	for _, method := range methods {
		operator := strings.Contains(method, "/"+controlpb.Operator_ServiceDesc.ServiceName+"/")
		for i, m := range messages {
			err := rpcCall(t, conn, method, m, operator)
			code := status.Code(err)
			if operator && (errors.Is(err, io.EOF) || i == 0 && code != codes.PermissionDenied) { // the first is a message of every kind
				t.Errorf("%s as %s, message %d: %v", method, path, i, err)
			}
		}
	}
}

// rpcCall sends the message, twice on what may be a stream, and returns how the call ended.
func rpcCall(t *testing.T, conn *grpc.ClientConn, method string, message []byte, once bool) error {
	limit := 300 * time.Millisecond
	if once {
		limit = 5 * time.Second
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	_ = s.SendMsg(&message)
	if !once {
		_ = s.SendMsg(&message)
	}
	_ = s.CloseSend()
	for {
		var answer []byte
		if err := s.RecvMsg(&answer); err != nil {
			return err
		}
	}
}

// localSessionGarbage opens local sessions and misuses them.
func localSessionGarbage(t *testing.T, r *redTeam, address string) {
	hello := func(h *controlpb.LocalHello) []byte {
		b, _ := proto.Marshal(&controlpb.ToGateway{Message: &controlpb.ToGateway_Hello{Hello: h}})
		return b
	}
	good := hello(&controlpb.LocalHello{WireVersion: 1, Proxy: "shop/ghost", InboundAddress: "nowhere"})
	ping, _ := proto.Marshal(&controlpb.ToGateway{Message: &controlpb.ToGateway_Ping{}})
	sessions := [][][]byte{
		{garbage(100)}, {nil}, {hello(&controlpb.LocalHello{})}, {hello(&controlpb.LocalHello{WireVersion: 1 << 30})}, {good, good}, {good, garbage(60 << 10)},
		{good, {0x12, 2, 0x0a, 0}}, {good, {0x1a, 4, 8, 0xff, 0xff, 1}}, {good, ping, ping, ping},
	}
	for _, frames := range sessions {
		c, err := r.mtls(address, "/ns/shop/sa/ghost", preface.ALPN, "")
		if err != nil {
			t.Errorf("local session: %v", err)
			return
		}
		for _, f := range frames {
			_ = tunnel.WriteFrame(c, f)
		}
		_, _ = c.Write([]byte{0xff, 0xff, 0xff, 0xff})
		if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Error("a local session with a frame of 4 GiB goes on")
		}
		_ = c.Close()
	}
}

// inboundGarbage speaks nonsense to a sidecar, as a workload that may call it.
func inboundGarbage(t *testing.T, r *redTeam, address, alpn string) {
	preamble := "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	resets := preamble
	for id := 1; id < 2000; id += 2 { // HEADERS for GET /, at once taken back
		n := string([]byte{byte(id >> 24), byte(id >> 16), byte(id >> 8), byte(id)})
		resets += "\x00\x00\x04\x01\x05" + n + "\x82\x86\x84\x01" + "\x00\x00\x04\x03\x00" + n + "\x00\x00\x00\x08"
	}
	inputs := []string{string(garbage(32 << 10)), preamble + string(garbage(4<<10)), resets, "GET / HTTP/1.1\r\n", "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
		"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n", "GET /" + strings.Repeat("a", 1<<20) + " HTTP/1.1\r\n\r\n"}
	for _, in := range inputs {
		c, err := r.mtls(address, "/ns/shop/sa/ghost", alpn, "http.web.shop.svc.us-east.acme")
		if err != nil {
			t.Errorf("sidecar: %v", err)
			return
		}
		_ = c.SetDeadline(time.Now().Add(time.Second))
		_, _ = io.WriteString(c, in)
		_, _ = io.Copy(io.Discard, c)
		_ = c.NetConn().Close()
	}
}

// tunnelGarbage is what a member's gateway may think of inside its session.
func tunnelGarbage(t *testing.T, s *tunnel.Session) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	open := func(what string, f func(context.Context) (tunnel.Stream, error), data []byte) {
		st, err := f(ctx)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		_ = st.SetDeadline(time.Now().Add(patience))
		_, _ = st.Write(data)
		_ = st.CloseWrite()
		_, _ = io.Copy(io.Discard, io.LimitReader(st, 1<<20))
		st.Reset()
	}
	frames := [][]byte{nil, {0, 0, 0, 0}, {0xff, 0xff, 0xff, 0xff}, {0, 0, 0, 4, 1, 2, 3, 4}, {0, 0, 1, 0, 1}, garbage(32 << 10)}
	for _, b := range frames {
		many(copies, func() { open("catalog", s.OpenCatalog, b) })
		many(copies, func() { open("query", s.OpenQuery, b) })
		many(copies, func() { open("stream", s.OpenRaw, b) })
	}
	for _, method := range []string{"", "probe", "probe-back", "head-of", "introduce", "trace", "why", "member-list", strings.Repeat("x", 40<<10), "\x00"} {
		for _, body := range [][]byte{nil, garbage(200), []byte("{}"), []byte(`"`), make([]byte, 200<<10)} {
			if _, err := ask(ctx, s, method, body); err != nil {
				t.Errorf("query %.20q: no answer: %v", method, err)
			}
		}
	}
	for i := range 2000 {
		_ = s.SendPacket(garbage(1 + i%1000))
		s.SendMarker(tunnel.Marker{Tag: uint64(i), Direction: byte(i), Offset: 1 << 63, Traceparent: "00-" + strings.Repeat("z", i%60), End: i%2 == 0})
	}
}
