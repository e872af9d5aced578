// SPDX-License-Identifier: Apache-2.0

package join_test

import (
	"testing"

	"github.com/strait-mesh/strait/federation/join"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func FuzzParseToken(f *testing.F) {
	us := newSide(f, "us-east")
	tokens, _ := newTokens(f, now)
	tok, err := tokens.Issue(us.template("eu-west"), nil, 0)
	must(f, err)
	text, err := tok.Text()
	must(f, err)
	f.Add(text)
	f.Add(join.TokenPrefix)
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := join.ParseToken(s)
		if err != nil {
			if !problem.Is(err, problem.TokenMalformed) {
				t.Errorf("code of %v", err)
			}
			return
		}
		again, err := tok.Text()
		must(t, err)
		if _, err := join.ParseToken(again); err != nil {
			t.Errorf("a token does not survive: %v", err)
		}
	})
}

// FuzzFrames gives every step of both machines arbitrary bytes: errors only. Nonces and signatures are random, so that coverage is
// not reproducible: run it with -fuzzminimizetime 10x.
func FuzzFrames(f *testing.F) {
	c := newTalk(f)
	d, err := join.NewDialler(join.DiallerConfig{Self: c.eu.self, Token: c.token, JoinerKey: c.eu.key, Opened: c.diallerOpened, Now: now})
	must(f, err)
	newAcceptor := func(t testing.TB) *join.Acceptor {
		a, err := join.NewAcceptor(join.AcceptorConfig{Self: c.us.self, Opened: c.acceptorOpened, Key: c.tokens.Key, Now: now,
			Introduced: func(_ spiffeid.TrustDomain, b *trust.Bundle) *trust.Bundle { return b }})
		must(t, err)
		return a
	}
	hello, err := d.Hello()
	must(f, err)
	a := newAcceptor(f)
	challenge, err := a.Hello(hello)
	must(f, err)
	proof, _, err := d.Challenge(challenge)
	must(f, err)
	_, err = a.Proof(proof)
	must(f, err)
	verdict, err := a.Verdict(join.Verdict{Outcome: join.Approved})
	must(f, err)
	catalog, err := join.CatalogFrame(nil, 3, nil)
	must(f, err)
	in, err := join.SignIntroduction(join.Introduction{Federation: "acme", Introducer: c.us.td, Receiver: c.eu.td, Subject: c.us.td, Cluster: "x", Issued: epoch, Expires: epoch.Add(1)}, c.us.self.Identity)
	must(f, err)
	for _, b := range [][]byte{hello, challenge, proof, verdict, catalog, in, join.Refusal(problem.New(problem.TokenBound, "x"))} {
		f.Add(hello, b)
		f.Add(b, b)
	}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		a := newAcceptor(t)
		if _, err := a.Hello(first); err == nil {
			_, _ = a.Proof(second)
		}
		d, err := join.NewDialler(join.DiallerConfig{Self: c.eu.self, Token: c.token, JoinerKey: c.eu.key, Opened: c.diallerOpened, Now: now})
		must(t, err)
		_, err = d.Hello()
		must(t, err)
		if _, _, err := d.Challenge(first); err == nil {
			if other, _, err := d.Verdict(second); err == nil {
				t.Errorf("a verdict without the secret: %+v", other)
			}
		}
		_, _ = join.ParseCatalogFrame(first)
		_, _ = join.ParseStoredIntroduction(first)
		_, _ = join.VerifyIntroduction(second, c.us.self.Bundle, c.eu.td, "acme", false, epoch)
	})
}
