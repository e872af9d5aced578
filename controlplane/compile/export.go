// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// anyMember in ExportTo.Clusters is every member.
const anyMember = "*"

// exports decides which port of which service leaves to which ready peer: ServiceExport and ExportPolicy, both.
func (r *run) exports() {
	unknown := map[*api.ExportPolicy][]string{}
	matched := map[*api.ExportPolicy]int{}
	for _, x := range r.in.Objects.ServiceExports {
		ref := api.Ref{Kind: api.KindServiceExport, Namespace: x.Namespace, Name: x.Name}
		s := r.services[federation.ServiceName{Namespace: x.Namespace, Name: x.Name}]
		if s == nil {
			for _, kind := range []string{"Accepted", "Valid"} {
				r.condition(ref, x.Generation, kind, false, "NoService", fmt.Sprintf("no Service %s/%s", x.Namespace, x.Name))
			}
			continue
		}
		s.exportID = string(x.UID) + "/" + s.name.String()
		named := false
		for _, p := range r.in.Objects.ExportPolicies {
			if p.Namespace != x.Namespace {
				continue
			}
			for i := range p.Spec.Rules {
				if rule := &p.Spec.Rules[i]; matches(&rule.Services, s.obj) {
					named = true
					matched[p]++
					unknown[p] = append(unknown[p], r.export(s, rule)...)
				}
			}
		}
		r.exportConditions(ref, x, s, named)
	}
	for _, p := range r.in.Objects.ExportPolicies {
		ref := api.Ref{Kind: api.KindExportPolicy, Namespace: p.Namespace, Name: p.Name}
		message := ""
		if list := slices.Compact(slices.Sorted(slices.Values(unknown[p]))); len(list) > 0 {
			message = "not members, so nothing goes to: " + strings.Join(list, ", ")
		} else if matched[p] == 0 {
			message = "no exported service matches"
		}
		r.condition(ref, p.Generation, "Accepted", true, "Valid", message)
	}
}

// export applies one rule and returns the clusters it names that are no ready members.
func (r *run) export(s *service, rule *api.ExportRule) (unknown []string) {
	var to []federation.ClusterName
	for _, c := range rule.To.Clusters {
		if c == anyMember {
			for _, p := range r.peers {
				if p.Ready {
					to = append(to, p.Cluster)
				}
			}
			continue
		}
		if p := r.byCluster[federation.ClusterName(c)]; p != nil && p.Ready {
			to = append(to, p.Cluster)
		} else if c != string(r.in.Self.Cluster) {
			unknown = append(unknown, c)
		}
	}
	for _, p := range s.ports {
		if len(rule.Ports) > 0 && !slices.Contains(rule.Ports, string(p.name)) {
			continue
		}
		for _, c := range to {
			p.exported[c] = true
		}
	}
	return unknown
}

func (r *run) exportConditions(ref api.Ref, x *api.ServiceExport, s *service, named bool) {
	r.condition(ref, x.Generation, "Accepted", true, "Valid", "")
	r.condition(ref, x.Generation, "Valid", true, "Valid", "")
	to := s.exportedTo()
	switch {
	case len(to) > 0:
		names := make([]string, len(to))
		for i, c := range to {
			names[i] = string(c)
		}
		r.out.Exports[s.name] = to
		r.condition(ref, x.Generation, "Ready", true, "Exported", "offered to "+strings.Join(names, ", "))
	case named:
		r.condition(ref, x.Generation, "Ready", false, "NoMember", "no ready member is among the clusters it may go to, or no port is")
	default:
		r.condition(ref, x.Generation, "Ready", false, "NotGranted", "no ExportPolicy of this namespace names it: it stays here")
	}
}

func (s *service) exportedTo() []federation.ClusterName {
	all := map[federation.ClusterName]bool{}
	for _, p := range s.ports {
		maps.Copy(all, p.exported)
	}
	return slices.Sorted(maps.Keys(all))
}

// emitOffers makes the grants and the catalogs.
func (r *run) emitOffers() {
	for _, p := range r.peers {
		if !p.Ready {
			continue
		}
		entries := r.catalogOf(p)
		r.out.Catalog[p.TrustDomain] = entries
		for _, s := range r.order {
			var ports []*controlpb.ServicePort
			for _, port := range s.ports {
				if port.exported[p.Cluster] {
					ports = append(ports, port.proto())
				}
			}
			if len(ports) == 0 {
				continue
			}
			id := exportID(s, p.TrustDomain)
			r.put(controlpb.TypeGrant, p.TrustDomain.String()+"/"+s.name.String(), &controlpb.Grant{
				PeerTrustDomain: p.TrustDomain.String(), Service: s.ref(), Ports: ports, ExportId: id,
			})
			entries["svc/"+s.name.String()] = r.offer(s, p.Cluster, ports, id)
		}
	}
}

// exportID names one export to one peer. It is another one when the ServiceExport was deleted and made again.
func exportID(s *service, td spiffeid.TrustDomain) string {
	h := sha256.Sum256([]byte(s.exportID + "\x00" + td.String()))
	return hex.EncodeToString(h[:8])
}

// offer is the catalog entry of s for one consumer. It speaks of exported ports only and holds no address.
func (r *run) offer(s *service, to federation.ClusterName, ports []*controlpb.ServicePort, id string) *controlpb.CatalogService {
	o := &controlpb.CatalogService{Service: s.ref(), Ports: ports, ExportId: id, Zones: map[string]*controlpb.HealthCounts{}, Limits: s.limits()}
	type seen struct {
		w     *workload
		ports map[string]bool
	}
	instances := map[string]*seen{}
	ids := map[string]bool{}
	for _, p := range s.ports {
		if !p.exported[to] {
			continue
		}
		for _, i := range p.instances {
			if r.denied[i.id] {
				continue
			}
			ids[i.id.String()] = true
			e := instances[i.obj.Name]
			if e == nil {
				e = &seen{i.workload, map[string]bool{}}
				instances[i.obj.Name] = e
			}
			e.ports[string(p.name)] = true
		}
	}
	o.SpiffeIds = slices.Sorted(maps.Keys(ids))
	for _, e := range instances {
		x := e.w.proxy.session
		if x == nil || x.Draining || x.InboundAddress == "" || e.w.obj.Spec.Drain {
			continue
		}
		zone := e.w.zone(r.in.Self.Locality)
		if o.Zones[zone] == nil {
			o.Zones[zone] = &controlpb.HealthCounts{}
		}
		count(o.Zones[zone], e.w, e.ports)
	}
	return o
}

// count adds the verdict about one instance.
func count(c *controlpb.HealthCounts, w *workload, ports map[string]bool) {
	switch worst(w.proxy.verdicts[w.obj.Name], ports) {
	case controlpb.Health_HEALTH_HEALTHY:
		c.Healthy++
	case controlpb.Health_HEALTH_UNHEALTHY:
		c.Unhealthy++
	default:
		c.Unknown++
	}
}

// matches says that sel names the service or selects it by its labels.
func matches(sel *api.ServiceSelector, s *api.Service) bool {
	if slices.Contains(sel.Names, s.Name) {
		return true
	}
	return selects(sel.MatchLabels, s.Labels)
}
