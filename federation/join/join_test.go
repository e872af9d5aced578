// SPDX-License-Identifier: Apache-2.0

package join_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/federation/join"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

var epoch = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// side is one cluster with its own root.
type side struct {
	name    string
	td      spiffeid.TrustDomain
	ca      *ca.CA
	self    join.Self
	gateway *trust.Identity
	key     ed25519.PrivateKey
}

func newSide(t testing.TB, name string) *side {
	t.Helper()
	td, err := spiffeid.ParseTrustDomain(name + ".acme")
	must(t, err)
	dir, err := datadir.Create(t.TempDir())
	must(t, err)
	authority, err := ca.Create(dir, ca.Config{TrustDomain: td, Now: now})
	must(t, err)
	cp, err := authority.IssueKey(spiffeid.ControlPlane(td), 0)
	must(t, err)
	gid, err := spiffeid.Gateway(td, "gateway-1")
	must(t, err)
	gw, err := authority.IssueKey(gid, 0)
	must(t, err)
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	return &side{name: name, td: td, ca: authority, gateway: gw, key: key, self: join.Self{
		Federation: "acme", Cluster: federation.ClusterName(name), TrustDomain: td, Region: name + "-1", Bundle: authority.Bundle(),
		Identity: cp, Version: "v0.1.0",
		Gateways: []*controlpb.GatewayRecord{{Name: "gateway-1", Addresses: []string{"gw." + name + ".example:7443"}}},
	}}
}

func now() time.Time { return epoch }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (s *side) chain() (out [][]byte) {
	for _, c := range s.gateway.Chain {
		out = append(out, c.Raw)
	}
	return out
}

func (s *side) template(allowed string) join.Token {
	return join.Token{
		Federation: "acme", Cluster: s.self.Cluster, TrustDomain: s.td, BundleHash: s.self.Bundle.Hash(),
		Gateways:       []join.TokenGateway{{ID: s.gateway.ID, Addresses: []string{"gw." + s.name + ".example:7443"}}},
		AllowedCluster: federation.ClusterName(allowed),
	}
}

func newTokens(t testing.TB, clock func() time.Time) (*join.Tokens, *datadir.Dir) {
	t.Helper()
	dir, err := datadir.Create(t.TempDir())
	must(t, err)
	s, err := join.OpenTokens(dir, join.TokensConfig{Now: clock})
	must(t, err)
	return s, dir
}

// talk is one conversation with its exporter, as both gateways saw it.
type talk struct {
	us, eu *side
	tokens *join.Tokens
	token  *join.Token

	diallerOpened, acceptorOpened *controlpb.JoinOpened
	acceptorNow                   func() time.Time
}

func newTalk(t testing.TB) *talk {
	t.Helper()
	us, eu := newSide(t, "us-east"), newSide(t, "eu-west")
	tokens, _ := newTokens(t, now)
	tok, err := tokens.Issue(us.template("eu-west"), nil, 0)
	must(t, err)
	exporter := bytes.Repeat([]byte{7}, 32)
	return &talk{
		us: us, eu: eu, tokens: tokens, token: tok, acceptorNow: now,
		diallerOpened: &controlpb.JoinOpened{
			Exporter: exporter, PeerChainDer: us.chain(), PeerBundleJwks: us.self.Bundle.Marshal(), Address: "gw.us-east.example:7443",
		},
		acceptorOpened: &controlpb.JoinOpened{Exporter: exporter, PeerChainDer: eu.chain()},
	}
}

// run goes through the whole conversation; each step's error ends it.
func (c *talk) run(t testing.TB) (*join.Claim, *join.Counterpart, *join.Verdict, error) {
	t.Helper()
	d, err := join.NewDialler(join.DiallerConfig{Self: c.eu.self, Token: c.token, JoinerKey: c.eu.key, Opened: c.diallerOpened, Now: now})
	if err != nil {
		return nil, nil, nil, err
	}
	a, err := join.NewAcceptor(join.AcceptorConfig{
		Self: c.us.self, Opened: c.acceptorOpened, Key: c.tokens.Key, Now: c.acceptorNow,
		Introduced: func(spiffeid.TrustDomain, *trust.Bundle) *trust.Bundle { return nil },
	})
	must(t, err)
	hello, err := d.Hello()
	must(t, err)
	challenge, err := a.Hello(hello)
	if err != nil {
		return nil, nil, nil, err
	}
	proof, _, err := d.Challenge(challenge)
	if err != nil {
		return nil, nil, nil, err
	}
	claim, err := a.Proof(proof)
	if err != nil {
		return nil, nil, nil, err
	}
	frame, err := a.Verdict(join.Verdict{Outcome: join.Approved, Approve: "auto", Expires: epoch.Add(time.Hour), Members: []join.Member{{Cluster: "ap-south", TrustDomain: c.us.td}}})
	must(t, err)
	other, verdict, err := d.Verdict(frame)
	return claim, other, verdict, err
}

func TestConversation(t *testing.T) {
	c := newTalk(t)
	claim, other, verdict, err := c.run(t)
	must(t, err)
	if claim.TrustDomain != c.eu.td || claim.Cluster != "eu-west" || claim.TokenID != c.token.ID || claim.GatewayID != c.eu.gateway.ID ||
		claim.Bundle.Hash() != c.eu.self.Bundle.Hash() || len(claim.Gateways) != 1 {
		t.Errorf("claim %+v", claim)
	}
	if other.TrustDomain != c.us.td || other.Cluster != "us-east" || other.Bundle.Hash() != c.us.self.Bundle.Hash() || other.Region != "us-east-1" {
		t.Errorf("counterpart %+v", other)
	}
	if verdict.Outcome != join.Approved || verdict.Approve != "auto" || len(verdict.Members) != 1 {
		t.Errorf("verdict %+v", verdict)
	}
}

// TestConversationRefuses: what either side cannot prove ends the conversation with its own code.
func TestConversationRefuses(t *testing.T) {
	tests := []struct {
		name   string
		change func(t *testing.T, c *talk)
		want   problem.Code
	}{
		{"wrong secret", func(_ *testing.T, c *talk) { c.token.Secret[0] ^= 1 }, problem.ProofRefused},
		{"unknown token", func(_ *testing.T, c *talk) { c.token.ID = "0123456789abcdef" }, problem.TokenUnknown},
		{"somebody in between: the exporters differ", func(_ *testing.T, c *talk) { c.acceptorOpened.Exporter = bytes.Repeat([]byte{8}, 32) }, problem.ProofRefused},
		{"a server with another root", func(t *testing.T, c *talk) {
			c.diallerOpened.PeerBundleJwks = newSide(t, "us-east").self.Bundle.Marshal()
		}, problem.IdentityMismatch},
		{"a server that is not named", func(t *testing.T, c *talk) {
			id, err := spiffeid.Gateway(c.us.td, "gateway-2")
			must(t, err)
			c.us.gateway, err = c.us.ca.IssueKey(id, 0)
			must(t, err)
			c.diallerOpened.PeerChainDer = c.us.chain()
		}, problem.IdentityMismatch},
		{"a server that is a workload", func(t *testing.T, c *talk) {
			id, err := spiffeid.Workload(c.us.td, "shop", "web")
			must(t, err)
			c.us.gateway, err = c.us.ca.IssueKey(id, 0)
			must(t, err)
			c.diallerOpened.PeerChainDer = c.us.chain()
		}, problem.IdentityMismatch},
		{"a joiner whose gateway is of another trust domain", func(t *testing.T, c *talk) {
			c.acceptorOpened.PeerChainDer = newSide(t, "thief").chain()
		}, problem.TrustRefused},
		{"a joiner whose control plane is of another root", func(t *testing.T, c *talk) {
			c.eu.self.Identity = newSide(t, "eu-west").self.Identity
		}, problem.TrustRefused},
		{"another federation", func(_ *testing.T, c *talk) { c.eu.self.Federation = "other" }, problem.TokenWrongFederation},
		{"clocks apart", func(_ *testing.T, c *talk) { c.acceptorNow = func() time.Time { return epoch.Add(31 * time.Second) } }, problem.ClockSkew},
		{"an issuer that calls itself otherwise", func(_ *testing.T, c *talk) { c.us.self.Cluster = "us-west" }, problem.IdentityMismatch},
		{"loopback addresses", func(_ *testing.T, c *talk) { c.eu.self.Gateways[0].Addresses = []string{"127.0.0.1:7443"} }, problem.AddressRefused},
		{"loopback by another name", func(_ *testing.T, c *talk) { c.eu.self.Gateways[0].Addresses = []string{"LOCALHOST.:7443"} }, problem.AddressRefused},
		{"loopback as a number", func(_ *testing.T, c *talk) { c.eu.self.Gateways[0].Addresses = []string{"0x7f000001:7443"} }, problem.AddressRefused},
		{"link-local addresses", func(_ *testing.T, c *talk) { c.eu.self.Gateways[0].Addresses = []string{"169.254.169.254:80"} }, problem.AddressRefused},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := newTalk(t)
			tt.change(t, c)
			if _, _, _, err := c.run(t); !problem.Is(err, tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
}

func TestVerdictOfAnotherConversationIsRefused(t *testing.T) {
	c := newTalk(t)
	d, err := join.NewDialler(join.DiallerConfig{Self: c.eu.self, Token: c.token, JoinerKey: c.eu.key, Opened: c.diallerOpened, Now: now})
	must(t, err)
	accept := func(hello []byte) (*join.Acceptor, []byte) {
		a, err := join.NewAcceptor(join.AcceptorConfig{Self: c.us.self, Opened: c.acceptorOpened, Key: c.tokens.Key, Now: now})
		must(t, err)
		challenge, err := a.Hello(hello)
		must(t, err)
		return a, challenge
	}
	hello, err := d.Hello()
	must(t, err)
	_, challenge := accept(hello)
	other, _ := accept(hello)
	proof, _, err := d.Challenge(challenge)
	must(t, err)
	if _, err := other.Proof(proof); !problem.Is(err, problem.ProofRefused) {
		t.Errorf("a proof was replayed: %v", err)
	}
}

func TestStepsOutOfOrder(t *testing.T) {
	c := newTalk(t)
	a, err := join.NewAcceptor(join.AcceptorConfig{Self: c.us.self, Opened: c.acceptorOpened, Key: c.tokens.Key, Now: now})
	must(t, err)
	if _, err := a.Proof([]byte("x")); err == nil {
		t.Error("a proof before the hello")
	}
	if _, err := a.Verdict(join.Verdict{}); err == nil {
		t.Error("a verdict before the proof")
	}
}

func TestIntroduction(t *testing.T) {
	us, eu, ap := newSide(t, "us-east"), newSide(t, "eu-west"), newSide(t, "ap-south")
	base := join.Introduction{
		Federation: "acme", Introducer: us.td, Receiver: eu.td, Subject: ap.td, Cluster: "ap-south", Region: "ap", TokenID: "x",
		BundleHash: ap.self.Bundle.Hash(), Gateways: []join.TokenGateway{{ID: ap.gateway.ID, Addresses: []string{"gw.ap.example:7443"}}},
		Issued: epoch, Expires: epoch.Add(time.Hour),
	}
	tests := []struct {
		name   string
		change func(in *join.Introduction)
		signer *side
		ok     bool
	}{
		{"good", func(*join.Introduction) {}, us, true},
		{"for somebody else", func(in *join.Introduction) { in.Receiver = ap.td }, us, false},
		{"in the name of another", func(in *join.Introduction) { in.Introducer = ap.td }, us, false},
		{"signed by another", func(*join.Introduction) {}, ap, false},
		{"of another federation", func(in *join.Introduction) { in.Federation = "other" }, us, false},
		{"too late", func(in *join.Introduction) { in.Expires = epoch }, us, false},
		{"not yet", func(in *join.Introduction) { in.Issued = epoch.Add(time.Minute) }, us, false},
		{"for ever", func(in *join.Introduction) { in.Expires = epoch.Add(365 * 24 * time.Hour) }, us, false},
		{"with a gateway of another trust domain", func(in *join.Introduction) { in.Gateways[0].ID = us.gateway.ID }, us, false},
		{"with an address inside", func(in *join.Introduction) { in.Gateways[0].Addresses = []string{"[::1]:7443"} }, us, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := base
			in.Gateways = []join.TokenGateway{{ID: ap.gateway.ID, Addresses: []string{"gw.ap.example:7443"}}}
			tt.change(&in)
			b, err := join.SignIntroduction(in, tt.signer.self.Identity)
			must(t, err)
			got, err := join.VerifyIntroduction(b, us.self.Bundle, eu.td, "acme", false, epoch)
			if tt.ok != (err == nil) {
				t.Fatalf("got %v", err)
			}
			if err != nil && !problem.Is(err, problem.TrustRefused) {
				t.Errorf("code of %v", err)
			}
			if err == nil && (got.Subject != ap.td || got.Cluster != "ap-south" || got.BundleHash != base.BundleHash) {
				t.Errorf("got %+v", got)
			}
		})
	}
	var gw *trust.Identity = us.gateway // a gateway's signature is not its control plane's
	b, err := join.SignIntroduction(base, gw)
	must(t, err)
	if _, err := join.VerifyIntroduction(b, us.self.Bundle, eu.td, "acme", false, epoch); err == nil {
		t.Error("a gateway introduced somebody")
	}
}

// TestIntroducedConversation: without a token, both sides are known by introduction.
func TestIntroducedConversation(t *testing.T) {
	for _, known := range []bool{true, false} {
		c := newTalk(t)
		in := &join.Introduction{
			Federation: "acme", Subject: c.us.td, Cluster: "us-east", BundleHash: c.us.self.Bundle.Hash(),
			Gateways: []join.TokenGateway{{ID: c.us.gateway.ID, Addresses: []string{"gw.us-east.example:7443"}}},
		}
		d, err := join.NewDialler(join.DiallerConfig{Self: c.eu.self, Introduction: in, JoinerKey: c.eu.key, Opened: c.diallerOpened, Now: now})
		must(t, err)
		a, err := join.NewAcceptor(join.AcceptorConfig{Self: c.us.self, Opened: c.acceptorOpened, Key: c.tokens.Key, Now: now,
			Introduced: func(td spiffeid.TrustDomain, shown *trust.Bundle) *trust.Bundle {
				if !known || td != c.eu.td {
					return nil
				}
				return join.Pinned(shown, c.eu.self.Bundle.Hash())
			}})
		must(t, err)
		hello, err := d.Hello()
		must(t, err)
		challenge, err := a.Hello(hello)
		must(t, err)
		proof, _, err := d.Challenge(challenge)
		must(t, err)
		claim, err := a.Proof(proof)
		if !known {
			if !problem.Is(err, problem.TrustRefused) {
				t.Errorf("a stranger: %v", err)
			}
			continue
		}
		must(t, err)
		if claim.TokenID != "" || claim.TrustDomain != c.eu.td {
			t.Errorf("claim %+v", claim)
		}
		frame, err := a.Verdict(join.Verdict{Outcome: join.Approved})
		must(t, err)
		if _, _, err := d.Verdict(frame); err != nil {
			t.Error(err)
		}
	}
}

func TestRefusalTravels(t *testing.T) {
	c := newTalk(t)
	d, err := join.NewDialler(join.DiallerConfig{Self: c.eu.self, Token: c.token, JoinerKey: c.eu.key, Opened: c.diallerOpened, Now: now})
	must(t, err)
	_, err = d.Hello()
	must(t, err)
	_, _, err = d.Challenge(join.Refusal(problem.New(problem.TokenRevoked, "revoked\x1b[31m").WithFix("ask again")))
	var p *problem.Error = problem.From(err)
	if p.Code != problem.TokenRevoked || p.What != "revoked [31m" || len(p.Fix) != 1 {
		t.Errorf("got %+v", p)
	}
}

func TestFramesAreBounded(t *testing.T) {
	c := newTalk(t)
	a, err := join.NewAcceptor(join.AcceptorConfig{Self: c.us.self, Opened: c.acceptorOpened, Key: c.tokens.Key, Now: now})
	must(t, err)
	big, err := proto.Marshal(&controlpb.JoinMessage{Version: 1, Message: &controlpb.JoinMessage_Hello{Hello: &controlpb.JoinHello{
		Nonce: make([]byte, 16), JoinerKey: make([]byte, 32), WireVersion: 1, BundleJwks: make([]byte, join.MaxFrame),
	}}})
	must(t, err)
	if _, err := a.Hello(big); err == nil {
		t.Error("an oversized frame was taken")
	}
	update := &controlpb.CatalogUpdate{Entries: []*controlpb.CatalogEntry{{Key: "svc/a/b", Body: make([]byte, join.MaxFrame)}}}
	b, err := join.CatalogFrame(update, 1, nil)
	must(t, err)
	got, err := join.ParseCatalogFrame(b)
	if err != nil || got.GetUpdate() != nil || got.GetServices() != 1 {
		t.Errorf("a catalog that does not fit: %v %v", got, err)
	}
	old, err := proto.Marshal(&controlpb.JoinMessage{Version: 2})
	must(t, err)
	if _, err := join.ParseCatalogFrame(old); !problem.Is(err, problem.VersionSkew) {
		t.Errorf("another version: %v", err)
	}
}
