// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/settings"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/register"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Facts are what a cluster is, fixed at init: the section "cluster" of strait.yaml.
type Facts struct {
	Federation       string   `name:"federation" json:"federation" help:"name of the federation"`
	Cluster          string   `name:"cluster" json:"cluster" help:"name of the cluster"`
	Region           string   `name:"region" json:"region" help:"region"`
	Zone             string   `name:"zone" json:"zone,omitempty" help:"zone"`
	TrustDomain      string   `name:"trust-domain" json:"trust-domain" help:"SPIFFE trust domain"`
	GatewayAddresses []string `name:"gateway-addresses" json:"gateway-addresses,omitempty" help:"where other clusters reach our gateways"`
	Identities       string   `name:"identities" json:"identities,omitempty" help:"where identities come from: empty for our CA, workload-api for a SPIFFE Workload API"`
}

// parsed are the facts as values.
type parsed struct {
	federation  federation.FederationName
	cluster     federation.ClusterName
	locality    federation.Locality
	trustDomain spiffeid.TrustDomain
}

func (f Facts) parse() (p parsed, err error) {
	bad := func(flag string, err error) (parsed, error) {
		return parsed{}, problem.New(problem.Usage, "%s: %v", flag, err).WithState("nothing was written.")
	}
	if p.federation, err = federation.ParseFederationName(f.Federation); err != nil {
		return bad("FEDERATION", err)
	}
	if p.cluster, err = federation.ParseClusterName(f.Cluster); err != nil {
		return bad("--cluster", err)
	}
	if p.trustDomain, err = spiffeid.ParseTrustDomain(f.TrustDomain); err != nil {
		return bad("--trust-domain", err)
	}
	if f.Identities != "" && f.Identities != FromWorkloadAPI {
		return bad("identities", fmt.Errorf("%q: want nothing or %s", f.Identities, FromWorkloadAPI))
	}
	if f.Region == "" {
		return bad("--region", errors.New("is required"))
	}
	text := f.Region
	if f.Zone != "" {
		text += "/" + f.Zone
	}
	if p.locality, err = federation.ParseLocality(text); err != nil {
		return bad("--region", err)
	}
	return p, nil
}

// InitConfig is what a new cluster is.
type InitConfig struct {
	DataDir          string
	Federation       string
	Cluster          string
	Region           string
	Zone             string
	TrustDomain      string // default <cluster>.<federation>
	GatewayAddresses []string
	ExternalCA       string // directory of an external CA's intermediate; "": a root is made
	WorkloadAPI      string // unix:///path: no CA, identities come from there; TrustDomain is required then
	Now              func() time.Time
}

// InitResult says what was made.
type InitResult struct {
	Federation       string    `json:"federation"`
	Cluster          string    `json:"cluster"`
	TrustDomain      string    `json:"trustDomain"`
	BundleSHA256     string    `json:"bundleSHA256,omitempty"`
	RootNotAfter     time.Time `json:"rootNotAfter,omitzero"`
	DataDir          string    `json:"dataDir"`
	ConfigFile       string    `json:"configFile"`
	GatewayTokenFile string    `json:"gatewayTokenFile,omitempty"`
	WorkloadAPI      string    `json:"workloadAPI,omitempty"`
	Entries          []string  `json:"entries,omitempty"` // SPIFFE IDs to register with the Workload API
}

const (
	configFile       = "strait.yaml"
	gatewayTokenFile = "tokens/gateway-1.token"
	firstGateway     = "gateway-1"
	// gatewayTokenTTL is how long init's token for the first gateway can be redeemed.
	gatewayTokenTTL = 24 * time.Hour
)

// Init makes a cluster's data directory, offline: keys, strait.yaml and the registration token of the first gateway. It never
// overwrites one.
func Init(cfg InitConfig) (*InitResult, error) {
	if cfg.TrustDomain == "" && cfg.Cluster != "" && cfg.WorkloadAPI == "" {
		cfg.TrustDomain = cfg.Cluster + "." + cfg.Federation
	}
	facts := Facts{Federation: cfg.Federation, Cluster: cfg.Cluster, Region: cfg.Region, Zone: cfg.Zone, TrustDomain: cfg.TrustDomain, GatewayAddresses: cfg.GatewayAddresses}
	if cfg.WorkloadAPI != "" {
		facts.Identities = FromWorkloadAPI
	}
	p, err := facts.parse()
	if err != nil {
		return nil, err
	}
	for _, a := range cfg.GatewayAddresses {
		if _, port, err := net.SplitHostPort(a); err != nil || port == "" {
			return nil, problem.New(problem.Usage, "--gateway-address %s: want HOST:PORT", a).WithState("nothing was written.")
		}
	}
	if cfg.WorkloadAPI != "" {
		return initElsewhere(cfg, facts, p)
	}
	if initialized(cfg.DataDir) {
		return nil, problem.New(problem.AlreadyInitialized, "%s holds the keys of a cluster", cfg.DataDir).WithState("nothing was written.")
	}
	config := map[string]any{}
	if cfg.ExternalCA != "" {
		if cfg.ExternalCA, err = filepath.Abs(cfg.ExternalCA); err != nil {
			return nil, err
		}
		config["external-ca"] = cfg.ExternalCA
	}
	dir, err := datadir.Create(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := writeConfig(dir, facts, config); err != nil {
		return nil, err
	}
	authority, err := ca.Create(dir, ca.Config{TrustDomain: p.trustDomain, Now: cfg.Now, External: cfg.ExternalCA})
	if err != nil {
		return nil, err
	}
	if err := issueGatewayToken(dir, authority, p, cfg.Now); err != nil {
		return nil, err
	}
	sum := authority.Bundle().Hash()
	return &InitResult{
		Federation: p.federation.String(), Cluster: p.cluster.String(), TrustDomain: p.trustDomain.String(),
		BundleSHA256: hex.EncodeToString(sum[:]), RootNotAfter: authority.Bundle().NotAfter(),
		DataDir: dir.Path(), ConfigFile: dir.Path(configFile), GatewayTokenFile: dir.Path(gatewayTokenFile),
	}, nil
}

func writeConfig(dir *datadir.Dir, facts Facts, controlPlane map[string]any) error {
	text, err := yaml.Marshal(map[string]any{"cluster": facts, "controlplane": controlPlane, "gateway": map[string]any{}})
	if err != nil {
		return err
	}
	head := "# Written by strait init. The section cluster is fixed; the others take the flags of their role, without dashes.\n"
	return dir.WriteFile(configFile, append([]byte(head), text...))
}

func issueGatewayToken(dir *datadir.Dir, authority *ca.CA, p parsed, now func() time.Time) error {
	tokens, err := register.OpenTokens(dir, now)
	if err != nil {
		return err
	}
	id, err := spiffeid.Gateway(p.trustDomain, firstGateway)
	if err != nil {
		return err
	}
	tok, err := tokens.Issue(register.Grant{
		Kind: register.KindGateway, Name: firstGateway, SPIFFEID: id, Region: p.locality.Region, Zone: p.locality.Zone,
	}, gatewayTokenTTL)
	if err != nil {
		return err
	}
	sum := authority.Bundle().Hash()
	tok.BundleSHA256 = sum[:]
	tok.Addresses = []string{"127.0.0.1:7400"}
	return dir.WriteFile(gatewayTokenFile, []byte(tok.Encode()+"\n"))
}

// ReadFacts reads the section cluster of a data directory's strait.yaml.
func ReadFacts(dir *datadir.Dir) (Facts, error) {
	var f Facts
	data, err := dir.ReadFile(configFile)
	if errors.Is(err, fs.ErrNotExist) {
		return f, problem.New(problem.ConfigInvalid, "%s is missing", dir.Path(configFile)).WithFix("strait init").Wrap(err)
	}
	if err != nil {
		return f, err
	}
	err = settings.Bind("cluster", &f).Load(settings.Sources{
		File: data, FileName: dir.Path(configFile), Sections: []string{"cluster", "controlplane", "gateway", "sidecar"},
	})
	if err != nil {
		return f, err
	}
	if _, err := f.parse(); err != nil {
		return f, problem.New(problem.ConfigInvalid, "%s: %s", dir.Path(configFile), strings.TrimPrefix(err.Error(), "usage error: ")).Wrap(err)
	}
	return f, nil
}

func (f Facts) String() string { return fmt.Sprintf("%s of %s", f.Cluster, f.Federation) }
