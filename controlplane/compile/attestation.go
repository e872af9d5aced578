// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"cmp"
	"math"
	"slices"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/controlpb"
)

// selectors says which processes may take the sidecar's identity: those of all of its workloads, which have one identity. Their
// order is the same whatever the objects'.
func (p *proxy) selectors() []*controlpb.UnixSelector {
	var out []*controlpb.UnixSelector
	for _, w := range p.workloads {
		if w.obj.Spec.Attestation == nil {
			continue
		}
		for _, u := range w.obj.Spec.Attestation.Unix {
			if m := selector(u); m != nil {
				out = append(out, m)
			}
		}
	}
	slices.SortFunc(out, compareSelectors)
	return slices.CompactFunc(out, func(a, b *controlpb.UnixSelector) bool { return compareSelectors(a, b) == 0 })
}

// selector is nil for one that would match nobody, or more than what was written.
func selector(u api.UnixSelector) *controlpb.UnixSelector {
	m := &controlpb.UnixSelector{Path: u.Path}
	for _, f := range []struct {
		from *int64
		to   **uint32
	}{{u.UID, &m.Uid}, {u.GID, &m.Gid}} {
		if f.from == nil {
			continue
		}
		if *f.from < 0 || *f.from >= math.MaxUint32 {
			return nil
		}
		n := uint32(*f.from)
		*f.to = &n
	}
	if m.Uid == nil && m.Gid == nil && m.Path == "" {
		return nil
	}
	return m
}

func compareSelectors(a, b *controlpb.UnixSelector) int {
	number := func(n *uint32) int64 {
		if n == nil {
			return -1
		}
		return int64(*n)
	}
	return cmp.Or(cmp.Compare(number(a.Uid), number(b.Uid)), cmp.Compare(number(a.Gid), number(b.Gid)), cmp.Compare(a.Path, b.Path))
}
