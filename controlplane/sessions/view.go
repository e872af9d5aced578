// SPDX-License-Identifier: Apache-2.0

package sessions

import (
	"sync/atomic"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// View is what is known of all sessions at one moment, immutable.
type View struct {
	// Revision rises with each change of sessions, instances or addresses, Decided with each change of a decision.
	Revision uint64
	Decided  uint64
	Sessions map[string]*Session // by proxy, "<namespace>/<proxy>"
	// Settling is true until sessions of before a restart had time to return; their instances lower no count meanwhile.
	Settling bool
}

// Session is what one sidecar last said, immutable except for LastReport.
type Session struct {
	Proxy          string
	ID             spiffeid.ID
	InboundAddress string
	Locality       federation.Locality
	Version        string
	Interval       time.Duration
	Live           bool // its stream is open
	Silent         bool // lost, or quiet for three intervals: what follows is the last word
	Draining       bool
	Since          time.Time // of Live
	Instances      []Instance
	Decisions      map[federation.ServiceName]*Decision

	lastReport *atomic.Int64
}

// LastReport is when it last said anything.
func (s *Session) LastReport() time.Time { return time.UnixMilli(s.lastReport.Load()) }

// Instance is the verdict on one instance, or on one of its ports.
type Instance struct {
	Workload string
	PortName string
	Health   controlpb.Health // the last verdict; unknown if there never was one
	Reason   string
	Stale    bool // the sidecar has no verdict now, or is held to an earlier one: Health is the last one
}

// Decision is what one caller decided for one service.
type Decision struct {
	Report   *controlpb.DecisionReport // do not modify
	Received time.Time
}

// Get returns the session of a proxy, or nil.
func (v *View) Get(proxy string) *Session { return v.Sessions[proxy] }

// Callers returns the sessions that report a decision for a service, by proxy.
func (v *View) Callers(service federation.ServiceName) map[string]*Decision {
	callers := map[string]*Decision{}
	for proxy, s := range v.Sessions {
		if d := s.Decisions[service]; d != nil {
			callers[proxy] = d
		}
	}
	return callers
}
