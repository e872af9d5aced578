// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// probes waits for the tunnel and for a probe in each direction: the issuer's first, then ours, which makes both sides ready.
func (j *joinRun) probes(ctx context.Context) error {
	m, td := j.m, j.tok.TrustDomain
	var back controlpb.ProbeBody
	err := j.until(ctx, func(ctx context.Context) error {
		r, err := m.Ask(ctx, td, methodProbeBack, nil)
		if err != nil {
			return err
		}
		return proto.Unmarshal(r.Body, &back)
	})
	if err != nil {
		return err
	}
	j.ok(stageProbeOut, "200 in %s", millis(back.GetElapsedSeconds()))
	var out time.Duration
	err = j.until(ctx, func(ctx context.Context) error {
		elapsed, _, err := m.Probe(ctx, td)
		if err != nil {
			return err
		}
		out = elapsed
		return m.proven(td, true)
	})
	if err != nil {
		return err
	}
	if p := m.View().Peer(td); p == nil || !p.Ready() {
		return problem.New(problem.ProbeFailed, "%s is not ready although probes have crossed", j.tok.Cluster).Retry()
	}
	j.ok("ready", "200 in %s", millis(out.Seconds()))
	return nil
}

// until tries f whenever the view changed or ProbeEvery has passed, until it succeeds, is refused for good, or ctx ends.
func (j *joinRun) until(ctx context.Context, f func(context.Context) error) error {
	ticker := time.NewTicker(j.m.cfg.ProbeEvery)
	defer ticker.Stop()
	for {
		changed := j.m.Changed()
		try, cancel := context.WithTimeout(ctx, defaultTimeout)
		err := f(try)
		cancel()
		if err == nil {
			return nil
		}
		if p := j.m.View().Peer(j.tok.TrustDomain); p == nil || !p.Trusted() {
			return problem.New(problem.TrustRefused, "%s was withdrawn meanwhile", j.tok.Cluster).Wrap(err)
		}
		select {
		case <-ctx.Done():
			return problem.New(problem.ProbeFailed, "%s: %v", j.title(), err).
				WithState("%s and %s are joining: nothing routes or trusts yet. The same command resumes.", j.m.cfg.Cluster, j.tok.Cluster).
				Retry().Wrap(err)
		case <-changed:
			if !j.m.tunnelUp(j.tok.TrustDomain) {
				continue
			}
			select { // a refusal is not asked for at every change
			case <-ticker.C:
			case <-ctx.Done():
			}
		case <-ticker.C:
		}
	}
}

func (m *Manager) tunnelUp(td spiffeid.TrustDomain) bool {
	p := m.View().Peer(td)
	return p != nil && p.TunnelUp
}
