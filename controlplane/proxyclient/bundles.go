// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"errors"
	"fmt"
	"sync"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// bundleKeeper writes the source's bundles: the own trust domain's, and those that resources carry. Where the identity comes from
// a Workload API, so does the own bundle, and nothing else: resources that carry it are acknowledged and left alone.
type bundleKeeper struct {
	source    *trust.Source
	own       spiffeid.TrustDomain
	dir       *datadir.Dir
	elsewhere bool // the own bundle is the Workload API's matter

	mu sync.Mutex // serialises changes
}

func newBundleKeeper(source *trust.Source, own spiffeid.TrustDomain, dir *datadir.Dir) *bundleKeeper {
	return &bundleKeeper{source: source, own: own, dir: dir}
}

func bundleFile(td spiffeid.TrustDomain) string { return "bundles/" + td.String() + ".json" }

// apply is the client's first watcher: trust changes before anybody acts on what changed with it.
func (k *bundleKeeper) apply(ch Change) error {
	if ch.TypeURL != controlpb.TypeBundle && ch.TypeURL != controlpb.TypePeer {
		return nil
	}
	td, err := spiffeid.ParseTrustDomain(ch.Name)
	if err != nil {
		return err
	}
	var named string
	var jwks []byte
	switch m := ch.Message.(type) {
	case nil:
		return k.remove(td)
	case *controlpb.Bundle:
		named, jwks = m.GetTrustDomain(), m.GetJwks()
	case *controlpb.Peer:
		if td == k.own {
			return errors.New("a peer with the own trust domain")
		}
		named, jwks = m.GetTrustDomain(), m.GetBundleJwks()
	}
	if named != ch.Name {
		return fmt.Errorf("resource %s speaks of trust domain %.100q", ch.Name, named)
	}
	b, err := trust.ParseBundle(td, jwks)
	if err != nil {
		return err
	}
	if td == k.own && k.elsewhere {
		return nil
	}
	if td == k.own {
		return k.setOwn(b)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.source.UpdateBundles(func(all *trust.Bundles) *trust.Bundles { return all.With(b) })
	return nil
}

func (k *bundleKeeper) remove(td spiffeid.TrustDomain) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if td != k.own && k.source.Bundles().Get(td) != nil { // without the own one nothing could be repaired any more
		k.source.UpdateBundles(func(all *trust.Bundles) *trust.Bundles { return all.Without(td) })
	}
	return nil
}

// setOwn puts the own trust domain's bundle in force and on disk. A lower sequence than the present one changes nothing; the same
// one with other roots or keys is refused (trust.ErrRollback).
func (k *bundleKeeper) setOwn(b *trust.Bundle) error {
	if len(b.Roots()) == 0 {
		return errors.New("a bundle of the own trust domain without roots")
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	have := k.source.Bundles().Get(k.own)
	if have != nil && (b.Sequence() < have.Sequence() || b.Equal(have)) {
		return nil
	}
	if err := have.CheckUpdate(b); err != nil {
		return err
	}
	if err := k.dir.WriteFile(bundleFile(k.own), b.Marshal()); err != nil {
		return err
	}
	k.source.UpdateBundles(func(all *trust.Bundles) *trust.Bundles { return all.With(b) })
	return nil
}
