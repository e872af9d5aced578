// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"math"
	"time"

	"github.com/strait-mesh/strait/federation"
)

// Outcome is what one use of an endpoint met.
type Outcome int

// The outcomes.
const (
	OK          Outcome = iota
	ServerError         // an answer of 5xx from the application
	Reset               // the connection broke under it
	Unreachable         // no connection could be made
	NoInstance          // the far sidecar said that it has no healthy instance: nothing was done
	Neutral             // says nothing about the endpoint (the caller went away, a policy refused)
)

// Figures are the numbers of the books.
type Figures struct {
	// Streak of 5xx answers or resets after which an endpoint is ejected. Default 5.
	Streak int
	// EjectFor is how long. Default 30 s.
	EjectFor time.Duration
	// Retry is the first pause before an unreachable endpoint is tried again; it doubles up to EjectFor. Default 1 s.
	Retry time.Duration
}

func (f Figures) withDefaults() Figures {
	if f.Streak <= 0 {
		f.Streak = 5
	}
	if f.EjectFor <= 0 {
		f.EjectFor = 30 * time.Second
	}
	if f.Retry <= 0 {
		f.Retry = time.Second
	}
	return f
}

// book is what is known of one endpoint.
type book struct {
	inFlight int
	cost     float64 // peak EWMA of latency, seconds
	costAt   time.Time
	streak   int
	fails    int // failures to reach it, running
	ejected  bool
	hard     bool // ejected because it was not reached: a success ends it
	until    time.Time
	reason   federation.Reason
	why      string
	seen     time.Time
}

// isEjected clears an ejection that is over.
func (b *book) isEjected(now time.Time) bool {
	if b.ejected && !b.hard && !now.Before(b.until) {
		b.ejected, b.streak = false, 0
	}
	return b.ejected
}

func (b *book) eject(now time.Time, d time.Duration, hard bool, reason federation.Reason, why string) {
	b.ejected, b.hard, b.until, b.reason, b.why = true, hard, now.Add(d), reason, why
}

// observe adds one latency: a rise counts at once, a fall decays over ten seconds.
func (b *book) observe(now time.Time, d time.Duration) {
	s := d.Seconds()
	if b.costAt.IsZero() || s > b.cost {
		b.cost, b.costAt = s, now
		return
	}
	w := math.Exp(-now.Sub(b.costAt).Seconds() / 10)
	b.cost, b.costAt = b.cost*w+s*(1-w), now
}

// load is what the two choices are compared by; weight is the number of instances behind the endpoint.
func (b *book) load(weight int) float64 {
	return (b.cost + 1e-4) * float64(b.inFlight+1) / float64(max(weight, 1))
}

// Ejection is one ejected endpoint.
type Ejection struct {
	Key    string
	Reason federation.Reason
	Why    string
	Until  time.Time // zero: until it is reached again
}

// Evidence is what a group's own experience says of its cluster.
type Evidence struct {
	// Active says that the group was used within the last minute; otherwise it has no opinion.
	Active bool
	Down   bool
	Until  time.Time
	Reason federation.Reason
	Why    string
	// Ejected is the number of instances (own cluster) or handles (remote) that are ejected.
	Ejected    int
	Ejections  []Ejection
	Candidates int
}
