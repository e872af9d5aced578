// SPDX-License-Identifier: Apache-2.0

package health

import (
	"errors"
	"net"
	"syscall"
	"time"
)

// State is the verdict about one instance.
type State int

// The verdicts. Ejected is Unhealthy for everybody outside.
const (
	Unknown State = iota
	Healthy
	Unhealthy
	Ejected
)

// String returns the state's word.
func (s State) String() string {
	return [...]string{"unknown", "healthy", "unhealthy", "ejected"}[s]
}

// Rules are the figures of the state machine.
type Rules struct {
	// Streak of server errors from live traffic after which an instance is ejected. Default 5.
	Streak int
	// EjectFor is how long. Raising it keeps a recovered instance idle for longer. Default 30 s.
	EjectFor time.Duration
	// Rise is how many successful checks running end unhealthy. Default 2.
	Rise int
	// Fall is how many failed (not refused) checks running end healthy. Default 2.
	Fall int
}

func (r Rules) withDefaults() Rules {
	if r.Streak <= 0 {
		r.Streak = 5
	}
	if r.EjectFor <= 0 {
		r.EjectFor = 30 * time.Second
	}
	if r.Rise <= 0 {
		r.Rise = 2
	}
	if r.Fall <= 0 {
		r.Fall = 2
	}
	return r
}

// verdict is the state machine of one instance: pure, time is a parameter.
type verdict struct {
	state        State
	reason       string
	ups, downs   int // checks running
	errors       int // server errors running
	ejectedUntil time.Time
}

// check takes the result of one active check and reports whether the verdict changed.
func (v *verdict) check(now time.Time, r Rules, err error) bool {
	before := *v
	if err == nil {
		v.ups, v.downs = v.ups+1, 0
	} else {
		v.ups, v.downs = 0, v.downs+1
	}
	switch v.state {
	case Unknown:
		if err == nil {
			v.state, v.reason = Healthy, ""
		} else {
			v.state, v.reason = Unhealthy, word(err)
		}
	case Healthy:
		if err != nil && (Definite(err) || v.downs >= r.Fall) {
			v.state, v.reason = Unhealthy, word(err)
		}
	case Unhealthy:
		if err == nil && v.ups >= r.Rise {
			v.state, v.reason, v.errors = Healthy, "", 0
		} else if err != nil {
			v.reason = word(err)
		}
	case Ejected:
		if now.Before(v.ejectedUntil) {
			break
		}
		v.errors = 0
		if err == nil {
			v.state, v.reason = Healthy, ""
		} else {
			v.state, v.reason = Unhealthy, word(err)
		}
	}
	return before.state != v.state || before.reason != v.reason
}

// connect takes what live traffic met when it connected.
func (v *verdict) connect(err error) bool {
	if err == nil {
		return false
	}
	v.ups = 0
	if v.state == Ejected || v.state == Unhealthy {
		return false
	}
	v.state, v.reason = Unhealthy, word(err)
	return true
}

// answer takes one answer of live traffic and reports whether the streak is full; the caller ejects if it may.
func (v *verdict) answer(failed bool, r Rules) bool {
	if !failed {
		v.errors = 0
		return false
	}
	v.errors++
	return v.errors >= r.Streak && (v.state == Healthy || v.state == Unknown)
}

func (v *verdict) eject(now time.Time, r Rules) {
	v.state, v.reason = Ejected, ReasonOutlier
	v.errors, v.ups, v.downs = 0, 0, 0
	v.ejectedUntil = now.Add(r.EjectFor)
}

// ReasonOutlier is the reason of an ejected instance.
const ReasonOutlier = "outlier_ejected"

// Definite says that nothing listens there: one such failure is enough.
func Definite(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) ||
		errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.ECONNRESET)
}

// word turns an error into one of few phrases: reasons are shown to users and must not carry addresses.
func word(err error) string {
	var status *StatusError
	var nerr net.Error
	switch {
	case errors.As(err, &status):
		return status.Error()
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connect refused"
	case errors.Is(err, syscall.ECONNRESET):
		return "connection reset"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "host unreachable"
	case errors.As(err, &nerr) && nerr.Timeout():
		return "check timed out"
	default:
		return "check failed"
	}
}
