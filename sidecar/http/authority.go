// SPDX-License-Identifier: Apache-2.0

package http

import (
	"errors"
	"net/netip"
	"strings"
)

var errAuthority = errors.New("host is not a name or an address with an optional port")

// ParseAuthority splits a Host or :authority into a normalised host and the port written with it. The host is lower case
// without trailing dot, an IPv6 address without brackets in its canonical form; user information, zones, empty labels
// and anything that is not a DNS name or an address are refused. An empty authority is an empty host.
func ParseAuthority(s string) (host, port string, err error) {
	if s == "" {
		return "", "", nil
	}
	if len(s) > 512 {
		return "", "", errAuthority
	}
	rest := ""
	if strings.HasPrefix(s, "[") {
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return "", "", errAuthority
		}
		addr, err := netip.ParseAddr(s[1:end])
		if err != nil || !addr.Is6() || addr.Zone() != "" {
			return "", "", errAuthority
		}
		host, rest = addr.String(), s[end+1:]
	} else {
		host = s
		if i := strings.IndexByte(s, ':'); i >= 0 {
			host, rest = s[:i], s[i:]
		}
		host = strings.ToLower(strings.TrimSuffix(host, "."))
		if !validName(host) {
			return "", "", errAuthority
		}
	}
	if rest != "" {
		port = rest[1:]
		if rest[0] != ':' || !validPort(port) {
			return "", "", errAuthority
		}
	}
	return host, port, nil
}

func validName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	label := 0
	for i := range len(s) {
		c := s[i]
		switch {
		case c == '.':
			if label == 0 {
				return false
			}
			label = 0
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_':
			if label++; label > 63 {
				return false
			}
		default:
			return false
		}
	}
	return label > 0
}

func validPort(s string) bool {
	if s == "" || len(s) > 5 {
		return false
	}
	n := 0
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
		n = n*10 + int(s[i]-'0')
	}
	return n > 0 && n < 1<<16
}
