// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strings"
)

// SocketEnv is the variable in which the specification keeps the address.
const SocketEnv = "SPIFFE_ENDPOINT_SOCKET"

// ParseAddress reads the address of a Workload API (SPIFFE Workload Endpoint, section 4): unix:///path or tcp://IP:port. It
// returns what net.Dial takes.
func ParseAddress(s string) (network, address string, err error) {
	u, err := url.Parse(s)
	if err != nil {
		return "", "", fmt.Errorf("%.200q is no URI", s)
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "" || strings.HasSuffix(s, "#") || u.ForceQuery {
		return "", "", fmt.Errorf("%.200q has more than a scheme and a path or an address", s)
	}
	switch u.Scheme {
	case "unix":
		if u.Host != "" || u.Path == "" || u.Path == "/" {
			return "", "", fmt.Errorf("%.200q: want unix:///path/of/the/socket", s)
		}
		return "unix", u.Path, nil
	case "tcp":
		host, port, err := net.SplitHostPort(u.Host)
		if err != nil || port == "" || u.Path != "" {
			return "", "", fmt.Errorf("%.200q: want tcp://IP:port", s)
		}
		if _, err := netip.ParseAddr(host); err != nil {
			return "", "", fmt.Errorf("%.200q: want an IP address, no name", s)
		}
		return "tcp", u.Host, nil
	}
	return "", "", errors.New("want unix:///path/of/the/socket (or tcp://IP:port)")
}

// StandardEnv makes the standard variable the value of a setting spiffe-endpoint-socket whose own variable, STRAIT_SPIFFE_ENDPOINT_SOCKET,
// is not set: stronger than a file, weaker than a flag.
func StandardEnv(getenv func(string) (string, bool)) func(string) (string, bool) {
	return func(name string) (string, bool) {
		v, ok := getenv(name)
		if !ok && name == "STRAIT_"+SocketEnv {
			return getenv(SocketEnv)
		}
		return v, ok
	}
}
