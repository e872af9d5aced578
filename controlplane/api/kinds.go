// SPDX-License-Identifier: Apache-2.0

package api

import (
	"embed"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Groups and versions.
const (
	Group      = "strait.dev"
	Version    = "v1alpha1"
	GroupMCS   = "multicluster.x-k8s.io"
	VersionMCS = "v1beta1"

	// MCSModule is where crds/serviceexports.yaml comes from.
	MCSModule = "sigs.k8s.io/mcs-api v0.5.2"
)

// Kinds.
const (
	KindNamespace      = "Namespace"
	KindService        = "Service"
	KindServiceExport  = "ServiceExport"
	KindFederation     = "Federation"
	KindPeer           = "Peer"
	KindExportPolicy   = "ExportPolicy"
	KindFailoverPolicy = "FailoverPolicy"
	KindAccessPolicy   = "AccessPolicy"
	KindWorkload       = "Workload"

	// KindServiceImport is not served; a targetRef may name it.
	KindServiceImport = "ServiceImport"
)

// Kind is one kind that the configuration API serves.
type Kind struct {
	schema.GroupVersionKind
	Plural     string
	Namespaced bool
	BuiltIn    bool   // served without a CustomResourceDefinition
	File       string // in Schemas
}

// Resource returns the kind's group, version and plural name.
func (k Kind) Resource() schema.GroupVersionResource { return k.GroupVersion().WithResource(k.Plural) }

var kinds = []Kind{
	builtIn(KindNamespace, "namespaces", false),
	builtIn(KindService, "services", true),
	{schema.GroupVersionKind{Group: GroupMCS, Version: VersionMCS, Kind: KindServiceExport}, "serviceexports", true, false, "crds/serviceexports.yaml"},
	own(KindFederation, "federations", false),
	own(KindPeer, "peers", false),
	own(KindExportPolicy, "exportpolicies", true),
	own(KindFailoverPolicy, "failoverpolicies", true),
	own(KindAccessPolicy, "accesspolicies", true),
	own(KindWorkload, "workloads", true),
}

func builtIn(kind, plural string, namespaced bool) Kind {
	return Kind{schema.GroupVersionKind{Version: "v1", Kind: kind}, plural, namespaced, true, "builtin/" + plural + ".yaml"}
}

func own(kind, plural string, namespaced bool) Kind {
	return Kind{schema.GroupVersionKind{Group: Group, Version: Version, Kind: kind}, plural, namespaced, false, "crds/" + plural + ".yaml"}
}

// Kinds returns every kind, in an order in which they may be created.
func Kinds() []Kind { return slices.Clone(kinds) }

// KindFor returns the kind of that group, version and name.
func KindFor(gvk schema.GroupVersionKind) (Kind, bool) {
	for _, k := range kinds {
		if k.GroupVersionKind == gvk {
			return k, true
		}
	}
	return Kind{}, false
}

// KindNamed finds a kind by its singular or plural name in any case.
func KindNamed(name string) (Kind, bool) {
	for _, k := range kinds {
		if strings.EqualFold(name, k.Kind) || strings.EqualFold(name, k.Plural) {
			return k, true
		}
	}
	return Kind{}, false
}

//go:embed crds/*.yaml builtin/*.yaml
var files embed.FS

// Schema returns the CustomResourceDefinition of k as YAML. For built-in kinds it only describes them.
func (k Kind) Schema() []byte {
	data, err := files.ReadFile(k.File)
	if err != nil {
		panic(fmt.Sprintf("api: schema of %s: %v", k.Kind, err)) // embedded; a test reads each
	}
	return data
}
