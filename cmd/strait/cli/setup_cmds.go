// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/strait-mesh/strait/controlplane"
)

func setupCommands(e *env) []*cobra.Command {
	return []*cobra.Command{newInitCmd(e), newTokenCmd(e), newJoinCmd(e), newLeaveCmd(e), newMemberCmd(e)}
}

func newInitCmd(e *env) *cobra.Command {
	var o controlplane.InitConfig
	c := &cobra.Command{Use: "init FEDERATION --cluster C --region R", Short: "Create a cluster here: identity, trust root, first gateway", Args: cobra.ExactArgs(1),
		Long: `Create a cluster: its trust domain and root, its configuration file and a registration token for its first gateway, in the data directory.
Nothing listens yet. The cluster's name, region and trust domain are fixed from here on.

With --spiffe-endpoint-socket the cluster has no CA and no registration tokens: control plane, gateways and sidecars take their identities from a
SPIFFE Workload API server, SPIRE or another. That is fixed, too.`,
		Example: "  strait init acme --cluster us-east --region us-east-1\n  strait init acme --cluster eu-west --region eu-west-1 --data-dir ./eu-west --gateway-address 203.0.113.7:7443\n" +
			"  strait init acme --cluster ap-south --region ap-south-1 --trust-domain ap.acme.example --spiffe-endpoint-socket unix:///run/spire/sockets/agent.sock",
		RunE: func(_ *cobra.Command, args []string) error {
			o.Federation = args[0]
			return initRun(e, o)
		}}
	f := c.Flags()
	f.StringVar(&o.Cluster, "cluster", "", "name of the cluster: one DNS label")
	f.StringVar(&o.Region, "region", "", "region it is in")
	f.StringVar(&o.Zone, "zone", "", "zone of its control plane and first gateway")
	f.StringVar(&o.TrustDomain, "trust-domain", "", "SPIFFE trust domain (default <cluster>.<federation>)")
	f.StringVar(&o.ExternalCA, "external-ca", "", "make no root: sign with the intermediate CA in this directory (tls.crt, tls.key, ca.crt)")
	f.StringVar(&o.WorkloadAPI, "spiffe-endpoint-socket", "", "take identities from the SPIFFE Workload API at unix:///path and make no CA; needs --trust-domain")
	f.StringSliceVar(&o.GatewayAddresses, "gateway-address", nil, "where other clusters reach the first gateway, HOST:PORT")
	return c
}

func initRun(e *env, o controlplane.InitConfig) error {
	o.DataDir = e.dataDir
	if o.DataDir == "" {
		o.DataDir = e.defaultDataDir()
	}
	o.Now = e.now
	r, err := controlplane.Init(o)
	if err != nil {
		return err
	}
	if err := e.addContext(o.Cluster, cliContext{DataDir: r.DataDir}, true); err != nil {
		return err
	}
	if e.output != "table" && e.output != "wide" || e.jq != "" {
		return e.print("Cluster", r, &table{names: []string{r.Cluster}})
	}
	if r.WorkloadAPI != "" {
		return initElsewhereOut(e, r, o.Region)
	}
	fmt.Fprintf(e.out, "cluster %s of federation %s is ready to start\n", r.Cluster, r.Federation)
	writeColumns(e.out, [][]string{
		{"trust domain", r.TrustDomain},
		{"root", fmt.Sprintf("sha256 %s, until %s", r.BundleSHA256, r.RootNotAfter.UTC().Format("2006-01-02"))},
		{"data directory", r.DataDir},
		{"configuration", r.ConfigFile},
		{"context", o.Cluster + " (now the current one)"},
	}, "  ")
	e.progress("Next: strait controlplane --data-dir %s", r.DataDir)
	e.progress("then: strait gateway --data-dir %s/gateway --token-file %s", r.DataDir, r.GatewayTokenFile)
	return nil
}

// initElsewhereOut says what was made where identities come from a Workload API.
func initElsewhereOut(e *env, r *controlplane.InitResult, region string) error {
	fmt.Fprintf(e.out, "cluster %s of federation %s needs identities before it can start\n", r.Cluster, r.Federation)
	writeColumns(e.out, [][]string{
		{"trust domain", r.TrustDomain},
		{"identities", "from the Workload API at " + r.WorkloadAPI},
		{"data directory", r.DataDir},
		{"configuration", r.ConfigFile},
		{"context", r.Cluster + " (now the current one)"},
	}, "  ")
	fmt.Fprintln(e.out, "register these entries there, and /ns/<namespace>/sa/<service account> for each workload:")
	for _, id := range r.Entries {
		fmt.Fprintf(e.out, "  %s\n", id)
	}
	e.progress("Next: strait controlplane --data-dir %s", r.DataDir)
	e.progress("then: strait gateway --data-dir %s/gateway --spiffe-endpoint-socket %s --name gateway-1 --control-plane 127.0.0.1:7400 --cluster %s --federation %s --region %s", r.DataDir, r.WorkloadAPI, r.Cluster, r.Federation, region)
	return nil
}
