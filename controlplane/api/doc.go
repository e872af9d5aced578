// SPDX-License-Identifier: Apache-2.0

// Package api holds the Go types of the configuration: our kinds in strait.dev/v1alpha1, and of upstream's kinds (Service v1,
// Namespace v1, ServiceExport of multicluster.x-k8s.io/v1beta1) the part that Strait reads. Their schemas are beside them in
// crds/ as CustomResourceDefinitions, the one source for the embedded API server, for Kubernetes and for the offline validator;
// builtin/ holds the schemas of the two built-in kinds in the same form. crds/serviceexports.yaml is upstream's own file, from
// sigs.k8s.io/mcs-api v0.5.2, unchanged.
//
// The types are plain values for reading: nothing here talks to an API server. Objects that are shared (controlplane/objects)
// must not be changed.
package api
