// SPDX-License-Identifier: Apache-2.0

// Package configapi is the configuration API: the Kubernetes API machinery (k8s.io/apiextensions-apiserver) over an embedded
// etcd, in one process and without Kubernetes. Everything else sees a *rest.Config.
//
// It serves the kinds of controlplane/api: the CustomResourceDefinitions, applied at each start, and Namespace and Service as
// built-in rows. A namespace is made by the first write into it. Callers prove themselves by a client certificate of the API CA
// whose organization is a role (viewer, operator, admin), or come through Handler, for which the caller has
// already authenticated them. There is no anonymous access and being local proves nothing.
//
// etcd listens on unix sockets inside the data directory, which only its owner may enter. The libraries keep global state: at
// most one Server runs per process at any time; a second Start fails.
package configapi
