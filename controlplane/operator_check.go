// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
)

// Check implements controlpb.OperatorServer.
func (o *operator) Check(_ context.Context, req *controlpb.CheckRequest) (*controlpb.CheckResponse, error) {
	horizon := time.Duration(req.CertHorizonSeconds) * time.Second
	r := &controlpb.CheckResponse{}
	for _, it := range o.c.check(horizon) {
		if len(req.Groups) == 0 || slices.Contains(req.Groups, it.Group) {
			r.Items = append(r.Items, it)
		}
	}
	return r, nil
}

// checks gathers items in the order of their groups.
type checks struct{ items []*controlpb.CheckItem }

func (k *checks) add(group, state, format string, args ...any) *controlpb.CheckItem {
	it := &controlpb.CheckItem{Group: group, State: state, Text: fmt.Sprintf(format, args...)}
	k.items = append(k.items, it)
	return it
}

func (k *checks) bad(group, state string, code problem.Code, why, fix, format string, args ...any) {
	it := k.add(group, state, format, args...)
	it.Code, it.Why, it.Fix = string(code), why, fix
}

func (c *ControlPlane) check(horizon time.Duration) []*controlpb.CheckItem {
	k := &checks{}
	view := c.federate.View()
	c.checkJoins(k, view)
	c.checkTunnels(k, view)
	c.checkTrust(k, view, horizon)
	c.checkIssuer(k)
	c.checkElsewhere(k)
	c.checkCatalogs(k, view)
	c.checkProxies(k)
	c.checkFailover(k)
	return k.items
}

func (c *ControlPlane) checkJoins(k *checks, view *federate.View) {
	for _, p := range view.Peers {
		switch p.State {
		case federate.StateReady:
			k.add("join", "ok", "%s is a ready member since %s", p.Cluster, p.Since.UTC().Format(time.RFC3339))
		case federate.StateAwaiting:
			k.bad("join", "warn", problem.AwaitingApproval, "somebody has to let it in", "strait member approve "+p.Cluster.String(), "%s awaits approval", p.Cluster)
		case federate.StateJoining:
			k.bad("join", "warn", problem.ProbeFailed, "the join was interrupted after: "+strings.Join(p.Stages, ", "),
				"run the same strait join again", "%s is joining; it expires at %s", p.Cluster, p.Expires.UTC().Format(time.RFC3339))
		}
	}
	for _, a := range view.Alarms {
		if c.now().Sub(a.At) < 24*time.Hour {
			k.bad("join", "warn", problem.NameTaken, a.Kind, "strait member describe "+a.Cluster.String(), "%s: %s", a.Cluster, a.Text)
		}
	}
}

func (c *ControlPlane) checkTunnels(k *checks, view *federate.View) {
	connected := 0
	for _, g := range view.Gateways {
		if g.Connected {
			connected++
		} else {
			k.bad("tunnels", "warn", problem.NoGateway, "its link to the control plane ended at "+g.LastSeen.UTC().Format(time.TimeOnly),
				"look at the gateway's log; start it again", "gateway %s is not connected", g.Name)
		}
	}
	if connected == 0 {
		k.bad("tunnels", "fail", problem.NoGateway, "calls between clusters go through a gateway",
			"strait gateway --data-dir DIR --token-file "+c.dir.Path(gatewayTokenFile), "no gateway of this cluster is connected")
	}
	for _, p := range view.Peers {
		if !p.Ready() {
			continue
		}
		var up []federate.Tunnel
		var last string
		for _, t := range p.Tunnels {
			if t.State == "up" {
				up = append(up, t)
			} else if t.LastError != "" {
				last = t.LastError
			}
		}
		pair := fmt.Sprintf("%s ⇄ %s", c.self.cluster, p.Cluster)
		if len(up) == 0 {
			if last == "" {
				last = "no gateway of it answers"
			}
			k.bad("tunnels", "fail", problem.ClusterUnreachable, last, "strait member describe "+p.Cluster.String(), "%-22s down", pair)
			continue
		}
		t := up[0]
		k.add("tunnels", "ok", "%-22s %s, rtt %dms, loss %.1f%%, %s", pair, t.Transport, int(t.RttSeconds*1000+0.5), t.LossRatio*100, count(len(up), "tunnel"))
	}
}

// count is "1 tunnel" or "2 tunnels".
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func shortTime(d time.Duration) string {
	if d >= 48*time.Hour {
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	}
	return d.Round(time.Second).String()
}

func (c *ControlPlane) checkCatalogs(k *checks, view *federate.View) {
	for _, p := range view.Peers {
		switch {
		case !p.Ready():
		case p.Conflict:
			k.bad("catalogs", "fail", problem.CatalogFork, "two signers, a copied data directory, or an attack", "strait member describe "+p.Cluster.String(), "%s signed two catalogs with one number", p.Cluster)
		case p.Refused != "":
			k.bad("catalogs", "fail", problem.CatalogRefused, p.Refused, "strait member describe "+p.Cluster.String(), "the catalog of %s was refused; the one before stays", p.Cluster)
		case p.Catalog == nil:
			k.bad("catalogs", "warn", problem.CatalogStale, "it has not come yet", "strait ping "+p.Cluster.String(), "no catalog of %s", p.Cluster)
		case p.Freshness != federation.Fresh:
			k.bad("catalogs", "warn", problem.CatalogStale, "no fresh head since "+p.Catalog.ReceivedAt.UTC().Format(time.TimeOnly), "strait ping "+p.Cluster.String(), "the catalog of %s is %s", p.Cluster, p.Freshness)
		default:
			k.add("catalogs", "ok", "%s offers %s (epoch %d, seq %d)", p.Cluster, count(len(p.Catalog.Services), "service"), p.Catalog.Head.Epoch, p.Catalog.Head.Seq)
		}
	}
}

func (c *ControlPlane) checkProxies(k *checks) {
	behind := []string{}
	list := c.discovery.Subscribers()
	for _, s := range list {
		if !s.Current {
			behind = append(behind, s.Node)
		}
	}
	if len(behind) > 0 {
		k.bad("proxies", "warn", problem.ConfigInvalid, "they have not acknowledged yet, or refused", "look at their logs", "%d of %d proxies are behind: %s", len(behind), len(list), strings.Join(behind, ", "))
	} else {
		k.add("proxies", "ok", "%d proxies have acknowledged revision %d", len(list), c.revision.Load())
	}
	for name, s := range c.sessions.View().Sessions {
		if s.Silent {
			k.bad("proxies", "warn", problem.NoControlPlane, "its last report came at "+s.LastReport().UTC().Format(time.TimeOnly)+"; its last verdicts are kept",
				"look at the sidecar; start it again", "sidecar %s does not report", name)
		}
	}
}

func (c *ControlPlane) checkFailover(k *checks) {
	for _, s := range (&operator{c: c}).services("") {
		if len(s.Callers) == 0 {
			continue
		}
		name := s.Service.Namespace + "/" + s.Service.Name
		switch federation.Reason(s.Reason) {
		case federation.LocalOK, federation.PriorityOK:
			k.add("failover", "ok", "%s goes to %s", name, s.Active)
		case federation.NoEndpoints:
			k.bad("failover", "fail", problem.NoEndpoints, s.Reason, "strait why "+name, "%s goes nowhere", name)
		default:
			k.bad("failover", "warn", problem.FailoverActive, s.Reason, "strait why "+name, "%s goes to %s", name, s.Active)
		}
	}
	if out := c.compiled.Load(); out != nil {
		for _, p := range out.Problems {
			k.bad("failover", "warn", problem.InvalidObject, "see the object's conditions", "strait get", "%s", p)
		}
	}
}
