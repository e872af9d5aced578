// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"cmp"
	"errors"
	"fmt"
	"strings"
)

// ClusterName names one member of a federation: one lower-case DNS label. Values from outside pass ParseClusterName or
// UnmarshalText.
type ClusterName string

// FederationName names a federation: one lower-case DNS label.
type FederationName string

// PortName names one port of a service: one lower-case DNS label.
type PortName string

// OwnCluster is the word that stands for the caller's own cluster in the tiers of a policy. It is no cluster's name.
const OwnCluster ClusterName = "local"

// ServiceName is a service inside one cluster, or the federated service of that name.
type ServiceName struct {
	Namespace string
	Name      string
}

// Locality says where something runs. Either part may be empty.
type Locality struct {
	Region string `json:"region,omitempty"`
	Zone   string `json:"zone,omitempty"`
}

var errEmptyName = errors.New("empty name")

// reservedClusters are words that mean something else where a cluster is named.
var reservedClusters = map[string]bool{"local": true, "any": true, "all": true, "clusterset": true}

// ParseClusterName accepts one lower-case DNS label that is not a reserved word (local, any, all, clusterset).
func ParseClusterName(s string) (ClusterName, error) {
	if err := checkLabel(s); err != nil {
		return "", fmt.Errorf("cluster name %.80q: %w", s, err)
	}
	if reservedClusters[s] {
		return "", fmt.Errorf("cluster name %q: reserved word", s)
	}
	return ClusterName(s), nil
}

func (c ClusterName) String() string { return string(c) }

// IsZero reports whether c names nothing.
func (c ClusterName) IsZero() bool { return c == "" }

// MarshalText returns the name.
func (c ClusterName) MarshalText() ([]byte, error) { return []byte(c), nil }

// UnmarshalText accepts what ParseClusterName accepts, the empty name and OwnCluster.
func (c *ClusterName) UnmarshalText(b []byte) error {
	if len(b) == 0 || string(b) == string(OwnCluster) {
		*c = ClusterName(b)
		return nil
	}
	v, err := ParseClusterName(string(b))
	if err != nil {
		return err
	}
	*c = v
	return nil
}

// ParseFederationName accepts one lower-case DNS label other than "local".
func ParseFederationName(s string) (FederationName, error) {
	if err := checkLabel(s); err != nil {
		return "", fmt.Errorf("federation name %.80q: %w", s, err)
	}
	if s == "local" {
		return "", fmt.Errorf("federation name %q: reserved word", s)
	}
	return FederationName(s), nil
}

func (f FederationName) String() string { return string(f) }

// IsZero reports whether f names nothing.
func (f FederationName) IsZero() bool { return f == "" }

// MarshalText returns the name.
func (f FederationName) MarshalText() ([]byte, error) { return []byte(f), nil }

// UnmarshalText accepts what ParseFederationName accepts and the empty name.
func (f *FederationName) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*f = ""
		return nil
	}
	v, err := ParseFederationName(string(b))
	if err != nil {
		return err
	}
	*f = v
	return nil
}

// ParsePortName accepts one lower-case DNS label.
func ParsePortName(s string) (PortName, error) {
	if err := checkLabel(s); err != nil {
		return "", fmt.Errorf("port name %.80q: %w", s, err)
	}
	return PortName(s), nil
}

func (p PortName) String() string { return string(p) }

// IsZero reports whether p names nothing.
func (p PortName) IsZero() bool { return p == "" }

// MarshalText returns the name.
func (p PortName) MarshalText() ([]byte, error) { return []byte(p), nil }

// UnmarshalText accepts what ParsePortName accepts and the empty name.
func (p *PortName) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*p = ""
		return nil
	}
	v, err := ParsePortName(string(b))
	if err != nil {
		return err
	}
	*p = v
	return nil
}

// NewServiceName accepts two lower-case DNS labels.
func NewServiceName(namespace, name string) (ServiceName, error) {
	for _, l := range []string{namespace, name} {
		if err := checkLabel(l); err != nil {
			return ServiceName{}, fmt.Errorf("service %.80q/%.80q: %w", namespace, name, err)
		}
	}
	return ServiceName{Namespace: namespace, Name: name}, nil
}

// ParseServiceName accepts "<namespace>/<name>".
func ParseServiceName(s string) (ServiceName, error) {
	ns, name, ok := strings.Cut(s, "/")
	if !ok {
		return ServiceName{}, fmt.Errorf("service %.160q: want <namespace>/<name>", s)
	}
	return NewServiceName(ns, name)
}

// String returns "<namespace>/<name>", or "" for the zero value.
func (s ServiceName) String() string {
	if s.IsZero() {
		return ""
	}
	return s.Namespace + "/" + s.Name
}

// IsZero reports whether s names nothing.
func (s ServiceName) IsZero() bool { return s == ServiceName{} }

// Compare orders by namespace, then name.
func (s ServiceName) Compare(o ServiceName) int {
	return cmp.Or(cmp.Compare(s.Namespace, o.Namespace), cmp.Compare(s.Name, o.Name))
}

// MarshalText returns String.
func (s ServiceName) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText accepts what ParseServiceName accepts and the empty name.
func (s *ServiceName) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*s = ServiceName{}
		return nil
	}
	v, err := ParseServiceName(string(b))
	if err != nil {
		return err
	}
	*s = v
	return nil
}

// ParseLocality accepts "<region>", "<region>/<zone>" and "".
func ParseLocality(s string) (Locality, error) {
	if s == "" {
		return Locality{}, nil
	}
	region, zone, cut := strings.Cut(s, "/")
	if region == "" || (cut && zone == "") || len(s) > 128 {
		return Locality{}, fmt.Errorf("locality %.140q: want <region> or <region>/<zone>", s)
	}
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.') && i != len(region) {
			return Locality{}, fmt.Errorf("locality %.140q: character %q", s, c)
		}
	}
	return Locality{Region: region, Zone: zone}, nil
}

// String returns "<region>/<zone>", or "<region>".
func (l Locality) String() string {
	if l.Zone == "" {
		return l.Region
	}
	return l.Region + "/" + l.Zone
}

// IsZero reports whether nothing is known.
func (l Locality) IsZero() bool { return l == Locality{} }

// checkLabel accepts an RFC 1123 DNS label in lower case.
func checkLabel(s string) error {
	if s == "" {
		return errEmptyName
	}
	if len(s) > 63 {
		return errors.New("longer than 63 bytes")
	}
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-') {
			return fmt.Errorf("character %q is not a-z, 0-9 or '-'", c)
		}
	}
	if s[0] == '-' || s[len(s)-1] == '-' {
		return errors.New("begins or ends with '-'")
	}
	return nil
}
