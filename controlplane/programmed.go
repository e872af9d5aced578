// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/compile"
	"github.com/strait-mesh/strait/controlplane/controlpb"
)

// resourceName is one discovery resource.
type resourceName struct{ typeURL, name string }

// programmed is the condition Programmed of an object: whether every proxy that subscribes to what the object makes has
// acknowledged it. ok is false for kinds that make nothing for proxies.
func (c *ControlPlane) programmed(out *compile.Output, objects *api.Objects, ref api.Ref) (cond metav1.Condition, ok bool) {
	names, ok := affected(out, objects, ref)
	if !ok {
		return cond, false
	}
	acked, subscribed, refused := 0, 0, ""
	for _, n := range names {
		a, s, nacks := c.discovery.Acked(n.typeURL, n.name)
		acked += a
		subscribed += s
		for _, k := range nacks {
			refused = k.Node + ": " + k.Message
		}
	}
	cond = metav1.Condition{Type: "Programmed", Status: metav1.ConditionTrue, Reason: "Acked", Message: fmt.Sprintf("%d of %d proxies", acked, subscribed)}
	switch {
	case refused != "":
		cond.Status, cond.Reason = metav1.ConditionFalse, "Refused"
		cond.Message += "; refused by " + refused
	case acked < subscribed:
		cond.Status, cond.Reason = metav1.ConditionFalse, "Pending"
	}
	return cond, true
}

// affected lists the resources that an object shapes.
func affected(out *compile.Output, objects *api.Objects, ref api.Ref) ([]resourceName, bool) {
	var names []resourceName
	services := func(refs []api.TargetRef) []string {
		var list []string
		for _, t := range refs {
			list = append(list, ref.Namespace+"/"+t.Name)
		}
		return list
	}
	switch ref.Kind {
	case "FailoverPolicy":
		for _, p := range objects.FailoverPolicies {
			if p.Namespace == ref.Namespace && p.Name == ref.Name {
				for _, s := range services(p.Spec.TargetRefs) {
					names = append(names, resourceName{controlpb.TypeService, s})
				}
			}
		}
	case "AccessPolicy":
		for _, p := range objects.AccessPolicies {
			if p.Namespace == ref.Namespace && p.Name == ref.Name {
				for _, s := range services(p.Spec.TargetRefs) {
					names = append(names, selvesOf(out, s)...)
				}
			}
		}
	case "ExportPolicy", "ServiceExport":
		for name, m := range out.Resources[controlpb.TypeGrant] {
			s := m.(*controlpb.Grant).Service
			if s.GetNamespace() == ref.Namespace && (ref.Kind == "ExportPolicy" || s.GetName() == ref.Name) {
				names = append(names, resourceName{controlpb.TypeGrant, name})
			}
		}
	case "Workload":
		for _, w := range objects.Workloads {
			if w.Namespace == ref.Namespace && w.Name == ref.Name {
				names = append(names, resourceName{controlpb.TypeSelf, w.Namespace + "/" + w.ProxyName()})
			}
		}
	default:
		return nil, false
	}
	return names, true
}

// selvesOf are the sidecars that answer for a service.
func selvesOf(out *compile.Output, service string) []resourceName {
	ns, name, _ := strings.Cut(service, "/")
	var names []resourceName
	for proxy, m := range out.Resources[controlpb.TypeSelf] {
		for _, p := range m.(*controlpb.Self).Inbound {
			if p.Service.GetNamespace() == ns && p.Service.GetName() == name {
				names = append(names, resourceName{controlpb.TypeSelf, proxy})
				break
			}
		}
	}
	return names
}
