// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Bounds of the work that one chain causes.
const (
	maxSignatures = 4  // of roots, tried over a stranger's chain before anything else about signatures
	maxPaths      = 4  // from the leaf to a root, followed to the end
	maxAnchored   = 64 // pairs of issuer and root that a bundle remembers; a cluster has a few a year
)

// steps sorts a chain into the leaf, the certificates of its issuer, those of the issuer's issuer and so on. Each certificate
// follows one that it issued, by name, or is a sibling of the one before it: the same subject with the same key, certified by
// another authority. During the rotation of a root an issuer is sent as two siblings, so that whoever knows either root
// finds a path. Self-issued certificates at the end that fit nowhere are roots sent along; they are left out.
func steps(chain []*x509.Certificate) ([][]*x509.Certificate, error) {
	out := [][]*x509.Certificate{chain[:1]}
	for i, c := range chain[1:] {
		before := chain[i]
		switch {
		case i > 0 && sibling(before, c):
			last := len(out) - 1
			out[last] = append(out[last], c)
		case bytes.Equal(before.RawIssuer, c.RawSubject):
			out = append(out, []*x509.Certificate{c})
		case !slices.ContainsFunc(chain[i+1:], func(c *x509.Certificate) bool { return !selfIssued(c) }):
			return out, nil
		default:
			return nil, fmt.Errorf("certificate %d was not issued by the one after it, nor is that a sibling", i)
		}
	}
	return out, nil
}

func sibling(a, b *x509.Certificate) bool {
	return bytes.Equal(a.RawSubject, b.RawSubject) && bytes.Equal(a.RawSubjectPublicKeyInfo, b.RawSubjectPublicKeyInfo)
}

func selfIssued(c *x509.Certificate) bool { return bytes.Equal(c.RawSubject, c.RawIssuer) }

// chainEnd is when a chain ends for whoever can use all of it: the leaf, and of each issuer the sibling that lasts longest. A
// sibling is sent for those who need it, and its end concerns nobody else. A chain in disorder ends with its first certificate.
func chainEnd(chain []*x509.Certificate) time.Time {
	list, err := steps(chain)
	if err != nil {
		return firstEnd(chain)
	}
	end := chain[0].NotAfter
	for _, step := range list {
		last := step[0].NotAfter
		for _, c := range step[1:] {
			if c.NotAfter.After(last) {
				last = c.NotAfter
			}
		}
		if last.Before(end) {
			end = last
		}
	}
	return end
}

func firstEnd(chain []*x509.Certificate) time.Time {
	end := chain[0].NotAfter
	for _, c := range chain[1:] {
		if c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}

// route is a way from the leaf to a root: one certificate of each step. Only the last one's signature has been looked at.
type route struct {
	path []*x509.Certificate
	root int // index into Bundle.roots
}

// refusal is a reason and its cause.
type refusal struct {
	reason string
	err    error
}

var errNoAnchor = errors.New("no root of its trust domain signed it")

// verify follows the steps to a root at now, the leaf as of leafAt, and returns the path with that root. Times are judged of the
// certificates of one path: what is sent along for others may have ended.
func (b *Bundle) verify(list [][]*x509.Certificate, td spiffeid.TrustDomain, leafAt, now time.Time) ([]*x509.Certificate, *refusal) {
	why := &refusal{"untrusted", errNoAnchor}
	routes, late := b.routes(list, now)
	if late != nil {
		why = late
	}
	for _, r := range routes {
		path, err := r.follow(b, td, leafAt)
		if err == nil {
			return path, nil
		}
		why = &refusal{"untrusted", err}
	}
	return nil, why
}

// routes finds the ways up whose certificates are valid at now and whose upper end a root has signed, shortest first. For a
// stranger that costs one signature, unless roots share a name without key identifiers, and never more than maxSignatures.
// The refusal says that there was a way but for the time.
func (b *Bundle) routes(list [][]*x509.Certificate, now time.Time) (found []route, late *refusal) {
	tried := 0
	for k, step := range list {
		for _, top := range step {
			for i, root := range b.roots {
				if !named(root, top) {
					continue
				}
				r := route{append(below(list[:k], top, now), top), i}
				if err := r.checkTimes(root, now); err != nil {
					if late == nil {
						late = err
					}
					continue
				}
				if b.anchors(i, top, &tried) {
					found = append(found, r)
				}
				if tried >= maxSignatures || len(found) >= maxPaths {
					return found, late
				}
			}
		}
	}
	return found, late
}

// named reports whether c says that root has issued it.
func named(root, c *x509.Certificate) bool {
	return bytes.Equal(root.RawSubject, c.RawIssuer) &&
		(len(c.AuthorityKeyId) == 0 || len(root.SubjectKeyId) == 0 || bytes.Equal(c.AuthorityKeyId, root.SubjectKeyId))
}

// below chooses a certificate of each step under top: one that names the step above it, and of siblings one that is valid.
func below(list [][]*x509.Certificate, top *x509.Certificate, now time.Time) []*x509.Certificate {
	path := make([]*x509.Certificate, len(list), len(list)+2)
	above := top
	for k := len(list) - 1; k >= 0; k-- {
		for _, c := range list[k] {
			if bytes.Equal(c.RawIssuer, above.RawSubject) && (path[k] == nil || valid(path[k], now) != nil) {
				path[k] = c
			}
		}
		above = path[k] // never nil: the last of a step names the step above it
	}
	return path
}

func (r route) checkTimes(root *x509.Certificate, now time.Time) *refusal {
	for _, c := range append(r.path[1:len(r.path):len(r.path)], root) { // the leaf has been judged
		if err := valid(c, now); err != nil {
			return err
		}
	}
	return nil
}

func valid(c *x509.Certificate, now time.Time) *refusal {
	switch {
	case now.Before(c.NotBefore):
		return &refusal{"not_yet_valid", fmt.Errorf("valid from %s", c.NotBefore.UTC().Format(time.RFC3339))}
	case now.After(c.NotAfter):
		return &refusal{"expired", fmt.Errorf("valid until %s", c.NotAfter.UTC().Format(time.RFC3339))}
	}
	return nil
}

// anchor is an issuer and the root that was seen to have signed it.
type anchor struct {
	sum  [32]byte // of the whole certificate
	root int
}

// anchors reports whether root i signed c; a signature that has to be checked is counted.
func (b *Bundle) anchors(i int, c *x509.Certificate, tried *int) bool {
	a := anchor{sha256.Sum256(c.Raw), i}
	if _, ok := b.anchored.Load(a); ok {
		return true
	}
	*tried++
	if c.CheckSignatureFrom(b.roots[i]) != nil {
		return false
	}
	if c.IsCA && b.anchoredCount.Add(1) <= maxAnchored {
		b.anchored.Store(a, struct{}{})
	}
	return true
}

// follow checks every signature of the path, its lengths and constraints, and returns it with the root. What stands above the
// leaf has been judged at the present time already.
func (r route) follow(b *Bundle, td spiffeid.TrustDomain, leafAt time.Time) ([]*x509.Certificate, error) {
	between := x509.NewCertPool()
	for _, c := range r.path[1:] {
		between.AddCert(c)
	}
	paths, err := r.path[0].Verify(x509.VerifyOptions{
		Roots: b.pools[r.root], Intermediates: between, CurrentTime: leafAt, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, err
	}
	for _, p := range paths {
		if err = checkConstraints(p, td); err == nil {
			return p, nil
		}
	}
	return nil, err
}
