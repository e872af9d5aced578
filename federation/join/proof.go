// SPDX-License-Identifier: Apache-2.0

package join

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Domain tags: what a MAC or a signature is about.
const (
	tagJoiner       = "strait-join/1 joiner"
	tagIssuer       = "strait-join/1 issuer"
	tagIntroduction = "strait-join/1 introduction"
)

// Bounds of certificate chains from the other side.
const (
	maxChain       = trust.MaxChainLength
	maxCertificate = 16 << 10
)

// Key is derived from a token's secret. It prints as "[key]".
type Key [sha256.Size]byte

// String hides the key.
func (Key) String() string { return "[key]" }

// GoString hides the key.
func (Key) GoString() string { return "[key]" }

// LogValue hides the key.
func (Key) LogValue() slog.Value { return slog.StringValue("[key]") }

func deriveKey(s Secret, id string) Key {
	k, err := hkdf.Key(sha256.New, s[:], []byte(id), "strait-join-1 key", sha256.Size)
	if err != nil {
		panic("join: hkdf: " + err.Error()) // only for lengths beyond its limit
	}
	return Key(k)
}

// proofText is what one side's MAC and signatures are over. The parts are the frames, and the facts, so far.
func proofText(tag string, exporter []byte, parts ...[]byte) []byte {
	h := sha256.New()
	for _, p := range parts {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write(p)
	}
	text := append([]byte(tag), 0)
	text = append(text, exporter...)
	return h.Sum(text)
}

func mac(k Key, text []byte) []byte {
	m := hmac.New(sha256.New, k[:])
	m.Write(text)
	return m.Sum(nil)
}

var errSignature = errors.New("signature does not verify")

// sign signs text with the identity's key.
func sign(id *trust.Identity, text []byte) ([]byte, error) {
	digest := sha256.Sum256(text)
	sig, err := id.Key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	return sig, nil
}

// checkSignature is the inverse of sign.
func checkSignature(pub crypto.PublicKey, text, sig []byte) error {
	digest := sha256.Sum256(text)
	ok := false
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(k, digest[:], sig)
	case *rsa.PublicKey:
		ok = k.Size() >= 256 && rsa.VerifyPKCS1v15(k, crypto.SHA256, digest[:], sig) == nil
	}
	if !ok {
		return errSignature
	}
	return nil
}

// verifyChain verifies a chain under one bundle and returns whose it is.
func verifyChain(ders [][]byte, bundle *trust.Bundle, now time.Time) (*trust.Peer, error) {
	if len(ders) == 0 || len(ders) > maxChain {
		return nil, fmt.Errorf("chain of %d certificates; 1 to %d", len(ders), maxChain)
	}
	chain := make([]*x509.Certificate, 0, len(ders))
	for _, der := range ders {
		if len(der) > maxCertificate {
			return nil, errors.New("certificate is too large")
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate: %w", err)
		}
		chain = append(chain, c)
	}
	bundles, err := trust.NewBundles(bundle)
	if err != nil {
		return nil, err
	}
	return trust.Verify(chain, bundles, now)
}

// verifyControlPlane checks that sig over text is by td's control plane, and returns its chain.
func verifyControlPlane(ders [][]byte, bundle *trust.Bundle, td spiffeid.TrustDomain, text, sig []byte, now time.Time) ([]*x509.Certificate, error) {
	p, err := verifyChain(ders, bundle, now)
	if err != nil {
		return nil, err
	}
	if p.ID != spiffeid.ControlPlane(td) {
		return nil, fmt.Errorf("signed by %s, which is not the control plane of %s", p.ID, td)
	}
	return p.Chain, checkSignature(p.Chain[0].PublicKey, text, sig)
}

// maxPinnedRoots bounds the search for a pin.
const maxPinnedRoots = 16

// Pinned is the part of a bundle that a pin made earlier names: all its roots, or some of them in a row (a root was added to the
// bundle, or left it, since). Its sequence is 0. nil: the pin names nothing in it.
func Pinned(b *trust.Bundle, pin [32]byte) *trust.Bundle {
	if b == nil || len(b.Roots()) > maxPinnedRoots {
		return nil
	}
	roots := b.Roots()
	for from := range roots {
		for to := from + 1; to <= len(roots); to++ {
			if part, err := trust.NewBundle(b.TrustDomain(), roots[from:to], 0); err == nil && part.Hash() == pin {
				return part
			}
		}
	}
	return nil
}

// chainDER is the inverse of parsing.
func chainDER(chain []*x509.Certificate) [][]byte {
	out := make([][]byte, 0, len(chain))
	for _, c := range chain {
		out = append(out, c.Raw)
	}
	return out
}
