// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/strait-mesh/strait/federation"
)

func TestPolicyValidate(t *testing.T) {
	tiers := func(ts ...federation.Tier) func(*federation.Policy) {
		return func(p *federation.Policy) { p.Tiers = ts }
	}
	for _, c := range []struct {
		name string
		edit func(*federation.Policy)
		ok   bool
	}{
		{"default", func(*federation.Policy) {}, true},
		{"return equals trip", func(p *federation.Policy) { p.ReturnPercent = 50 }, false},
		{"return below trip", func(p *federation.Policy) { p.ReturnPercent = 40 }, false},
		{"trip above the default return", func(p *federation.Policy) { p.TripPercent, p.SpillBelowPercent = 80, 90 }, false},
		{"spill below trip", func(p *federation.Policy) { p.SpillBelowPercent = 40 }, false},
		{"more than all", func(p *federation.Policy) { p.ReturnPercent = 101 }, false},
		{"tiers", tiers(federation.Tier{Clusters: []federation.ClusterName{"local"}}, federation.Tier{Clusters: []federation.ClusterName{"a", "b"},
			Weights: map[federation.ClusterName]uint32{"a": 80}}, federation.Tier{Any: true, Except: []federation.ClusterName{"c"}}), true},
		{"empty tier", tiers(federation.Tier{}), false},
		{"named twice", tiers(federation.Tier{Clusters: []federation.ClusterName{"a"}}, federation.Tier{Clusters: []federation.ClusterName{"a"}}), false},
		{"weight for another tier's", tiers(federation.Tier{Clusters: []federation.ClusterName{"a"}},
			federation.Tier{Clusters: []federation.ClusterName{"b"}, Weights: map[federation.ClusterName]uint32{"a": 1}}), false},
	} {
		p := federation.DefaultPolicy()
		c.edit(&p)
		if err := p.Validate(); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	p := federation.Policy{ReturnPercent: 45}
	if err := p.Validate(); !errors.Is(err, federation.ErrReturnNotAboveTrip) {
		t.Errorf("flap guard: %v", err)
	}
	if got := (federation.Policy{}).WithDefaults(); !reflect.DeepEqual(got, federation.DefaultPolicy()) {
		t.Errorf("a zero policy is %+v", got)
	}
	if got := (federation.Policy{Ramp: -1}).WithDefaults(); got.Ramp != -1 || got.ReturnAfter != 2*time.Minute {
		t.Errorf("none is not the default: %+v", got)
	}
}
