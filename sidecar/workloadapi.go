// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/workloadapi"
)

// newWorkloadAPI makes the server of the SPIFFE Workload API; nil when it is off.
func newWorkloadAPI(s *Sidecar) (*workloadapi.Server, error) {
	if s.cfg.WorkloadAPI == "" {
		return nil, nil
	}
	issuer, ok := s.cfg.Client.(workloadapi.Issuer)
	if !ok {
		return nil, fmt.Errorf("sidecar: the SPIFFE Workload API needs a control plane, and %T is none", s.cfg.Client)
	}
	refused := s.cfg.Metrics.Counter("strait_workload_api_refused_total", "Calls of the SPIFFE Workload API that were refused.", "reason")
	return workloadapi.New(workloadapi.Config{
		Source: s.source, Issuer: issuer, Denied: s.isDenied, RenewEvery: s.cfg.RenewEvery, Now: s.cfg.Now, Logger: s.log,
		Refused: func(reason string) { refused.With(reason).Inc() },
	})
}

// serveWorkloadAPI serves until ctx ends.
func (s *Sidecar) serveWorkloadAPI(ctx context.Context, l *workloadapi.Listener) {
	s.log.Info("SPIFFE Workload API serves", "socket", l.Addr().String())
	if err := s.workloads.Run(ctx, l); err != nil {
		s.log.Error("SPIFFE Workload API not served", "error", err)
	}
}

// tellWorkloadAPI passes on who may take which identity, after Self or what was withdrawn has changed.
func (s *Sidecar) tellWorkloadAPI() {
	if s.workloads == nil {
		return
	}
	_, name, _ := strings.Cut(s.cfg.Proxy, "/")
	a := workloadapi.Access{Proxy: s.cfg.Proxy, Hint: name}
	if self := s.self.Load(); self != nil {
		id, err := spiffeid.Parse(self.GetSpiffeId())
		if err != nil {
			s.log.Error("SPIFFE Workload API serves nobody", "error", err)
		} else {
			a.ID, a.Selectors = id, selectorsOf(self)
		}
	}
	if !a.ID.IsZero() {
		if reason, denied := s.isDenied(a.ID, time.Time{}); denied {
			if a.Withdrawn = reason; reason == "" {
				a.Withdrawn = "no reason given"
			}
		}
	}
	s.workloads.SetAccess(a)
	s.workloads.Reconsider()
}

func selectorsOf(self *controlpb.Self) []workloadapi.Selector {
	out := make([]workloadapi.Selector, 0, len(self.GetWorkloadApi()))
	for _, u := range self.GetWorkloadApi() {
		out = append(out, workloadapi.Selector{UID: u.Uid, GID: u.Gid, Path: u.GetPath()})
	}
	return out
}

// recallWorkloads has the applications' identity renewed with the sidecar's own, when the control plane recalls what it issued.
func (s *Sidecar) recallWorkloads(b *controlpb.Bundle) {
	ms := b.GetRenewIssuedBeforeMs()
	own := s.source.Identity()
	if s.workloads == nil || ms <= 0 || own == nil || b.GetTrustDomain() != own.ID.TrustDomain().String() {
		return
	}
	s.workloads.RenewIssuedBefore(time.UnixMilli(ms))
}
