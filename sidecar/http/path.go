// SPDX-License-Identifier: Apache-2.0

package http

import (
	"errors"
	"net/url"
	"strings"
)

// errPath says why a path is refused. The words appear in generated responses.
type errPath string

func (e errPath) Error() string { return string(e) }

var errNotAbsolute = errors.New("path does not begin with a slash")

// normalPath returns the one spelling of a path (without query) that is both judged and forwarded: percent-encoding is
// decoded where it means an unreserved character, upper-cased elsewhere, and applied to bytes that need it. What
// applications are known to read differently from proxies is refused rather than guessed: encoded slashes, backslashes and
// NUL, raw backslashes, dot segments however encoded, broken escapes, control characters.
//
// With strict, also refused is what only some applications fold away: empty segments ("//") and path parameters (";").
func normalPath(raw string, strict bool) (string, error) {
	if !strings.HasPrefix(raw, "/") {
		return "", errNotAbsolute
	}
	var b strings.Builder
	b.Grow(len(raw))
	for i := 0; i < len(raw); i++ {
		c, escaped := raw[i], false
		if c == '%' {
			if i+2 >= len(raw) || !isHex(raw[i+1]) || !isHex(raw[i+2]) {
				return "", errPath("broken percent-encoding")
			}
			c, escaped = unhex(raw[i+1])<<4|unhex(raw[i+2]), true
			i += 2
		}
		switch {
		case c < 0x20 || c == 0x7f:
			return "", errPath("control character or %00")
		case c == '\\':
			return "", errPath("backslash or %5c")
		case c == '/' && escaped:
			return "", errPath("%2f")
		case c == ';' && strict:
			return "", errPath("path parameter")
		case c == '#' && !escaped:
			return "", errPath("fragment")
		case c == '/', unreserved(c), !escaped && strings.IndexByte("!$&'()*+,;=:@", c) >= 0:
			b.WriteByte(c)
		default:
			const digits = "0123456789ABCDEF"
			b.WriteByte('%')
			b.WriteByte(digits[c>>4])
			b.WriteByte(digits[c&15])
		}
	}
	path := b.String()
	for segment := range strings.SplitSeq(path[1:], "/") {
		// ".;x" is a dot segment to applications that cut parameters off first.
		name, _, _ := strings.Cut(segment, ";")
		if name == "." || name == ".." {
			return "", errPath("dot segment")
		}
	}
	if strict && strings.Contains(path, "//") {
		return "", errPath("empty segment")
	}
	return path, nil
}

func unreserved(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_' || c == '~'
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}

func unhex(c byte) byte {
	switch {
	case c <= '9':
		return c - '0'
	case c >= 'a':
		return c - 'a' + 10
	}
	return c - 'A' + 10
}

// rawPath returns the path of a received request as it was written.
func rawPath(u *url.URL) string {
	if u.Opaque != "" {
		return u.Opaque
	}
	if u.RawPath != "" {
		return u.RawPath
	}
	return u.EscapedPath()
}

// withPath returns u with a path in normal form, which the client writes byte for byte.
func withPath(u *url.URL, path string) (*url.URL, error) {
	decoded, err := url.PathUnescape(path)
	if err != nil {
		return nil, err
	}
	out := *u
	out.Opaque, out.Path, out.RawPath, out.Fragment, out.RawFragment = "", decoded, path, "", ""
	return &out, nil
}
