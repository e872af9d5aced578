// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// ErrMalformed is wrapped by every error about bytes of a peer that are not what the protocol says.
var ErrMalformed = errors.New("malformed")

const recordVersion = 1

// record builds {length, version, fields}. Fields must be put in ascending order of tag; empty ones are left out.
type record struct{ b []byte }

func newRecord() *record { return &record{b: []byte{0, 0, recordVersion}} }

func (r *record) bytes(tag byte, v []byte) {
	if len(v) == 0 {
		return
	}
	r.b = append(r.b, tag, byte(len(v)>>8), byte(len(v)))
	r.b = append(r.b, v...)
}

func (r *record) string(tag byte, v string) { r.bytes(tag, []byte(v)) }

func (r *record) uint(tag byte, v uint64, size int) {
	if v == 0 {
		return
	}
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], v)
	r.bytes(tag, b[8-size:])
}

func (r *record) finish(limit int) ([]byte, error) {
	if len(r.b) > limit {
		return nil, fmt.Errorf("encode record: %d bytes, at most %d", len(r.b), limit)
	}
	binary.BigEndian.PutUint16(r.b, uint16(len(r.b)-2))
	return r.b, nil
}

// readRecord reads one record of at most limit bytes and returns version and fields.
func readRecord(r io.Reader, limit int) ([]byte, error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(head[:]))
	if n < 1 || n+2 > limit {
		return nil, fmt.Errorf("%w: record of %d bytes", ErrMalformed, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return b, nil
}

// eachField walks the fields of a record's payload: ascending tags, none empty.
func eachField(b []byte, f func(tag byte, v []byte) bool) error {
	if len(b) < 1 || b[0] != recordVersion {
		return fmt.Errorf("%w: record version", ErrMalformed)
	}
	b = b[1:]
	last := 0
	for len(b) > 0 {
		if len(b) < 3 {
			return fmt.Errorf("%w: truncated field", ErrMalformed)
		}
		tag, n := b[0], int(binary.BigEndian.Uint16(b[1:]))
		if int(tag) <= last || n == 0 || len(b) < 3+n {
			return fmt.Errorf("%w: field %d", ErrMalformed, tag)
		}
		if !f(tag, b[3:3+n]) {
			return fmt.Errorf("%w: field %d", ErrMalformed, tag)
		}
		last, b = int(tag), b[3+n:]
	}
	return nil
}

// uintOf decodes a number of exactly size bytes; zero is never encoded.
func uintOf(v []byte, size int, out *uint64) bool {
	if len(v) != size {
		return false
	}
	*out = 0
	for _, c := range v {
		*out = *out<<8 | uint64(c)
	}
	return *out != 0
}

func textOf(v []byte, limit int, out *string) bool {
	if len(v) > limit {
		return false
	}
	for _, c := range v {
		if c < 0x21 || c > 0x7e {
			return false
		}
	}
	*out = string(v)
	return true
}

// WriteFrame writes one frame of 4-byte length.
func WriteFrame(w io.Writer, b []byte) error {
	out := make([]byte, 4, 4+len(b))
	binary.BigEndian.PutUint32(out, uint32(len(b)))
	_, err := w.Write(append(out, b...))
	return err
}

// ReadFrame reads one frame of at most limit bytes. Memory is taken as the bytes come, not as the length claims.
func ReadFrame(r io.Reader, limit int) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if int64(n) > int64(limit) {
		return nil, fmt.Errorf("%w: frame of %d bytes, at most %d", ErrMalformed, n, limit)
	}
	const chunk = 64 << 10
	b := make([]byte, 0, min(int(n), chunk))
	for len(b) < int(n) {
		m := min(int(n)-len(b), chunk)
		off := len(b)
		b = append(b, make([]byte, m)...)
		if _, err := io.ReadFull(r, b[off:]); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return b, nil
}
