// SPDX-License-Identifier: Apache-2.0

package join

import (
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

// IntroductionTTL is how long an introduction may be acted upon.
const IntroductionTTL = 7 * 24 * time.Hour

// MaxIntroduction bounds a signed introduction, in bytes.
const MaxIntroduction = 64 << 10

// Introduction is one member's word that another cluster has become a member. It grants nothing.
type Introduction struct {
	Federation federation.FederationName
	Introducer spiffeid.TrustDomain
	Receiver   spiffeid.TrustDomain
	Subject    spiffeid.TrustDomain
	Cluster    federation.ClusterName // of the subject
	Region     string
	BundleHash [32]byte
	Gateways   []TokenGateway
	TokenID    string
	Issued     time.Time
	Expires    time.Time
}

// Addresses lists the addresses of all the subject's gateways.
func (i *Introduction) Addresses() []string { return (&Token{Gateways: i.Gateways}).Addresses() }

// SignIntroduction signs with the introducer's control plane identity.
func SignIntroduction(in Introduction, id *trust.Identity) ([]byte, error) {
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(&controlpb.Introduction{
		Federation: in.Federation.String(), IntroducerTrustDomain: in.Introducer.String(), ReceiverTrustDomain: in.Receiver.String(),
		SubjectCluster: in.Cluster.String(), SubjectTrustDomain: in.Subject.String(), SubjectRegion: in.Region,
		SubjectBundleSha256: in.BundleHash[:], SubjectGateways: gatewaysToProto(in.Gateways), TokenId: in.TokenID,
		IssuedUnix: in.Issued.Unix(), ExpiresUnix: in.Expires.Unix(),
	})
	if err != nil {
		return nil, fmt.Errorf("introduction: %w", err)
	}
	sig, err := sign(id, introductionText(body))
	if err != nil {
		return nil, err
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(&controlpb.SignedIntroduction{
		Introduction: body, Signature: sig, ChainDer: chainDER(id.Chain),
	})
}

func introductionText(body []byte) []byte { return append(append([]byte(tagIntroduction), 0), body...) }

// VerifyIntroduction checks that from, a peer whose bundle is known, signed this for self, and that it is complete and in time.
// Whether the name is free is for the caller to judge. Errors are STR-5201.
func VerifyIntroduction(b []byte, bundle *trust.Bundle, self spiffeid.TrustDomain, fed federation.FederationName, allowLoopback bool, now time.Time) (*Introduction, error) {
	in, err := verifyIntroduction(b, bundle, self, fed, allowLoopback, now)
	if err != nil {
		return nil, problem.New(problem.TrustRefused, "introduction: %v", err).Wrap(err)
	}
	return in, nil
}

func verifyIntroduction(b []byte, bundle *trust.Bundle, self spiffeid.TrustDomain, fed federation.FederationName, allowLoopback bool, now time.Time) (*Introduction, error) {
	if bundle == nil {
		return nil, errors.New("the introducer is not trusted")
	}
	if len(b) > MaxIntroduction {
		return nil, fmt.Errorf("%d bytes; at most %d", len(b), MaxIntroduction)
	}
	var s controlpb.SignedIntroduction
	if err := proto.Unmarshal(b, &s); err != nil {
		return nil, err
	}
	text := introductionText(s.GetIntroduction())
	if _, err := verifyControlPlane(s.GetChainDer(), bundle, bundle.TrustDomain(), text, s.GetSignature(), now); err != nil {
		return nil, err
	}
	in, err := parseIntroduction(s.GetIntroduction())
	if err != nil {
		return nil, err
	}
	for _, g := range in.Gateways {
		for _, a := range g.Addresses {
			if err := checkAddress(a, allowLoopback); err != nil {
				return nil, err
			}
		}
	}
	switch {
	case in.Introducer != bundle.TrustDomain():
		return nil, fmt.Errorf("signed by %s in the name of %s", bundle.TrustDomain(), in.Introducer)
	case in.Receiver != self:
		return nil, fmt.Errorf("meant for %s", in.Receiver)
	case in.Federation != fed:
		return nil, fmt.Errorf("of the federation %s", in.Federation)
	case !now.Before(in.Expires), in.Issued.After(now.Add(MaxSkew)):
		return nil, fmt.Errorf("not valid now: from %s to %s", in.Issued.UTC().Format(time.RFC3339), in.Expires.UTC().Format(time.RFC3339))
	}
	return in, nil
}

// ParseStoredIntroduction reads an introduction that was verified when it came.
func ParseStoredIntroduction(b []byte) (*Introduction, error) {
	var s controlpb.SignedIntroduction
	if err := proto.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("introduction: %w", err)
	}
	return parseIntroduction(s.GetIntroduction())
}

func parseIntroduction(body []byte) (*Introduction, error) {
	var m controlpb.Introduction
	if err := proto.Unmarshal(body, &m); err != nil {
		return nil, err
	}
	in := &Introduction{
		Region: clip(m.GetSubjectRegion()), TokenID: clip(m.GetTokenId()),
		Issued: time.Unix(m.GetIssuedUnix(), 0), Expires: time.Unix(m.GetExpiresUnix(), 0),
	}
	if in.Expires.Sub(in.Issued) > IntroductionTTL {
		return nil, errors.New("valid for too long")
	}
	if copy(in.BundleHash[:], m.GetSubjectBundleSha256()) != 32 || len(m.GetSubjectBundleSha256()) != 32 {
		return nil, errors.New("no bundle hash")
	}
	var err error
	if in.Federation, err = federation.ParseFederationName(m.GetFederation()); err != nil {
		return nil, err
	}
	if in.Cluster, err = federation.ParseClusterName(m.GetSubjectCluster()); err != nil {
		return nil, err
	}
	for _, f := range []struct {
		text string
		td   *spiffeid.TrustDomain
	}{{m.GetIntroducerTrustDomain(), &in.Introducer}, {m.GetReceiverTrustDomain(), &in.Receiver}, {m.GetSubjectTrustDomain(), &in.Subject}} {
		if *f.td, err = spiffeid.ParseTrustDomain(f.text); err != nil {
			return nil, err
		}
	}
	in.Gateways, err = gatewaysFromProto(m.GetSubjectGateways(), in.Subject)
	return in, err
}
