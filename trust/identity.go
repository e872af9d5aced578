// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Identity is an X509-SVID with its key, immutable.
type Identity struct {
	ID        spiffeid.ID
	Chain     []*x509.Certificate // leaf first, without the root; an issuer may be followed by its siblings
	Key       crypto.Signer
	NotBefore time.Time
	NotAfter  time.Time // of the certificate of the chain that ends first; of siblings the one that lasts counts
}

// NewIdentity checks that key belongs to the leaf and that the leaf is an X509-SVID in form; it verifies no signature.
func NewIdentity(chainDER [][]byte, key crypto.Signer) (*Identity, error) {
	if len(chainDER) == 0 || len(chainDER) > MaxChainLength {
		return nil, fmt.Errorf("identity: %d certificates", len(chainDER))
	}
	id := &Identity{Key: key}
	for _, der := range chainDER {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("identity: %w", err)
		}
		id.Chain = append(id.Chain, c)
	}
	leaf := id.Chain[0]
	id.NotBefore, id.NotAfter = leaf.NotBefore, chainEnd(id.Chain)
	var err error
	if id.ID, err = leafID(leaf); err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	if err := leafUsage(leaf); err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	pub, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if key == nil || !ok || !pub.Equal(key.Public()) {
		return nil, errors.New("identity: the key does not belong to the certificate")
	}
	return id, nil
}

// ChainDER is the chain as bytes.
func (i *Identity) ChainDER() [][]byte {
	out := make([][]byte, len(i.Chain))
	for n, c := range i.Chain {
		out[n] = c.Raw
	}
	return out
}

func (i *Identity) certificate() *tls.Certificate {
	return &tls.Certificate{Certificate: i.ChainDER(), PrivateKey: i.Key, Leaf: i.Chain[0]}
}

// MarshalPEM renders chain and key, for a file that only its owner reads.
func (i *Identity) MarshalPEM() ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(i.Key)
	if err != nil {
		return nil, fmt.Errorf("marshal identity: %w", err)
	}
	var b bytes.Buffer
	for _, c := range i.Chain {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	_ = pem.Encode(&b, &pem.Block{Type: "PRIVATE KEY", Bytes: key})
	return b.Bytes(), nil
}

// ParseIdentityPEM reads what MarshalPEM wrote. Its errors never contain key material.
func ParseIdentityPEM(data []byte) (*Identity, error) {
	var chain [][]byte
	var key crypto.Signer
	for len(data) > 0 {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		switch block.Type {
		case "CERTIFICATE":
			chain = append(chain, block.Bytes)
		case "PRIVATE KEY":
			k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			s, ok := k.(crypto.Signer)
			if err != nil || !ok || key != nil {
				return nil, errors.New("identity: malformed private key")
			}
			key = s
		}
	}
	if key == nil {
		return nil, errors.New("identity: no private key")
	}
	return NewIdentity(chain, key)
}
