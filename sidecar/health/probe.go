// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
)

// StatusError is an HTTP check's answer outside 200-399.
type StatusError struct{ Code int }

// Error returns "status 503".
func (e *StatusError) Error() string { return fmt.Sprintf("status %d", e.Code) }

var checkClient = &http.Client{
	Transport: &http.Transport{
		Proxy: nil, DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: 16 << 10,
	},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// Probe checks t once: a connect, or a GET where t has a path. ctx bounds it.
func Probe(ctx context.Context, t Target) error {
	if t.Path == "" {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", t.Address)
		if err != nil {
			return err
		}
		return c.Close()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+t.Address+t.Path, nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "strait-check")
	resp, err := checkClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.CopyN(io.Discard, resp.Body, 64<<10); err != nil && err != io.EOF {
		return err
	}
	if resp.StatusCode < 200 || resp.StatusCode > 399 {
		return &StatusError{Code: resp.StatusCode}
	}
	return nil
}
