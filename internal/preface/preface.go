// SPDX-License-Identifier: Apache-2.0

package preface

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

const (
	// ExporterLabel names the TLS exporter of the local session that keys the MAC.
	ExporterLabel = "EXPORTER-strait-local/1"
	// KeySize is the length of that key.
	KeySize = 32
	// ALPN is the protocol of the local session.
	ALPN = "strait-local/1"
	// MaxHeader bounds the whole PROXY header, in bytes.
	MaxHeader = 1024
	// MaxAvoid bounds the handles to avoid.
	MaxAvoid = 8
	// Timeout is how long the gateway waits for the whole of preface and ClientHello.
	Timeout = 2 * time.Second

	maxAuthority   = 255
	maxClass       = 32
	maxTraceparent = 64
)

// Classes of a connection.
const (
	ClassInteractive = "interactive"
	ClassBulk        = "bulk"
)

// Signature is how a PROXY v2 header starts.
var Signature = [12]byte{'\r', '\n', '\r', '\n', 0, '\r', '\n', 'Q', 'U', 'I', 'T', '\n'}

// TLV types: the authority is the registered one, ours are from the custom range, in the order in which they must come.
const (
	tlvAuthority   = 0x02
	tlvSession     = 0xE0
	tlvCounter     = 0xE1
	tlvClass       = 0xE2
	tlvTraceparent = 0xE3
	tlvAvoid       = 0xE4
	tlvDeadline    = 0xE5
	tlvMAC         = 0xEF
)

// SessionID names a local session; the gateway chooses it.
type SessionID [16]byte

// Handle is an opaque name of one far instance, keyed per consumer and rotating daily.
type Handle [8]byte

// IsZero reports whether h names nothing.
func (h Handle) IsZero() bool { return h == Handle{} }

// Preface is what a sidecar says of one connection.
type Preface struct {
	Session     SessionID
	Counter     uint64        // never twice in a session
	Authority   string        // the inner SNI
	Class       string        // ClassInteractive when empty
	Traceparent string        // W3C, may be empty
	Avoid       []Handle      // far instances not to be tried; at most MaxAvoid
	Deadline    time.Duration // until when the connection must be made; 0 = the gateway's default
}

// ErrMalformed is wrapped by every error about bytes that are not a preface.
var ErrMalformed = errors.New("malformed preface")

// ErrMAC says that the MAC does not match the session's key.
var ErrMAC = errors.New("preface mac does not match")

// KeyFrom derives the MAC key from a local session's connection; both ends get the same.
func KeyFrom(cs tls.ConnectionState) ([]byte, error) {
	key, err := cs.ExportKeyingMaterial(ExporterLabel, nil, KeySize)
	if err != nil {
		return nil, fmt.Errorf("export local session key: %w", err)
	}
	return key, nil
}

// Append appends the encoded header for p, whose connection starts with the ClientHello message that has sum helloSum.
func Append(b []byte, p Preface, key []byte, helloSum [32]byte) ([]byte, error) {
	switch {
	case p.Authority == "" || len(p.Authority) > maxAuthority:
		return nil, fmt.Errorf("encode preface: authority of %d bytes", len(p.Authority))
	case len(p.Class) > maxClass, len(p.Traceparent) > maxTraceparent, len(p.Avoid) > MaxAvoid, p.Deadline < 0:
		return nil, errors.New("encode preface: field too long")
	}
	start := len(b)
	b = append(b, Signature[:]...)
	b = append(b, 0x21, 0x00, 0, 0) // version 2, PROXY; unspecified family: TLVs only
	b = appendTLV(b, tlvAuthority, []byte(p.Authority))
	b = appendTLV(b, tlvSession, p.Session[:])
	b = appendTLV(b, tlvCounter, binary.BigEndian.AppendUint64(nil, p.Counter))
	if p.Class != "" {
		b = appendTLV(b, tlvClass, []byte(p.Class))
	}
	if p.Traceparent != "" {
		b = appendTLV(b, tlvTraceparent, []byte(p.Traceparent))
	}
	if len(p.Avoid) > 0 {
		v := make([]byte, 0, 8*len(p.Avoid))
		for _, h := range p.Avoid {
			v = append(v, h[:]...)
		}
		b = appendTLV(b, tlvAvoid, v)
	}
	if ms := p.Deadline.Milliseconds(); ms > 0 {
		b = appendTLV(b, tlvDeadline, binary.BigEndian.AppendUint32(nil, uint32(min(ms, 1<<32-1))))
	}
	total := len(b) - start + 3 + sha256.Size
	binary.BigEndian.PutUint16(b[start+14:], uint16(total-16))
	mac := sum(key, b[start:], helloSum)
	b = appendTLV(b, tlvMAC, mac[:])
	return b, nil
}

// header is a parsed but not yet verified preface.
type header struct {
	Preface
	signed []byte // what the MAC covers, beside the hello
	mac    []byte
}

// parse judges the encoding alone: fixed order, nothing twice, nothing unknown, the MAC last. raw is the whole header.
func parse(raw []byte) (*header, error) {
	n, err := headerLength(raw)
	if err != nil {
		return nil, err
	}
	if len(raw) != n {
		return nil, fmt.Errorf("%w: %d bytes where the header says %d", ErrMalformed, len(raw), n)
	}
	h := &header{}
	rest, last, seen := raw[16:], -1, 0
	for len(rest) > 0 {
		if len(rest) < 3 || len(rest) < 3+int(binary.BigEndian.Uint16(rest[1:])) {
			return nil, fmt.Errorf("%w: truncated field", ErrMalformed)
		}
		typ, v := int(rest[0]), rest[3:3+int(binary.BigEndian.Uint16(rest[1:]))]
		if typ <= last {
			return nil, fmt.Errorf("%w: field %#x out of order", ErrMalformed, typ)
		}
		if !h.set(typ, v) {
			return nil, fmt.Errorf("%w: field %#x", ErrMalformed, typ)
		}
		if typ == tlvMAC {
			h.signed = raw[:len(raw)-len(rest)]
		}
		last, seen, rest = typ, seen+1, rest[3+len(v):]
	}
	if h.mac == nil || h.Authority == "" || seen < 4 || h.Session == (SessionID{}) {
		return nil, fmt.Errorf("%w: required field missing", ErrMalformed)
	}
	return h, nil
}

func (h *header) set(typ int, v []byte) bool {
	switch typ {
	case tlvAuthority:
		h.Authority = string(v)
		return len(v) > 0 && len(v) <= maxAuthority
	case tlvSession:
		return copy(h.Session[:], v) == len(h.Session) && len(v) == len(h.Session)
	case tlvCounter:
		if len(v) != 8 {
			return false
		}
		h.Counter = binary.BigEndian.Uint64(v)
		return true
	case tlvClass:
		h.Class = string(v)
		return len(v) > 0 && len(v) <= maxClass && printable(v)
	case tlvTraceparent:
		h.Traceparent = string(v)
		return len(v) > 0 && len(v) <= maxTraceparent && printable(v)
	case tlvAvoid:
		if len(v) == 0 || len(v)%8 != 0 || len(v) > 8*MaxAvoid {
			return false
		}
		for ; len(v) > 0; v = v[8:] {
			h.Avoid = append(h.Avoid, Handle(v[:8]))
		}
		return true
	case tlvDeadline:
		if len(v) != 4 {
			return false
		}
		h.Deadline = time.Duration(binary.BigEndian.Uint32(v)) * time.Millisecond
		return h.Deadline > 0
	case tlvMAC:
		h.mac = v
		return len(v) == sha256.Size
	}
	return false
}

// headerLength is the length of the whole header, known from its first 16 bytes.
func headerLength(b []byte) (int, error) {
	if len(b) < 16 || !bytes.Equal(b[:12], Signature[:]) {
		return 0, fmt.Errorf("%w: no PROXY v2 signature", ErrMalformed)
	}
	if b[12] != 0x21 || b[13] != 0x00 {
		return 0, fmt.Errorf("%w: command %#x family %#x", ErrMalformed, b[12], b[13])
	}
	n := 16 + int(binary.BigEndian.Uint16(b[14:]))
	if n > MaxHeader {
		return 0, fmt.Errorf("%w: header of %d bytes", ErrMalformed, n)
	}
	return n, nil
}

// Read reads a preface and the ClientHello behind it from r, of which prefix was read already. key gives the MAC key of
// a session; a session it does not know is refused like a wrong MAC. The caller sets deadlines, and afterwards checks the
// counter in the session's Window. Hello.Raw holds everything read behind the header.
func Read(r io.Reader, prefix []byte, key func(SessionID) ([]byte, bool)) (*Preface, *Hello, error) {
	buf := make([]byte, 0, 4096)
	buf = append(buf, prefix...)
	var err error
	if buf, err = fill(r, buf, 16); err != nil {
		return nil, nil, fmt.Errorf("read preface: %w", err)
	}
	n, err := headerLength(buf)
	if err != nil {
		return nil, nil, err
	}
	if buf, err = fill(r, buf, n); err != nil {
		return nil, nil, fmt.Errorf("read preface: %w", err)
	}
	h, err := parse(buf[:n])
	if err != nil {
		return nil, nil, err
	}
	k, ok := key(h.Session)
	if !ok {
		return nil, nil, fmt.Errorf("session unknown: %w", ErrMAC)
	}
	hello, err := ReadHello(r, buf[n:])
	if err != nil {
		return nil, nil, err
	}
	if want := sum(k, h.signed, hello.Sum); !hmac.Equal(want[:], h.mac) {
		return nil, nil, ErrMAC
	}
	if hello.ServerName != h.Authority {
		return nil, nil, fmt.Errorf("%w: server name differs from the authority", ErrHello)
	}
	return &h.Preface, hello, nil
}

// fill reads until b holds n bytes; it may read more when b has room.
func fill(r io.Reader, b []byte, n int) ([]byte, error) {
	for len(b) < n {
		if cap(b) < n {
			b = append(make([]byte, 0, max(n, 2*cap(b))), b...)
		}
		m, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+m]
		if err != nil && len(b) < n {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return b, err
		}
	}
	return b, nil
}

func sum(key, signed []byte, helloSum [32]byte) (out [32]byte) {
	m := hmac.New(sha256.New, key)
	m.Write([]byte("strait-local/1 preface"))
	m.Write(signed)
	m.Write(helloSum[:])
	m.Sum(out[:0])
	return out
}

func appendTLV(b []byte, typ byte, v []byte) []byte {
	b = append(b, typ, byte(len(v)>>8), byte(len(v)))
	return append(b, v...)
}

func printable(b []byte) bool {
	for _, c := range b {
		if c < 0x21 || c > 0x7e {
			return false
		}
	}
	return true
}
