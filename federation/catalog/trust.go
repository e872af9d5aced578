// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Keys of the entries about trust. The one of a denial is followed by the path of the SPIFFE ID.
const (
	BundleKey    = "bundle"
	SeenKey      = "seen"
	denialPrefix = "deny/"
)

// MaxDenials is how many withdrawn identities one catalog may carry.
const MaxDenials = 1000

// Seen says which bundle of the consumer every live proxy of the origin has acknowledged.
type Seen struct {
	Sequence uint64   // from 1
	Hash     [32]byte // trust.Bundle.Hash
}

// Denial is an identity that its own cluster withdrew.
type Denial struct {
	ID           spiffeid.ID
	IssuedBefore time.Time // zero: whatever it presents; else certificates issued before, to the millisecond
	At           time.Time // when it was withdrawn: the newest are kept when there are too many. It does not travel.
}

// DenialKey is the key of a withdrawn identity's entry.
func DenialKey(id spiffeid.ID) string { return denialPrefix + strings.TrimPrefix(id.Path(), "/") }

// BundleEntry is the body of the entry about the origin's own bundle. A bundle that is larger than an entry may be is an error: no
// consumer would take the catalog.
func BundleEntry(b *trust.Bundle) ([]byte, error) {
	body, err := marshalEntry(&controlpb.TrustBundle{Jwks: b.Marshal(), Sequence: b.Sequence()})
	if err != nil {
		return nil, err
	}
	if len(body) > maxEntrySize {
		return nil, fmt.Errorf("the trust bundle of %s has %d bytes with %d roots and %d JWT keys: a catalog entry carries at most %d",
			b.TrustDomain(), len(body), len(b.Roots()), len(b.JWTKeys()), maxEntrySize)
	}
	if _, err := judgeBundle(b.TrustDomain(), body); err != nil {
		return nil, fmt.Errorf("the trust bundle of %s: %w", b.TrustDomain(), err)
	}
	return body, nil
}

// SeenEntry is the body of the entry about the consumer's bundle.
func SeenEntry(s Seen) ([]byte, error) {
	if s.Sequence == 0 {
		return nil, errors.New("catalog entry: an acknowledgement of a bundle without sequence")
	}
	return marshalEntry(&controlpb.BundleSeen{Sequence: s.Sequence, Sha256: s.Hash[:]})
}

// DenialEntries are the entries of withdrawn identities of origin, by key, and how many were left out: those of other trust
// domains, those whose paths no key can carry, and the oldest beyond MaxDenials.
func DenialEntries(origin spiffeid.TrustDomain, denials []Denial) (entries map[string][]byte, left int) {
	sorted := slices.SortedFunc(slices.Values(denials), func(a, b Denial) int {
		return cmp.Or(b.At.Compare(a.At), strings.Compare(a.ID.String(), b.ID.String()))
	})
	entries = map[string][]byte{}
	for _, d := range sorted {
		key := DenialKey(d.ID)
		m := &controlpb.DeniedIdentity{SpiffeId: d.ID.String()}
		if !d.IssuedBefore.IsZero() {
			m.IssuedBeforeMs = d.IssuedBefore.UnixMilli()
		}
		body, err := marshalEntry(m)
		if err == nil {
			_, err = judgeDenial(origin, key, body)
		}
		if err != nil || len(key) > maxKeySize || len(entries) == MaxDenials {
			left++
			continue
		}
		entries[key] = body
	}
	return entries, left
}

func marshalEntry(m proto.Message) ([]byte, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("catalog entry: %w", err)
	}
	return b, nil
}

func judgeBundle(origin spiffeid.TrustDomain, body []byte) (*trust.Bundle, error) {
	var m controlpb.TrustBundle
	if err := proto.Unmarshal(body, &m); err != nil {
		return nil, errors.New("not a trust bundle")
	}
	if len(m.GetJwks()) > trust.MaxBundleSize {
		return nil, fmt.Errorf("%d bytes, at most %d", len(m.GetJwks()), trust.MaxBundleSize)
	}
	b, err := trust.ParseBundle(origin, m.GetJwks())
	switch {
	case err != nil:
		return nil, err
	case len(b.Roots()) == 0:
		return nil, errors.New("a bundle without roots")
	case b.Sequence() == 0 || b.Sequence() != m.GetSequence():
		return nil, fmt.Errorf("sequence %d of a bundle of sequence %d", m.GetSequence(), b.Sequence())
	}
	return b, nil
}

func judgeSeen(body []byte) (*Seen, error) {
	var m controlpb.BundleSeen
	if err := proto.Unmarshal(body, &m); err != nil {
		return nil, errors.New("not an acknowledgement")
	}
	if m.GetSequence() == 0 || len(m.GetSha256()) != 32 {
		return nil, errors.New("an acknowledgement without sequence or hash")
	}
	return &Seen{m.GetSequence(), [32]byte(m.GetSha256())}, nil
}

func judgeDenial(origin spiffeid.TrustDomain, key string, body []byte) (*Denial, error) {
	var m controlpb.DeniedIdentity
	if err := proto.Unmarshal(body, &m); err != nil {
		return nil, errors.New("not a withdrawn identity")
	}
	id, err := spiffeid.Parse(m.GetSpiffeId())
	switch {
	case err != nil:
		return nil, errors.New("the identity is no SPIFFE ID")
	case id.TrustDomain() != origin:
		return nil, fmt.Errorf("it withdraws an identity of trust domain %s", id.TrustDomain())
	case id.Path() == "" || DenialKey(id) != key:
		return nil, fmt.Errorf("the entry is about %.120q", id.String())
	case m.GetIssuedBeforeMs() < 0 || m.GetIssuedBeforeMs() > math.MaxInt64>>15:
		return nil, fmt.Errorf("issued before %d ms", m.GetIssuedBeforeMs())
	}
	d := &Denial{ID: id}
	if ms := m.GetIssuedBeforeMs(); ms > 0 {
		d.IssuedBefore = time.UnixMilli(ms).UTC()
	}
	return d, nil
}
