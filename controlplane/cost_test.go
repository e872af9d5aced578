// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"slices"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/federation"
)

func TestWhyNotes(t *testing.T) {
	member := func(name string, rtt time.Duration, healthy, unhealthy uint32) federation.Member {
		m := federation.Member{
			Cluster: federation.ClusterName(name), Region: name, Same: true, Health: federation.Health{Healthy: healthy, Unhealthy: unhealthy},
		}
		if m.Local = rtt == 0; !m.Local {
			m.Tunnel = federation.Tunnel{Known: true, Up: true, RTT: rtt}
		}
		return m
	}
	remote := []federation.Member{member("eu-west", 80*time.Millisecond, 6, 0), member("ap-south", 198*time.Millisecond, 2, 0)}
	cause := "Check the cause: strait trace --failover"
	for _, tc := range []struct {
		name string
		home federation.Member
		want []string
	}{
		{"at home", member("us-east", 0, 4, 0), nil},
		{"tripped", member("us-east", 0, 1, 3), []string{"Cost of being here: +80ms rtt, 100% of requests cross-region", cause}},
		{"spilling", member("us-east", 0, 5, 3), []string{"Cost of being here: +9ms rtt, 11% of requests cross-region", cause}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := federation.Inputs{
				Service: federation.ServiceName{Namespace: "shop", Name: "checkout"}, Cluster: "us-east", Locality: federation.Locality{Region: "us-east"},
				Policy: federation.DefaultPolicy(), Members: append([]federation.Member{tc.home}, remote...),
			}
			st, d := federation.Step(time.Unix(1e9, 0), federation.State{}, in)
			report, err := wire.DecisionToProto(time.Unix(1e9, 0), in, st, d, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := whyNotes([]*controlpb.WhyGroup{{Decision: report}}); !slices.Equal(got, tc.want) {
				t.Errorf("%q, want %q", got, tc.want)
			}
		})
	}
}
