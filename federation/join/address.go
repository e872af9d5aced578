// SPDX-License-Identifier: Apache-2.0

package join

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Bounds of what the other side says of its gateways.
const (
	maxRecords         = 32
	maxRecordAddresses = 8
	maxZone            = 63
)

var errAddress = errors.New("not an address of a gateway")

// checkAddress accepts "host:port" with a DNS name or an IP address that a gateway of another cluster can have.
func checkAddress(s string, allowLoopback bool) error {
	if len(s) > maxAddress {
		return fmt.Errorf("address of %d bytes: %w", len(s), errAddress)
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return fmt.Errorf("address %.80q: %w", s, errAddress)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || port[0] == '0' {
		return fmt.Errorf("address %.80q: port: %w", s, errAddress)
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		ip = ip.Unmap()
		switch {
		case ip.Zone() != "", ip.IsUnspecified(), ip.IsMulticast(), ip.IsLinkLocalUnicast(), ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
			return fmt.Errorf("address %.80q: %w", s, errAddress)
		case ip.IsLoopback() && !allowLoopback:
			return fmt.Errorf("address %.80q: loopback: %w", s, errAddress)
		}
		return nil
	}
	if host == "localhost" && !allowLoopback {
		return fmt.Errorf("address %.80q: loopback: %w", s, errAddress)
	}
	if !hostName(host) {
		return fmt.Errorf("address %.80q: host: %w", s, errAddress)
	}
	return nil
}

// hostName accepts lower- and upper-case letters, digits, '-' and '.', not all of them digits and dots (that would be a
// malformed IPv4 address that some resolvers accept).
func hostName(s string) bool {
	letters := false
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z':
			letters = true
		case c >= '0' && c <= '9' || c == '-' || c == '.':
		default:
			return false
		}
	}
	return letters && len(s) <= 253 && s[0] != '.' && s[0] != '-'
}

// CheckRecords judges what a cluster says of its own gateways.
func CheckRecords(td spiffeid.TrustDomain, records []*controlpb.GatewayRecord, allowLoopback bool) error {
	if len(records) > maxRecords {
		return fmt.Errorf("%d gateways; at most %d", len(records), maxRecords)
	}
	seen := map[string]bool{}
	for _, r := range records {
		if _, err := spiffeid.Gateway(td, r.GetName()); err != nil || seen[r.GetName()] {
			return fmt.Errorf("gateway name %.80q: invalid, or twice", r.GetName())
		}
		seen[r.GetName()] = true
		if len(r.GetAddresses()) > maxRecordAddresses || len(r.GetZone()) > maxZone {
			return fmt.Errorf("gateway %s: too many addresses, or a zone that is too long", r.GetName())
		}
		for _, a := range r.GetAddresses() {
			if err := checkAddress(a, allowLoopback); err != nil {
				return fmt.Errorf("gateway %s: %w", r.GetName(), err)
			}
		}
	}
	return nil
}
