// SPDX-License-Identifier: Apache-2.0

package endpoint

import "github.com/strait-mesh/strait/trust/spiffeid"

// Want is an identity that a process needs.
type Want struct {
	Text string                 // how errors and lists name it: a SPIFFE ID, or its form
	Fits func(spiffeid.ID) bool // required
}

// Exactly wants id.
func Exactly(id spiffeid.ID) Want {
	return Want{id.String(), func(have spiffeid.ID) bool { return have == id && !id.IsZero() }}
}

// ControlPlane wants the control plane of td.
func ControlPlane(td spiffeid.TrustDomain) Want { return Exactly(spiffeid.ControlPlane(td)) }

// CatalogSigner wants the catalog signer of td.
func CatalogSigner(td spiffeid.TrustDomain) Want { return Exactly(spiffeid.CatalogSigner(td)) }

// Gateway wants the gateway of that name, of whatever trust domain the server is.
func Gateway(name string) Want {
	return Want{"spiffe://<trust domain>/strait/gateway/" + name, func(id spiffeid.ID) bool {
		have, ok := id.Gateway()
		return ok && have == name
	}}
}

// Workload wants a service account of the namespace; an empty service account means any.
func Workload(namespace, serviceAccount string) Want {
	text := serviceAccount
	if text == "" {
		text = "<service account>"
	}
	return Want{"spiffe://<trust domain>/ns/" + namespace + "/sa/" + text, func(id spiffeid.ID) bool {
		ns, sa, ok := id.Workload()
		return ok && ns == namespace && (serviceAccount == "" || sa == serviceAccount)
	}}
}
