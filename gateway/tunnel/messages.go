// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"fmt"
	"io"
	"time"

	"github.com/strait-mesh/strait/internal/preface"
)

// Bounds of the records.
const (
	MaxHello  = 512
	MaxHeader = 1024
	maxNotice = 256
	maxMarker = 256

	// WireVersion is what this build speaks; a session is refused when the versions' ranges do not meet.
	WireVersion = 1
	// MaxHops bounds how many gateways a stream may have crossed when it arrives.
	MaxHops = 1
)

const (
	laneControl     = 0
	laneInteractive = 1
)

// hello is the first record on each link, and its answer.
type hello struct {
	Version  uint16
	Features uint64
	Name     string
	Cluster  string
	Lane     byte
	Nonce    [16]byte
	Refusal  string
}

func (h hello) append() ([]byte, error) {
	r := newRecord()
	r.uint(1, uint64(h.Version), 2)
	r.uint(2, h.Features, 8)
	r.string(3, h.Name)
	r.string(4, h.Cluster)
	r.uint(5, uint64(h.Lane), 1)
	if h.Nonce != [16]byte{} {
		r.bytes(6, h.Nonce[:])
	}
	r.string(7, h.Refusal)
	return r.finish(MaxHello)
}

func parseHello(b []byte) (hello, error) {
	var h hello
	var n uint64
	err := eachField(b, func(tag byte, v []byte) bool {
		switch tag {
		case 1:
			ok := uintOf(v, 2, &n)
			h.Version = uint16(n)
			return ok
		case 2:
			return uintOf(v, 8, &h.Features)
		case 3:
			return textOf(v, 128, &h.Name)
		case 4:
			return textOf(v, 128, &h.Cluster)
		case 5:
			ok := uintOf(v, 1, &n)
			h.Lane = byte(n)
			return ok
		case 6:
			return copy(h.Nonce[:], v) == 16 && len(v) == 16
		case 7:
			return textOf(v, 64, &h.Refusal)
		}
		return true // later versions may say more
	})
	if err == nil && h.Version == 0 {
		err = fmt.Errorf("%w: hello without version", ErrMalformed)
	}
	return h, err
}

// Header is the first record of an interactive stream: which service the sender wants, on whose behalf.
type Header struct {
	Service     string // "ns/name"
	Port        string // port name
	Export      string // export id, when the sender knows it
	Source      string // SPIFFE ID of the calling workload as its own gateway verified it
	Traceparent string
	Deadline    time.Duration // until when the connection must be made; 0 = the receiver's default
	Class       string
	Hops        uint8            // gateways crossed, this one's sender included
	Avoid       []preface.Handle // instances not to be picked, at most preface.MaxAvoid
	Tag         uint64           // names the stream in markers; unique in the session and direction
}

// Append encodes h.
func (h Header) Append(b []byte) ([]byte, error) {
	if len(h.Avoid) > preface.MaxAvoid {
		return nil, fmt.Errorf("encode header: %d handles", len(h.Avoid))
	}
	r := newRecord()
	r.string(1, h.Service)
	r.string(2, h.Port)
	r.string(3, h.Export)
	r.string(4, h.Source)
	r.string(5, h.Traceparent)
	r.uint(6, uint64(max(0, min(h.Deadline.Milliseconds(), 1<<32-1))), 4)
	r.string(7, h.Class)
	r.uint(8, uint64(h.Hops), 1)
	avoid := make([]byte, 0, 8*len(h.Avoid))
	for _, a := range h.Avoid {
		avoid = append(avoid, a[:]...)
	}
	r.bytes(9, avoid)
	r.uint(10, h.Tag, 8)
	out, err := r.finish(MaxHeader)
	return append(b, out...), err
}

// ReadHeader reads and decodes a header. What the names in it mean is for the caller to judge.
func ReadHeader(r io.Reader) (Header, error) {
	b, err := readRecord(r, MaxHeader)
	if err != nil {
		return Header{}, err
	}
	return parseHeader(b)
}

func parseHeader(b []byte) (Header, error) {
	var h Header
	var n uint64
	err := eachField(b, func(tag byte, v []byte) bool {
		switch tag {
		case 1:
			return textOf(v, 127, &h.Service)
		case 2:
			return textOf(v, 63, &h.Port)
		case 3:
			return textOf(v, 64, &h.Export)
		case 4:
			return textOf(v, 600, &h.Source)
		case 5:
			return textOf(v, 64, &h.Traceparent)
		case 6:
			ok := uintOf(v, 4, &n)
			h.Deadline = time.Duration(n) * time.Millisecond
			return ok
		case 7:
			return textOf(v, 32, &h.Class)
		case 8:
			ok := uintOf(v, 1, &n)
			h.Hops = uint8(n)
			return ok
		case 9:
			if len(v)%8 != 0 || len(v) > 8*preface.MaxAvoid {
				return false
			}
			for ; len(v) > 0; v = v[8:] {
				h.Avoid = append(h.Avoid, preface.Handle(v[:8]))
			}
			return true
		case 10:
			return uintOf(v, 8, &h.Tag)
		}
		return false
	})
	return h, err
}

// Marker says that bytes of the stream tag belong to a trace from here on, or (End) no longer.
type Marker struct {
	Tag         uint64
	Direction   uint8
	Offset      uint64
	Traceparent string
	End         bool
}

func (m Marker) append() ([]byte, error) {
	r := newRecord()
	r.uint(1, m.Tag, 8)
	r.uint(2, uint64(m.Direction), 1)
	r.uint(3, m.Offset, 8)
	r.string(4, m.Traceparent)
	if m.End {
		r.uint(5, 1, 1)
	}
	return r.finish(maxMarker)
}

func parseMarker(b []byte) (Marker, error) {
	var m Marker
	var n uint64
	err := eachField(b, func(tag byte, v []byte) bool {
		switch tag {
		case 1:
			return uintOf(v, 8, &m.Tag)
		case 2:
			ok := uintOf(v, 1, &n)
			m.Direction = uint8(n)
			return ok
		case 3:
			return uintOf(v, 8, &m.Offset)
		case 4:
			return textOf(v, 64, &m.Traceparent)
		case 5:
			m.End = true
			return len(v) == 1 && v[0] == 1
		}
		return false
	})
	return m, err
}

// Kinds of notices.
const (
	noticeDrain  = 1
	noticeRetire = 2
	noticeNarrow = 3 // full packets of this end vanish: dial anew
)

type notice struct {
	Kind     byte
	Deadline time.Duration
}

func (n notice) append() ([]byte, error) {
	r := newRecord()
	r.uint(1, uint64(n.Kind), 1)
	r.uint(2, uint64(max(0, min(n.Deadline.Milliseconds(), 1<<32-1))), 4)
	return r.finish(maxNotice)
}

func parseNotice(b []byte) (notice, error) {
	var out notice
	var n uint64
	err := eachField(b, func(tag byte, v []byte) bool {
		switch tag {
		case 1:
			ok := uintOf(v, 1, &n)
			out.Kind = byte(n)
			return ok
		case 2:
			ok := uintOf(v, 4, &n)
			out.Deadline = time.Duration(n) * time.Millisecond
			return ok
		}
		return false
	})
	return out, err
}
