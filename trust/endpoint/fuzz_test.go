// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"testing"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/endpoint/endpointtest"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// FuzzOffer: whatever a server sends, what is taken of it holds against its own bundle.
func FuzzOffer(f *testing.F) {
	a, err := endpointtest.New(endpointtest.Options{})
	if err != nil {
		f.Fatal(err)
	}
	v, err := a.SVID(spiffeid.ControlPlane(mustDomain(f, "a.example")))
	if err != nil {
		f.Fatal(err)
	}
	seed := func(m *workload.X509SVIDResponse) {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	seed(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{v, v}, FederatedBundles: map[string][]byte{"spiffe://b.example": a.Bundle(), "": {1}}})
	seed(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{SpiffeId: "spiffe://a.example/x"}}})
	seed(&workload.X509SVIDResponse{})
	now := time.Now()
	f.Fuzz(func(t *testing.T, data []byte) {
		var m workload.X509SVIDResponse
		if proto.Unmarshal(data, &m) != nil {
			return
		}
		o, err := readOffer(&m, now)
		if err != nil {
			return
		}
		if len(o.offered) != len(m.Svids) {
			t.Errorf("%d offered, %d said", len(m.Svids), len(o.offered))
		}
		for _, s := range o.svids {
			all, err := trust.NewBundles(s.bundle)
			if err != nil {
				t.Fatal(err)
			}
			if p, err := trust.Verify(s.identity.Chain, all, now); err != nil || p.ID != s.identity.ID {
				t.Errorf("%s was taken and does not hold: %v", s.identity.ID, err)
			}
		}
	})
}

// FuzzJWTKeys: whatever stands in the answer, only keys with a kid come out of it.
func FuzzJWTKeys(f *testing.F) {
	a, err := endpointtest.New(endpointtest.Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(a.JWKS())
	f.Add([]byte(`{"keys":[{"use":"x509-svid","kty":"EC"},null,{"use":7},{"kid":"a"},{"kid":"a"}]}`))
	td := mustDomain(f, "a.example")
	f.Fuzz(func(t *testing.T, doc []byte) {
		keys, err := readJWTKeys(&workload.JWTBundlesResponse{Bundles: map[string][]byte{"spiffe://a.example": doc}}, td)
		for _, k := range keys {
			if k.ID == "" || k.Key == nil || err != nil {
				t.Errorf("key %q %v, %v", k.ID, k.Key, err)
			}
		}
	})
}

func mustDomain(f *testing.F, s string) spiffeid.TrustDomain {
	td, err := spiffeid.ParseTrustDomain(s)
	if err != nil {
		f.Fatal(err)
	}
	return td
}
