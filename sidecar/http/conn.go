// SPDX-License-Identifier: Apache-2.0

package http

import (
	"net"
	nethttp "net/http"
	"time"
)

// ConnConfig configures a connection to a callee's sidecar.
type ConnConfig struct {
	// Protocol is "h2" or "http/1.1". Empty takes what TLS negotiated, and h2 on a connection without TLS.
	Protocol string
	// PingEvery is how long nothing may be received before a liveness ping is sent (h2), PingTimeout how long its answer may
	// take before the connection counts as dead. Together they bound how long a vanished peer goes unnoticed; lower values
	// cost a frame per idle connection and interval. Defaults 5 s and 4 s.
	PingEvery   time.Duration
	PingTimeout time.Duration
	// HeaderBytes limits a response's head; default 64 KiB.
	HeaderBytes int
}

// Conn is a client connection of this engine.
type Conn struct{}

// NewClientConn takes ownership of an established connection to a callee's sidecar.
func NewClientConn(c net.Conn, cfg ConnConfig) (*Conn, error) { return &Conn{}, nil }

// RoundTrip sends one request. Safe for concurrent use.
func (c *Conn) RoundTrip(r *nethttp.Request) (*nethttp.Response, error) { return nil, nil }

// Ready reports whether another request can be sent now.
func (c *Conn) Ready() bool { return false }

// Active is the number of requests in progress.
func (c *Conn) Active() int { return 0 }

// Retire lets the requests in progress end, takes no more, and then closes.
func (c *Conn) Retire() {}

// Closed is closed when the connection has ended, whatever ended it.
func (c *Conn) Closed() <-chan struct{} { return nil }

// Close cuts the connection and what is on it.
func (c *Conn) Close() error { return nil }
