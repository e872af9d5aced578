// SPDX-License-Identifier: Apache-2.0

package join

import (
	"crypto/ed25519"
	"crypto/hmac"
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

// AcceptorConfig makes an Acceptor.
type AcceptorConfig struct {
	Self   Self
	Opened *controlpb.JoinOpened // what the own gateway saw
	// Key returns the key derived from a token's secret, or STR-2205.
	Key func(tokenID string) (Key, error)
	// Introduced returns the bundle by which td has to prove itself without a token: the one that is held of it, or of the bundle
	// that it shows the part that an introduction pinned (Pinned). nil: it was not introduced to us with that bundle.
	Introduced func(td spiffeid.TrustDomain, shown *trust.Bundle) *trust.Bundle
	Now        func() time.Time
}

// Claim is a dialler that proved what it said; whether it may come in is for the caller to decide.
type Claim struct {
	Counterpart
	TokenID   string // empty: it was introduced
	JoinerKey [32]byte
	CheckOnly bool
}

// Binding is what a token is bound to.
func (c *Claim) Binding() Binding {
	return Binding{TrustDomain: c.TrustDomain, BundleHash: c.Bundle.Hash(), JoinerKey: c.JoinerKey}
}

// Acceptor is the side that was dialled. Its steps are called in order: Hello, Proof, Verdict.
type Acceptor struct {
	cfg  AcceptorConfig
	step int
	key  Key

	hello, challenge, proof []byte
	received                time.Time // of the hello
	msg                     *controlpb.JoinHello
	claim                   *Claim
}

// NewAcceptor starts a conversation that the own gateway accepted.
func NewAcceptor(cfg AcceptorConfig) (*Acceptor, error) {
	if err := cfg.Self.check(); err != nil {
		return nil, err
	}
	if len(cfg.Opened.GetExporter()) != exporterSize || len(cfg.Opened.GetPeerChainDer()) == 0 {
		return nil, errors.New("join: the gateway gave no exporter or no certificate")
	}
	return &Acceptor{cfg: cfg}, nil
}

func (a *Acceptor) next(step int) error {
	if a.step != step {
		return fmt.Errorf("join: step %d after step %d", step, a.step)
	}
	a.step++
	return nil
}

// Hello takes the dialler's first frame and returns the challenge. It verifies nothing and tells nothing but clock and version.
func (a *Acceptor) Hello(frame []byte) ([]byte, error) {
	if err := a.next(0); err != nil {
		return nil, err
	}
	m, err := decode(frame)
	if err != nil {
		return nil, err
	}
	h := m.GetHello()
	if h == nil || len(h.GetNonce()) != nonceSize || len(h.GetJoinerKey()) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("hello: %w", errFrame)
	}
	if err := checkWire(h.GetWireVersion()); err != nil {
		return nil, err
	}
	if h.GetTokenId() != "" {
		if !validTokenID(h.GetTokenId()) {
			return nil, fmt.Errorf("hello: token id: %w", errFrame)
		}
		if a.key, err = a.cfg.Key(h.GetTokenId()); err != nil {
			return nil, err
		}
	}
	a.hello, a.msg, a.received = frame, h, a.cfg.Now()
	a.challenge, err = encode(&controlpb.JoinMessage{Message: &controlpb.JoinMessage_Challenge{Challenge: &controlpb.JoinChallenge{
		TimeMs: a.received.UnixMilli(), WireVersion: WireVersion, Features: features, Version: a.cfg.Self.Version, Nonce: newNonce(),
	}}})
	return a.challenge, err
}

// Proof takes the dialler's proof: the MAC first, then what is dearer. STR-2211 without the secret; STR-5201 if the trust domain
// is not proven, or was not introduced; STR-2206 for another federation.
func (a *Acceptor) Proof(frame []byte) (*Claim, error) {
	if err := a.next(1); err != nil {
		return nil, err
	}
	m, err := decode(frame)
	if err != nil {
		return nil, err
	}
	p := m.GetProof()
	if p == nil {
		return nil, fmt.Errorf("proof: %w", errFrame)
	}
	text := proofText(tagJoiner, a.cfg.Opened.GetExporter(), a.hello, a.challenge)
	h := a.msg
	if h.GetTokenId() != "" && !hmac.Equal(mac(a.key, text), p.GetMac()) {
		return nil, problem.New(problem.ProofRefused, "the joiner does not know the secret of token %s, or somebody is in between", h.GetTokenId()).
			WithState("nothing was changed on either side")
	}
	td, err := spiffeid.ParseTrustDomain(h.GetTrustDomain())
	if err != nil {
		return nil, untrusted("the dialler's trust domain", err)
	}
	bundle, err := parsePeerBundle(td, h.GetBundleJwks())
	if err != nil {
		return nil, untrusted("the dialler's bundle", err)
	}
	known := bundle
	if h.GetTokenId() == "" {
		known = a.cfg.Introduced(td, bundle)
	}
	if known == nil {
		return nil, problem.New(problem.TrustRefused, "nobody introduced a cluster with that trust domain and that bundle here").
			WithWhy("without a token a cluster is known by introduction only, or its root has changed since")
	}
	if err := a.verify(p, td, bundle, known, text); err != nil {
		return nil, err
	}
	if a.claim.Federation != a.cfg.Self.Federation {
		return nil, problem.New(problem.TokenWrongFederation, "%s is of the federation %s; this one is %s",
			a.claim.Cluster, a.claim.Federation, a.cfg.Self.Federation).WithState("nothing was changed on either side")
	}
	if err := skewError(a.claim.Skew); err != nil {
		return nil, err
	}
	a.proof = frame
	return a.claim, nil
}

// verify checks the three proofs of the trust domain, by what is known of its bundle, and the joiner key, and fills in the claim.
func (a *Acceptor) verify(p *controlpb.JoinProof, td spiffeid.TrustDomain, bundle, known *trust.Bundle, text []byte) error {
	h, now := a.msg, a.cfg.Now()
	if !ed25519.Verify(h.GetJoinerKey(), text, p.GetJoinerSignature()) {
		return untrusted("the joiner's key", errSignature)
	}
	gateway, err := opened(a.cfg.Opened, known, td, now)
	if err != nil {
		return untrusted("the dialler's gateway", err)
	}
	chain, err := verifyControlPlane(h.GetControlPlaneChainDer(), known, td, text, p.GetControlPlaneSignature(), now)
	if err != nil {
		return untrusted("the dialler's control plane", err)
	}
	c := &Claim{TokenID: h.GetTokenId(), JoinerKey: [32]byte(h.GetJoinerKey()), CheckOnly: h.GetCheckOnly()}
	c.TrustDomain, c.Bundle, c.GatewayID, c.Chain = td, bundle, gateway.ID, chain
	c.Skew = time.UnixMilli(h.GetTimeMs()).Sub(a.received)
	if err := names(&c.Counterpart, h.GetFederation(), h.GetCluster(), h.GetRegion(), h.GetVersion(), h.GetGateways(), a.cfg.Self.AllowLoopback); err != nil {
		return untrusted("what the dialler says of itself", err)
	}
	a.claim = c
	return nil
}

// Verdict returns the frame that tells the decision and proves this side.
func (a *Acceptor) Verdict(v Verdict) ([]byte, error) {
	if err := a.next(2); err != nil {
		return nil, err
	}
	s := a.cfg.Self
	f := &controlpb.JoinFacts{
		Federation: s.Federation.String(), Cluster: s.Cluster.String(), TrustDomain: s.TrustDomain.String(), Region: s.Region,
		Gateways: s.Gateways, ControlPlaneChainDer: chainDER(s.Identity.Chain), Approve: v.Approve, ExpiresUnix: v.Expires.Unix(),
		Version: s.Version, Resumed: v.Resumed,
	}
	switch v.Outcome {
	case Approved:
		f.State = controlpb.JoinVerdict_STATE_APPROVED
	case Awaiting:
		f.State = controlpb.JoinVerdict_STATE_AWAITING
	default:
		f.State = controlpb.JoinVerdict_STATE_CHECKED
	}
	for i, m := range v.Members {
		if i == maxMembers {
			break
		}
		f.Members = append(f.Members, &controlpb.JoinMember{Cluster: m.Cluster.String(), TrustDomain: m.TrustDomain.String(), Region: m.Region})
	}
	facts, err := proto.MarshalOptions{Deterministic: true}.Marshal(f)
	if err != nil {
		return nil, fmt.Errorf("facts: %w", err)
	}
	text := proofText(tagIssuer, a.cfg.Opened.GetExporter(), a.hello, a.challenge, a.proof, facts)
	out := &controlpb.JoinVerdict{Facts: facts}
	if a.msg.GetTokenId() != "" {
		out.Mac = mac(a.key, text)
	}
	if out.ControlPlaneSignature, err = sign(s.Identity, text); err != nil {
		return nil, err
	}
	return encode(&controlpb.JoinMessage{Message: &controlpb.JoinMessage_Verdict{Verdict: out}})
}

// ClusterOf is the cluster name in a claim's hello, before anything is proven; for logs.
func (a *Acceptor) ClusterOf() federation.ClusterName {
	c, err := federation.ParseClusterName(a.msg.GetCluster())
	if err != nil {
		return ""
	}
	return c
}
