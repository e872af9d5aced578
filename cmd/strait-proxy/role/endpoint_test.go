// SPDX-License-Identifier: Apache-2.0

package role

import (
	"strings"
	"testing"

	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/internal/problem"
)

func TestElsewhere(t *testing.T) {
	good := elsewhere{socket: "unix:///run/agent.sock", cluster: "us-east", federation: "acme", region: "us-east-1", zone: "a"}
	at := []string{"127.0.0.1:7400"}
	info, err := good.self(proxyclient.Sidecar, "shop/cart", at)
	if err != nil || info.Cluster != "us-east" || info.Federation != "acme" || info.Locality.Region != "us-east-1" || info.Locality.Zone != "a" {
		t.Errorf("%+v, %v", info, err)
	}
	if info, err = (elsewhere{}).self(proxyclient.Gateway, "", nil); err != nil || info != (proxyclient.Info{}) {
		t.Errorf("without a socket: %+v, %v", info, err)
	}
	with := func(f func(*elsewhere)) elsewhere { e := good; f(&e); return e }
	for says, tt := range map[string]struct {
		e    elsewhere
		role proxyclient.Role
		name string
		at   []string
	}{
		"missing: --proxy":                         {good, proxyclient.Sidecar, "", at},
		"missing: --name":                          {good, proxyclient.Gateway, "", at},
		"missing: --control-plane":                 {good, proxyclient.Gateway, "g", nil},
		"missing: --cluster --federation --region": {elsewhere{socket: good.socket}, proxyclient.Gateway, "g", at},
		"--cluster: ":                              {with(func(e *elsewhere) { e.cluster = "US" }), proxyclient.Gateway, "g", at},
		"--federation: ":                           {with(func(e *elsewhere) { e.federation = "a b" }), proxyclient.Gateway, "g", at},
		"--region: ":                               {with(func(e *elsewhere) { e.zone = "a/b" }), proxyclient.Gateway, "g", at},
	} {
		if _, err := tt.e.self(tt.role, tt.name, tt.at); !problem.Is(err, problem.Usage) || !strings.Contains(err.Error(), says) {
			t.Errorf("want %q: %v", says, err)
		}
	}
}
