// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"context"
	"encoding/json"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
)

const mirrorRetry = 5 * time.Second

// runMirror keeps the objects of peers like the view: newest state only, again after an error.
func (m *Manager) runMirror() {
	done := map[federation.ClusterName]string{}
	listed := false
	retry := time.NewTicker(mirrorRetry)
	defer retry.Stop()
	for {
		changed := m.Changed()
		if !listed {
			listed = m.listMirrored(done)
		}
		var again <-chan time.Time
		if !m.mirror(done) || !listed {
			again = retry.C
		}
		select {
		case <-changed:
		case <-again:
		case <-m.ctx.Done():
			return
		}
	}
}

// listMirrored notes the objects that exist, so that those of former peers are deleted.
func (m *Manager) listMirrored(done map[federation.ClusterName]string) bool {
	ctx, cancel := context.WithTimeout(m.ctx, defaultTimeout)
	defer cancel()
	names, err := m.cfg.Objects.List(ctx)
	if err != nil {
		m.log.Warn("peer objects could not be listed", "error", err)
		return false
	}
	for _, name := range names {
		if _, ok := done[name]; !ok {
			done[name] = "" // written again if it is a peer's, else deleted
		}
	}
	return true
}

func (m *Manager) mirror(done map[federation.ClusterName]string) bool {
	ok := true
	live := map[federation.ClusterName]bool{}
	for _, p := range m.View().Peers {
		live[p.Cluster] = true
		print := mirrored(p)
		if done[p.Cluster] == print {
			continue
		}
		ctx, cancel := context.WithTimeout(m.ctx, defaultTimeout)
		err := m.cfg.Objects.Upsert(ctx, *p)
		cancel()
		if err != nil {
			m.log.Warn("peer object could not be written", "cluster", p.Cluster.String(), "error", err)
			ok = false
			continue
		}
		done[p.Cluster] = print
	}
	for cluster := range done {
		if live[cluster] {
			continue
		}
		ctx, cancel := context.WithTimeout(m.ctx, defaultTimeout)
		err := m.cfg.Objects.Delete(ctx, cluster)
		cancel()
		if err != nil {
			m.log.Warn("peer object could not be deleted", "cluster", cluster.String(), "error", err)
			ok = false
			continue
		}
		delete(done, cluster)
	}
	return ok
}

// mirrored is what an object shows: slow facts only, no tunnels and no catalog numbers.
func mirrored(p *Peer) string {
	b, _ := json.Marshal(struct {
		TD, State, Region, Hash, By string
		Sameness                    []string
		Gateways                    []*controlpb.GatewayRecord
		Conflict                    bool
	}{p.TrustDomain.String(), string(p.State), p.Region, hexHash(p.BundleHash), p.IntroducedBy.String(), p.Sameness, p.Gateways, p.Conflict})
	return string(b)
}
