// SPDX-License-Identifier: Apache-2.0

package sessions

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	snapshotFile   = "snapshot/sessions"
	snapshotFormat = 1
)

// record is what is held of one proxy; guarded by Server.mu, except for lastReport.
type record struct {
	proxy      string
	id         spiffeid.ID
	hello      *controlpb.SessionHello
	interval   time.Duration
	live       *live
	silent     bool
	draining   bool
	since      time.Time
	instances  map[instanceKey]Instance
	restored   map[instanceKey]Instance // of the snapshot, while it lowers no count; nil afterwards
	decisions  map[federation.ServiceName]*Decision
	lastReport *atomic.Int64 // Unix milliseconds
}

type instanceKey struct{ workload, port string }

func newRecord(proxy string) *record {
	return &record{
		proxy: proxy, hello: &controlpb.SessionHello{Proxy: proxy}, interval: defaultInterval, instances: map[instanceKey]Instance{},
		decisions: map[federation.ServiceName]*Decision{}, lastReport: &atomic.Int64{},
	}
}

// report takes in a full list of instances and says whether anything changed. Unknown keeps the last verdict.
func (r *record) report(list []*controlpb.InstanceHealth) (changed bool) {
	next := make(map[instanceKey]Instance, len(list))
	for _, i := range list {
		k := instanceKey{i.GetWorkload(), i.GetPortName()}
		in := Instance{Workload: i.GetWorkload(), PortName: i.GetPortName(), Health: i.GetHealth(), Reason: i.GetReason()}
		if in.Health != controlpb.Health_HEALTH_HEALTHY && in.Health != controlpb.Health_HEALTH_UNHEALTHY {
			in.Health = controlpb.Health_HEALTH_UNKNOWN
			if before, ok := r.instances[k]; ok && before.Health != controlpb.Health_HEALTH_UNKNOWN {
				in = before
				in.Stale = true
			}
		}
		next[k] = in
	}
	if maps.Equal(r.instances, next) {
		return false
	}
	r.instances = next
	return true
}

// session is the record as part of a View. held keeps what was healthy before the restart healthy.
func (r *record) session(held bool) *Session {
	s := &Session{
		Proxy: r.proxy, ID: r.id, InboundAddress: r.hello.GetInboundAddress(), Version: r.hello.GetVersion(),
		Locality: federation.Locality{Region: r.hello.GetLocality().GetRegion(), Zone: r.hello.GetLocality().GetZone()},
		Interval: r.interval, Live: r.live != nil, Silent: r.silent, Draining: r.draining, Since: r.since,
		Decisions: r.decisions, lastReport: r.lastReport,
	}
	instances := r.instances
	if held {
		instances = maps.Clone(instances)
		for k, before := range r.restored {
			if now, ok := instances[k]; before.Health == controlpb.Health_HEALTH_HEALTHY && (!ok || now.Health != before.Health) {
				before.Stale = true
				instances[k] = before
			}
		}
	}
	s.Instances = slices.SortedFunc(maps.Values(instances), func(a, b Instance) int {
		return cmp.Or(cmp.Compare(a.Workload, b.Workload), cmp.Compare(a.PortName, b.PortName))
	})
	return s
}

// save writes the snapshot if anything has come in since the last one.
func (s *Server) save() {
	s.mu.Lock()
	if !s.unsaved || s.cfg.Dir == nil {
		s.mu.Unlock()
		return
	}
	s.unsaved, s.saved = false, s.cfg.Now()
	snap := s.snapshotLocked()
	s.mu.Unlock()
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(snap)
	if err == nil {
		err = s.cfg.Dir.WriteState(snapshotFile, data)
	}
	if err != nil {
		s.log.Error("sessions not saved", "err", err)
		s.mu.Lock()
		s.unsaved = true
		s.mu.Unlock()
	}
}

func (s *Server) snapshotLocked() *controlpb.SessionsSnapshot {
	snap := &controlpb.SessionsSnapshot{Format: snapshotFormat, SavedMs: s.cfg.Now().UnixMilli()}
	for _, proxy := range slices.Sorted(maps.Keys(s.records)) {
		r := s.records[proxy]
		rec := &controlpb.SessionRecord{
			SpiffeId: r.id.String(), LastReportMs: r.lastReport.Load(),
			Last: &controlpb.SessionReport{Hello: r.hello, Draining: r.draining, InstancesPresent: true},
		}
		// What a restart holds on to is what was in force, so that two restarts in a row lower no count either.
		for _, i := range r.session(r.restored != nil).Instances {
			rec.Last.Instances = append(rec.Last.Instances, &controlpb.InstanceHealth{
				Workload: i.Workload, PortName: i.PortName, Health: i.Health, Reason: i.Reason,
			})
		}
		for _, name := range slices.SortedFunc(maps.Keys(r.decisions), federation.ServiceName.Compare) {
			rec.Last.Decisions = append(rec.Last.Decisions, r.decisions[name].Report)
			rec.DecisionReceivedMs = append(rec.DecisionReceivedMs, r.decisions[name].Received.UnixMilli())
		}
		snap.Sessions = append(snap.Sessions, rec)
	}
	return snap
}

// load reads the snapshot: every session in it is silent until it reports again.
func (s *Server) load() error {
	data, err := s.cfg.Dir.ReadState(snapshotFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("sessions: %w", err)
	}
	snap := &controlpb.SessionsSnapshot{}
	if err := proto.Unmarshal(data, snap); err != nil {
		return fmt.Errorf("sessions: %w", err)
	}
	if snap.GetFormat() != snapshotFormat {
		return fmt.Errorf("sessions: snapshot of format %d, want %d", snap.GetFormat(), snapshotFormat)
	}
	for _, rec := range snap.GetSessions() {
		r, err := restore(rec)
		if err != nil {
			s.log.Warn("session not restored", "proxy", rec.GetLast().GetHello().GetProxy(), "err", err)
			continue
		}
		s.records[r.proxy] = r
	}
	s.rev++
	return nil
}

func restore(rec *controlpb.SessionRecord) (*record, error) {
	hello := rec.GetLast().GetHello()
	if err := checkHello(hello); err != nil {
		return nil, err
	}
	id, err := spiffeid.Parse(rec.GetSpiffeId())
	if err != nil {
		return nil, err
	}
	r := newRecord(hello.GetProxy())
	r.id, r.hello, r.interval, r.silent, r.draining = id, hello, interval(hello), true, rec.GetLast().GetDraining()
	r.lastReport.Store(rec.GetLastReportMs())
	r.report(rec.GetLast().GetInstances())
	r.restored = r.instances
	for i, d := range rec.GetLast().GetDecisions() {
		name, err := wire.ServiceFromProto(d.GetService())
		if err != nil || i >= len(rec.GetDecisionReceivedMs()) {
			continue
		}
		r.decisions[name] = &Decision{Report: d, Received: time.UnixMilli(rec.GetDecisionReceivedMs()[i])}
	}
	return r, nil
}
