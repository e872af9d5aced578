// SPDX-License-Identifier: Apache-2.0

package workloadapi

import (
	"crypto/x509"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/trust"
)

// messages makes each message once for all streams. A message that says the same as the one before is the one before, so that
// streams compare pointers. Messages are not modified once they were returned.
type messages struct {
	mu sync.Mutex

	svidOf   svidKey
	svidSaid *workload.X509SVIDResponse
	x509Of   *trust.Bundles
	x509Said *workload.X509BundlesResponse
	jwtOf    *trust.Bundles
	jwtSaid  *workload.JWTBundlesResponse
}

type svidKey struct {
	id      *trust.Identity
	bundles *trust.Bundles
	hint    string
}

// same is the message said before if next says nothing else.
func same[M proto.Message](said, next M) M {
	if said.ProtoReflect().IsValid() && proto.Equal(said, next) {
		return said
	}
	return next
}

func (s *messages) svid(a Access, id *trust.Identity, bundles *trust.Bundles) (*workload.X509SVIDResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := svidKey{id, bundles, a.Hint}
	if s.svidSaid != nil && s.svidOf == key {
		return s.svidSaid, nil
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(id.Key)
	if err != nil {
		return nil, fmt.Errorf("key of the identity: %w", err)
	}
	own := id.ID.TrustDomain()
	m := &workload.X509SVIDResponse{
		Svids: []*workload.X509SVID{{
			SpiffeId: id.ID.String(), X509Svid: concatenated(id.Chain), X509SvidKey: pkcs8, Bundle: concatenated(bundles.Get(own).Roots()), Hint: a.Hint,
		}},
		FederatedBundles: map[string][]byte{},
	}
	for _, td := range bundles.TrustDomains() {
		if roots := bundles.Get(td).Roots(); td != own && len(roots) > 0 {
			m.FederatedBundles["spiffe://"+td.String()] = concatenated(roots)
		}
	}
	s.svidOf, s.svidSaid = key, same(s.svidSaid, m)
	return s.svidSaid, nil
}

func (s *messages) x509(bundles *trust.Bundles) *workload.X509BundlesResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.x509Said != nil && s.x509Of == bundles {
		return s.x509Said
	}
	m := &workload.X509BundlesResponse{Bundles: map[string][]byte{}}
	for _, td := range bundles.TrustDomains() {
		if roots := bundles.Get(td).Roots(); len(roots) > 0 {
			m.Bundles["spiffe://"+td.String()] = concatenated(roots)
		}
	}
	s.x509Of, s.x509Said = bundles, same(s.x509Said, m)
	return s.x509Said
}

func (s *messages) jwt(bundles *trust.Bundles) (*workload.JWTBundlesResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.jwtSaid != nil && s.jwtOf == bundles {
		return s.jwtSaid, nil
	}
	m := &workload.JWTBundlesResponse{Bundles: map[string][]byte{}}
	for _, td := range bundles.TrustDomains() {
		b := bundles.Get(td)
		if len(b.JWTKeys()) == 0 {
			continue
		}
		// A bundle without its roots is a JWK set of the keys for tokens alone.
		only, err := trust.NewBundle(td, nil, b.Sequence())
		if err == nil {
			only, err = only.WithJWTKeys(b.JWTKeys())
		}
		if err != nil {
			return nil, err
		}
		m.Bundles["spiffe://"+td.String()] = only.Marshal()
	}
	s.jwtOf, s.jwtSaid = bundles, same(s.jwtSaid, m)
	return s.jwtSaid, nil
}

func concatenated(certificates []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certificates {
		out = append(out, c.Raw...)
	}
	return out
}

// maxTokens bounds the tokens that are kept; each may have 16 KiB.
const maxTokens = 128

type cached struct {
	token string
	until time.Time
}

// tokenCache keeps tokens for the first half of their life, as long as the bundles stay.
type tokenCache struct {
	generation atomic.Uint64 // counts clear

	mu      sync.Mutex
	bundles *trust.Bundles
	tokens  map[string]cached
}

func (c *tokenCache) get(key string, bundles *trust.Bundles, now time.Time) (string, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t, ok := c.tokens[key]
	if !ok || c.bundles != bundles || !now.Before(t.until) {
		return "", false
	}
	return t.token, true
}

func (c *tokenCache) put(key string, bundles *trust.Bundles, t cached) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tokens == nil || c.bundles != bundles || len(c.tokens) >= maxTokens {
		c.tokens = map[string]cached{}
	}
	c.bundles = bundles
	c.tokens[key] = t
}

func (c *tokenCache) clear() {
	c.generation.Add(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tokens = nil
}
