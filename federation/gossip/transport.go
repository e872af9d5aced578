// SPDX-License-Identifier: Apache-2.0

package gossip

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

const (
	syntheticPort = 7443
	sendQueue     = 64 // packets to one peer that wait for the link; more are dropped
	receiveQueue  = 256
	streamQueue   = 8
	idleSender    = time.Minute // a sender without packets ends
	pingsNoted    = 16
)

var (
	errStopped   = errors.New("gossip has stopped")
	errNoSession = errors.New("no live session")
)

// syntheticIP stands for a member's name where memberlist wants an address: fd00::/8 and a hash of the name. Nobody dials it.
func syntheticIP(name string) net.IP {
	sum := sha256.Sum256([]byte("strait gossip " + name))
	return append(net.IP{0xfd}, sum[:15]...)
}

func syntheticAddress(name string) string {
	return net.JoinHostPort(syntheticIP(name).String(), strconv.Itoa(syntheticPort))
}

// peerAddr is where a packet came from.
type peerAddr string

func (peerAddr) Network() string  { return "strait" }
func (a peerAddr) String() string { return syntheticAddress(string(a)) }

// transport is memberlist's transport over Link: by name, over the live session to that name, or not at all.
type transport struct {
	name    string
	label   string
	link    Link
	log     *slog.Logger
	filter  *filter
	packets chan *memberlist.Packet
	streams chan net.Conn
	ctx     context.Context // ends with Shutdown
	cancel  context.CancelFunc

	mu      sync.Mutex
	senders map[string]chan []byte
	wg      sync.WaitGroup
	stopped bool
	conns   map[*guarded]bool
	pings   []uint32 // sent last, the newest at the end
}

var _ memberlist.NodeAwareTransport = (*transport)(nil)

func newTransport(cfg Config) *transport {
	ctx, cancel := context.WithCancel(context.Background())
	return &transport{
		name: cfg.Name, label: string(cfg.Federation), link: cfg.Link, log: cfg.Logger, filter: newFilter(cfg),
		packets: make(chan *memberlist.Packet, receiveQueue), streams: make(chan net.Conn, streamQueue),
		ctx: ctx, cancel: cancel, senders: map[string]chan []byte{}, conns: map[*guarded]bool{},
	}
}

// FinalAdvertiseAddr returns the synthetic address.
func (t *transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return syntheticIP(t.name), syntheticPort, nil
}

// WriteTo is not used: memberlist knows names.
func (t *transport) WriteTo([]byte, string) (time.Time, error) {
	return time.Time{}, errors.New("gossip: packet without a name")
}

// DialTimeout is not used.
func (t *transport) DialTimeout(string, time.Duration) (net.Conn, error) {
	return nil, errors.New("gossip: stream without a name")
}

// WriteToAddress queues a packet for a's session, or drops it when there is none or too much waits. It never blocks.
func (t *transport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	now := time.Now()
	live := slices.Contains(t.link.Peers(), a.Name)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped {
		return now, errStopped
	}
	t.notePingLocked(b)
	if !live {
		return now, nil // lost, as packets are
	}
	q := t.senders[a.Name]
	if q == nil {
		q = make(chan []byte, sendQueue)
		t.senders[a.Name] = q
		t.wg.Go(func() { t.sender(a.Name, q) })
	}
	select {
	case q <- b:
	default:
	}
	return now, nil
}

// sender gives one peer's packets to the link until none came for a while.
func (t *transport) sender(peer string, q chan []byte) {
	idle := time.NewTimer(idleSender)
	defer idle.Stop()
	for {
		select {
		case b := <-q:
			if err := t.link.SendDatagram(peer, b); err != nil {
				t.log.Debug("gossip packet not sent", "peer", peer, "error", err)
			}
			idle.Reset(idleSender)
		case <-idle.C:
			t.mu.Lock()
			if len(q) == 0 {
				delete(t.senders, peer)
				t.mu.Unlock()
				return
			}
			t.mu.Unlock()
			idle.Reset(idleSender)
		case <-t.ctx.Done():
			return
		}
	}
}

// DialAddressTimeout opens a stream for push/pull; what the other end answers goes through the filter.
func (t *transport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	if !slices.Contains(t.link.Peers(), a.Name) {
		return nil, fmt.Errorf("%s: %w", a.Name, errNoSession)
	}
	ctx, cancel := context.WithTimeout(t.ctx, timeout)
	defer cancel()
	c, err := t.link.OpenStream(ctx, a.Name)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped {
		c.Close()
		return nil, errStopped
	}
	return t.guardLocked(a.Name, c, false), nil
}

// PacketCh gives memberlist what was delivered and judged.
func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// StreamCh gives memberlist the streams that peers opened.
func (t *transport) StreamCh() <-chan net.Conn { return t.streams }

// notePingLocked remembers the number of a ping that memberlist or a probe it relays will wait for.
func (t *transport) notePingLocked(b []byte) {
	b, _, err := memberlist.RemoveLabelHeaderFromPacket(b)
	if err != nil {
		return
	}
	parts, err := splitPacket(b)
	if err != nil || parts[0][0] != pingType {
		return
	}
	var p ping
	if decode(parts[0][1:], &p) != nil {
		return
	}
	if len(t.pings) == pingsNoted {
		t.pings = slices.Delete(t.pings, 0, 1)
	}
	t.pings = append(t.pings, p.SeqNo)
}

// settle comes before memberlist's shutdown. From here nothing is sent or opened, streams break, and probes under way are answered
// by ourselves: memberlist would go on waiting for them for up to 40 s and has no way to be stopped.
func (t *transport) settle() {
	t.mu.Lock()
	t.stopped = true
	pings, conns := t.pings, slices.Collect(maps.Keys(t.conns))
	t.mu.Unlock()
	t.cancel()
	for _, c := range conns {
		c.Close()
	}
	for _, n := range pings {
		if b, err := encode(nil, ackType, &ack{SeqNo: n}); err == nil {
			t.packets <- &memberlist.Packet{Buf: b, From: peerAddr(t.name), Timestamp: time.Now()}
		}
	}
	for len(t.packets) > 0 { // memberlist takes them without waiting for anything
		time.Sleep(time.Millisecond)
	}
}

// Shutdown waits for the senders. The goroutines that memberlist leaves behind find nothing to wait for.
func (t *transport) Shutdown() error {
	t.mu.Lock()
	t.stopped = true
	t.mu.Unlock()
	t.cancel()
	t.wg.Wait()
	for {
		select {
		case c := <-t.streams:
			c.Close()
		default:
			return nil
		}
	}
}

func (t *transport) deliver(from string, b []byte) {
	if t.ctx.Err() != nil {
		return
	}
	now := time.Now()
	buf, label, err := memberlist.RemoveLabelHeaderFromPacket(b)
	if err != nil || label != t.label {
		return
	}
	buf = t.filter.packet(from, buf, now)
	if len(buf) == 0 {
		return
	}
	select {
	case t.packets <- &memberlist.Packet{Buf: buf, From: peerAddr(from), Timestamp: now}:
	default:
	}
}

func (t *transport) deliverStream(from string, c net.Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped || !t.filter.allowStream(from, time.Now()) {
		c.Close()
		return
	}
	g := t.guardLocked(from, c, true)
	select {
	case t.streams <- g:
	default:
		delete(t.conns, g)
		c.Close()
	}
}

// clearIdle forgets members that were not heard of for long, until ctx ends.
func (t *transport) clearIdle(ctx context.Context) {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			t.filter.forget(now)
		}
	}
}
