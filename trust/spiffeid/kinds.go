// SPDX-License-Identifier: Apache-2.0

package spiffeid

import (
	"errors"
	"strings"
)

const (
	gatewayPrefix  = "/strait/gateway/"
	operatorPrefix = "/strait/operator/"
	controlPlane   = "/strait/controlplane"
	catalogSigner  = "/strait/catalog-signer"
)

// below is the ID of td with path, judged like any other.
func below(td TrustDomain, path string) (ID, error) {
	if td.IsZero() {
		return ID{}, errors.New("SPIFFE ID: no trust domain")
	}
	return Parse(scheme + td.name + path)
}

func segment(s string) error {
	if strings.Contains(s, "/") {
		return errors.New("SPIFFE ID: a name contains '/'")
	}
	return nil
}

// Workload is spiffe://<td>/ns/<namespace>/sa/<service account>.
func Workload(td TrustDomain, namespace, serviceAccount string) (ID, error) {
	if err := errors.Join(segment(namespace), segment(serviceAccount)); err != nil {
		return ID{}, err
	}
	return below(td, "/ns/"+namespace+"/sa/"+serviceAccount)
}

// Gateway is spiffe://<td>/strait/gateway/<name>.
func Gateway(td TrustDomain, name string) (ID, error) {
	if err := segment(name); err != nil {
		return ID{}, err
	}
	return below(td, gatewayPrefix+name)
}

// Operator is spiffe://<td>/strait/operator/<name>.
func Operator(td TrustDomain, name string) (ID, error) {
	if err := segment(name); err != nil {
		return ID{}, err
	}
	return below(td, operatorPrefix+name)
}

// ControlPlane is spiffe://<td>/strait/controlplane; the zero ID for no trust domain.
func ControlPlane(td TrustDomain) ID {
	id, _ := below(td, controlPlane)
	return id
}

// CatalogSigner is spiffe://<td>/strait/catalog-signer; the zero ID for no trust domain.
func CatalogSigner(td TrustDomain) ID {
	id, _ := below(td, catalogSigner)
	return id
}

// Workload returns namespace and service account when id is a workload's.
func (id ID) Workload() (namespace, serviceAccount string, ok bool) {
	p := strings.Split(id.Path(), "/")
	if len(p) != 5 || p[1] != "ns" || p[3] != "sa" {
		return "", "", false
	}
	return p[2], p[4], true
}

// Gateway returns the name when id is a gateway's.
func (id ID) Gateway() (name string, ok bool) { return after(id.Path(), gatewayPrefix) }

// Operator returns the name when id is an operator's.
func (id ID) Operator() (name string, ok bool) { return after(id.Path(), operatorPrefix) }

// IsControlPlane reports whether id is its trust domain's control plane.
func (id ID) IsControlPlane() bool { return id.Path() == controlPlane }

// IsCatalogSigner reports whether id is its trust domain's catalog signer.
func (id ID) IsCatalogSigner() bool { return id.Path() == catalogSigner }

func after(path, prefix string) (string, bool) {
	name, ok := strings.CutPrefix(path, prefix)
	return name, ok && name != "" && !strings.Contains(name, "/")
}
