// SPDX-License-Identifier: Apache-2.0

package lookalike

import (
	"encoding/binary"
	"net"
)

// SplitConn is the client's end of a connection whose first write, a ClientHello, leaves in two parts. Use it before anything is written.
type SplitConn struct {
	net.Conn
	At      int  // bytes of the first part: 1 … Len()-1
	Records bool // two TLS records; else two writes

	hello []byte
}

// recordHeader is the size of the header of a TLS record.
const recordHeader = 5

// Len is how many bytes there were to cut, once the ClientHello was written: of the record, or of its body.
func (c *SplitConn) Len() int {
	if c.Records {
		return max(0, len(c.hello)-recordHeader)
	}
	return len(c.hello)
}

// Write cuts the first one.
func (c *SplitConn) Write(b []byte) (int, error) {
	if c.hello != nil {
		return c.Conn.Write(b)
	}
	c.hello = append([]byte{}, b...)
	if c.At <= 0 || c.At >= c.Len() {
		return c.Conn.Write(b)
	}
	parts := [][]byte{b[:c.At], b[c.At:]}
	if c.Records {
		body := b[recordHeader:]
		parts = [][]byte{record(b, body[:c.At]), record(b, body[c.At:])}
	}
	for _, p := range parts {
		if _, err := c.Conn.Write(p); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}

// record is body under a header like that of b.
func record(b, body []byte) []byte {
	out := append(append([]byte{}, b[:3]...), 0, 0)
	binary.BigEndian.PutUint16(out[3:], uint16(len(body)))
	return append(out, body...)
}
