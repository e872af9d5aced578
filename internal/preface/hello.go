// SPDX-License-Identifier: Apache-2.0

package preface

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// MaxHello bounds a ClientHello message and the records that carry it, in bytes.
const MaxHello = 16 << 10

const (
	extServerName = 0
	extECH        = 0xfe0d // encrypted_client_hello
)

// ErrHello is wrapped by every refusal of a ClientHello.
var ErrHello = errors.New("client hello refused")

// Hello is a ClientHello as read from the wire.
type Hello struct {
	ServerName string
	Sum        [32]byte // SHA-256 of the handshake message, without record headers
	Raw        []byte   // every byte read, to be passed on as it is; may reach beyond the message
}

// ReadHello reads one whole ClientHello message from r, of which prefix was read already.
func ReadHello(r io.Reader, prefix []byte) (*Hello, error) {
	raw := append(make([]byte, 0, 4096), prefix...)
	if len(raw) > 2*MaxHello {
		return nil, fmt.Errorf("%w: too long", ErrHello)
	}
	var s helloScanner
	for {
		msg, need, err := s.scan(raw)
		if err != nil {
			return nil, err
		}
		if msg != nil {
			name, err := parseHello(msg)
			if err != nil {
				return nil, err
			}
			return &Hello{ServerName: name, Sum: sha256.Sum256(msg), Raw: raw}, nil
		}
		if raw, err = fill(r, raw, need); err != nil {
			return nil, fmt.Errorf("read client hello: %w", err)
		}
	}
}

// helloScanner reassembles a ClientHello from records. The zero value is ready.
type helloScanner struct {
	msg []byte // handshake bytes so far
	off int    // of the next record in the raw bytes
}

// scan consumes whole records of raw, which only ever grows. It returns the message once complete, else how many bytes
// raw must have before the next call can make progress.
func (s *helloScanner) scan(raw []byte) (msg []byte, need int, err error) {
	for {
		if want, ok := s.wanted(); ok && len(s.msg) >= want {
			if len(s.msg) > want {
				return nil, 0, fmt.Errorf("%w: bytes behind the message in its record", ErrHello)
			}
			return s.msg, 0, nil
		}
		if len(raw) < s.off+5 {
			return nil, s.off + 5, nil
		}
		h := raw[s.off:]
		n := int(binary.BigEndian.Uint16(h[3:]))
		if h[0] != 22 || h[1] != 3 || n == 0 || n > MaxHello {
			return nil, 0, fmt.Errorf("%w: not a TLS handshake record", ErrHello)
		}
		if s.off+5+n > 2*MaxHello || len(s.msg)+n > MaxHello {
			return nil, 0, fmt.Errorf("%w: longer than %d bytes", ErrHello, MaxHello)
		}
		// What a first record says of the message is judged before its whole record was read.
		if len(s.msg) == 0 && len(h) > 5 && h[5] != 1 {
			return nil, 0, fmt.Errorf("%w: handshake message %d", ErrHello, h[5])
		}
		if len(h) < 5+n {
			return nil, s.off + 5 + n, nil
		}
		s.msg = append(s.msg, h[5:5+n]...)
		s.off += 5 + n
		if want, ok := s.wanted(); ok && (s.msg[0] != 1 || want > MaxHello) {
			return nil, 0, fmt.Errorf("%w: handshake message %d of %d bytes", ErrHello, s.msg[0], want)
		}
	}
}

// wanted is the length of the whole message, once its header is there.
func (s *helloScanner) wanted() (int, bool) {
	if len(s.msg) < 4 {
		return 0, false
	}
	return 4 + (int(s.msg[1])<<16 | int(s.msg[2])<<8 | int(s.msg[3])), true
}

// parseHello returns the one server name in a ClientHello message.
func parseHello(msg []byte) (string, error) {
	c := cursor{b: msg}
	c.skip(4 + 2 + 32) // message header, version, random
	c.bytes(1)         // session id
	if suites := c.bytes(2); len(suites) == 0 || len(suites)%2 != 0 {
		c.bad = true
	}
	if len(c.bytes(1)) == 0 { // compression methods
		c.bad = true
	}
	exts := cursor{b: c.bytes(2)}
	if c.bad || len(c.b) != 0 {
		return "", fmt.Errorf("%w: malformed message", ErrHello)
	}
	name, names := "", 0
	seen := make(map[uint16]bool, 16)
	for len(exts.b) > 0 {
		typ := exts.uint16()
		body := exts.bytes(2)
		if exts.bad || seen[typ] {
			return "", fmt.Errorf("%w: malformed or doubled extension %d", ErrHello, typ)
		}
		seen[typ] = true
		switch typ {
		case extECH:
			return "", fmt.Errorf("%w: encrypted_client_hello", ErrHello)
		case extServerName:
			b := cursor{b: body}
			list := cursor{b: b.bytes(2)}
			for len(list.b) > 0 {
				kind, host := list.uint8(), list.bytes(2)
				if kind != 0 || len(host) == 0 {
					list.bad = true
					break
				}
				name, names = string(host), names+1
			}
			if b.bad || list.bad || len(b.b) != 0 {
				return "", fmt.Errorf("%w: malformed server name", ErrHello)
			}
		}
	}
	if names != 1 || len(name) > maxAuthority {
		return "", fmt.Errorf("%w: %d server names", ErrHello, names)
	}
	return name, nil
}

// cursor reads big-endian fields; a short read sets bad and yields zeros.
type cursor struct {
	b   []byte
	bad bool
}

func (c *cursor) skip(n int) []byte {
	if len(c.b) < n {
		c.bad, c.b = true, nil
		return nil
	}
	v := c.b[:n]
	c.b = c.b[n:]
	return v
}

func (c *cursor) uint8() byte {
	if v := c.skip(1); v != nil {
		return v[0]
	}
	return 0
}

func (c *cursor) uint16() uint16 {
	if v := c.skip(2); v != nil {
		return binary.BigEndian.Uint16(v)
	}
	return 0
}

// bytes reads a vector whose length has size bytes.
func (c *cursor) bytes(size int) []byte {
	if size == 1 {
		return c.skip(int(c.uint8()))
	}
	return c.skip(int(c.uint16()))
}
