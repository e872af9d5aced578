// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"encoding/binary"
	"io"
	"sync"
	"time"
)

// State is how usable a session is.
type State int32

// States, from best to worst.
const (
	StateUp State = iota + 1
	StateSuspect
	StateDown
)

// String returns the word used in reports.
func (s State) String() string {
	switch s {
	case StateUp:
		return "up"
	case StateSuspect:
		return "suspect"
	}
	return "down"
}

const (
	pingEvery    = 250 * time.Millisecond
	suspectAfter = time.Second
	downAfter    = 3 * time.Second
)

// judge is the whole rule: silent for max(1 s, 4 RTT) is suspect, for 3 s (or twice the former) is down.
func judge(silence, rtt time.Duration) State {
	suspect := max(suspectAfter, 4*rtt)
	switch {
	case silence > max(downAfter, 2*suspect):
		return StateDown
	case silence > suspect:
		return StateSuspect
	}
	return StateUp
}

// pulse measures one session by pings: smoothed RTT, silence, and which share of pings stayed unanswered.
type pulse struct {
	mu      sync.Mutex
	rtt     time.Duration // smoothed, RFC 6298 weights; 0 = none yet
	last    time.Time     // of the last answer
	pending map[uint64]time.Time
	next    uint64
	loss    float64 // smoothed share of packets lost, from the transport's totals
	sent    uint64
	lost    uint64
}

func newPulse(now time.Time) *pulse {
	return &pulse{last: now, pending: make(map[uint64]time.Time)}
}

func (p *pulse) ping(now time.Time) uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next++
	p.pending[p.next] = now
	delete(p.pending, p.next-64)
	return p.next
}

// pong takes an answer; one that was never asked for is ignored.
func (p *pulse) pong(id uint64, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	at, ok := p.pending[id]
	if !ok {
		return
	}
	delete(p.pending, id)
	p.last = now
	sample := now.Sub(at)
	if p.rtt == 0 {
		p.rtt = sample
	} else {
		p.rtt += (sample - p.rtt) / 8
	}
}

func (p *pulse) state(now time.Time) State {
	p.mu.Lock()
	defer p.mu.Unlock()
	return judge(now.Sub(p.last), p.rtt)
}

// silence is how long ago the last answer came.
func (p *pulse) silence(now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return now.Sub(p.last)
}

// totals feeds the transport's running totals of packets.
func (p *pulse) totals(sent, lost uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ds := int64(sent - p.sent)
	dl := int64(lost - p.lost)
	if ds < 20 {
		return // too few to say anything
	}
	p.sent, p.lost = sent, lost
	p.loss += (min(1, max(0, float64(dl)/float64(ds))) - p.loss) / 8
}

func (p *pulse) figures() (rtt time.Duration, loss float64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rtt, p.loss
}

// pinger opens the ping stream, sends a number every 250 ms, and judges. A writer that is stuck does not stop the judging.
func (s *Session) pinger(ctx context.Context) {
	numbers := make(chan uint64, 1)
	s.wg.Go(func() { s.pingStream(ctx, numbers) })
	t := time.NewTicker(pingEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		now := time.Now()
		select {
		case numbers <- s.pulse.ping(now):
		default:
		}
		st := s.control.stats()
		s.pulse.totals(st.sent, st.lost)
		if s.e.cfg.Now().After(s.notAfter) {
			s.fail(errExpired)
			return
		}
		if s.retired(now) {
			s.fail(errRetired)
			return
		}
		state := s.pulse.state(now)
		if state == StateDown {
			s.fail(errSilent)
			return
		}
		s.setState(state)
		if s.probeWidth(now) {
			s.tooNarrow(false)
		}
	}
}

func (s *Session) pingStream(ctx context.Context, numbers <-chan uint64) {
	st, err := s.openControl(ctx, kindPing)
	if err != nil {
		return // the judging goes on and ends the session
	}
	defer st.Reset()
	s.wg.Go(func() { s.readPongs(st) })
	var b [8]byte
	for {
		select {
		case <-ctx.Done():
			return
		case n := <-numbers:
			binary.BigEndian.PutUint64(b[:], n)
			if _, err := st.Write(b[:]); err != nil {
				return
			}
		}
	}
}

func (s *Session) readPongs(st Stream) {
	var b [8]byte
	for {
		if _, err := io.ReadFull(st, b[:]); err != nil {
			return
		}
		before, _ := s.pulse.figures()
		s.pulse.pong(binary.BigEndian.Uint64(b[:]), time.Now())
		if rtt, _ := s.pulse.figures(); before == 0 && rtt > 0 {
			s.e.changed() // until now it was unknown, or a guess
		}
		s.setState(s.pulse.state(time.Now()))
	}
}

// echo answers the other end's pings.
func echo(st Stream) {
	var b [8]byte
	for {
		if _, err := io.ReadFull(st, b[:]); err != nil {
			return
		}
		if _, err := st.Write(b[:]); err != nil {
			return
		}
	}
}
