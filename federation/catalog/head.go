// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Bounds of a head.
const (
	DefaultTTL  = 60 * time.Second // how long a head speaks for its catalog
	MaxTTL      = time.Hour
	MaxHeadSize = 1 << 10
	// MaxSkew is how far an issuer's clock may be ahead of ours.
	MaxSkew = 10 * time.Minute
	// MaxEpochJump is how much an epoch may exceed one already accepted.
	MaxEpochJump = 1 << 20
)

const (
	headVersion = 1
	// signatureDomain keeps a head's signature from meaning anything else.
	signatureDomain = "strait catalog head v1\x00"
)

// Head says what one origin offers to one consumer, at one moment. Heads of one origin and consumer are ordered by (Epoch, Seq);
// signing again later changes neither.
type Head struct {
	TrustDomain    spiffeid.TrustDomain // the origin
	Consumer       spiffeid.TrustDomain
	Epoch, Seq     uint64   // both from 1
	Hash           [32]byte // of the sorted entries
	Count          int      // of the entries
	IssuedAt       time.Time
	TTL            time.Duration
	BundleSequence uint64 // of the origin's trust bundle
}

// Newer reports whether h comes after (epoch, seq).
func (h Head) Newer(epoch, seq uint64) bool {
	return h.Epoch > epoch || h.Epoch == epoch && h.Seq > seq
}

// Marshal returns the canonical encoding (DESIGN.md), which is what is signed. Times are kept to the millisecond.
func (h Head) Marshal() []byte {
	b := make([]byte, 0, 160)
	b = append(b, headVersion)
	field := func(v []byte) {
		b = binary.BigEndian.AppendUint16(b, uint16(len(v)))
		b = append(b, v...)
	}
	number := func(v uint64) { field(binary.BigEndian.AppendUint64(nil, v)) }
	number(0) // feature bits
	field([]byte(h.TrustDomain.String()))
	field([]byte(h.Consumer.String()))
	number(h.Epoch)
	number(h.Seq)
	field(h.Hash[:])
	number(uint64(h.Count))
	number(uint64(h.IssuedAt.UnixMilli()))
	number(uint64(h.TTL.Milliseconds()))
	number(h.BundleSequence)
	return b
}

// ParseHead is the inverse of Marshal: it accepts no other encoding of the same head.
func ParseHead(b []byte) (*Head, error) {
	r := headReader{rest: b}
	if len(b) == 0 || len(b) > MaxHeadSize {
		return nil, fmt.Errorf("catalog head: %d bytes, want 1 to %d", len(b), MaxHeadSize)
	}
	if b[0] != headVersion {
		return nil, fmt.Errorf("catalog head: version %d, want %d", b[0], headVersion)
	}
	r.rest = b[1:]
	var h Head
	features := r.number()
	h.TrustDomain = r.trustDomain()
	h.Consumer = r.trustDomain()
	h.Epoch, h.Seq = r.number(), r.number()
	if hash := r.field(); len(hash) == len(h.Hash) {
		h.Hash = [32]byte(hash)
	} else {
		r.fail("hash")
	}
	count, issued, ttl := r.number(), r.number(), r.number()
	h.BundleSequence = r.number()
	switch {
	case r.err != nil:
		return nil, r.err
	case len(r.rest) > 0:
		return nil, fmt.Errorf("catalog head: %d bytes too many", len(r.rest))
	case features != 0:
		return nil, fmt.Errorf("catalog head: unknown features %#x", features)
	case h.Epoch == 0 || h.Seq == 0:
		return nil, errors.New("catalog head: epoch or sequence is zero")
	case count > math.MaxInt32:
		return nil, fmt.Errorf("catalog head: count %d", count)
	case issued > 1<<48:
		return nil, fmt.Errorf("catalog head: issued at %d", issued)
	case ttl == 0 || ttl > uint64(MaxTTL.Milliseconds()):
		return nil, fmt.Errorf("catalog head: ttl of %d ms", ttl)
	}
	h.Count = int(count)
	h.IssuedAt = time.UnixMilli(int64(issued)).UTC()
	h.TTL = time.Duration(ttl) * time.Millisecond
	return &h, nil
}

type headReader struct {
	rest []byte
	err  error
}

func (r *headReader) fail(what string) {
	if r.err == nil {
		r.err = fmt.Errorf("catalog head: malformed %s", what)
	}
}

func (r *headReader) field() []byte {
	if len(r.rest) < 2 {
		r.fail("length")
		return nil
	}
	n := int(binary.BigEndian.Uint16(r.rest))
	if len(r.rest)-2 < n {
		r.fail("field")
		return nil
	}
	v := r.rest[2 : 2+n]
	r.rest = r.rest[2+n:]
	return v
}

func (r *headReader) number() uint64 {
	v := r.field()
	if len(v) != 8 {
		r.fail("number")
		return 0
	}
	return binary.BigEndian.Uint64(v)
}

func (r *headReader) trustDomain() spiffeid.TrustDomain {
	v := string(r.field())
	td, err := spiffeid.ParseTrustDomain(v)
	if err != nil || td.String() != v {
		r.fail("trust domain")
	}
	return td
}

// Sign signs h with its origin's catalog signer.
func Sign(h Head, id *trust.Identity) (*controlpb.SignedHead, error) {
	if id.ID != spiffeid.CatalogSigner(h.TrustDomain) {
		return nil, fmt.Errorf("sign catalog head: %s does not sign for %s", id.ID, h.TrustDomain)
	}
	b := h.Marshal()
	if _, err := ParseHead(b); err != nil {
		return nil, fmt.Errorf("sign catalog head: %w", err)
	}
	digest := headDigest(b)
	sig, err := id.Key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("sign catalog head: %w", err)
	}
	return &controlpb.SignedHead{Head: b, Signature: sig, ChainDer: id.ChainDER()}, nil
}

func headDigest(head []byte) [32]byte {
	s := sha256.New()
	s.Write([]byte(signatureDomain))
	s.Write(head)
	return [32]byte(s.Sum(nil))
}

// VerifyHead returns the head if origin's catalog signer signed it for consumer and its time can be. Errors are *HeadError.
func VerifyHead(sh *controlpb.SignedHead, bundles *trust.Bundles, origin, consumer spiffeid.TrustDomain, now time.Time) (*Head, error) {
	h, err := ParseHead(sh.GetHead())
	if err != nil {
		return nil, &HeadError{Reason: "malformed", Err: err}
	}
	if h.TrustDomain != origin {
		return nil, &HeadError{Reason: "signer", Err: fmt.Errorf("head of %s where %s was expected", h.TrustDomain, origin)}
	}
	if h.Consumer != consumer {
		return nil, &HeadError{Reason: "consumer", Err: fmt.Errorf("head for %s, we are %s", h.Consumer, consumer)}
	}
	if err := verifySignature(sh, bundles, spiffeid.CatalogSigner(origin), now); err != nil {
		return nil, err
	}
	if h.IssuedAt.After(now.Add(MaxSkew)) {
		return nil, &HeadError{Reason: "time", Err: fmt.Errorf("issued %v ahead of our clock", h.IssuedAt.Sub(now))}
	}
	return h, nil
}

func verifySignature(sh *controlpb.SignedHead, bundles *trust.Bundles, signer spiffeid.ID, now time.Time) error {
	size := 0
	for _, der := range sh.GetChainDer() {
		size += len(der)
	}
	if len(sh.GetChainDer()) > trust.MaxChainLength || size > trust.MaxChainBytes || len(sh.GetSignature()) > 256 {
		return &HeadError{Reason: "malformed", Err: errors.New("chain or signature too large")}
	}
	var chain []*x509.Certificate
	for _, der := range sh.GetChainDer() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return &HeadError{Reason: "malformed", Err: err}
		}
		chain = append(chain, c)
	}
	peer, err := trust.Verify(chain, bundles, now)
	if err != nil {
		return &HeadError{Reason: "signer", Err: err}
	}
	if peer.ID != signer {
		return &HeadError{Reason: "signer", Err: fmt.Errorf("signed by %s, want %s", peer.ID, signer)}
	}
	key, ok := chain[0].PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return &HeadError{Reason: "signer", Err: errors.New("signer's key is not ECDSA P-256")}
	}
	digest := headDigest(sh.GetHead())
	if !ecdsa.VerifyASN1(key, digest[:], sh.GetSignature()) {
		return &HeadError{Reason: "signature", Err: errors.New("does not verify")}
	}
	return nil
}
