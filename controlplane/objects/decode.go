// SPDX-License-Identifier: Apache-2.0

package objects

import (
	"encoding/json"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/strait-mesh/strait/controlplane/api"
)

// newValue returns an empty value of a kind.
func newValue(kind string) any {
	switch kind {
	case api.KindNamespace:
		return &api.Namespace{}
	case api.KindService:
		return &api.Service{}
	case api.KindServiceExport:
		return &api.ServiceExport{}
	case api.KindFederation:
		return &api.Federation{}
	case api.KindPeer:
		return &api.Peer{}
	case api.KindExportPolicy:
		return &api.ExportPolicy{}
	case api.KindFailoverPolicy:
		return &api.FailoverPolicy{}
	case api.KindAccessPolicy:
		return &api.AccessPolicy{}
	case api.KindWorkload:
		return &api.Workload{}
	}
	return nil
}

// lax kinds are upstream's: their types here are a part of them, so other fields are no reason to refuse one.
var lax = map[string]bool{api.KindNamespace: true, api.KindService: true, api.KindServiceExport: true}

// decode reads u as its kind. Our own kinds are read strictly, as to their specification.
func decode(k api.Kind, u *unstructured.Unstructured) *cached {
	v := newValue(k.Kind)
	err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, v)
	if err == nil && !lax[k.Kind] {
		content := map[string]any{"apiVersion": u.GetAPIVersion(), "kind": u.GetKind(), "spec": u.Object["spec"]}
		err = runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(content, newValue(k.Kind), true)
	}
	if err == nil {
		return &cached{value: v}
	}
	return &cached{unreadable: &api.Unreadable{
		Ref:        api.Ref{Kind: k.Kind, Namespace: u.GetNamespace(), Name: u.GetName()},
		Generation: u.GetGeneration(), Error: strings.TrimSpace(err.Error()), Targets: targetsOf(u),
	}}
}

// targetsOf reads the targetRefs of an object that cannot be read as a whole.
func targetsOf(u *unstructured.Unstructured) []api.TargetRef {
	list, ok, err := unstructured.NestedFieldNoCopy(u.Object, "spec", "targetRefs")
	if !ok || err != nil {
		return nil
	}
	data, err := json.Marshal(list)
	if err != nil {
		return nil
	}
	var refs []api.TargetRef
	_ = json.Unmarshal(data, &refs) // what can be read of them
	return refs
}

// add puts an object on its list.
func add(o *api.Objects, c *cached) {
	switch v := c.value.(type) {
	case *api.Namespace:
		o.Namespaces = append(o.Namespaces, v)
	case *api.Service:
		o.Services = append(o.Services, v)
	case *api.ServiceExport:
		o.ServiceExports = append(o.ServiceExports, v)
	case *api.Federation:
		o.Federations = append(o.Federations, v)
	case *api.Peer:
		o.Peers = append(o.Peers, v)
	case *api.ExportPolicy:
		o.ExportPolicies = append(o.ExportPolicies, v)
	case *api.FailoverPolicy:
		o.FailoverPolicies = append(o.FailoverPolicies, v)
	case *api.AccessPolicy:
		o.AccessPolicies = append(o.AccessPolicies, v)
	case *api.Workload:
		o.Workloads = append(o.Workloads, v)
	default:
		o.Unreadable = append(o.Unreadable, *c.unreadable)
	}
}
