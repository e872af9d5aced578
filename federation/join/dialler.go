// SPDX-License-Identifier: Apache-2.0

package join

import (
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// DiallerConfig makes a Dialler: with a Token to join its issuer, with an Introduction to meet its subject.
type DiallerConfig struct {
	Self         Self
	Token        *Token
	Introduction *Introduction
	JoinerKey    ed25519.PrivateKey
	CheckOnly    bool
	Opened       *controlpb.JoinOpened // what the own gateway saw
	Now          func() time.Time
}

// Dialler is the side that opened the conversation. Its steps are called in order: Hello, Challenge, Verdict.
type Dialler struct {
	cfg  DiallerConfig
	step int

	td      spiffeid.TrustDomain // expected
	cluster federation.ClusterName
	fed     federation.FederationName

	hello, challenge, proof []byte
	sent                    time.Time
	other                   Counterpart
}

// NewDialler checks what the own gateway saw against the pin: STR-2210 if the other end did not prove what the token, or the
// introduction, names.
func NewDialler(cfg DiallerConfig) (*Dialler, error) {
	if err := cfg.Self.check(); err != nil {
		return nil, err
	}
	d := &Dialler{cfg: cfg}
	var pin [32]byte
	var allowed []TokenGateway
	switch {
	case cfg.Token != nil:
		d.td, d.cluster, d.fed = cfg.Token.TrustDomain, cfg.Token.Cluster, cfg.Token.Federation
		pin, allowed = cfg.Token.BundleHash, cfg.Token.Gateways
	case cfg.Introduction != nil:
		d.td, d.cluster, d.fed = cfg.Introduction.Subject, cfg.Introduction.Cluster, cfg.Introduction.Federation
		pin, allowed = cfg.Introduction.BundleHash, cfg.Introduction.Gateways
	default:
		return nil, errors.New("join: neither token nor introduction")
	}
	mismatch := func(err error) error {
		return problem.New(problem.IdentityMismatch, "%s: %v", cfg.Opened.GetAddress(), err).
			WithState("nothing was changed on either side").Wrap(err)
	}
	if len(cfg.Opened.GetExporter()) != exporterSize {
		return nil, mismatch(errors.New("the gateway gave no exporter"))
	}
	bundle, err := parsePeerBundle(d.td, cfg.Opened.GetPeerBundleJwks())
	if err != nil {
		return nil, mismatch(err)
	}
	if got := bundle.Hash(); got != pin {
		return nil, mismatch(fmt.Errorf("its bundle has the fingerprint %s, not %s", Fingerprint(got), Fingerprint(pin)))
	}
	p, err := opened(cfg.Opened, bundle, d.td, cfg.Now())
	if err != nil {
		return nil, mismatch(err)
	}
	if !slices.ContainsFunc(allowed, func(g TokenGateway) bool { return g.ID == p.ID }) {
		return nil, mismatch(fmt.Errorf("it proved %s, which is not named", p.ID))
	}
	d.other.TrustDomain, d.other.Bundle, d.other.GatewayID = d.td, bundle, p.ID
	d.other.Chain = p.Chain
	return d, nil
}

// GatewayID is the identity that the other end's gateway proved.
func (d *Dialler) GatewayID() spiffeid.ID { return d.other.GatewayID }

// Chain is the chain that the other end's gateway presented.
func (d *Dialler) Chain() []*x509.Certificate { return d.other.Chain }

// Bundle is the other side's bundle, which matched the pin: of a bundle that has changed since, the roots that were pinned.
func (d *Dialler) Bundle() *trust.Bundle { return d.other.Bundle }

func (d *Dialler) next(step int) error {
	if d.step != step {
		return fmt.Errorf("join: step %d after step %d", step, d.step)
	}
	d.step++
	return nil
}

// Hello returns the first frame.
func (d *Dialler) Hello() ([]byte, error) {
	if err := d.next(0); err != nil {
		return nil, err
	}
	s := d.cfg.Self
	h := &controlpb.JoinHello{
		Federation: s.Federation.String(), Cluster: s.Cluster.String(), TrustDomain: s.TrustDomain.String(), Region: s.Region,
		BundleJwks: s.Bundle.Marshal(), Gateways: s.Gateways, TimeMs: d.cfg.Now().UnixMilli(), Version: s.Version,
		WireVersion: WireVersion, Features: features, ControlPlaneChainDer: chainDER(s.Identity.Chain),
		JoinerKey: d.cfg.JoinerKey.Public().(ed25519.PublicKey), Nonce: newNonce(), CheckOnly: d.cfg.CheckOnly,
	}
	if d.cfg.Token != nil {
		h.TokenId = d.cfg.Token.ID
	}
	var err error
	d.hello, err = encode(&controlpb.JoinMessage{Message: &controlpb.JoinMessage_Hello{Hello: h}})
	d.sent = d.cfg.Now()
	return d.hello, err
}

// Challenge takes the acceptor's first frame and returns the proof. The skew is the acceptor's clock minus ours, half the round trip
// deducted; beyond MaxSkew the error is STR-2208.
func (d *Dialler) Challenge(frame []byte) (proof []byte, skew time.Duration, err error) {
	if err := d.next(1); err != nil {
		return nil, 0, err
	}
	m, err := decode(frame)
	if err != nil {
		return nil, 0, err
	}
	c := m.GetChallenge()
	if c == nil || len(c.GetNonce()) != nonceSize || len(c.GetVersion()) > maxText {
		return nil, 0, fmt.Errorf("challenge: %w", errFrame)
	}
	if err := checkWire(c.GetWireVersion()); err != nil {
		return nil, 0, err
	}
	now := d.cfg.Now()
	middle := d.sent.Add(now.Sub(d.sent) / 2)
	skew = time.UnixMilli(c.GetTimeMs()).Sub(middle)
	d.other.Skew = skew
	if err := skewError(skew); err != nil {
		return nil, skew, err
	}
	d.challenge = frame
	text := proofText(tagJoiner, d.cfg.Opened.GetExporter(), d.hello, d.challenge)
	p := &controlpb.JoinProof{JoinerSignature: ed25519.Sign(d.cfg.JoinerKey, text)}
	if d.cfg.Token != nil {
		p.Mac = mac(d.cfg.Token.Key(), text)
	}
	if p.ControlPlaneSignature, err = sign(d.cfg.Self.Identity, text); err != nil {
		return nil, skew, err
	}
	d.proof, err = encode(&controlpb.JoinMessage{Message: &controlpb.JoinMessage_Proof{Proof: p}})
	return d.proof, skew, err
}

// Verdict takes the acceptor's decision with its proofs. What it returns is proven.
func (d *Dialler) Verdict(frame []byte) (*Counterpart, *Verdict, error) {
	if err := d.next(2); err != nil {
		return nil, nil, err
	}
	m, err := decode(frame)
	if err != nil {
		return nil, nil, err
	}
	v := m.GetVerdict()
	if v == nil {
		return nil, nil, fmt.Errorf("verdict: %w", errFrame)
	}
	text := proofText(tagIssuer, d.cfg.Opened.GetExporter(), d.hello, d.challenge, d.proof, v.GetFacts())
	if d.cfg.Token != nil && !hmac.Equal(mac(d.cfg.Token.Key(), text), v.GetMac()) {
		return nil, nil, problem.New(problem.IdentityMismatch, "%s does not know the token's secret, or somebody is in between", d.cluster)
	}
	var f controlpb.JoinFacts
	if err := proto.Unmarshal(v.GetFacts(), &f); err != nil {
		return nil, nil, fmt.Errorf("facts: %w: %w", errFrame, err)
	}
	chain, err := verifyControlPlane(f.GetControlPlaneChainDer(), d.other.Bundle, d.td, text, v.GetControlPlaneSignature(), d.cfg.Now())
	if err != nil {
		return nil, nil, problem.New(problem.IdentityMismatch, "the control plane of %s: %v", d.cluster, err).Wrap(err)
	}
	c := d.other
	c.Chain = chain
	if err := names(&c, f.GetFederation(), f.GetCluster(), f.GetRegion(), f.GetVersion(), f.GetGateways(), d.cfg.Self.AllowLoopback); err != nil {
		return nil, nil, fmt.Errorf("facts: %w: %w", errFrame, err)
	}
	if c.Federation != d.fed || c.Cluster != d.cluster || f.GetTrustDomain() != d.td.String() {
		return nil, nil, problem.New(problem.IdentityMismatch, "it calls itself %s of %s, not %s of %s", c.Cluster, c.Federation, d.cluster, d.fed)
	}
	verdict, err := verdictFromProto(&f)
	if err != nil {
		return nil, nil, err
	}
	return &c, verdict, nil
}

func verdictFromProto(f *controlpb.JoinFacts) (*Verdict, error) {
	v := &Verdict{Approve: clip(f.GetApprove()), Expires: time.Unix(f.GetExpiresUnix(), 0), Resumed: f.GetResumed()}
	switch f.GetState() {
	case controlpb.JoinVerdict_STATE_APPROVED:
		v.Outcome = Approved
	case controlpb.JoinVerdict_STATE_AWAITING:
		v.Outcome = Awaiting
	case controlpb.JoinVerdict_STATE_CHECKED:
		v.Outcome = Checked
	default:
		return nil, fmt.Errorf("verdict %d: %w", f.GetState(), errFrame)
	}
	if len(f.GetMembers()) > maxMembers {
		return nil, fmt.Errorf("%d members: %w", len(f.GetMembers()), errFrame)
	}
	for _, m := range f.GetMembers() {
		cluster, err := federation.ParseClusterName(m.GetCluster())
		td, err2 := spiffeid.ParseTrustDomain(m.GetTrustDomain())
		if err != nil || err2 != nil {
			continue // a hint
		}
		v.Members = append(v.Members, Member{Cluster: cluster, TrustDomain: td, Region: clip(m.GetRegion())})
	}
	return v, nil
}
