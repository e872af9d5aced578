// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	joinQueue   = 4
	joinDialMax = 30 * time.Second
	joinLife    = 5 * time.Minute
	linkWait    = 8 * time.Second // of an inbound conversation, for the link to come back
	maxMessage  = 1024            // bytes of an error's text
)

// conversation is one join conversation that this gateway relays between the far gateway and its own control plane.
type conversation struct {
	id      uint64
	inbound bool
	down    chan []byte // from the control plane; closed by close
	ended   chan struct{}
	once    sync.Once
	closed  atomic.Bool // by the control plane
}

func (c *conversation) close() {
	if c.closed.CompareAndSwap(false, true) {
		close(c.down)
	}
}

// abort ends the conversation without delivering what is queued.
func (c *conversation) abort() { c.once.Do(func() { close(c.ended) }) }

type conversationKey struct {
	id      uint64
	inbound bool
}

// conversations are the live ones. Dialled and inbound ids are different name spaces.
type conversations struct {
	mu   sync.Mutex
	next uint64
	open map[conversationKey]*conversation
}

func (c *conversations) add(id uint64, inbound bool) (*conversation, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open == nil {
		c.open = make(map[conversationKey]*conversation)
	}
	if inbound {
		c.next++
		id = c.next
	}
	key := conversationKey{id, inbound}
	if c.open[key] != nil {
		return nil, false
	}
	conv := &conversation{id: id, inbound: inbound, down: make(chan []byte, joinQueue), ended: make(chan struct{})}
	c.open[key] = conv
	return conv, true
}

func (c *conversations) remove(conv *conversation) {
	conv.abort()
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.open, conversationKey{conv.id, conv.inbound})
}

// deliver gives a frame of the control plane to its conversation. One that does not drain its queue is ended: the link is
// shared and must not wait.
func (c *conversations) deliver(f *controlpb.JoinFrame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	conv := c.open[conversationKey{f.Id, f.Inbound}]
	if conv == nil {
		return
	}
	if len(f.Body) > 0 {
		select {
		case conv.down <- f.Body:
		default:
			conv.abort()
		}
	}
	if f.Close {
		delete(c.open, conversationKey{f.Id, f.Inbound}) // nothing more may be sent into the queue
		conv.close()
	}
}

func (c *conversations) closeAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conv := range c.open {
		conv.abort()
	}
}

// dialJoin opens a conversation for our control plane and relays it until either side ends it.
func (l *link) dialJoin(s *linkStream, d *controlpb.JoinDial) {
	conv, ok := l.joins.add(d.Id, false)
	if !ok {
		return
	}
	defer l.joins.remove(conv)
	jc, bundle, err := l.openJoin(s.ctx, d)
	if err != nil {
		code := problem.GatewayNotReachable
		var verify *trust.VerifyError
		if errors.As(err, &verify) {
			code = problem.IdentityMismatch
		}
		l.closeJoin(s, conv, string(code), err.Error())
		return
	}
	opened, err := openedOf(jc)
	if err == nil && bundle != nil {
		opened.PeerBundleJwks = bundle.Marshal()
	}
	if err != nil {
		jc.Close()
		l.closeJoin(s, conv, string(problem.Internal), err.Error())
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, joinLife)
	defer cancel()
	l.relayJoin(ctx, s, conv, jc, opened)
}

func (l *link) openJoin(ctx context.Context, d *controlpb.JoinDial) (*tunnel.JoinConn, *trust.Bundle, error) {
	if len(d.BundleSha256) != 32 || len(d.Addresses) == 0 {
		return nil, nil, errors.New("join dial without pin or address")
	}
	limit := joinDialMax
	if d.TimeoutMs > 0 {
		limit = min(limit, time.Duration(d.TimeoutMs)*time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var mu sync.Mutex
	var bundle *trust.Bundle
	authorize := func(id spiffeid.ID) error {
		if !slices.Contains(d.GatewayIds, id.String()) {
			return errors.New("not a gateway that the token names")
		}
		return nil
	}
	config := trust.PinnedClientTLS([32]byte(d.BundleSha256), l.g.cfg.Client.Source(), l.g.cfg.Now,
		trust.TLSOptions{Authorize: authorize, ALPN: []string{tunnel.ALPNJoin}}, func(p trust.Pinned) {
			mu.Lock()
			defer mu.Unlock()
			bundle = p.Bundle
		})
	jc, err := l.g.tun.DialJoin(ctx, d.Addresses, config)
	if err != nil {
		return nil, nil, err
	}
	mu.Lock()
	defer mu.Unlock()
	return jc, bundle, nil
}

// serveJoin relays a conversation that a stranger opened. Our control plane judges it.
func (g *Gateway) serveJoin(ctx context.Context, jc *tunnel.JoinConn) {
	l := g.link
	opened, err := openedOf(jc)
	if err != nil || g.draining.Load() {
		return
	}
	wait, cancel := context.WithTimeout(ctx, linkWait)
	s := l.await(wait) // our control plane may be restarting
	cancel()
	if s == nil {
		return
	}
	conv, _ := l.joins.add(0, true)
	defer l.joins.remove(conv)
	l.relayJoin(ctx, s, conv, jc, opened)
}

func openedOf(jc *tunnel.JoinConn) (*controlpb.JoinOpened, error) {
	exporter, err := jc.Exporter()
	if err != nil {
		return nil, err
	}
	o := &controlpb.JoinOpened{Exporter: exporter, Transport: jc.Transport, RttSeconds: jc.RTT.Seconds(), Address: jc.Address,
		UdpOk: jc.UDPOK, TcpOk: jc.TCPOK}
	for _, c := range jc.State.PeerCertificates {
		o.PeerChainDer = append(o.PeerChainDer, c.Raw)
	}
	return o, nil
}

// relayJoin says what the TLS layer proved, and passes frames both ways until an end.
func (l *link) relayJoin(ctx context.Context, s *linkStream, conv *conversation, jc *tunnel.JoinConn, opened *controlpb.JoinOpened) {
	up := func(f *controlpb.JoinFrame) error {
		f.Id, f.Inbound = conv.id, conv.inbound
		return s.send(ctx, &controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Join{Join: f}})
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer jc.Close()
	if up(&controlpb.JoinFrame{Opened: opened}) != nil {
		return
	}
	wg.Go(func() {
		defer jc.Close()
		for {
			select {
			case b, ok := <-conv.down:
				if !ok || jc.WriteFrame(b) != nil {
					return
				}
			case <-conv.ended:
				return
			case <-s.ctx.Done():
				return
			case <-ctx.Done():
				return
			}
		}
	})
	var err error
	for {
		var b []byte
		if b, err = jc.ReadFrame(); err != nil {
			break
		}
		if up(&controlpb.JoinFrame{Body: b}) != nil {
			break
		}
	}
	conv.abort()
	if conv.closed.Load() {
		return // it is the control plane that ended it, and has forgotten it
	}
	code, message := "", ""
	if !errors.Is(err, io.EOF) {
		code, message = string(problem.GatewayNotReachable), cut(errString(err), maxMessage)
	}
	_ = up(&controlpb.JoinFrame{Close: true, ErrorCode: code, ErrorMessage: message})
}

func (l *link) closeJoin(s *linkStream, conv *conversation, code, message string) {
	_ = s.send(s.ctx, &controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Join{Join: &controlpb.JoinFrame{
		Id: conv.id, Inbound: conv.inbound, Close: true, ErrorCode: code, ErrorMessage: cut(message, maxMessage)}}})
}
