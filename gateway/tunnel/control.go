// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// notify queues a notice; when the queue is full, it is dropped: the session is then on its way out anyway.
func (s *Session) notify(n notice) {
	b, err := n.append()
	if err != nil {
		return
	}
	select {
	case s.notices <- b:
	default:
	}
}

// SendMarker passes a trace marker on; best effort: dropped when the queue is full.
func (s *Session) SendMarker(m Marker) {
	b, err := m.append()
	if err != nil {
		return
	}
	select {
	case s.markers <- b:
	default:
	}
}

// sendRecords writes queued records on a stream that is opened with the first one.
func (s *Session) sendRecords(ctx context.Context, kind byte, queue <-chan []byte) {
	var st Stream
	defer func() {
		if st != nil {
			st.Reset()
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return
		case b := <-queue:
			if st == nil {
				var err error
				if st, err = s.openControl(ctx, kind); err != nil {
					return
				}
			}
			_ = st.SetWriteDeadline(time.Now().Add(firstByteTimeout))
			if _, err := st.Write(b); err != nil {
				return
			}
		}
	}
}

func (s *Session) readNotices(st Stream) {
	for {
		b, err := readRecord(st, maxNotice)
		if err != nil {
			return
		}
		n, err := parseNotice(b)
		if err != nil {
			s.fail(err)
			return
		}
		switch n.Kind {
		case noticeDrain:
			if s.draining.CompareAndSwap(false, true) {
				s.e.log.Info("far gateway is draining", "peer", s.Peer().String(), "gateway", s.gateway, "tunnel", s.id)
				if s.e.cfg.Draining != nil {
					s.e.cfg.Draining(s, n.Deadline)
				}
				s.e.changed()
			}
		case noticeRetire:
			if s.retiring.CompareAndSwap(0, time.Now().UnixNano()) {
				s.leaveRootless()
				s.e.changed()
			}
		case noticeNarrow:
			s.tooNarrow(true)
		}
	}
}

func (s *Session) readMarkers(st Stream) {
	for {
		b, err := readRecord(st, maxMarker)
		if err != nil {
			return
		}
		m, err := parseMarker(b)
		if err != nil {
			s.fail(err)
			return
		}
		if s.e.cfg.Marker != nil && s.inbound.Allow() {
			s.e.cfg.Marker(s, m)
		}
	}
}

// SendPacket queues one gossip packet; it never blocks. A full queue drops it.
func (s *Session) SendPacket(b []byte) error {
	if len(b) > maxPacket {
		return fmt.Errorf("send packet: %d bytes, at most %d", len(b), maxPacket)
	}
	select {
	case s.packets <- append([]byte(nil), b...):
		return nil
	default:
		return errors.New("send packet: queue full")
	}
}

func (s *Session) sendPackets(ctx context.Context) {
	large := make(chan []byte, packetQueue)
	s.wg.Go(func() { s.sendRecords(ctx, kindPackets, large) })
	for {
		select {
		case <-ctx.Done():
			return
		case b := <-s.packets:
			err := s.control.sendPacket(b)
			if !errors.Is(err, errTooLarge) && !errors.Is(err, errNoDatagrams) {
				continue
			}
			framed := append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(b)), uint16(len(b))), b...)
			select {
			case large <- framed:
			default:
			}
		}
	}
}

func (s *Session) receivePackets(ctx context.Context) {
	for {
		b, err := s.control.receivePacket(ctx)
		if err != nil {
			return // watch sees the link end
		}
		if s.takeProbe(b) {
			continue
		}
		s.deliver(b)
	}
}

func (s *Session) readPackets(st Stream) {
	for {
		var head [2]byte
		if _, err := io.ReadFull(st, head[:]); err != nil {
			return
		}
		b := make([]byte, binary.BigEndian.Uint16(head[:]))
		if _, err := io.ReadFull(st, b); err != nil {
			return
		}
		s.deliver(b)
	}
}

func (s *Session) deliver(b []byte) {
	if s.e.cfg.Packet != nil && s.inbound.Allow() && s.e.ready(s.Peer()) {
		s.e.cfg.Packet(s.e.nameOf(s), b)
	}
}

// GossipLink is the Endpoint as the gossip library wants it: names are "<gateway>.<cluster>".
type GossipLink struct{ e *Endpoint }

// Gossip returns the link.
func (e *Endpoint) Gossip() GossipLink { return GossipLink{e} }

// Peers returns the names of live sessions with ready peers.
func (g GossipLink) Peers() []string {
	var names []string
	seen := make(map[string]bool)
	for _, s := range g.e.Sessions() {
		if n := g.e.nameOf(s); n != "" && s.usable() && g.e.ready(s.Peer()) && !seen[n] {
			seen[n] = true
			names = append(names, n)
		}
	}
	return names
}

// SendDatagram never blocks; without a session to peer the packet is dropped with an error.
func (g GossipLink) SendDatagram(peer string, b []byte) error {
	s := g.e.byName(peer)
	if s == nil {
		return fmt.Errorf("send packet to %.80q: no session", peer)
	}
	return s.SendPacket(b)
}

// OpenStream opens a push/pull stream.
func (g GossipLink) OpenStream(ctx context.Context, peer string) (net.Conn, error) {
	s := g.e.byName(peer)
	if s == nil {
		return nil, fmt.Errorf("open stream to %.80q: no session", peer)
	}
	st, err := s.openControl(ctx, kindGossip)
	if err != nil {
		return nil, err
	}
	return netStream{st, g.e.addr(), s.control.remoteAddr()}, nil
}
