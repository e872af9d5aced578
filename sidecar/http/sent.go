// SPDX-License-Identifier: Apache-2.0

package http

import (
	"context"
	"fmt"
	"io"
	nethttp "net/http"
	"net/http/httptrace"
	"sync/atomic"
)

type markKey struct{}

// sentMark learns about one RoundTrip whether its request can have reached the other side.
type sentMark struct {
	asks    atomic.Int32 // for a connection; each one but the first means that the try before it was not looked at
	refused atomic.Bool  // and we gave no further one
	wrote   atomic.Bool  // a head was written
}

// attach returns r with the hooks. GetBody lets the transport come back to us for a second connection even if the body
// was begun: it never reads what GetBody returns, because no second connection is given.
func (m *sentMark) attach(r *nethttp.Request) *nethttp.Request {
	ctx := context.WithValue(r.Context(), markKey{}, m)
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{WroteHeaders: func() { m.wrote.Store(true) }})
	r = r.WithContext(ctx)
	if r.Body != nil && r.GetBody == nil {
		r.GetBody = func() (io.ReadCloser, error) { return nethttp.NoBody, nil }
	}
	return r
}

// again counts an ask for a connection and reports false if it is one too many.
func (m *sentMark) again(limit int32) bool {
	if m.asks.Add(1) > limit {
		m.refused.Store(true)
		return false
	}
	return true
}

// unseen reports whether a request that failed cannot have reached the application.
func (m *sentMark) unseen() bool { return m.refused.Load() || !m.wrote.Load() }

// classify adds errUnsent to the errors of requests that cannot have reached the application.
func (m *sentMark) classify(err error) error {
	if m.unseen() {
		return fmt.Errorf("%w: %w", errUnsent, err)
	}
	return err
}
