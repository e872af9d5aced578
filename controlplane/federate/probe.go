// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const maxNonce = 64

// Probe asks a peer's control plane for an echo and returns how long that took, measured here.
func (m *Manager) Probe(ctx context.Context, td spiffeid.TrustDomain) (time.Duration, *Reply, error) {
	nonce := make([]byte, 16)
	_, _ = rand.Read(nonce)
	body, err := proto.Marshal(&controlpb.ProbeBody{Nonce: nonce, TimeMs: m.now().UnixMilli(), Cluster: m.cfg.Cluster.String(), Version: m.cfg.Version})
	if err != nil {
		return 0, nil, fmt.Errorf("probe: %w", err)
	}
	began := time.Now()
	r, err := m.Ask(ctx, td, methodProbe, body)
	if err != nil {
		return 0, nil, err
	}
	elapsed := time.Since(began)
	var answer controlpb.ProbeBody
	if err := proto.Unmarshal(r.Body, &answer); err != nil || !bytes.Equal(answer.GetNonce(), nonce) {
		return 0, nil, problem.New(problem.ProbeFailed, "the answer to the probe is not its echo")
	}
	return elapsed, r, nil
}

// handleProbe echoes, and notes that the peer's probe came.
func (m *Manager) handleProbe(_ context.Context, from spiffeid.TrustDomain, body []byte) ([]byte, error) {
	var p controlpb.ProbeBody
	if err := proto.Unmarshal(body, &p); err != nil || len(p.GetNonce()) > maxNonce {
		return nil, problem.New(problem.ProbeFailed, "malformed probe")
	}
	if err := m.proven(from, false); err != nil {
		return nil, err
	}
	return proto.Marshal(&controlpb.ProbeBody{
		Nonce: p.GetNonce(), TimeMs: m.now().UnixMilli(), Cluster: m.cfg.Cluster.String(), Version: m.cfg.Version,
	})
}

// handleProbeBack probes the asker and tells how long that took.
func (m *Manager) handleProbeBack(ctx context.Context, from spiffeid.TrustDomain, _ []byte) ([]byte, error) {
	elapsed, _, err := m.Probe(ctx, from)
	if err != nil {
		return nil, err
	}
	if err := m.proven(from, true); err != nil {
		return nil, err
	}
	return proto.Marshal(&controlpb.ProbeBody{ElapsedSeconds: elapsed.Seconds(), Cluster: m.cfg.Cluster.String(), Version: m.cfg.Version})
}

// prove probes a peer that a third member introduced.
func (m *Manager) prove(td spiffeid.TrustDomain) error {
	ctx, cancel := context.WithTimeout(m.ctx, defaultTimeout)
	defer cancel()
	if _, _, err := m.Probe(ctx, td); err != nil {
		return err
	}
	return m.proven(td, true)
}

// proven notes that a probe crossed, outwards (ours was answered) or inwards; after both a joining peer is ready.
func (m *Manager) proven(td spiffeid.TrustDomain, outwards bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.peers[td] == nil {
		return problem.New(problem.TrustRefused, "%s is no member here", td)
	}
	var ready *record
	err := m.updateLocked(td, func(r *record) error {
		had := r.ProbeIn
		if outwards {
			had = r.ProbeOut
		}
		if r.State != StateJoining || had {
			return errUnchanged
		}
		if outwards {
			r.ProbeOut = true
			r.stage("probe-out")
		} else {
			r.ProbeIn = true
			r.stage("probe-in")
		}
		if r.ProbeIn && r.ProbeOut {
			r.setState(StateReady, m.now())
			r.Joined, r.Expires = m.now(), time.Time{}
			r.stage("ready")
			ready = r
		}
		return nil
	})
	if err != nil || ready == nil {
		return err
	}
	m.log.Info("member ready", "cluster", ready.Cluster.String(), "peer", td.String())
	if ready.Role == roleIssuer && ready.TokenID != "" {
		if err := m.tokens.MarkUsed(ready.TokenID); err != nil {
			m.log.Warn("token could not be marked as used", "token", ready.TokenID, "error", err)
		}
	}
	return nil
}
