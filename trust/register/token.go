// SPDX-License-Identifier: Apache-2.0

package register

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Kinds of what registers.
const (
	KindGateway = "gateway"
	KindSidecar = "sidecar"
)

const (
	tokenPrefix  = "strait-register-1."
	maxTokenText = 16 << 10
	maxTokens    = 10_000
)

// Token is what the newcomer holds. It is a secret: String never prints it.
type Token struct {
	ID           string               `json:"id"`
	Secret       []byte               `json:"secret"`
	TrustDomain  spiffeid.TrustDomain `json:"trustDomain"`
	BundleSHA256 []byte               `json:"bundleSHA256"`
	Addresses    []string             `json:"addresses,omitempty"` // of the control plane
	Expires      time.Time            `json:"expires"`
	Kind         string               `json:"kind"`
	Name         string               `json:"name"` // gateway name, or "<namespace>/<proxy>"
}

// String names the token without its secret.
func (t Token) String() string { return "registration token " + t.ID }

// GoString is String: %#v prints no secret either.
func (t Token) GoString() string { return t.String() }

// LogValue is String, for slog.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }

// Encode is the text of a token file.
func (t Token) Encode() string {
	body, err := json.Marshal(t)
	if err != nil {
		panic("register: marshal token: " + err.Error()) // strings, bytes and a time
	}
	sum := sha256.Sum256(body)
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(body, sum[:4]...))
}

// ParseToken reads the text of a token file. Its errors never contain any of it.
func ParseToken(text string) (Token, error) {
	var t Token
	bad := func(why string) (Token, error) {
		return Token{}, problem.New(problem.RegistrationRefused, "not a registration token: %s", why).
			WithWhy("the text is truncated, damaged or something else").WithFix("copy the whole file that strait wrote")
	}
	text = strings.TrimSpace(text)
	rest, ok := strings.CutPrefix(text, tokenPrefix)
	if !ok || len(text) > maxTokenText {
		return bad("it does not begin with " + tokenPrefix)
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(rest)
	if err != nil || len(raw) < 5 {
		return bad("it is no base64")
	}
	body, sum := raw[:len(raw)-4], raw[len(raw)-4:]
	if want := sha256.Sum256(body); !bytes.Equal(sum, want[:4]) {
		return bad("its checksum does not match")
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&t); err != nil || dec.More() {
		return bad("its content is malformed")
	}
	if !validID(t.ID) || len(t.Secret) != 16 || len(t.BundleSHA256) != 32 || t.TrustDomain.IsZero() || t.Kind != KindGateway && t.Kind != KindSidecar {
		return bad("its content is incomplete")
	}
	return t, nil
}

// validID accepts what Issue makes: 16 letters and digits of base32.
func validID(id string) bool {
	return len(id) == 16 && strings.Trim(id, "abcdefghijklmnopqrstuvwxyz234567") == ""
}

// deriveKey makes what the store keeps. The secret is 128 random bits: nothing slower is needed.
func deriveKey(secret []byte) []byte {
	m := hmac.New(sha256.New, secret)
	m.Write([]byte("strait-register/1 key"))
	return m.Sum(nil)
}

func proofOf(key, exporter, csr []byte) []byte {
	sum := sha256.Sum256(csr)
	m := hmac.New(sha256.New, key)
	m.Write([]byte(ALPN))
	m.Write(exporter)
	m.Write(sum[:])
	return m.Sum(nil)
}

// Grant is what a token gives.
type Grant struct {
	Kind     string      `json:"kind"`
	Name     string      `json:"name"`
	SPIFFEID spiffeid.ID `json:"spiffeID"`
	Region   string      `json:"region,omitempty"`
	Zone     string      `json:"zone,omitempty"`
}

// Record is what the store knows of a token.
type Record struct {
	ID      string    `json:"id"`
	Key     []byte    `json:"key"` // derived from the secret
	Grant   Grant     `json:"grant"`
	Expires time.Time `json:"expires"`
	Bound   string    `json:"bound,omitempty"` // SHA-256 of the public key that redeemed it, hex
	Revoked bool      `json:"revoked,omitempty"`
}

// State is unused, bound, expired or revoked.
func (r Record) State(now time.Time) string {
	switch {
	case r.Revoked:
		return "revoked"
	case !now.Before(r.Expires):
		return "expired"
	case r.Bound != "":
		return "bound"
	default:
		return "unused"
	}
}

// Tokens is the issuer's store, a state file each below tokens/register/.
type Tokens struct {
	dir *datadir.Dir
	now func() time.Time

	mu      sync.Mutex
	records map[string]Record
}

const tokensDir = "tokens/register"

// OpenTokens reads the store; tokens that ended more than a day ago are dropped.
func OpenTokens(dir *datadir.Dir, now func() time.Time) (*Tokens, error) {
	if now == nil {
		now = time.Now
	}
	t := &Tokens{dir: dir, now: now, records: map[string]Record{}}
	names, err := dir.List(tokensDir)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		data, err := dir.ReadState(tokensDir + "/" + name)
		if errors.Is(err, datadir.ErrCorrupt) {
			continue // set aside; whoever holds the token is refused
		}
		if err != nil {
			return nil, err
		}
		var r Record
		if err := json.Unmarshal(data, &r); err != nil || r.ID != name {
			return nil, fmt.Errorf("registration token %s: not a record of it: %w", name, err)
		}
		t.records[r.ID] = r
	}
	t.pruneLocked()
	return t, nil
}

// Issue makes a token for g that works for ttl. Trust domain, pin and addresses are the caller's to fill in.
func (t *Tokens) Issue(g Grant, ttl time.Duration) (Token, error) {
	raw := make([]byte, 16+10)
	_, _ = rand.Read(raw)
	id := strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(raw[16:]))
	tok := Token{ID: id, Secret: raw[:16], TrustDomain: g.SPIFFEID.TrustDomain(), Expires: t.now().Add(ttl).Truncate(time.Second), Kind: g.Kind, Name: g.Name}
	r := Record{ID: id, Key: deriveKey(tok.Secret), Grant: g, Expires: tok.Expires}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pruneLocked()
	if len(t.records) >= maxTokens {
		return Token{}, fmt.Errorf("issue registration token: %d tokens are kept; revoke some", maxTokens)
	}
	if err := t.saveLocked(r); err != nil {
		return Token{}, err
	}
	return tok, nil
}

// keepEnded is how long the record of an ended token stays, so that its holder learns why it is refused.
const keepEnded = 24 * time.Hour

func (t *Tokens) pruneLocked() {
	for id, r := range t.records {
		if t.now().After(r.Expires.Add(keepEnded)) && t.dir.Remove(tokensDir+"/"+id) == nil {
			delete(t.records, id)
		}
	}
}

func (t *Tokens) saveLocked(r Record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := t.dir.WriteState(tokensDir+"/"+r.ID, data); err != nil {
		return fmt.Errorf("save registration token: %w", err)
	}
	t.records[r.ID] = r
	return nil
}

// List returns the records by id, without their keys.
func (t *Tokens) List() []Record {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]Record, 0, len(t.records))
	for _, r := range t.records {
		r.Key = nil
		out = append(out, r)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out
}

// Revoke ends a token. An unknown one is a *problem.Error of STR-1004.
func (t *Tokens) Revoke(id string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.records[id]
	if !ok {
		return problem.New(problem.NotFound, "no registration token has the id %s", id)
	}
	r.Revoked = true
	return t.saveLocked(r)
}

func refused(why string) error {
	return problem.New(problem.RegistrationRefused, "the control plane refused the token").WithWhy("%s", why)
}

// judge checks a proof, and whether its token may still be redeemed; it changes nothing. An unknown token costs the same
// work and gets the same answer as a wrong proof.
func (t *Tokens) judge(id string, proof, exporter, csr []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, known := t.records[id]
	key := r.Key
	if !known {
		key = make([]byte, sha256.Size)
	}
	if !hmac.Equal(proof, proofOf(key, exporter, csr)) || !known {
		return refused("the token is unknown here, or its secret is not right")
	}
	return t.usable(r)
}

func (t *Tokens) usable(r Record) error {
	if state := r.State(t.now()); state == "revoked" || state == "expired" {
		return refused("the token is " + state)
	}
	return nil
}

// bind gives the token to a public key, durably, before it returns: compare-and-swap from nobody or from that same key.
func (t *Tokens) bind(id string, publicKey [32]byte) (Grant, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.records[id]
	if !ok {
		return Grant{}, refused("the token is unknown here, or its secret is not right")
	}
	if err := t.usable(r); err != nil { // it may have been revoked since judge
		return Grant{}, err
	}
	bound := hex.EncodeToString(publicKey[:])
	switch r.Bound {
	case bound:
		return r.Grant, nil
	case "":
		r.Bound = bound
		return r.Grant, t.saveLocked(r)
	default:
		return Grant{}, refused("the token was used already")
	}
}
