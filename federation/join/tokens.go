// SPDX-License-Identifier: Apache-2.0

package join

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Life of a token.
const (
	DefaultTTL = 15 * time.Minute
	MaxTTL     = 24 * time.Hour
	Resume     = 24 * time.Hour      // how long the joiner that a token is bound to may resume
	keepEnded  = 30 * 24 * time.Hour // how long an ended token's record explains itself
	maxTokens  = 1000
)

const (
	tokensDir   = "tokens"
	tokenFormat = 1
)

// TokenState is where a token is in its life.
type TokenState string

// The states of a token.
const (
	Unused  TokenState = "unused"
	Bound   TokenState = "bound"
	Used    TokenState = "used"
	Expired TokenState = "expired"
	Revoked TokenState = "revoked"
)

// Binding is the joiner that a token belongs to once it was redeemed.
type Binding struct {
	TrustDomain spiffeid.TrustDomain
	BundleHash  [32]byte
	JoinerKey   [32]byte // Ed25519 public key
}

// same reports whether both are one joiner: its key says so, whatever became of its roots meanwhile.
func (b Binding) same(o Binding) bool {
	return b.TrustDomain == o.TrustDomain && b.JoinerKey == o.JoinerKey
}

// Record is what the issuer keeps of a token: no secret.
type Record struct {
	ID             string
	AllowedCluster federation.ClusterName
	Sameness       []string // what we grant the joiner
	Approve        Approve
	Issued         time.Time
	Expires        time.Time
	Binding        Binding // zero while unused
	BoundAt        time.Time
	UsedAt         time.Time
	RevokedAt      time.Time
}

// State at now.
func (r *Record) State(now time.Time) TokenState {
	switch {
	case !r.RevokedAt.IsZero():
		return Revoked
	case !r.UsedAt.IsZero():
		return Used
	case r.IsBound() && now.Before(r.BoundAt.Add(Resume)):
		return Bound
	case r.IsBound() || !now.Before(r.Expires):
		return Expired
	}
	return Unused
}

// IsBound reports whether a joiner has redeemed the token.
func (r *Record) IsBound() bool { return !r.Binding.TrustDomain.IsZero() }

// ends is when the record has nothing more to allow.
func (r *Record) ends() time.Time {
	switch {
	case !r.RevokedAt.IsZero():
		return r.RevokedAt
	case r.IsBound():
		return r.BoundAt.Add(Resume)
	}
	return r.Expires
}

// TokensConfig makes a Tokens.
type TokensConfig struct {
	Now    func() time.Time // nil: time.Now
	Logger *slog.Logger     // nil: discard
}

// Tokens is the issuer's store of join tokens. What a method returned is on disk.
type Tokens struct {
	dir *datadir.Dir
	now func() time.Time
	log *slog.Logger

	mu      sync.Mutex
	records map[string]*entry
}

type entry struct {
	rec Record
	key Key
}

// storedToken is the state file of one token.
type storedToken struct {
	Format         int                    `json:"format"`
	ID             string                 `json:"id"`
	Key            string                 `json:"key"` // derived from the secret
	AllowedCluster federation.ClusterName `json:"allowedCluster"`
	Sameness       []string               `json:"sameness,omitempty"`
	Approve        Approve                `json:"approve"`
	Issued         time.Time              `json:"issued"`
	Expires        time.Time              `json:"expires"`
	BoundTo        *storedBinding         `json:"boundTo,omitempty"`
	BoundAt        time.Time              `json:"boundAt,omitzero"`
	UsedAt         time.Time              `json:"usedAt,omitzero"`
	RevokedAt      time.Time              `json:"revokedAt,omitzero"`
}

type storedBinding struct {
	TrustDomain spiffeid.TrustDomain `json:"trustDomain"`
	BundleHash  string               `json:"bundleHash"`
	JoinerKey   string               `json:"joinerKey"`
}

// OpenTokens reads the tokens of a data directory. A damaged record is left out and logged: its token is unknown.
func OpenTokens(dir *datadir.Dir, cfg TokensConfig) (*Tokens, error) {
	t := &Tokens{dir: dir, now: cfg.Now, log: cfg.Logger, records: map[string]*entry{}}
	if t.now == nil {
		t.now = time.Now
	}
	if t.log == nil {
		t.log = slog.New(slog.DiscardHandler)
	}
	names, err := dir.List(tokensDir)
	if err != nil {
		return nil, fmt.Errorf("join tokens: %w", err)
	}
	for _, name := range names {
		id, ok := strings.CutPrefix(name, "join-")
		id, ok2 := strings.CutSuffix(id, ".json")
		if !ok || !ok2 || !validTokenID(id) {
			continue
		}
		e, err := t.read(id)
		if err != nil {
			t.log.Error("join token is not readable", "token", id, "error", err)
			continue
		}
		t.records[id] = e
	}
	return t, nil
}

func tokenFile(id string) string { return tokensDir + "/join-" + id + ".json" }

func (t *Tokens) read(id string) (*entry, error) {
	data, err := t.dir.ReadState(tokenFile(id))
	if err != nil {
		return nil, err
	}
	var s storedToken
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, err
	}
	if s.Format != tokenFormat || s.ID != id {
		return nil, fmt.Errorf("format %d of token %s", s.Format, s.ID)
	}
	e := &entry{rec: Record{
		ID: s.ID, AllowedCluster: s.AllowedCluster, Sameness: s.Sameness, Approve: s.Approve, Issued: s.Issued,
		Expires: s.Expires, BoundAt: s.BoundAt, UsedAt: s.UsedAt, RevokedAt: s.RevokedAt,
	}}
	if !decode32(s.Key, (*[32]byte)(&e.key)) {
		return nil, errors.New("bad key")
	}
	if b := s.BoundTo; b != nil {
		e.rec.Binding.TrustDomain = b.TrustDomain
		if !decode32(b.BundleHash, &e.rec.Binding.BundleHash) || !decode32(b.JoinerKey, &e.rec.Binding.JoinerKey) || b.TrustDomain.IsZero() {
			return nil, errors.New("bad binding")
		}
	}
	return e, nil
}

func decode32(s string, out *[32]byte) bool {
	b, err := hex.DecodeString(s)
	return err == nil && copy(out[:], b) == 32 && len(b) == 32
}

func (t *Tokens) write(e *entry) error {
	r := &e.rec
	s := storedToken{
		Format: tokenFormat, ID: r.ID, Key: hex.EncodeToString(e.key[:]), AllowedCluster: r.AllowedCluster, Sameness: r.Sameness,
		Approve: r.Approve, Issued: r.Issued, Expires: r.Expires, BoundAt: r.BoundAt, UsedAt: r.UsedAt, RevokedAt: r.RevokedAt,
	}
	if r.IsBound() {
		s.BoundTo = &storedBinding{
			TrustDomain: r.Binding.TrustDomain, BundleHash: hex.EncodeToString(r.Binding.BundleHash[:]),
			JoinerKey: hex.EncodeToString(r.Binding.JoinerKey[:]),
		}
	}
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("join token %s: %w", r.ID, err)
	}
	if err := t.dir.WriteState(tokenFile(r.ID), data); err != nil {
		return fmt.Errorf("join token %s: %w", r.ID, err)
	}
	return nil
}

// Issue completes tok with id, secret, times and stores its record. ttl 0 is DefaultTTL.
func (t *Tokens) Issue(tok Token, sameness []string, ttl time.Duration) (*Token, error) {
	if ttl == 0 {
		ttl = DefaultTTL
	}
	if ttl < time.Second || ttl > MaxTTL {
		return nil, problem.New(problem.Usage, "a join token may live from 1s to %s, not %s", MaxTTL, ttl)
	}
	if tok.Approve == "" {
		tok.Approve = ApproveAuto
	}
	if tok.Approve != ApproveAuto && tok.Approve != ApproveManual {
		return nil, problem.New(problem.Usage, "approval %q: want auto or manual", string(tok.Approve))
	}
	if _, err := federation.ParseClusterName(tok.AllowedCluster.String()); err != nil {
		return nil, problem.New(problem.Usage, "%v", err).WithWhy("a token is for one cluster, named by --cluster")
	}
	now := t.now()
	tok.ID, tok.Secret = newTokenID(), newSecret()
	tok.Issued, tok.Expires = now.Truncate(time.Second), now.Add(ttl).Truncate(time.Second)
	e := &entry{key: tok.Key(), rec: Record{
		ID: tok.ID, AllowedCluster: tok.AllowedCluster, Sameness: slices.Clone(sameness), Approve: tok.Approve,
		Issued: now, Expires: tok.Expires,
	}}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pruneLocked(now)
	if len(t.records) >= maxTokens {
		return nil, problem.New(problem.Usage, "%d join tokens are kept already", len(t.records)).
			WithFix("strait token revoke those that are not needed; ended ones go after 30 days")
	}
	if err := t.write(e); err != nil {
		return nil, err
	}
	t.records[tok.ID] = e
	return &tok, nil
}

func (t *Tokens) pruneLocked(now time.Time) {
	for id, e := range t.records {
		if now.After(e.rec.ends().Add(keepEnded)) {
			if err := t.dir.Remove(tokenFile(id)); err != nil {
				t.log.Warn("join token record could not be removed", "token", id, "error", err)
				continue
			}
			delete(t.records, id)
		}
	}
}

// Key returns the derived key of a token, or STR-2205.
func (t *Tokens) Key(id string) (Key, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, err := t.findLocked(id)
	if err != nil {
		return Key{}, err
	}
	return e.key, nil
}

func (t *Tokens) findLocked(id string) (*entry, error) {
	e := t.records[id]
	if e == nil {
		return nil, problem.New(problem.TokenUnknown, "no token with the id %.32q was issued here, or its record is gone", id).
			WithState("nothing was changed on either side")
	}
	return e, nil
}

// Get returns a token's record, or STR-2205.
func (t *Tokens) Get(id string) (Record, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, err := t.findLocked(id)
	if err != nil {
		return Record{}, err
	}
	return e.rec, nil
}

// List returns all records, newest first.
func (t *Tokens) List() []Record {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]Record, 0, len(t.records))
	for _, e := range t.records {
		out = append(out, e.rec)
	}
	slices.SortFunc(out, func(a, b Record) int {
		if c := b.Issued.Compare(a.Issued); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return out
}

// Check says what Redeem would say, and changes nothing.
func (t *Tokens) Check(id string, cluster federation.ClusterName, b Binding) (Record, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, err := t.findLocked(id)
	if err != nil {
		return Record{}, err
	}
	return e.rec, t.judge(&e.rec, cluster, b)
}

// Redeem binds a token to the joiner that proved it: compare-and-swap from unbound to b, or the same b again while the joiner may
// resume. STR-2202 expired, 2203 revoked, 2204 another joiner's, 2207 another cluster's.
func (t *Tokens) Redeem(id string, cluster federation.ClusterName, b Binding) (Record, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, err := t.findLocked(id)
	if err != nil {
		return Record{}, err
	}
	if err := t.judge(&e.rec, cluster, b); err != nil {
		return e.rec, err
	}
	if e.rec.IsBound() {
		return e.rec, nil
	}
	next := *e
	next.rec.Binding, next.rec.BoundAt = b, t.now()
	if err := t.write(&next); err != nil {
		return e.rec, err
	}
	*e = next
	return e.rec, nil
}

func (t *Tokens) judge(r *Record, cluster federation.ClusterName, b Binding) error {
	now := t.now()
	const unchanged = "nothing was changed on either side"
	switch {
	case cluster != r.AllowedCluster:
		return problem.New(problem.TokenScope, "the token is for the cluster %s; this one is %s", r.AllowedCluster, cluster).WithState(unchanged)
	case !r.RevokedAt.IsZero():
		return problem.New(problem.TokenRevoked, "token %s was revoked %s ago", r.ID, ago(now, r.RevokedAt)).WithState(unchanged)
	case r.IsBound() && !r.Binding.same(b):
		return problem.New(problem.TokenBound, "token %s belongs to another joiner, which redeemed it %s ago", r.ID, ago(now, r.BoundAt)).
			WithState(unchanged)
	case r.IsBound() && !now.Before(r.BoundAt.Add(Resume)):
		return problem.New(problem.TokenExpired, "token %s was redeemed %s ago and may be resumed for %s only", r.ID, ago(now, r.BoundAt), Short(Resume)).
			WithState(unchanged)
	case !r.IsBound() && !now.Before(r.Expires):
		return problem.New(problem.TokenExpired, "token %s expired %s ago", r.ID, ago(now, r.Expires)).WithState(unchanged)
	}
	return nil
}

// MarkUsed ends a bound token whose joiner became ready.
func (t *Tokens) MarkUsed(id string) error {
	return t.change(id, func(r *Record) error {
		if r.UsedAt.IsZero() {
			r.UsedAt = t.now()
		}
		return nil
	})
}

// Revoke ends a token that is not used up. Revoking twice is no error.
func (t *Tokens) Revoke(id string) error {
	return t.change(id, func(r *Record) error {
		if !r.UsedAt.IsZero() {
			return problem.New(problem.Usage, "token %s is used up: %s joined with it", id, r.AllowedCluster).
				WithWhy("a used token opens nothing any more").WithFix("to withdraw the cluster: strait member evict %s", r.AllowedCluster)
		}
		if r.RevokedAt.IsZero() {
			r.RevokedAt = t.now()
		}
		return nil
	})
}

func (t *Tokens) change(id string, f func(*Record) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, err := t.findLocked(id)
	if err != nil {
		return err
	}
	next := *e
	if err := f(&next.rec); err != nil {
		return err
	}
	if err := t.write(&next); err != nil {
		return err
	}
	*e = next
	return nil
}

// Outstanding returns the record of a token that could still let cluster in by being redeemed for the first time, or nil.
func (t *Tokens) Outstanding(cluster federation.ClusterName) *Record {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	for _, e := range t.records {
		if e.rec.AllowedCluster == cluster && e.rec.State(now) == Unused {
			r := e.rec
			return &r
		}
	}
	return nil
}

// ago says how long before now t was, for people.
func ago(now, t time.Time) string { return Short(now.Sub(t)) }

// Short rounds a duration down for people: "42s", "13m", "2h5m".
func Short(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d/time.Second))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d/time.Minute))
	case d%time.Hour < time.Minute:
		return fmt.Sprintf("%dh", int(d/time.Hour))
	}
	return fmt.Sprintf("%dh%dm", int(d/time.Hour), int(d%time.Hour/time.Minute))
}
