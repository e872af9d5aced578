// SPDX-License-Identifier: Apache-2.0

package role

import (
	"strings"

	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/endpoint"
)

// elsewhere is what a proxy is told when its identity comes from a SPIFFE Workload API: no registration says who it is then.
type elsewhere struct {
	socket, cluster, federation, region, zone, serviceAccount string
}

// self judges the settings; without a socket there is nothing to tell.
func (e elsewhere) self(role proxyclient.Role, name string, controlPlane []string) (info proxyclient.Info, err error) {
	if e.socket == "" {
		return info, nil
	}
	nameFlag := "--name"
	if role == proxyclient.Sidecar {
		nameFlag = "--proxy"
	}
	var missing []string
	for _, need := range []struct {
		flag  string
		given bool
	}{{nameFlag, name != ""}, {"--control-plane", len(controlPlane) > 0}, {"--cluster", e.cluster != ""}, {"--federation", e.federation != ""}, {"--region", e.region != ""}} {
		if !need.given {
			missing = append(missing, need.flag)
		}
	}
	if len(missing) > 0 {
		return info, problem.New(problem.Usage, "missing: %s", strings.Join(missing, " ")).
			WithWhy("the identity comes from the Workload API at %s, and no registration token says these", e.socket).
			WithFix("strait %s %s … --control-plane HOST:7400 --cluster C --federation F --region R", role, nameFlag).
			WithFix("without a Workload API: unset %s", endpoint.SocketEnv)
	}
	bad := func(flag string, err error) (proxyclient.Info, error) {
		return proxyclient.Info{}, problem.New(problem.Usage, "%s: %v", flag, err)
	}
	if info.Cluster, err = federation.ParseClusterName(e.cluster); err != nil {
		return bad("--cluster", err)
	}
	if info.Federation, err = federation.ParseFederationName(e.federation); err != nil {
		return bad("--federation", err)
	}
	place := e.region
	if e.zone != "" {
		place += "/" + e.zone
	}
	if info.Locality, err = federation.ParseLocality(place); err != nil {
		return bad("--region", err)
	}
	return info, nil
}
