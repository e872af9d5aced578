// SPDX-License-Identifier: Apache-2.0

package join_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/federation/join"
	"github.com/strait-mesh/strait/internal/problem"
)

func TestTokenText(t *testing.T) {
	us := newSide(t, "us-east")
	tokens, _ := newTokens(t, now)
	tok, err := tokens.Issue(us.template("eu-west"), []string{"shop"}, time.Hour)
	must(t, err)
	text, err := tok.Text()
	must(t, err)
	got, err := join.ParseToken("\n " + text + "\n")
	must(t, err)
	if fmt.Sprint(*got) != fmt.Sprint(*tok) || got.Secret != tok.Secret || !got.Expires.Equal(epoch.Add(time.Hour)) {
		t.Errorf("got %v, want %v", got, tok)
	}
	if s := fmt.Sprintf("%v %+v %#v %s", tok, tok, *tok, tok.Key()); strings.Contains(s, fmt.Sprintf("%x", tok.Secret[:])) || strings.Contains(s, fmt.Sprint([16]byte(tok.Secret))) {
		t.Error("the secret was printed")
	}
	text = strings.TrimSpace(text)
	for i := range text { // each cut, and each changed character
		if _, err := join.ParseToken(text[:i]); !problem.Is(err, problem.TokenMalformed) {
			t.Fatalf("cut at %d: %v", i, err)
		}
		b := []byte(text)
		b[i] ^= 1
		if _, err := join.ParseToken(string(b)); !problem.Is(err, problem.TokenMalformed) {
			t.Fatalf("changed at %d: %v", i, err)
		}
	}
	if _, err := join.ParseToken("strait-register-1.AAAA"); !strings.Contains(fmt.Sprint(err), "registration token") {
		t.Errorf("got %v", err)
	}
}

func TestTokenLife(t *testing.T) {
	us := newSide(t, "us-east")
	clock := epoch
	tokens, dir := newTokens(t, func() time.Time { return clock })
	a := join.Binding{TrustDomain: us.td, BundleHash: [32]byte{1}, JoinerKey: [32]byte{2}}
	issue := func() string {
		clock = epoch
		tok, err := tokens.Issue(us.template("eu-west"), nil, 0)
		must(t, err)
		return tok.ID
	}
	other, rotated, elsewhere := a, a, a
	other.JoinerKey[0]++
	rotated.BundleHash[0]++
	elsewhere.TrustDomain = newSide(t, "ap-south").td
	tests := []struct {
		name string
		do   func(id string) error
		want problem.Code
		then join.TokenState
	}{
		{"first", func(id string) error { _, err := tokens.Redeem(id, "eu-west", a); return err }, "", join.Bound},
		{"the same joiner again", func(id string) error {
			_, _ = tokens.Redeem(id, "eu-west", a)
			clock = clock.Add(23 * time.Hour)
			_, err := tokens.Redeem(id, "eu-west", a)
			return err
		}, "", join.Bound},
		{"the same joiner too late", func(id string) error {
			_, _ = tokens.Redeem(id, "eu-west", a)
			clock = clock.Add(24 * time.Hour)
			_, err := tokens.Redeem(id, "eu-west", a)
			return err
		}, problem.TokenExpired, join.Expired},
		{"another key", func(id string) error {
			_, _ = tokens.Redeem(id, "eu-west", a)
			_, err := tokens.Redeem(id, "eu-west", other)
			return err
		}, problem.TokenBound, join.Bound},
		{"the same joiner with a rotated root", func(id string) error {
			_, _ = tokens.Redeem(id, "eu-west", a)
			_, err := tokens.Redeem(id, "eu-west", rotated)
			return err
		}, "", join.Bound},
		{"another trust domain", func(id string) error {
			_, _ = tokens.Redeem(id, "eu-west", a)
			_, err := tokens.Redeem(id, "eu-west", elsewhere)
			return err
		}, problem.TokenBound, join.Bound},
		{"another key after use", func(id string) error {
			_, _ = tokens.Redeem(id, "eu-west", a)
			_ = tokens.MarkUsed(id)
			_, err := tokens.Redeem(id, "eu-west", other)
			return err
		}, problem.TokenBound, join.Used},
		{"expired", func(id string) error {
			clock = clock.Add(15 * time.Minute)
			_, err := tokens.Redeem(id, "eu-west", a)
			return err
		}, problem.TokenExpired, join.Expired},
		{"revoked", func(id string) error {
			_ = tokens.Revoke(id)
			_, err := tokens.Redeem(id, "eu-west", a)
			return err
		}, problem.TokenRevoked, join.Revoked},
		{"another cluster", func(id string) error { _, err := tokens.Redeem(id, "ap-south", a); return err }, problem.TokenScope, join.Unused},
		{"unknown", func(string) error { _, err := tokens.Redeem("0011223344556677", "eu-west", a); return err }, problem.TokenUnknown, join.Unused},
		{"revoke a used one", func(id string) error {
			_, _ = tokens.Redeem(id, "eu-west", a)
			_ = tokens.MarkUsed(id)
			return tokens.Revoke(id)
		}, problem.Usage, join.Used},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			id := issue()
			err := tt.do(id)
			if tt.want == "" && err != nil || tt.want != "" && !problem.Is(err, tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			reopened, err := join.OpenTokens(dir, join.TokensConfig{Now: func() time.Time { return clock }})
			must(t, err)
			for _, s := range []*join.Tokens{tokens, reopened} {
				rec, err := s.Get(id)
				must(t, err)
				if got := rec.State(clock); got != tt.then {
					t.Errorf("state %s, want %s", got, tt.then)
				}
			}
		})
	}
	clock = epoch.Add(60 * 24 * time.Hour)
	_, err := tokens.Issue(us.template("eu-west"), nil, 0)
	must(t, err)
	if n := len(tokens.List()); n != 1 {
		t.Errorf("%d records after two months", n)
	}
}

// TestOneOfThousandWins: of a thousand joiners that race with one token exactly one redeems it (T32, P5).
func TestOneOfThousandWins(t *testing.T) {
	us := newSide(t, "us-east")
	tokens, dir := newTokens(t, now)
	tok, err := tokens.Issue(us.template("eu-west"), nil, 0)
	must(t, err)
	var mu sync.Mutex
	var winners []int
	codes := map[problem.Code]int{}
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 1000 {
		wg.Go(func() {
			<-start
			_, err := tokens.Redeem(tok.ID, "eu-west", join.Binding{TrustDomain: us.td, JoinerKey: [32]byte{byte(i), byte(i >> 8), 1}})
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				winners = append(winners, i)
			} else {
				codes[problem.From(err).Code]++
			}
		})
	}
	close(start)
	wg.Wait()
	if len(winners) != 1 || codes[problem.TokenBound] != 999 {
		t.Fatalf("%d winners, %v", len(winners), codes)
	}
	reopened, err := join.OpenTokens(dir, join.TokensConfig{Now: now})
	must(t, err)
	rec, err := reopened.Get(tok.ID)
	must(t, err)
	if w := winners[0]; rec.Binding.JoinerKey != [32]byte{byte(w), byte(w >> 8), 1} {
		t.Error("the binding on disk is not the winner's")
	}
}
