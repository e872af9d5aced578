// SPDX-License-Identifier: Apache-2.0

package span

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net/http"
	"strconv"
	"strings"
)

// TraceID identifies a trace; the zero value is invalid.
type TraceID [16]byte

// ID identifies a span; the zero value is invalid.
type ID [8]byte

// String returns 32 lower-case hexadecimal digits.
func (t TraceID) String() string { return hex.EncodeToString(t[:]) }

// IsZero reports whether t is the invalid id.
func (t TraceID) IsZero() bool { return t == TraceID{} }

// String returns 16 lower-case hexadecimal digits.
func (i ID) String() string { return hex.EncodeToString(i[:]) }

// IsZero reports whether i is the invalid id.
func (i ID) IsZero() bool { return i == ID{} }

// Header names.
const (
	TraceparentHeader = "Traceparent"
	TracestateHeader  = "Tracestate"
)

const (
	flagSampled     = 1
	maxState        = 512 // bytes of tracestate kept of others
	maxStateMembers = 31  // and one of ours
	maxHop          = 255
	noRetries       = -1
)

// Context is the position in a trace: the span that what follows has as its parent.
type Context struct {
	Trace   TraceID
	Span    ID
	Sampled bool
	Hop     int    // index of the last hop; 0 before the first
	Cluster string // of the last hop; may be empty
	state   string // other members of tracestate
	retries int    // 1 + what the rest of the chain may make; 0 is no figure
}

// IsValid reports whether both ids are there.
func (c Context) IsValid() bool { return !c.Trace.IsZero() && !c.Span.IsZero() }

// Retries is how many retries the rest of the chain may make; ok is false when nobody said.
func (c Context) Retries() (n int, ok bool) { return c.retries + noRetries, c.retries > 0 }

// WithRetries returns c with the number of retries left for the rest of the chain.
func (c Context) WithRetries(n int) Context {
	c.retries = min(max(n, 0), maxHop) + 1
	return c
}

// WithHop returns c at the given hop of a cluster.
func (c Context) WithHop(hop int, cluster string) Context {
	c.Hop, c.Cluster = min(max(hop, 0), maxHop), cluster
	return c
}

// New returns a context with fresh ids, not sampled.
func New() Context { return Context{Trace: newTraceID(), Span: newID()} }

func newTraceID() (t TraceID) {
	for t.IsZero() {
		rand.Read(t[:]) // never fails (Go 1.24)
	}
	return t
}

func newID() (i ID) {
	for i.IsZero() {
		rand.Read(i[:])
	}
	return i
}

var errTraceparent = errors.New("parse traceparent: not version-traceid-spanid-flags")

// ParseTraceparent parses a traceparent value. Versions above 00 are read by their first four fields, as the specification asks.
func ParseTraceparent(s string) (Context, error) {
	var c Context
	if len(s) < 55 || s[2] != '-' || s[35] != '-' || s[52] != '-' {
		return c, errTraceparent
	}
	var version, flags [1]byte
	if !lowerHex(version[:], s[0:2]) || !lowerHex(c.Trace[:], s[3:35]) || !lowerHex(c.Span[:], s[36:52]) || !lowerHex(flags[:], s[53:55]) {
		return Context{}, errTraceparent
	}
	switch {
	case version[0] == 0xff, version[0] == 0 && len(s) != 55, len(s) > 55 && s[55] != '-', !c.IsValid():
		return Context{}, errTraceparent
	}
	c.Sampled = flags[0]&flagSampled != 0
	return c, nil
}

func lowerHex(dst []byte, s string) bool {
	for i := range len(s) {
		if s[i] >= 'A' && s[i] <= 'F' {
			return false
		}
	}
	_, err := hex.Decode(dst, []byte(s))
	return err == nil
}

// Traceparent returns the header's value, or "" for an invalid context.
func (c Context) Traceparent() string {
	if !c.IsValid() {
		return ""
	}
	b := make([]byte, 0, 55)
	b = append(b, "00-"...)
	b = hex.AppendEncode(b, c.Trace[:])
	b = append(b, '-')
	b = hex.AppendEncode(b, c.Span[:])
	if c.Sampled {
		return string(append(b, "-01"...))
	}
	return string(append(b, "-00"...))
}

// WithTracestate returns c with what a tracestate value says: our own member, and the others kept to be passed on. A value
// that breaks the syntax is ignored as a whole, as the specification asks.
func (c Context) WithTracestate(s string) Context {
	if len(s) > 4*maxState {
		return c
	}
	next, kept, members := c, make([]string, 0, 4), 0
	seen := false
	for member := range strings.SplitSeq(s, ",") {
		member = strings.Trim(member, " \t")
		if member == "" {
			continue
		}
		key, value, ok := strings.Cut(member, "=")
		if members++; !ok || members > maxStateMembers+1 || !validStateKey(key) || !validStateValue(value) {
			return c
		}
		if key == "strait" {
			if !seen {
				next = next.withOwn(value)
			}
			seen = true
			continue
		}
		kept = append(kept, member)
	}
	// Others are dropped from the right, where the oldest stand.
	for len(kept) > maxStateMembers || len(strings.Join(kept, ",")) > maxState {
		kept = kept[:len(kept)-1]
	}
	next.state = strings.Join(kept, ",")
	return next
}

// withOwn reads "hop:N;c:CLUSTER;r:N". What it does not understand is ignored: a later version may say more.
func (c Context) withOwn(value string) Context {
	for field := range strings.SplitSeq(value, ";") {
		key, v, _ := strings.Cut(field, ":")
		switch key {
		case "hop":
			if n, err := strconv.ParseUint(v, 10, 8); err == nil {
				c.Hop = int(n)
			}
		case "c":
			if validCluster(v) {
				c.Cluster = v
			}
		case "r":
			if n, err := strconv.ParseUint(v, 10, 8); err == nil {
				c = c.WithRetries(int(n))
			}
		}
	}
	return c
}

func validCluster(s string) bool {
	if s == "" || len(s) > 63 {
		return false
	}
	for i := range len(s) {
		if b := s[i]; (b < 'a' || b > 'z') && (b < '0' || b > '9') && b != '-' && b != '.' {
			return false
		}
	}
	return true
}

func validStateKey(s string) bool {
	if s == "" || len(s) > 256 {
		return false
	}
	for i := range len(s) {
		b := s[i]
		if (b < 'a' || b > 'z') && (b < '0' || b > '9') && strings.IndexByte("_-*/@", b) < 0 {
			return false
		}
	}
	return true
}

func validStateValue(s string) bool {
	if s == "" || len(s) > 256 {
		return false
	}
	for i := range len(s) {
		if b := s[i]; b < 0x20 || b > 0x7e || b == '=' {
			return false
		}
	}
	return true
}

// Tracestate returns the header's value with our member first, or "".
func (c Context) Tracestate() string {
	var b strings.Builder
	if c.Hop > 0 || c.Cluster != "" || c.retries > 0 {
		b.WriteString("strait=hop:")
		b.WriteString(strconv.Itoa(c.Hop))
		if validCluster(c.Cluster) {
			b.WriteString(";c:")
			b.WriteString(c.Cluster)
		}
		if n, ok := c.Retries(); ok {
			b.WriteString(";r:")
			b.WriteString(strconv.Itoa(n))
		}
	}
	if c.state != "" {
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(c.state)
	}
	return b.String()
}

// Extract reads the context of a request. More than one traceparent, or one that is malformed, is no context.
func Extract(h http.Header) (Context, bool) {
	parents := h[TraceparentHeader]
	if len(parents) != 1 {
		return Context{}, false
	}
	c, err := ParseTraceparent(strings.Trim(parents[0], " \t"))
	if err != nil {
		return Context{}, false
	}
	if states := h[TracestateHeader]; len(states) > 0 {
		c = c.WithTracestate(strings.Join(states, ","))
	}
	return c, true
}

// Inject writes c into h, replacing what was there.
func (c Context) Inject(h http.Header) {
	if !c.IsValid() {
		return
	}
	h[TraceparentHeader] = []string{c.Traceparent()}
	if s := c.Tracestate(); s != "" {
		h[TracestateHeader] = []string{s}
	} else {
		delete(h, TracestateHeader)
	}
}

// below reports whether a trace id falls into the sampled part.
func (t TraceID) below(ratio float64) bool {
	switch {
	case ratio >= 1:
		return true
	case ratio <= 0:
		return false
	}
	return float64(binary.BigEndian.Uint64(t[8:])>>11)/(1<<53) < ratio
}
