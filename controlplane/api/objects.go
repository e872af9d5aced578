// SPDX-License-Identifier: Apache-2.0

package api

import (
	"cmp"
	"slices"
)

// Objects is a snapshot of the whole configuration, each list sorted by namespace and name. It is shared: do not change it.
type Objects struct {
	Namespaces       []*Namespace
	Services         []*Service
	ServiceExports   []*ServiceExport
	Federations      []*Federation
	Peers            []*Peer
	ExportPolicies   []*ExportPolicy
	FailoverPolicies []*FailoverPolicy
	AccessPolicies   []*AccessPolicy
	Workloads        []*Workload

	// Unreadable lists objects that this version could not read as their kind. They are in no list above.
	Unreadable []Unreadable
}

// Unreadable is an object with a field that this version does not know or cannot read. What it says is not applied.
type Unreadable struct {
	Ref        Ref
	Generation int64
	Error      string
	// Targets are its targetRefs, as far as they could be read: a policy that cannot be understood must not leave its targets open.
	Targets []TargetRef
}

// Ref names one object.
type Ref struct {
	Kind      string
	Namespace string
	Name      string
}

// String returns "<kind> <namespace>/<name>".
func (r Ref) String() string {
	if r.Namespace == "" {
		return r.Kind + " " + r.Name
	}
	return r.Kind + " " + r.Namespace + "/" + r.Name
}

// Compare orders by kind, namespace, name.
func (r Ref) Compare(o Ref) int {
	return cmp.Or(cmp.Compare(r.Kind, o.Kind), cmp.Compare(r.Namespace, o.Namespace), cmp.Compare(r.Name, o.Name))
}

type named interface {
	GetNamespace() string
	GetName() string
}

func sortByName[T named](list []T) {
	slices.SortFunc(list, func(a, b T) int {
		return cmp.Or(cmp.Compare(a.GetNamespace(), b.GetNamespace()), cmp.Compare(a.GetName(), b.GetName()))
	})
}

// Sort puts every list in order.
func (o *Objects) Sort() {
	sortByName(o.Namespaces)
	sortByName(o.Services)
	sortByName(o.ServiceExports)
	sortByName(o.Federations)
	sortByName(o.Peers)
	sortByName(o.ExportPolicies)
	sortByName(o.FailoverPolicies)
	sortByName(o.AccessPolicies)
	sortByName(o.Workloads)
	slices.SortFunc(o.Unreadable, func(a, b Unreadable) int { return a.Ref.Compare(b.Ref) })
}
