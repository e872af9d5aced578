// SPDX-License-Identifier: Apache-2.0

package register_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/register"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

var t0 = time.Date(2026, 9, 1, 12, 0, 0, 0, time.UTC)

type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

var (
	td      = must(spiffeid.ParseTrustDomain("us-east.acme"))
	gateway = register.Grant{Kind: register.KindGateway, Name: "gw-1", SPIFFEID: must(spiffeid.Gateway(td, "gw-1")), Region: "us-east", Zone: "a"}
	sidecar = register.Grant{Kind: register.KindSidecar, Name: "shop/web-1", SPIFFEID: must(spiffeid.Workload(td, "shop", "web"))}
)

func newStore(t testing.TB) (*register.Tokens, *datadir.Dir, *clock) {
	t.Helper()
	c := &clock{now: t0}
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "strait"))
	if err != nil {
		t.Fatal(err)
	}
	store, err := register.OpenTokens(dir, c.Now)
	if err != nil {
		t.Fatal(err)
	}
	return store, dir, c
}

func issue(t testing.TB, s *register.Tokens, g register.Grant) register.Token {
	t.Helper()
	tok, err := s.Issue(g, 15*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	tok.BundleSHA256, tok.Addresses = make([]byte, 32), []string{"cp.example:7400"}
	return tok
}

func redeem(s *register.Tokens, tok register.Token, key string) (register.Grant, error) {
	exporter := []byte("exporter of this connection")
	return s.Redeem(tok.ID, register.Proof(tok, exporter, []byte(key)), exporter, []byte(key))
}

func TestTokenText(t *testing.T) {
	s, _, _ := newStore(t)
	tok := issue(t, s, gateway)
	text := tok.Encode()
	if strings.ContainsAny(text, "\n\r ") || !strings.HasPrefix(text, "strait-register-1.") {
		t.Errorf("the text is not one word with its prefix: %.30s", text)
	}
	for _, given := range []string{text, text + "\n", "  " + text + "\r\n"} {
		back, err := register.ParseToken(given)
		if err != nil || back.ID != tok.ID || !bytes.Equal(back.Secret, tok.Secret) || back.TrustDomain != td || !back.Expires.Equal(tok.Expires) ||
			back.Kind != register.KindGateway || back.Name != "gw-1" || back.Addresses[0] != "cp.example:7400" || !bytes.Equal(back.BundleSHA256, tok.BundleSHA256) {
			t.Errorf("came back as %+v, %v", back, err)
		}
	}
	bad := map[string]string{"empty": "", "prefix alone": "strait-register-1.", "another kind": strings.Replace(text, "register", "join", 1), "another version": strings.Replace(text, "-1.", "-2.", 1),
		"twice": text + text, "huge": text + strings.Repeat("A", 20_000), "padding": text + "="}
	for i := range len(text) {
		bad[fmt.Sprintf("cut at %d", i)] = text[:i]
		if i >= len("strait-register-1.") {
			other := "A"
			if text[i] == 'A' {
				other = "B"
			}
			bad[fmt.Sprintf("changed at %d", i)] = text[:i] + other + text[i+1:]
		}
	}
	for name, given := range bad {
		_, err := register.ParseToken(given)
		if !problem.Is(err, problem.RegistrationRefused) {
			t.Errorf("%s: %v", name, err)
		} else if len(given) > 30 && strings.Contains(err.Error(), given[20:30]) {
			t.Errorf("%s: the error shows the token: %v", name, err)
		}
	}
}

// TestTokenIsSecret: neither printing, nor logging, nor the store shows the secret.
func TestTokenIsSecret(t *testing.T) {
	s, dir, _ := newStore(t)
	tok := issue(t, s, gateway)
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "token", tok)
	secret := must(json.Marshal(tok.Secret))
	shown := fmt.Sprintf("%v %+v %#v %s %s", tok, tok, tok, tok, log.String())
	for _, form := range []string{string(tok.Secret), strings.Trim(string(secret), `"`), fmt.Sprintf("%x", tok.Secret), fmt.Sprint([]byte(tok.Secret)), tok.Encode()} {
		if strings.Contains(shown, form) {
			t.Errorf("the secret is shown: %s", shown)
		}
	}
	files, err := filepath.Glob(dir.Path("tokens", "register", "*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("%v, %v", files, err)
	}
	data, err := os.ReadFile(files[0])
	if err != nil || bytes.Contains(data, tok.Secret) || bytes.Contains(data, bytes.Trim(secret, `"`)) {
		t.Errorf("the store keeps the secret, %v", err)
	}
	if list := s.List(); len(list) != 1 || list[0].Key != nil {
		t.Error("the list shows keys")
	}
}

func TestRedeemRows(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(s *register.Tokens, tok register.Token, c *clock) error
		want string // part of the reason; "" = granted
	}{
		{"first", func(s *register.Tokens, tok register.Token, c *clock) error { return second(redeem(s, tok, "k1")) }, ""},
		{"the same key again", func(s *register.Tokens, tok register.Token, c *clock) error {
			_, _ = redeem(s, tok, "k1")
			c.add(14 * time.Minute)
			return second(redeem(s, tok, "k1"))
		}, ""},
		{"another key", func(s *register.Tokens, tok register.Token, c *clock) error {
			_, _ = redeem(s, tok, "k1")
			return second(redeem(s, tok, "k2"))
		}, "used already"},
		{"expired to the second", func(s *register.Tokens, tok register.Token, c *clock) error {
			c.add(15 * time.Minute)
			return second(redeem(s, tok, "k1"))
		}, "expired"},
		{"the same key after expiry", func(s *register.Tokens, tok register.Token, c *clock) error {
			_, _ = redeem(s, tok, "k1")
			c.add(time.Hour)
			return second(redeem(s, tok, "k1"))
		}, "expired"},
		{"revoked", func(s *register.Tokens, tok register.Token, c *clock) error {
			_ = s.Revoke(tok.ID)
			return second(redeem(s, tok, "k1"))
		}, "revoked"},
		{"the same key after revocation", func(s *register.Tokens, tok register.Token, c *clock) error {
			_, _ = redeem(s, tok, "k1")
			_ = s.Revoke(tok.ID)
			return second(redeem(s, tok, "k1"))
		}, "revoked"},
		{"wrong secret", func(s *register.Tokens, tok register.Token, c *clock) error {
			tok.Secret = make([]byte, 16)
			return second(redeem(s, tok, "k1"))
		}, "unknown here, or its secret"},
		{"unknown id", func(s *register.Tokens, tok register.Token, c *clock) error {
			tok.ID = "aaaaaaaaaaaaaaaa"
			return second(redeem(s, tok, "k1"))
		}, "unknown here, or its secret"},
		{"proof with the key of no token", func(s *register.Tokens, tok register.Token, c *clock) error {
			return second(s.Redeem("aaaaaaaaaaaaaaaa", make([]byte, 32), nil, nil))
		}, "unknown here, or its secret"},
		{"no proof", func(s *register.Tokens, tok register.Token, c *clock) error {
			return second(s.Redeem(tok.ID, nil, []byte("e"), []byte("k1")))
		}, "unknown here, or its secret"},
		{"proof of another connection", func(s *register.Tokens, tok register.Token, c *clock) error {
			return second(s.Redeem(tok.ID, register.Proof(tok, []byte("e1"), []byte("k1")), []byte("e2"), []byte("k1")))
		}, "unknown here, or its secret"},
		{"proof for another key", func(s *register.Tokens, tok register.Token, c *clock) error {
			return second(s.Redeem(tok.ID, register.Proof(tok, []byte("e"), []byte("k1")), []byte("e"), []byte("k2")))
		}, "unknown here, or its secret"},
	} {
		s, _, c := newStore(t)
		err := tt.do(s, issue(t, s, gateway), c)
		if tt.want == "" && err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if tt.want != "" && (!problem.Is(err, problem.RegistrationRefused) || !strings.Contains(problem.From(err).Reason(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

func second(_ register.Grant, err error) error { return err }

// TestRedeemRace: class T32. Of 1,000 redeemers with the secret and keys of their own exactly one is granted, and after a
// restart it is still that one.
func TestRedeemRace(t *testing.T) {
	s, dir, c := newStore(t)
	tok := issue(t, s, gateway)
	var won atomic.Int64
	var winner atomic.Pointer[string]
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range 1000 {
		key := fmt.Sprintf("key %d", i)
		wg.Go(func() {
			<-start
			g, err := redeem(s, tok, key)
			switch {
			case err == nil && g == gateway:
				won.Add(1)
				winner.Store(&key)
			case !problem.Is(err, problem.RegistrationRefused):
				t.Errorf("%s: %v, %v", key, g, err)
			}
		})
	}
	close(start)
	wg.Wait()
	if won.Load() != 1 {
		t.Fatalf("%d were granted", won.Load())
	}
	again, err := register.OpenTokens(dir, c.Now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := redeem(again, tok, *winner.Load()); err != nil {
		t.Errorf("the winner after a restart: %v", err)
	}
	if _, err := redeem(again, tok, "late"); err == nil {
		t.Error("another one after a restart")
	}
}

// TestTwoRedeemers: class T32, promise P5. Two with keys of their own race for each of 1,000 tokens: exactly one of each pair is granted what
// the token is bound to, and nothing else.
func TestTwoRedeemers(t *testing.T) {
	s, dir, c := newStore(t)
	const races = 1000
	winners := make([]string, races)
	tokens := make([]register.Token, races)
	for i := range races {
		tokens[i] = issue(t, s, sidecar)
		var granted [2]bool
		var wg sync.WaitGroup
		start := make(chan struct{})
		for j := range granted {
			wg.Go(func() {
				<-start
				g, err := redeem(s, tokens[i], fmt.Sprintf("key %d", j))
				granted[j] = err == nil
				if err == nil && g != sidecar || err != nil && !problem.Is(err, problem.RegistrationRefused) {
					t.Errorf("race %d, redeemer %d: %+v, %v", i, j, g, err)
				}
			})
		}
		close(start)
		wg.Wait()
		switch granted {
		case [2]bool{true, false}:
			winners[i] = "key 0"
		case [2]bool{false, true}:
			winners[i] = "key 1"
		default:
			t.Fatalf("race %d: granted %v", i, granted)
		}
	}
	again, err := register.OpenTokens(dir, c.Now)
	if err != nil {
		t.Fatal(err)
	}
	first := 0
	for i, tok := range tokens {
		for _, key := range []string{"key 0", "key 1"} {
			if _, err := redeem(again, tok, key); (err == nil) != (key == winners[i]) {
				t.Errorf("race %d after a restart: %s: %v; %s had won", i, key, err, winners[i])
			}
		}
		if winners[i] == "key 0" {
			first++
		}
	}
	t.Logf("the first of the pair won %d of %d", first, races)
}

func TestStoreLife(t *testing.T) {
	s, dir, c := newStore(t)
	used, unused, revoked := issue(t, s, gateway), issue(t, s, sidecar), issue(t, s, gateway)
	if _, err := redeem(s, used, "k"); err != nil {
		t.Fatal(err)
	}
	if err := s.Revoke(revoked.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.Revoke("../../etc/passwd"); !problem.Is(err, problem.NotFound) {
		t.Errorf("Revoke of nothing: %v", err)
	}
	states := func(s *register.Tokens) string {
		m := map[string]string{}
		for _, r := range s.List() {
			m[r.ID] = r.State(c.Now())
		}
		return m[used.ID] + " " + m[unused.ID] + " " + m[revoked.ID]
	}
	if got := states(s); got != "bound unused revoked" {
		t.Errorf("states: %s", got)
	}
	again, err := register.OpenTokens(dir, c.Now)
	if err != nil || states(again) != "bound unused revoked" {
		t.Errorf("after a restart: %s, %v", states(again), err)
	}
	c.add(time.Hour)
	if got := states(s); got != "expired expired revoked" {
		t.Errorf("an hour later: %s", got)
	}
	c.add(25 * time.Hour)
	last := issue(t, s, gateway)
	if names := must(dir.List("tokens/register")); len(names) != 1 || names[0] != last.ID || len(s.List()) != 1 {
		t.Errorf("a day later: %v", names)
	}
	// A damaged record is set aside: whoever holds its token is refused, the others work.
	other := issue(t, s, sidecar)
	if err := os.WriteFile(dir.Path("tokens/register", last.ID), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if again, err = register.OpenTokens(dir, c.Now); err != nil {
		t.Fatal(err)
	}
	if _, err := redeem(again, last, "k"); err == nil {
		t.Error("a damaged record is granted")
	}
	if g, err := redeem(again, other, "k"); err != nil || g != sidecar {
		t.Errorf("the other: %v, %v", g, err)
	}
}

// TestBindIsDurable: a token whose binding cannot be written is granted to nobody.
func TestBindIsDurable(t *testing.T) {
	s, dir, _ := newStore(t)
	tok := issue(t, s, gateway)
	path := dir.Path("tokens/register", tok.ID)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(path, "x"), 0o700); err != nil { // no file can take its place, not even root's
		t.Fatal(err)
	}
	if _, err := redeem(s, tok, "k1"); err == nil || problem.Is(err, problem.RegistrationRefused) {
		t.Fatalf("granted without a record, or called refused: %v", err)
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if _, err := redeem(s, tok, "k2"); err != nil {
		t.Errorf("after the disk recovered: %v", err)
	}
}

// FuzzToken: what parses renders to a token that parses to the same.
func FuzzToken(f *testing.F) {
	s, _, _ := newStore(f)
	f.Add(issue(f, s, gateway).Encode())
	f.Add(issue(f, s, sidecar).Encode() + "\n")
	f.Add("strait-register-1.")
	f.Fuzz(func(t *testing.T, text string) {
		tok, err := register.ParseToken(text)
		if err != nil {
			return
		}
		again, err := register.ParseToken(tok.Encode())
		if err != nil || again.Encode() != tok.Encode() {
			t.Fatalf("does not come back: %v", err)
		}
	})
}
