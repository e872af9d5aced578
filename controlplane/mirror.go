// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utiljson "k8s.io/apimachinery/pkg/util/json"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/compile"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
)

// describeSelf writes the Federation object once; afterwards it is the operator's.
func (c *ControlPlane) describeSelf(ctx context.Context) error {
	if c.federationObject() != nil {
		return nil
	}
	f := &api.Federation{
		TypeMeta:   metav1.TypeMeta{APIVersion: "strait.dev/v1alpha1", Kind: "Federation"},
		ObjectMeta: metav1.ObjectMeta{Name: c.facts.Federation},
		Spec: api.FederationSpec{
			Cluster: c.facts.Cluster, Region: c.facts.Region, Zone: c.facts.Zone, TrustDomain: c.facts.TrustDomain,
			GatewayAddresses: c.facts.GatewayAddresses,
		},
	}
	return c.objects.Apply(ctx, f.Kind, f)
}

// peerObjects mirrors peers into the configuration API, where their sameness may be edited.
type peerObjects struct{ c *ControlPlane }

func (p peerObjects) Upsert(ctx context.Context, peer federate.Peer) error {
	if p.c.objects == nil {
		return problem.New(problem.NoControlPlane, "the configuration API is not ready")
	}
	o := &api.Peer{
		TypeMeta:   metav1.TypeMeta{APIVersion: "strait.dev/v1alpha1", Kind: "Peer"},
		ObjectMeta: metav1.ObjectMeta{Name: peer.Cluster.String()},
		Spec:       api.PeerSpec{TrustDomain: peer.TrustDomain.String(), Sameness: peer.Sameness},
	}
	switch have := p.c.peerObject(peer.Cluster); {
	case have == nil:
		if err := p.c.objects.Apply(ctx, o.Kind, o); err != nil {
			return err
		}
	case have.Spec.TrustDomain != o.Spec.TrustDomain || !slices.Equal(have.Spec.Sameness, o.Spec.Sameness):
		// What an operator granted goes with the record, too: an evicted name may come back as another cluster.
		fields := map[string]any{"trustDomain": o.Spec.TrustDomain, "sameness": append([]string{}, o.Spec.Sameness...)}
		if err := p.c.objects.SetSpec(ctx, api.Ref{Kind: o.Kind, Name: o.Name}, fields); err != nil {
			return err
		}
	}
	o.Status = api.PeerStatus{
		State: string(peer.State), Reason: peer.Reason, Federation: peer.Federation.String(), Region: peer.Region,
		IntroducedBy: peer.IntroducedBy.String(), BundleSHA256: hex.EncodeToString(peer.BundleHash[:]),
	}
	if peer.Bundle != nil {
		o.Status.BundleSequence = int64(peer.Bundle.Sequence())
	}
	if peer.Catalog != nil {
		h := peer.Catalog.Head
		o.Status.Catalog = &api.CatalogMark{Epoch: int64(h.Epoch), Seq: int64(h.Seq), Hash: hex.EncodeToString(h.Hash[:])}
	}
	return p.c.objects.UpdateStatus(ctx, api.Ref{Kind: "Peer", Name: o.Name}, func(status map[string]any) bool {
		return mergeStatus(status, o.Status)
	})
}

// mergeStatus puts what next says into status and reports whether anything differed. Conditions are left to statusLoop.
func mergeStatus(status map[string]any, next api.PeerStatus) bool {
	data, err := json.Marshal(next)
	if err != nil {
		return false
	}
	var fields map[string]any
	if err := utiljson.Unmarshal(data, &fields); err != nil {
		return false
	}
	changed := false
	for k, v := range fields {
		if !reflect.DeepEqual(status[k], v) {
			status[k] = v
			changed = true
		}
	}
	return changed
}

func (p peerObjects) Delete(ctx context.Context, cluster federation.ClusterName) error {
	if p.c.objects == nil {
		return problem.New(problem.NoControlPlane, "the configuration API is not ready")
	}
	return p.c.objects.Delete(ctx, api.Ref{Kind: "Peer", Name: cluster.String()})
}

func (p peerObjects) List(context.Context) ([]federation.ClusterName, error) {
	if p.c.objects == nil {
		return nil, problem.New(problem.NoControlPlane, "the configuration API is not ready")
	}
	var out []federation.ClusterName
	for _, o := range p.c.objects.Objects().Peers {
		if name, err := federation.ParseClusterName(o.Name); err == nil {
			out = append(out, name)
		}
	}
	return out, nil
}

func (c *ControlPlane) peerObject(cluster federation.ClusterName) *api.Peer {
	for _, p := range c.objects.Objects().Peers {
		if p.Name == cluster.String() {
			return p
		}
	}
	return nil
}

// samenessLoop hands an operator's edit of Peer.spec.sameness to the federation's record. Only an edit counts: what the mirror
// has not written yet is not one.
func (c *ControlPlane) samenessLoop(ctx context.Context) error {
	seen := map[string][]string{}
	for {
		changed := c.objects.Changed()
		for _, o := range c.objects.Objects().Peers {
			before, known := seen[o.Name]
			seen[o.Name] = o.Spec.Sameness
			if !known || slices.Equal(before, o.Spec.Sameness) {
				continue
			}
			name, err := federation.ParseClusterName(o.Name)
			if err != nil {
				continue
			}
			p := c.federate.View().ByCluster(name)
			if p == nil || slices.Equal(p.Sameness, o.Spec.Sameness) {
				continue
			}
			if err := c.federate.SetSameness(p.TrustDomain, o.Spec.Sameness); err != nil {
				c.log.Warn("sameness not changed", "peer", o.Name, "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// statusEvery bounds how often conditions are written: they are slow status, not data.
const statusEvery = 500 * time.Millisecond

// statusLoop writes the conditions that the compiler found, with the acknowledgements of proxies.
func (c *ControlPlane) statusLoop(ctx context.Context) error {
	written := map[api.Ref]string{}
	t := time.NewTicker(statusEvery)
	defer t.Stop()
	for {
		if out := c.compiled.Load(); out != nil {
			objects := c.inputs.Load().Objects
			for _, u := range out.Conditions {
				if p, ok := c.programmed(out, objects, u.Ref); ok {
					u.Conditions = append(slices.Clone(u.Conditions), p)
				}
				text := c.objects.UID(u.Ref) + " " + conditionsText(u) // an object made again under the same name has no status yet
				if written[u.Ref] == text {
					continue
				}
				if err := c.objects.SetConditions(ctx, u.Ref, u.Generation, u.Conditions, c.now()); err != nil {
					c.log.Debug("conditions not written", "object", u.Ref.String(), "err", err)
					continue
				}
				written[u.Ref] = text
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func conditionsText(u compile.ConditionUpdate) string {
	text := fmt.Sprint(u.Generation, ";")
	for _, k := range u.Conditions {
		text += k.Type + "=" + string(k.Status) + " " + k.Reason + " " + k.Message + ";"
	}
	return text
}
