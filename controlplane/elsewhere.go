// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/grpc"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/endpoint"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// FromWorkloadAPI is the value of Facts.Identities for a cluster without a CA of its own.
const FromWorkloadAPI = "workload-api"

// workloadAPI is the authority of such a cluster: a SPIFFE Workload API server issues identities, to every process by itself, and
// says what the trust bundle is. The Handle is there once Run has begun.
type workloadAPI struct{ *endpoint.Handle }

// IssueCSR refuses: whoever needs an identity asks the Workload API.
func (workloadAPI) IssueCSR([]byte, spiffeid.ID, time.Duration) ([][]byte, error) {
	return nil, identitiesElsewhere("this control plane issues no identities")
}

func identitiesElsewhere(what string) *problem.Error {
	return problem.New(problem.IdentitiesElsewhere, "%s", what).
		WithWhy("identities come from the Workload API: the control plane takes its own from there, and has no key to sign others").
		WithFix("register an entry there and start the process with %s; strait check lists the entries", endpoint.SocketEnv)
}

// IssuerNotAfter is the end of the first intermediate to end, zero without any.
func (w workloadAPI) IssuerNotAfter() (end time.Time) {
	for _, c := range w.Identity(0).Chain[1:] {
		if end.IsZero() || c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}

// openAuthority opens our CA, or prepares for the Workload API. Whoever has one does not silently take the other: members of the
// federation know this cluster by its roots.
func (c *ControlPlane) openAuthority() (err error) {
	cfg := ca.Config{TrustDomain: c.self.trustDomain, Now: c.now, External: c.cfg.ExternalCA}
	switch {
	case c.facts.Identities == "" && c.cfg.WorkloadAPI != "":
		return problem.New(problem.ConfigInvalid, "%s holds a CA, and a Workload API was given (%s)", c.dir.Path(), c.cfg.WorkloadAPI).
			WithWhy("where identities come from is fixed at init; members know this cluster by its roots").
			WithFix("unset %s", endpoint.SocketEnv).WithFix("or begin a cluster with strait init --spiffe-endpoint-socket %s", c.cfg.WorkloadAPI)
	case c.facts.Identities != "" && c.cfg.ExternalCA != "":
		return problem.New(problem.ConfigInvalid, "%s takes its identities from a Workload API, and an external CA was given (%s)", c.dir.Path(), c.cfg.ExternalCA).
			WithWhy("where identities come from is fixed at init").WithFix("leave --external-ca out")
	case c.facts.Identities == "":
		if c.ca, err = ca.Open(c.dir, cfg); err != nil {
			return err
		}
		c.issuer, c.apiCA = c.ca, c.ca.API
		return nil
	case c.cfg.WorkloadAPI == "":
		return problem.New(problem.ConfigInvalid, "the address of the Workload API is missing").
			WithWhy("strait init has fixed that identities come from there").
			WithFix("%s=unix:///run/spire/sockets/agent.sock, or --spiffe-endpoint-socket", endpoint.SocketEnv)
	}
	if _, _, err := endpoint.ParseAddress(c.cfg.WorkloadAPI); err != nil {
		return problem.New(problem.ConfigInvalid, "--spiffe-endpoint-socket: %v", err)
	}
	c.elsewhere = &workloadAPI{}
	c.issuer = c.elsewhere
	c.apiCA, err = ca.OpenAPI(c.dir, cfg)
	return err
}

// awaitIdentity waits for the identities of this process until ctx ends.
func (c *ControlPlane) awaitIdentity(ctx context.Context) error {
	td := c.self.trustDomain
	h, err := endpoint.Open(ctx, endpoint.Config{
		Socket: c.cfg.WorkloadAPI, Wants: []endpoint.Want{endpoint.ControlPlane(td), endpoint.CatalogSigner(td)},
		Source: c.source, Dir: c.dir, File: "bundles/own.json", Now: c.now, Logger: c.log,
	})
	if err != nil {
		return err
	}
	c.elsewhere.Handle = h
	c.followElsewhere()
	return nil
}

// followElsewhere puts the present catalog signer in force; identity and bundle are the handle's matter.
func (c *ControlPlane) followElsewhere() { c.signer.Store(c.elsewhere.Identity(1)) }

// issuing are the RPCs that need a CA.
var issuing = map[string]string{
	controlpb.Identity_Renew_FullMethodName:         "this control plane renews no identities",
	controlpb.Identity_IssueJWT_FullMethodName:      "this control plane issues no JWT-SVIDs",
	controlpb.Operator_WorkloadToken_FullMethodName: "there are no registration tokens",
	controlpb.Operator_GatewayToken_FullMethodName:  "there are no registration tokens",
	controlpb.Operator_AccessIssue_FullMethodName:   "there are no operator certificates: use the command line where the control plane runs",
	controlpb.Operator_IssuerRequest_FullMethodName: "there is no issuer here",
	controlpb.Operator_IssuerImport_FullMethodName:  "there is no issuer here",
}

// needsCA refuses what only a CA can do where there is none.
func (c *ControlPlane) needsCA(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if what, ok := issuing[info.FullMethod]; ok && c.elsewhere != nil {
		return nil, wire.ToStatus(identitiesElsewhere(what))
	}
	return next(ctx, req)
}

// registrationRefused is what a process hears that comes with a token; nil where there is a CA.
func (c *ControlPlane) registrationRefused() error {
	if c.elsewhere == nil {
		return nil
	}
	return problem.New(problem.RegistrationRefused, "there are no registrations").
		WithWhy("identities come from the Workload API: start the process with %s and without a token", endpoint.SocketEnv)
}

// lifetime of the own identity, from its issue.
func (w workloadAPI) lifetime() time.Duration {
	id := w.Identity(0)
	return id.NotAfter.Sub(id.NotBefore)
}

// checkElsewhere lists the entries that the Workload API needs, whether each was seen, and how long identities live.
func (c *ControlPlane) checkElsewhere(k *checks) {
	if c.elsewhere == nil {
		return
	}
	s := c.elsewhere.Status()
	if s.LastError != nil {
		k.bad("trust", "warn", problem.IdentityNotOffered, s.LastError.Error(), "look at the server behind "+s.Socket,
			"the Workload API at %s; identities last came at %s", s.Socket, s.Updated.UTC().Format(time.DateTime))
	} else {
		k.add("trust", "ok", "identities come from the Workload API at %s", s.Socket)
	}
	if life := c.elsewhere.lifetime(); life < ca.DefaultTTL {
		k.bad("trust", "warn", problem.IdentityShortLived, fmt.Sprintf("a process that is not renewed stops after %s at the latest, and the promise of a day without a control plane holds no longer than that", shortTime(life)),
			"raise the lifetime to 36h for Strait's entries", "identities of the Workload API live for %s", shortTime(life))
	}
	for i, kind := range []string{"control plane", "catalog signer"} {
		id := c.elsewhere.Identity(i)
		k.add("trust", "ok", "entry %s (%s): seen, until %s", id.ID, kind, id.NotAfter.UTC().Format(time.DateTime))
	}
	connected := c.connected()
	entry := func(id spiffeid.ID, kind string, seen bool) {
		if seen {
			k.add("trust", "ok", "entry %s (%s): seen", id, kind)
			return
		}
		k.bad("trust", "warn", problem.IdentityNotOffered, "no process has come with it", "register the entry with the Workload API, and start the process with "+endpoint.SocketEnv,
			"entry %s (%s): not seen", id, kind)
	}
	gateways := c.federate.View().Gateways
	for _, g := range gateways {
		entry(g.ID, "gateway "+g.Name, connected[g.Name] == g.ID)
	}
	if len(gateways) == 0 {
		if id, err := spiffeid.Gateway(c.self.trustDomain, firstGateway); err == nil {
			entry(id, "gateway "+firstGateway, false)
		}
	}
	owners := *c.owners.Load()
	for _, proxy := range slices.Sorted(maps.Keys(owners)) {
		entry(owners[proxy], "sidecar "+proxy, connected[proxy] == owners[proxy])
	}
}
