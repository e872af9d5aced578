// SPDX-License-Identifier: Apache-2.0

package bundleendpoint

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"

	"github.com/strait-mesh/strait/trust"
)

const (
	fetchTime    = 10 * time.Second
	maxRedirects = 5
)

// fetch asks the endpoint once. held is the bundle in force, or nil.
func (f *Follower) fetch(ctx context.Context, e Endpoint, held *trust.Bundle) (*trust.Bundle, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	t := &http.Transport{
		DialContext: f.dial, DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: 16 << 10,
		TLSHandshakeTimeout: trust.HandshakeTimeout, ResponseHeaderTimeout: fetchTime,
	}
	defer t.CloseIdleConnections()
	switch {
	case e.Profile == ProfileWeb:
		t.TLSClientConfig = trust.WebClientTLS(f.cfg.WebRoots, f.cfg.Now)
	case held == nil:
		return nil, errors.New("no bundle to begin with")
	default:
		t.TLSClientConfig = trust.BundleClientTLS(held, e.EndpointID, f.cfg.Now)
	}
	client := &http.Client{Transport: t, CheckRedirect: checkRedirect}
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, e.URL, http.NoBody)
	if err != nil {
		return nil, err
	}
	q.Header.Set("Accept", "application/json")
	q.Header.Set("User-Agent", "strait")
	r, err := client.Do(q)
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the endpoint answers %d", r.StatusCode)
	}
	data, err := io.ReadAll(io.LimitReader(r.Body, trust.MaxBundleSize+1))
	if err != nil {
		return nil, err
	}
	b, err := trust.ParseBundle(e.TrustDomain, data)
	if err != nil {
		return nil, err
	}
	return b, checkFetched(held, b)
}

// checkFetched says whether what an endpoint published may replace what is held.
func checkFetched(held, next *trust.Bundle) error {
	if len(next.Roots()) == 0 {
		return fmt.Errorf("bundle of %s: no roots", next.TrustDomain())
	}
	return held.CheckUpdate(next)
}

// checkRedirect is http.Client's hook: next is about to be asked after via.
func checkRedirect(next *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return fmt.Errorf("more than %d redirects", maxRedirects)
	}
	if err := checkURL(next.URL); err != nil {
		return fmt.Errorf("redirect refused: %w", err)
	}
	next.Header.Del("Referer")
	return nil
}

func (f *Follower) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if f.cfg.Dial != nil {
		return f.cfg.Dial(ctx, network, addr)
	}
	d := &net.Dialer{Timeout: fetchTime}
	if !f.cfg.AllowLocal {
		d.Control = func(_, address string, _ syscall.RawConn) error { return checkAddress(address) }
	}
	return d.DialContext(ctx, network, addr)
}

// checkAddress refuses what an endpoint of another organisation cannot be: this machine, its links, and metadata services there.
func checkAddress(address string) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("address %.100q: %w", address, err)
	}
	a := ap.Addr().Unmap().WithZone("")
	if a.IsLoopback() || a.IsUnspecified() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsInterfaceLocalMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return fmt.Errorf("%s is an address of this machine or of its links; such endpoints are refused", a)
	}
	if a.Is4() && a.As4()[0] == 0 { // "this network": Linux takes it for the machine itself
		return fmt.Errorf("%s is an address of this machine", a)
	}
	return nil
}
