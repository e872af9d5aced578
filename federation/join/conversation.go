// SPDX-License-Identifier: Apache-2.0

package join

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// MaxSkew is how far the clocks of the two control planes may be apart, the way's time deducted.
const MaxSkew = 30 * time.Second

const exporterSize = 32

// Self is what one side tells of itself.
type Self struct {
	Federation    federation.FederationName
	Cluster       federation.ClusterName
	TrustDomain   spiffeid.TrustDomain
	Region        string
	Bundle        *trust.Bundle
	Identity      *trust.Identity // the control plane's
	Gateways      []*controlpb.GatewayRecord
	Version       string
	AllowLoopback bool // of the other side's gateways
}

func (s Self) check() error {
	if s.Bundle == nil || s.Identity == nil || s.Identity.ID != spiffeid.ControlPlane(s.TrustDomain) {
		return errors.New("join: the own control plane has no identity or bundle yet")
	}
	return nil
}

// Counterpart is the other side, proven.
type Counterpart struct {
	Federation  federation.FederationName
	Cluster     federation.ClusterName
	TrustDomain spiffeid.TrustDomain
	Region      string
	Bundle      *trust.Bundle
	Gateways    []*controlpb.GatewayRecord
	GatewayID   spiffeid.ID         // of the gateway at the other end of the connection
	Chain       []*x509.Certificate // of its control plane; a dialler has its gateway's until the verdict
	Version     string
	Skew        time.Duration // its clock minus ours; acceptor: uncorrected for the way
}

// Outcome is what the acceptor decided.
type Outcome string

// The outcomes of a conversation.
const (
	Approved Outcome = "approved"
	Awaiting Outcome = "awaiting"
	Checked  Outcome = "checked" // nothing was changed; it would have been approved, or would await approval
)

// Verdict is what the acceptor tells the dialler beside itself.
type Verdict struct {
	Outcome Outcome
	Approve string    // auto, manual, introduced
	Expires time.Time // until when the join may be resumed
	Resumed bool
	Members []Member // a hint for the user
}

// Member is another member as the acceptor knows it.
type Member struct {
	Cluster     federation.ClusterName
	TrustDomain spiffeid.TrustDomain
	Region      string
}

const maxMembers = 256

// opened checks what the own gateway says of the connection and returns the chain's owner.
func opened(o *controlpb.JoinOpened, bundle *trust.Bundle, td spiffeid.TrustDomain, now time.Time) (*trust.Peer, error) {
	ders := o.GetPeerChainDer()
	for len(ders) > maxChain && selfIssued(ders[len(ders)-1]) { // the server's roots, which it sends along
		ders = ders[:len(ders)-1]
	}
	p, err := verifyChain(ders, bundle, now)
	if err != nil {
		return nil, err
	}
	if _, ok := p.ID.Gateway(); !ok || p.ID.TrustDomain() != td {
		return nil, fmt.Errorf("%s is not a gateway of %s", p.ID, td)
	}
	return p, nil
}

func selfIssued(der []byte) bool {
	if len(der) > maxCertificate {
		return false
	}
	c, err := x509.ParseCertificate(der)
	return err == nil && bytes.Equal(c.RawIssuer, c.RawSubject)
}

func parsePeerBundle(td spiffeid.TrustDomain, jwks []byte) (*trust.Bundle, error) {
	if len(jwks) > maxBundle {
		return nil, fmt.Errorf("bundle of %d bytes; at most %d", len(jwks), maxBundle)
	}
	b, err := trust.ParseBundle(td, jwks)
	if err != nil {
		return nil, err
	}
	if len(b.Roots()) == 0 {
		return nil, fmt.Errorf("bundle of %s has no root", td)
	}
	return b, nil
}

// names parses what the other side calls itself and judges its gateway records.
func names(c *Counterpart, fed, cluster, region, version string, records []*controlpb.GatewayRecord, allowLoopback bool) error {
	var err error
	if c.Federation, err = federation.ParseFederationName(fed); err != nil {
		return err
	}
	if c.Cluster, err = federation.ParseClusterName(cluster); err != nil {
		return err
	}
	if len(region) > maxText || len(version) > maxText {
		return errors.New("region or version is too long")
	}
	c.Region, c.Version = clip(region), clip(version)
	if err := CheckRecords(c.TrustDomain, records, allowLoopback); err != nil {
		return err
	}
	c.Gateways = records
	return nil
}

func newNonce() []byte {
	b := make([]byte, nonceSize)
	_, _ = rand.Read(b)
	return b
}

// untrusted makes STR-5201 of what a counterpart could not prove.
func untrusted(what string, err error) error {
	if errors.Is(err, errAddress) {
		return problem.New(problem.AddressRefused, "%s: %v", what, err).WithState("nothing was changed on either side").Wrap(err)
	}
	return problem.New(problem.TrustRefused, "%s: %v", what, err).WithState("nothing was changed on either side").Wrap(err)
}

// skewError is STR-2208, or nil when the clocks agree well enough.
func skewError(skew time.Duration) error {
	if skew.Abs() <= MaxSkew {
		return nil
	}
	who := "ahead of"
	if skew < 0 {
		who = "behind"
	}
	return problem.New(problem.ClockSkew, "the other side's clock is %s %s ours (limit %s)", skew.Abs().Round(10*time.Millisecond), who, MaxSkew).
		WithState("nothing was changed on either side")
}

// CatalogFrame carries one side's signed catalog for the other, or only a count when it is too large or not signed yet, and the
// newest head that it holds of the other side's.
func CatalogFrame(update *controlpb.CatalogUpdate, services int, held *controlpb.SignedHead) ([]byte, error) {
	c := &controlpb.JoinCatalog{Update: update, Services: uint32(max(0, services)), Held: held}
	if proto.Size(c) > MaxFrame-1024 {
		c.Update = nil
	}
	return encode(&controlpb.JoinMessage{Message: &controlpb.JoinMessage_Catalog{Catalog: c}})
}

// ParseCatalogFrame reads a catalog frame; nothing in it is verified.
func ParseCatalogFrame(b []byte) (*controlpb.JoinCatalog, error) {
	m, err := decode(b)
	if err != nil {
		return nil, err
	}
	c := m.GetCatalog()
	if c == nil {
		return nil, fmt.Errorf("catalog: %w", errFrame)
	}
	return c, nil
}
