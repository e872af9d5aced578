// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"time"
)

// Width probes find what pings cannot: a path that silently became too narrow for the packets that the connection has grown to.
// Small packets pass then, and every full one vanishes; QUIC's discovery of the path's MTU only ever grows. While streams are open,
// each end sends a datagram as wide as the connection allows and the other answers with a small one.
const (
	datagramProbe  = 'w' // 'w', number u64, padding
	datagramAnswer = 'W' // 'W', number u64

	narrowAfter   = 8 // probes in a row, one with each ping, that should have been answered and were not, while pings are
	narrowSilence = pingEvery * 5 / 2
	probeHeader   = 9
	minProbe      = 1000 // bytes: connections begin with about 1,160; below there is nothing to fall back to
)

// errNarrow ends a session whose path became too narrow, once there is another one.
var errNarrow = errors.New("the path became too narrow")

// width judges one direction of a session. A far end that never answers (it knows no probes) is never judged.
type width struct {
	mu       sync.Mutex
	next     uint64 // the newest probe's number
	answered uint64 // the newest one that was answered; 0: none
}

// ask returns the number of the next probe.
func (w *width) ask() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.next++
	return w.next
}

// answer takes an answer. One that was never asked for, or an old one, changes nothing.
func (w *width) answer(n uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n <= w.next {
		w.answered = max(w.answered, n)
	}
}

// narrow reports whether full packets vanish, on a path of this round-trip time.
func (w *width) narrow(rtt time.Duration) bool {
	underway := uint64(2 * rtt / pingEvery)
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.answered > 0 && w.next-w.answered > narrowAfter+underway
}

// rest forgets what is on its way: nothing is sent while no stream is open.
func (w *width) rest() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.answered > 0 {
		w.answered = w.next
	}
}

func probe(kind byte, n uint64, size int) []byte {
	b := make([]byte, max(size, probeHeader))
	b[0] = kind
	binary.BigEndian.PutUint64(b[1:], n)
	return b
}

// probeWidth has a probe sent while streams are open, and reports that the path is too narrow. It never blocks.
func (s *Session) probeWidth(now time.Time) (narrow bool) {
	if s.transport != QUIC {
		return false
	}
	if s.streams.Load() == 0 {
		s.width.rest()
		return false
	}
	select {
	case s.probes <- struct{}{}:
	default: // the last one still waits: the connection takes nothing
	}
	rtt, _ := s.pulse.figures()
	return s.width.narrow(rtt) && s.pulse.silence(now) < narrowSilence+rtt
}

// sendProbes sends datagrams as wide as the lane's connection allows at the moment: on the connection that carries the streams, because each
// one finds the path's width by itself. Its answers come on the control link.
func (s *Session) sendProbes(ctx context.Context, lane link) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.probes:
		}
		if size := lane.packetSize(); size >= minProbe {
			_ = lane.sendPacket(probe(datagramProbe, s.width.ask(), size))
		}
	}
}

// receiveProbes takes the far end's probes from a lane.
func (s *Session) receiveProbes(ctx context.Context, lane link) {
	for {
		b, err := lane.receivePacket(ctx)
		if err != nil {
			return // watch sees the link end
		}
		s.takeProbe(b)
	}
}

// takeProbe handles probes and answers among the datagrams; it reports false for what is gossip.
func (s *Session) takeProbe(b []byte) bool {
	if len(b) < probeHeader || b[0] != datagramProbe && b[0] != datagramAnswer {
		return false
	}
	n := binary.BigEndian.Uint64(b[1:])
	if b[0] == datagramAnswer {
		s.width.answer(n)
	} else if s.inbound.Allow() {
		select {
		case s.packets <- probe(datagramAnswer, n, 0):
		default:
		}
	}
	return true
}
