// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Bounds of one message.
const (
	maxSVIDs     = 64
	maxFederated = 64
)

// svid is one SVID offered that holds.
type svid struct {
	identity *trust.Identity
	bundle   *trust.Bundle // of its trust domain, sequence 0
}

// offer is what one message of FetchX509SVID says.
type offer struct {
	svids     []svid
	federated map[spiffeid.TrustDomain]*trust.Bundle
	offered   []string // the spiffe_id of every SVID, as it came
	refused   []error  // what does not hold, each with its name
}

// readOffer parses and judges a message. Its error is that of a message which cannot be looked at.
func readOffer(m *workload.X509SVIDResponse, now time.Time) (*offer, error) {
	if n := len(m.GetSvids()); n == 0 || n > maxSVIDs {
		return nil, fmt.Errorf("a message with %d SVIDs; at most %d", n, maxSVIDs)
	}
	if n := len(m.GetFederatedBundles()); n > maxFederated {
		return nil, fmt.Errorf("a message with %d federated bundles; at most %d", n, maxFederated)
	}
	o := &offer{federated: map[spiffeid.TrustDomain]*trust.Bundle{}}
	for _, m := range m.GetSvids() {
		name := fmt.Sprintf("%.300s", m.GetSpiffeId())
		o.offered = append(o.offered, name)
		if s, err := readSVID(m, now); err != nil {
			o.refused = append(o.refused, fmt.Errorf("%s: %w", name, err))
		} else if !slices.ContainsFunc(o.svids, func(have svid) bool { return have.identity.ID == s.identity.ID }) {
			o.svids = append(o.svids, s) // the first of one ID is the default one
		}
	}
	for name, der := range m.GetFederatedBundles() {
		td, err := readTrustDomain(name)
		if err == nil {
			o.federated[td], err = readBundle(td, der)
		}
		if err != nil {
			delete(o.federated, td)
			o.refused = append(o.refused, fmt.Errorf("federated bundle %.300q: %w", name, err))
		}
	}
	return o, nil
}

func readSVID(m *workload.X509SVID, now time.Time) (svid, error) {
	want, err := spiffeid.Parse(m.GetSpiffeId())
	if err != nil {
		return svid{}, err
	}
	if len(m.GetX509Svid()) > trust.MaxChainBytes {
		return svid{}, fmt.Errorf("a chain of %d bytes; at most %d", len(m.GetX509Svid()), trust.MaxChainBytes)
	}
	chain, err := x509.ParseCertificates(m.GetX509Svid())
	if err != nil {
		return svid{}, errors.New("a malformed chain")
	}
	ders := make([][]byte, len(chain))
	for i, c := range chain {
		ders[i] = c.Raw
	}
	key, err := x509.ParsePKCS8PrivateKey(m.GetX509SvidKey())
	signer, ok := key.(crypto.Signer)
	if err != nil || !ok {
		return svid{}, errors.New("a malformed private key") // and nothing of it in the text
	}
	id, err := trust.NewIdentity(ders, signer)
	if err != nil {
		return svid{}, err
	}
	if id.ID != want {
		return svid{}, fmt.Errorf("its certificate is %s", id.ID)
	}
	b, err := readBundle(want.TrustDomain(), m.GetBundle())
	if err != nil {
		return svid{}, err
	}
	bundles, err := trust.NewBundles(b)
	if err != nil {
		return svid{}, err
	}
	if _, err := trust.Verify(id.Chain, bundles, now); err != nil {
		return svid{}, err
	}
	return svid{id, b}, nil
}

// readBundle reads the roots of td, one DER after the other, and puts the oldest first.
func readBundle(td spiffeid.TrustDomain, der []byte) (*trust.Bundle, error) {
	if len(der) > trust.MaxBundleSize {
		return nil, fmt.Errorf("a bundle of %d bytes; at most %d", len(der), trust.MaxBundleSize)
	}
	roots, err := x509.ParseCertificates(der)
	if err != nil {
		return nil, errors.New("a malformed bundle")
	}
	if len(roots) == 0 {
		return nil, errors.New("a bundle without roots")
	}
	slices.SortFunc(roots, func(a, b *x509.Certificate) int {
		return cmp.Or(a.NotBefore.Compare(b.NotBefore), bytes.Compare(a.Raw, b.Raw))
	})
	return trust.NewBundle(td, roots, 0)
}

// readTrustDomain reads a key of the maps: the SPIFFE ID of a trust domain, or its name.
func readTrustDomain(s string) (spiffeid.TrustDomain, error) {
	return spiffeid.ParseTrustDomain(strings.TrimPrefix(s, "spiffe://"))
}

// readJWTKeys finds the keys of td in a message of FetchJWTBundles. A trust domain without a document has none.
func readJWTKeys(m *workload.JWTBundlesResponse, td spiffeid.TrustDomain) ([]trust.JWTKey, error) {
	for name, doc := range m.GetBundles() {
		if have, err := readTrustDomain(name); err != nil || have != td {
			continue
		}
		doc, err := asBundle(doc)
		if err != nil {
			return nil, err
		}
		b, err := trust.ParseBundle(td, doc)
		if err != nil {
			return nil, err
		}
		return b.JWTKeys(), nil
	}
	return nil, nil
}

// asBundle turns a JWKS into a bundle document: keys without a use are for JWT-SVIDs here, and keys of other uses are left out.
func asBundle(doc []byte) ([]byte, error) {
	if len(doc) > trust.MaxBundleSize {
		return nil, fmt.Errorf("JWT keys of %d bytes; at most %d", len(doc), trust.MaxBundleSize)
	}
	var set struct {
		Keys []map[string]any `json:"keys"`
	}
	if err := json.Unmarshal(doc, &set); err != nil {
		return nil, errors.New("malformed JWT keys")
	}
	keys := make([]map[string]any, 0, len(set.Keys))
	for _, k := range set.Keys {
		if use := k["use"]; use == nil || use == "" || use == "jwt-svid" {
			if k == nil {
				continue
			}
			k["use"] = "jwt-svid"
			keys = append(keys, k)
		}
	}
	return json.Marshal(map[string]any{"keys": keys})
}
