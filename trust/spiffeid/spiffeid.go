// SPDX-License-Identifier: Apache-2.0

package spiffeid

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// Limits of the SPIFFE-ID specification, in bytes.
const (
	MaxTrustDomainLength = 255
	MaxLength            = 2048
)

const scheme = "spiffe://"

// TrustDomain is the name of a trust domain. The zero value is none. Values are comparable.
type TrustDomain struct{ name string }

// ParseTrustDomain accepts lower-case letters, digits, dots, dashes and underscores (SPIFFE-ID section 2.1), nothing else:
// no scheme, no port, no normalisation.
func ParseTrustDomain(s string) (TrustDomain, error) {
	if s == "" {
		return TrustDomain{}, errors.New("trust domain is empty")
	}
	if len(s) > MaxTrustDomainLength {
		return TrustDomain{}, fmt.Errorf("trust domain is longer than %d bytes", MaxTrustDomainLength)
	}
	for i := range len(s) {
		if c := s[i]; !isLowerAlnum(c) && c != '.' && c != '-' && c != '_' {
			return TrustDomain{}, fmt.Errorf("trust domain has the character %q; lower-case letters, digits, '.', '-' and '_' are allowed", c)
		}
	}
	return TrustDomain{s}, nil
}

func isLowerAlnum(c byte) bool { return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' }

// String is the name.
func (td TrustDomain) String() string { return td.name }

// IsZero reports whether td is none.
func (td TrustDomain) IsZero() bool { return td.name == "" }

// MarshalText implements encoding.TextMarshaler.
func (td TrustDomain) MarshalText() ([]byte, error) { return []byte(td.name), nil }

// UnmarshalText implements encoding.TextUnmarshaler; empty text is the zero value.
func (td *TrustDomain) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*td = TrustDomain{}
		return nil
	}
	v, err := ParseTrustDomain(string(b))
	if err != nil {
		return err
	}
	*td = v
	return nil
}

// ID is a SPIFFE ID with a path: the identity of one workload. The zero value is none. Values are comparable, and equal
// exactly when their texts are.
type ID struct {
	text string
	td   int // length of the trust domain
}

// Parse accepts exactly "spiffe://<trust domain>/<path>" with at most 2,048 bytes: lower-case scheme, no user, port, query
// or fragment, no percent-encoding, no empty or dot segment, no trailing slash (SPIFFE-ID sections 2 and 2.2).
func Parse(s string) (ID, error) {
	if len(s) > MaxLength {
		return ID{}, fmt.Errorf("SPIFFE ID is longer than %d bytes", MaxLength)
	}
	rest, ok := strings.CutPrefix(s, scheme)
	if !ok {
		return ID{}, errors.New(`SPIFFE ID does not begin with "spiffe://"`)
	}
	name, path, ok := strings.Cut(rest, "/")
	if !ok {
		return ID{}, errors.New("SPIFFE ID has no path")
	}
	td, err := ParseTrustDomain(name)
	if err != nil {
		return ID{}, fmt.Errorf("SPIFFE ID: %w", err)
	}
	if err := checkPath(path); err != nil {
		return ID{}, fmt.Errorf("SPIFFE ID: %w", err)
	}
	return ID{text: s, td: len(td.name)}, nil
}

func checkPath(path string) error {
	for _, seg := range strings.Split(path, "/") {
		switch seg {
		case "":
			return errors.New("path has an empty segment")
		case ".", "..":
			return errors.New("path has a dot segment")
		}
		for i := range len(seg) {
			c := seg[i]
			if !isLowerAlnum(c) && !('A' <= c && c <= 'Z') && c != '.' && c != '-' && c != '_' {
				return fmt.Errorf("path has the character %q", c)
			}
		}
	}
	return nil
}

// FromURL parses u by its text. A parsed URL has lost distinctions that an exact comparison needs (case of the scheme, an
// empty fragment): names in a peer's certificate are parsed from its bytes, by package trust.
func FromURL(u *url.URL) (ID, error) {
	if u == nil {
		return ID{}, errors.New("SPIFFE ID: no URI")
	}
	return Parse(u.String())
}

// String is the whole ID.
func (id ID) String() string { return id.text }

// IsZero reports whether id is none.
func (id ID) IsZero() bool { return id.text == "" }

// TrustDomain is the part after the scheme.
func (id ID) TrustDomain() TrustDomain {
	if id.text == "" {
		return TrustDomain{}
	}
	return TrustDomain{id.text[len(scheme) : len(scheme)+id.td]}
}

// Path begins with a slash.
func (id ID) Path() string {
	if id.text == "" {
		return ""
	}
	return id.text[len(scheme)+id.td:]
}

// URL is the ID as a URI SAN.
func (id ID) URL() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: id.TrustDomain().String(), Path: id.Path()}
}

// MarshalText implements encoding.TextMarshaler.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.text), nil }

// UnmarshalText implements encoding.TextUnmarshaler; empty text is the zero value.
func (id *ID) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*id = ID{}
		return nil
	}
	v, err := Parse(string(b))
	if err != nil {
		return err
	}
	*id = v
	return nil
}
