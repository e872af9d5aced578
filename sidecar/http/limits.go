// SPDX-License-Identifier: Apache-2.0

package http

import "time"

// Limits bound what one connection may hold or delay. The zero value has the defaults.
type Limits struct {
	HeaderBytes   int           // of a request's head: 64 KiB
	HeaderTimeout time.Duration // from a request's first byte to the end of its head, and for the first byte: 10 s
	Idle          time.Duration // between requests: 5 min; lower costs callers handshakes
	Streams       uint32        // concurrent HTTP/2 streams of a connection: 256
	BodyStall     time.Duration // without any progress of a body that is not gRPC, in either direction: 60 s
	Grace         time.Duration // for requests in progress when ServeConn's context ends: 30 s
	KeepBody      int           // bytes of a request body kept for a retry: 64 KiB
}

func (l Limits) withDefaults() Limits {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&l.HeaderTimeout, 10*time.Second)
	def(&l.Idle, 5*time.Minute)
	def(&l.BodyStall, time.Minute)
	def(&l.Grace, 30*time.Second)
	if l.HeaderBytes <= 0 {
		l.HeaderBytes = 64 << 10
	}
	if l.Streams == 0 {
		l.Streams = 256
	}
	if l.KeepBody <= 0 {
		l.KeepBody = 64 << 10
	}
	return l
}
