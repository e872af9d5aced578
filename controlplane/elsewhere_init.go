// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/endpoint"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// initialized says whether a data directory holds a cluster of either kind.
func initialized(path string) bool {
	if ca.Exists(path) {
		return true
	}
	dir, err := datadir.Open(path, datadir.Options{})
	if err != nil {
		return false
	}
	defer dir.Close()
	f, err := ReadFacts(dir)
	return err == nil && f.Identities == FromWorkloadAPI
}

// initElsewhere makes the data directory of a cluster whose identities come from a Workload API: strait.yaml and the CA of the
// configuration API, no key that signs a SPIFFE ID, and no token.
func initElsewhere(cfg InitConfig, facts Facts, p parsed) (*InitResult, error) {
	if _, _, err := endpoint.ParseAddress(cfg.WorkloadAPI); err != nil {
		return nil, problem.New(problem.Usage, "--spiffe-endpoint-socket: %v", err).WithState("nothing was written.")
	}
	if initialized(cfg.DataDir) {
		return nil, problem.New(problem.AlreadyInitialized, "%s holds a cluster", cfg.DataDir).WithState("nothing was written.")
	}
	if cfg.ExternalCA != "" {
		return nil, problem.New(problem.Usage, "an external CA and a Workload API: identities come from one of them").WithState("nothing was written.")
	}
	dir, err := datadir.Create(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if _, err := ca.CreateAPI(dir, ca.Config{TrustDomain: p.trustDomain, Now: cfg.Now}); err != nil {
		return nil, err
	}
	gateway, err := spiffeid.Gateway(p.trustDomain, firstGateway)
	if err != nil {
		return nil, err
	}
	// Last: it marks the directory as complete.
	if err := writeConfig(dir, facts, map[string]any{"spiffe-endpoint-socket": cfg.WorkloadAPI}); err != nil {
		return nil, err
	}
	return &InitResult{
		Federation: p.federation.String(), Cluster: p.cluster.String(), TrustDomain: p.trustDomain.String(), DataDir: dir.Path(),
		ConfigFile: dir.Path(configFile), WorkloadAPI: cfg.WorkloadAPI,
		Entries: []string{spiffeid.ControlPlane(p.trustDomain).String(), spiffeid.CatalogSigner(p.trustDomain).String(), gateway.String()},
	}, nil
}
