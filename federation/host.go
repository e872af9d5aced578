// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"fmt"
	"net"
	"strings"
)

// maxDNSName is the longest DNS name in text form, without the trailing dot.
const maxDNSName = 253

// clusterSetSuffix ends the names of federated services (the Kubernetes multi-cluster name).
const clusterSetSuffix = ".svc.clusterset.local"

// SNI returns the server name of one port of one cluster's service,
// "<port-name>.<service>.<namespace>.svc.<cluster>.<federation>".
func SNI(port PortName, s ServiceName, c ClusterName, f FederationName) string {
	return string(port) + "." + PinnedHost(s, c, f)
}

// ParseSNI is the inverse of SNI. It is exact: lower case, no trailing dot, nothing but the six parts and "svc".
func ParseSNI(name string) (PortName, ServiceName, ClusterName, FederationName, error) {
	fail := func(why any) (PortName, ServiceName, ClusterName, FederationName, error) {
		return "", ServiceName{}, "", "", fmt.Errorf("server name %.260q: %v", name, why)
	}
	if len(name) > maxDNSName {
		return fail("longer than 253 bytes")
	}
	l := strings.Split(name, ".")
	if len(l) != 6 || l[3] != "svc" {
		return fail("want <port>.<service>.<namespace>.svc.<cluster>.<federation>")
	}
	port, err := ParsePortName(l[0])
	if err != nil {
		return fail(err)
	}
	s, err := NewServiceName(l[2], l[1])
	if err != nil {
		return fail(err)
	}
	c, err := ParseClusterName(l[4])
	if err != nil {
		return fail(err)
	}
	f, err := ParseFederationName(l[5])
	if err != nil {
		return fail(err)
	}
	return port, s, c, f, nil
}

// PinnedHost returns the host name of one cluster's service, "<service>.<namespace>.svc.<cluster>.<federation>".
func PinnedHost(s ServiceName, c ClusterName, f FederationName) string {
	return s.Name + "." + s.Namespace + ".svc." + string(c) + "." + string(f)
}

// ClusterSetHost returns the host name of the federated service, "<service>.<namespace>.svc.clusterset.local".
func ClusterSetHost(s ServiceName) string { return s.Name + "." + s.Namespace + clusterSetSuffix }

// ParseHost reads the Host of a request, with or without a port, as a mesh name: "<svc>.<ns>", "<svc>.<ns>.svc",
// ClusterSetHost, or PinnedHost of federation f, in which case pinned is that cluster. A zero f accepts any federation. Case and
// one trailing dot are ignored, as DNS does. ok is false for anything else; whether the service exists is the caller's business.
func ParseHost(host string, f FederationName) (s ServiceName, pinned ClusterName, ok bool) {
	if strings.ContainsRune(host, ':') {
		h, _, err := net.SplitHostPort(host)
		if err != nil {
			return ServiceName{}, "", false
		}
		host = h
	}
	host = strings.TrimSuffix(host, ".")
	if len(host) > maxDNSName {
		return ServiceName{}, "", false
	}
	l := strings.Split(strings.ToLower(host), ".")
	switch {
	case len(l) == 2:
	case len(l) == 3 && l[2] == "svc":
	case len(l) == 5 && l[2] == "svc" && l[3] == "clusterset" && l[4] == "local":
	case len(l) == 5 && l[2] == "svc":
		c, err := ParseClusterName(l[3])
		if err != nil {
			return ServiceName{}, "", false
		}
		if got, err := ParseFederationName(l[4]); err != nil || (!f.IsZero() && got != f) {
			return ServiceName{}, "", false
		}
		pinned = c
	default:
		return ServiceName{}, "", false
	}
	s, err := NewServiceName(l[1], l[0])
	if err != nil {
		return ServiceName{}, "", false
	}
	return s, pinned, true
}
