// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// MaxStateSize bounds what ParseState reads, in bytes.
const MaxStateSize = 64 << 10

// State is what Step remembers between calls: per member where it stands between tripped and home, and since when. Its zero
// value is a start without memory, which goes to the best tier at once. It is reported and persisted as JSON.
type State struct {
	Version int                          `json:"version,omitempty"`
	At      time.Time                    `json:"at,omitzero"` // of the last Step
	Members map[ClusterName]MemberMemory `json:"members,omitempty"`
	// The active tier's members and when they became it.
	Active string    `json:"active,omitempty"`
	Since  time.Time `json:"since,omitzero"`
}

// Phase is where a member stands between out and home.
type Phase string

// The phases.
const (
	PhaseUp      Phase = "up"
	PhaseOut     Phase = "out"     // by somebody's decision: drained, not granted, not in the order
	PhaseTripped Phase = "tripped" // by its condition
	PhaseHold    Phase = "hold"
	PhaseRamp    Phase = "ramp"
)

// MemberMemory is what is remembered of one member.
type MemberMemory struct {
	Phase    Phase         `json:"phase"`
	Since    time.Time     `json:"since,omitzero"`    // of the phase; in PhaseRamp, of the step
	Until    time.Time     `json:"until,omitzero"`    // end of the hold-down
	Step     int           `json:"step,omitempty"`    // of the ramp
	Spoiled  bool          `json:"spoiled,omitempty"` // health was not good during the step
	Retrips  int           `json:"retrips,omitempty"` // doublings of the hold-down
	Returned time.Time     `json:"returned,omitzero"` // when traffic last came back
	Lossy    bool          `json:"lossy,omitempty"`   // out for tunnel loss, until it is half the limit
	Gone     bool          `json:"gone,omitempty"`    // not among the members any more
	Judged   bool          `json:"judged,omitempty"`  // Healthy is a verdict
	Healthy  float64       `json:"healthy,omitempty"` // the last known healthy percentage
	RTT      time.Duration `json:"rtt,omitempty"`     // the one the order goes by
}

// ParseState reads what json.Marshal made of a State.
func ParseState(b []byte) (State, error) {
	var s State
	if len(b) > MaxStateSize {
		return State{}, fmt.Errorf("failover state: %d bytes, at most %d", len(b), MaxStateSize)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return State{}, fmt.Errorf("failover state: %w", err)
	}
	if s.Version > stateVersion {
		return State{}, fmt.Errorf("failover state: version %d is newer than %d", s.Version, stateVersion)
	}
	return s, nil
}

const stateVersion = 1

// Digest names the state: equal states have equal digests, and the time of the last call is not part of it.
func (s State) Digest() string {
	s.At = time.Time{}
	b, err := json.Marshal(s)
	if err != nil { // no such value can be made by Step or ParseState
		b = []byte(err.Error())
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8])
}
