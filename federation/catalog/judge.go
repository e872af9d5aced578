// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	servicePrefix = "svc/"
	gatewayPrefix = "gw/"
)

// Bounds of one entry.
const (
	maxEntrySize   = 64 << 10
	maxPorts       = 64
	maxIdentities  = 64
	maxZones       = 64
	maxAddresses   = 16
	maxTextSize    = 256
	maxAddressSize = 260
)

// ServiceKey is the key of a service's entry.
func ServiceKey(s federation.ServiceName) string { return servicePrefix + s.String() }

// known reports whether key is of a kind that consumers know.
func known(key string) bool {
	return strings.HasPrefix(key, servicePrefix) || strings.HasPrefix(key, gatewayPrefix) || strings.HasPrefix(key, denialPrefix) ||
		key == BundleKey || key == SeenKey
}

// GatewayKey is the key of a gateway record's entry.
func GatewayKey(name string) string { return gatewayPrefix + name }

// judgeEntry reads one entry of origin's catalog: a *controlpb.CatalogService, *controlpb.GatewayRecord, *trust.Bundle, *Seen or
// *Denial that speaks of what is origin's own. Whatever else an entry is, the whole head is refused for it.
func judgeEntry(origin spiffeid.TrustDomain, key string, body []byte, allowLoopback bool) (any, error) {
	fail := func(err error) (any, error) {
		return nil, &ForeignError{Origin: origin, Key: key, Why: err.Error()}
	}
	if len(body) > maxEntrySize {
		return fail(fmt.Errorf("%d bytes, at most %d", len(body), maxEntrySize))
	}
	switch {
	case strings.HasPrefix(key, servicePrefix):
		var s controlpb.CatalogService
		if err := proto.Unmarshal(body, &s); err != nil {
			return fail(errors.New("not a service"))
		}
		if err := judgeService(origin, key, &s); err != nil {
			return fail(err)
		}
		return &s, nil
	case strings.HasPrefix(key, gatewayPrefix):
		var g controlpb.GatewayRecord
		if err := proto.Unmarshal(body, &g); err != nil {
			return fail(errors.New("not a gateway record"))
		}
		if err := judgeGateway(origin, key, &g, allowLoopback); err != nil {
			return fail(err)
		}
		return &g, nil
	case key == BundleKey:
		b, err := judgeBundle(origin, body)
		if err != nil {
			return fail(err)
		}
		return b, nil
	case key == SeenKey:
		s, err := judgeSeen(body)
		if err != nil {
			return fail(err)
		}
		return s, nil
	case strings.HasPrefix(key, denialPrefix):
		d, err := judgeDenial(origin, key, body)
		if err != nil {
			return fail(err)
		}
		return d, nil
	}
	return fail(errors.New("an entry of no known kind"))
}

func judgeService(origin spiffeid.TrustDomain, key string, s *controlpb.CatalogService) error {
	name, err := federation.NewServiceName(s.GetService().GetNamespace(), s.GetService().GetName())
	if err != nil {
		return err
	}
	if ServiceKey(name) != key {
		return fmt.Errorf("the entry is about %s", name)
	}
	if len(s.GetPorts()) > maxPorts || len(s.GetSpiffeIds()) > maxIdentities || len(s.GetZones()) > maxZones {
		return errors.New("too many ports, identities or zones")
	}
	seen := map[string]bool{}
	for _, p := range s.GetPorts() {
		if _, err := federation.ParsePortName(p.GetName()); err != nil {
			return err
		}
		if seen[p.GetName()] || p.GetNumber() == 0 || p.GetNumber() > 65535 {
			return fmt.Errorf("port %s %d", p.GetName(), p.GetNumber())
		}
		seen[p.GetName()] = true
	}
	for _, text := range s.GetSpiffeIds() {
		id, err := spiffeid.Parse(text)
		if err != nil {
			return errors.New("an identity is no SPIFFE ID")
		}
		if id.TrustDomain() != origin {
			return fmt.Errorf("identity of trust domain %s", id.TrustDomain())
		}
		if _, _, ok := id.Workload(); !ok {
			return errors.New("an identity is no workload's")
		}
	}
	for z := range s.GetZones() {
		if !plainText(z) {
			return errors.New("malformed zone")
		}
	}
	if !plainText(s.GetLimits().GetDrainReason()) || !plainText(s.GetExportId()) {
		return errors.New("malformed drain reason or export id")
	}
	return nil
}

func judgeGateway(origin spiffeid.TrustDomain, key string, g *controlpb.GatewayRecord, allowLoopback bool) error {
	if _, err := spiffeid.Gateway(origin, g.GetName()); err != nil {
		return err
	}
	if GatewayKey(g.GetName()) != key {
		return fmt.Errorf("the record is about gateway %.80q", g.GetName())
	}
	if len(g.GetAddresses()) > maxAddresses {
		return fmt.Errorf("%d addresses, at most %d", len(g.GetAddresses()), maxAddresses)
	}
	if !plainText(g.GetZone()) {
		return errors.New("malformed zone")
	}
	for _, a := range g.GetAddresses() {
		if err := CheckAddress(a, allowLoopback); err != nil {
			return err
		}
	}
	return nil
}

// CheckAddress accepts host:port where a peer's gateway may be dialled: a routable address, or a DNS name that no resolver takes
// for one.
func CheckAddress(addr string, allowLoopback bool) error {
	if len(addr) > maxAddressSize {
		return errors.New("address too long")
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("address %q is not host:port", addr)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
		return fmt.Errorf("address %q: port", addr)
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return checkHostName(addr, host, allowLoopback)
	}
	ip = ip.Unmap()
	switch {
	case ip.Zone() != "":
		return fmt.Errorf("address %q has a zone", addr)
	case ip.IsLoopback() && allowLoopback:
		return nil
	case ip.IsUnspecified(), ip.IsLoopback(), ip.IsMulticast(), ip.IsLinkLocalUnicast(), ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}),
		ip.Is4() && ip.As4()[0] == 0:
		return fmt.Errorf("address %q is not one that leads to another cluster", addr)
	}
	return nil
}

func checkHostName(addr, host string, allowLoopback bool) error {
	name := strings.TrimSuffix(host, ".")
	if name == "" || len(name) > 253 {
		return fmt.Errorf("address %q: host", addr)
	}
	labels := strings.Split(name, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
			return fmt.Errorf("address %q: host", addr)
		}
		for i := range len(l) {
			c := l[i]
			if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
				return fmt.Errorf("address %q: host", addr)
			}
		}
	}
	last := strings.ToLower(labels[len(labels)-1])
	if last[0] >= '0' && last[0] <= '9' { // 127.1, 0x7f000001 and the like
		return fmt.Errorf("address %q: a host name's last label does not begin with a digit", addr)
	}
	if last == "localhost" && !allowLoopback {
		return fmt.Errorf("address %q is not one that leads to another cluster", addr)
	}
	return nil
}

// plainText accepts short printable text: it is shown to operators and becomes labels.
func plainText(s string) bool {
	if len(s) > maxTextSize || !utf8.ValidString(s) {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f || r >= 0x80 && r <= 0x9f || r == 0x2028 || r == 0x2029 })
}
