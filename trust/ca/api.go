// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const apiFile = "ca/api.pem"

// API is the CA of the configuration API (7401) alone: DNS names, addresses and user names, and no SPIFFE ID, so that kubectl
// and browsers can verify it. It belongs to the cluster also where identities come from somewhere else. Its methods may be
// called concurrently.
type API struct {
	pair *pair
	now  func() time.Time
	log  *ledger
}

// CreateAPI makes a new API CA below dir, in place of one that is there.
func CreateAPI(dir *datadir.Dir, cfg Config) (*API, error) {
	c := newCA(dir, cfg)
	p, err := selfSigned(caTemplate("Strait API CA of "+c.td.String(), randomSerial(), c.now(), RootLifetime, 0, spiffeid.TrustDomain{}))
	if err == nil {
		err = savePair(c.dir, apiFile, p)
	}
	if err != nil {
		return nil, fmt.Errorf("create API CA: %w", err)
	}
	return &API{p, c.now, newLedger(c.dir, "api")}, nil
}

// OpenAPI reads the API CA below dir.
func OpenAPI(dir *datadir.Dir, cfg Config) (*API, error) {
	c := newCA(dir, cfg)
	p, err := loadPair(c.dir, apiFile)
	if err != nil {
		return nil, fmt.Errorf("open API CA: %w", err)
	}
	return &API{p, c.now, newLedger(c.dir, "api")}, nil
}

// APIRootPEM is the certificate that clients of the configuration API verify against.
func (a *API) APIRootPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.pair.cert.Raw})
}

// IssueServing makes a key and a serving certificate of the configuration API for DNS names and addresses.
func (a *API) IssueServing(dns []string, ips []net.IP, ttl time.Duration) (certPEM, keyPEM []byte, err error) {
	key, err := newECKey()
	if err != nil {
		return nil, nil, fmt.Errorf("issue serving certificate: %w", err)
	}
	certPEM, err = a.sign(&key.PublicKey, pkix.Name{CommonName: "strait-api"}, x509.ExtKeyUsageServerAuth, dns, ips, ttl)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return certPEM, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// IssueAPIClient signs a client certificate of the configuration API for the request's public key: user name and groups as
// Kubernetes reads them from the subject.
func (a *API) IssueAPIClient(csrDER []byte, name string, groups []string, ttl time.Duration) (certPEM []byte, err error) {
	pub, err := requestKey(csrDER)
	if err != nil {
		return nil, fmt.Errorf("issue API client %s: %w", name, err)
	}
	return a.sign(pub, pkix.Name{CommonName: name, Organization: groups}, x509.ExtKeyUsageClientAuth, nil, nil, ttl)
}

func (a *API) sign(pub crypto.PublicKey, subject pkix.Name, usage x509.ExtKeyUsage, dns []string, ips []net.IP, ttl time.Duration) ([]byte, error) {
	if ttl <= 0 {
		ttl = DefaultTTL
	}
	now := a.now()
	serial, err := a.log.serial(now)
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", subject.CommonName, err)
	}
	t := &x509.Certificate{
		SerialNumber: serial, Subject: subject, NotBefore: now.Add(-Backdate), NotAfter: now.Add(ttl), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage}, DNSNames: dns, IPAddresses: ips,
	}
	if t.NotAfter.After(a.pair.cert.NotAfter) {
		t.NotAfter = a.pair.cert.NotAfter
	}
	cert, err := sign(t, a.pair.cert, pub, a.pair.key)
	if err == nil {
		kind := "serving"
		if usage == x509.ExtKeyUsageClientAuth {
			kind = "client"
		}
		err = a.log.record(cert, subject.CommonName, kind, "control plane", now)
	}
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", subject.CommonName, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), nil
}
