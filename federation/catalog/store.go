// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Quotas of one peer.
const (
	DefaultMaxEntries       = 5000
	DefaultMaxBytes         = 8 << 20
	DefaultChangesPerSecond = 200
)

// StoreConfig makes a Store. Zero quotas are the defaults.
type StoreConfig struct {
	Self             spiffeid.TrustDomain // the consumer: heads for anybody else are refused
	MaxEntries       int                  // per peer
	MaxBytes         int                  // per peer, keys and bodies
	ChangesPerSecond float64              // per peer, sustained; MaxEntries at once. An update is one, a snapshot an eighth of its entries, at least
	AllowLoopback    bool                 // accept loopback addresses in gateway records (one-machine demos and tests)
	Now              func() time.Time
	Logger           *slog.Logger
}

func (c *StoreConfig) defaults() error {
	if c.Self.IsZero() {
		return errors.New("catalog store: Self is required")
	}
	if c.MaxEntries == 0 {
		c.MaxEntries = DefaultMaxEntries
	}
	if c.MaxBytes == 0 {
		c.MaxBytes = DefaultMaxBytes
	}
	if c.ChangesPerSecond == 0 {
		c.ChangesPerSecond = DefaultChangesPerSecond
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	return nil
}

// Result says what an update did.
type Result struct {
	Changed bool // the entries changed
	Fresh   bool // the head is newer than the one that was held
	Head    *Head
}

// View is one origin's catalog as it is held; immutable.
type View struct {
	Origin     spiffeid.TrustDomain
	Head       Head
	ReceivedAt time.Time // of the newest head
	Services   []*controlpb.CatalogService
	Gateways   []*controlpb.GatewayRecord
	Bundle     *trust.Bundle // the origin's own, as it says; nil: it does not say
	Seen       *Seen         // nil: nothing is acknowledged yet
	Denied     []Denial      // sorted by ID
}

// Conflict is two valid heads with the same numbers and different content.
type Conflict struct {
	First, Second *controlpb.SignedHead
	SeenAt        time.Time
}

// Store is what peers offer us, on disk before it is believed. Methods may be called concurrently.
type Store struct {
	dir *datadir.Dir
	cfg StoreConfig

	mu      sync.Mutex
	origins map[spiffeid.TrustDomain]*imported
}

// imported is what is held of one origin.
type imported struct {
	mu       sync.Mutex
	gone     bool
	mark     mark
	held     *held // nil: only the mark is known
	received time.Time
	parsed   map[string]parsedEntry
	view     *View
	conflict *Conflict
	changes  float64 // tokens left
	refilled time.Time
}

type parsedEntry struct {
	version uint64
	value   any // as judgeEntry returns it
}

// OpenStore reads what dir holds. A damaged file is reported and left aside; the origin is then fetched anew.
func OpenStore(dir *datadir.Dir, cfg StoreConfig) (*Store, error) {
	if err := cfg.defaults(); err != nil {
		return nil, err
	}
	s := &Store{dir: dir, cfg: cfg, origins: map[spiffeid.TrustDomain]*imported{}}
	names, err := dir.List(".")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open catalog store: %w", err)
	}
	for _, name := range names {
		if !strings.HasSuffix(name, catalogSuffix) {
			continue
		}
		if err := s.load(name); err != nil {
			if errors.Is(err, fs.ErrPermission) {
				return nil, fmt.Errorf("open catalog store: %w", err)
			}
			cfg.Logger.Error("stored catalog is damaged", "file", name, "error", err)
		}
	}
	return s, nil
}

const (
	catalogSuffix  = ".catalog"
	conflictSuffix = ".conflict"
)

// file names a file about td. Names that would be too long for a file system, or that the data directory could take for its own
// temporary or damaged files, are hashed.
func file(td spiffeid.TrustDomain, suffix string) string {
	name := td.String()
	if len(name) > 200 || name[0] == '.' || strings.Contains(name, "tmp") || strings.Contains(name, "corrupt") {
		sum := sha256.Sum256([]byte(name))
		name = hex.EncodeToString(sum[:])
	}
	return name + suffix
}

func (s *Store) load(name string) error {
	b, err := s.dir.ReadState(name)
	if err != nil {
		return err
	}
	received, u, err := unmarshalStored(b)
	if err != nil {
		return err
	}
	head, err := ParseHead(u.GetHead().GetHead())
	if err != nil {
		return err
	}
	td := head.TrustDomain
	if name != file(td, catalogSuffix) {
		return fmt.Errorf("it is the catalog of %s", td)
	}
	im := s.origin(td)
	im.mark = mark{head.Epoch, head.Seq, head.Hash}
	if b, err := s.dir.ReadState(file(td, conflictSuffix)); err == nil {
		im.conflict = unmarshalConflict(b)
	}
	h, _, err := (*held)(nil).merge(u, head, limits{s.cfg.MaxEntries, s.cfg.MaxBytes})
	if err != nil {
		return err // the mark stands all the same
	}
	parsed, err := im.judge(td, h, s.cfg.AllowLoopback)
	if err != nil {
		return err
	}
	im.publish(td, h, parsed, received)
	return nil
}

// origin finds or makes the record of td.
func (s *Store) origin(td spiffeid.TrustDomain) *imported {
	s.mu.Lock()
	defer s.mu.Unlock()
	im := s.origins[td]
	if im == nil {
		im = &imported{changes: float64(s.cfg.MaxEntries), refilled: s.cfg.Now()}
		s.origins[td] = im
	}
	return im
}

func (s *Store) find(td spiffeid.TrustDomain) *imported {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.origins[td]
}

// Apply verifies, judges and persists an update, and then holds it. What it refuses leaves everything as it was. Typed errors:
// *HeadError, *RollbackError, *ForkError (the evidence is kept), *QuotaError, *ForeignError, ErrEpochJump, ErrResync.
func (s *Store) Apply(origin spiffeid.TrustDomain, u *controlpb.CatalogUpdate, bundles *trust.Bundles) (Result, error) {
	now := s.cfg.Now()
	head, err := VerifyHead(u.GetHead(), bundles, origin, s.cfg.Self, now)
	if err != nil {
		return Result{}, err
	}
	for {
		im := s.origin(origin)
		im.mu.Lock()
		if im.gone { // forgotten meanwhile
			im.mu.Unlock()
			continue
		}
		r, err := s.applyLocked(im, origin, u, head, now)
		im.mu.Unlock()
		return r, err
	}
}

func (s *Store) applyLocked(im *imported, td spiffeid.TrustDomain, u *controlpb.CatalogUpdate, head *Head, now time.Time) (Result, error) {
	err := im.mark.judge(head, td)
	var next *held
	var changes int
	if err == nil {
		next, changes, err = im.held.merge(u, head, limits{s.cfg.MaxEntries, s.cfg.MaxBytes})
	}
	if fork := (*ForkError)(nil); errors.As(err, &fork) {
		s.keepEvidenceLocked(im, td, u.GetHead(), now)
	}
	if err != nil {
		return Result{}, err
	}
	if next == im.held {
		return Result{Head: head}, nil
	}
	if im.held != nil && next.ledger == im.held.ledger { // the same catalog, signed again
		im.held, im.received = next, now
		v := *im.view
		v.Head, v.ReceivedAt = *head, now
		im.view = &v
		return Result{Fresh: true, Head: head}, nil
	}
	cost := max(changes, 1) // whatever it changes, it is hashed, stored and passed on
	if u.GetSnapshot() {
		cost = max(cost, next.ledger.live/8)
	}
	if err := im.spendLocked(td, cost, now, s.cfg); err != nil {
		return Result{}, err
	}
	parsed, err := im.judge(td, next, s.cfg.AllowLoopback)
	if err != nil {
		return Result{}, err
	}
	if err := s.dir.WriteState(file(td, catalogSuffix), marshalStored(now, next)); err != nil {
		return Result{}, fmt.Errorf("store catalog of %s: %w", td, err)
	}
	im.mark = mark{head.Epoch, head.Seq, head.Hash}
	im.publish(td, next, parsed, now)
	return Result{Changed: changes > 0, Fresh: true, Head: head}, nil
}

// spendLocked takes changes from the peer's allowance.
func (im *imported) spendLocked(td spiffeid.TrustDomain, changes int, now time.Time, cfg StoreConfig) error {
	if d := now.Sub(im.refilled); d > 0 {
		im.changes = min(float64(cfg.MaxEntries), im.changes+d.Seconds()*cfg.ChangesPerSecond)
	}
	im.refilled = now
	if float64(changes) > im.changes {
		return &QuotaError{Origin: td, Quota: "changes", Have: changes, Limit: int(im.changes)}
	}
	im.changes -= float64(changes)
	return nil
}

// judge reads all entries; those that did not change are not read again.
func (im *imported) judge(td spiffeid.TrustDomain, h *held, allowLoopback bool) (map[string]parsedEntry, error) {
	parsed := make(map[string]parsedEntry, h.ledger.live)
	denials := 0
	same := im.held != nil && im.held.head.Epoch == h.head.Epoch
	for k, e := range h.ledger.entries {
		if e.deleted {
			continue
		}
		if strings.HasPrefix(k, denialPrefix) {
			if denials++; denials > MaxDenials {
				return nil, &QuotaError{Origin: td, Quota: "denials", Have: denials, Limit: MaxDenials}
			}
		}
		if p, ok := im.parsed[k]; ok && same && p.version == e.version {
			parsed[k] = p
			continue
		}
		m, err := judgeEntry(td, k, e.body, allowLoopback)
		if err != nil {
			return nil, err
		}
		parsed[k] = parsedEntry{e.version, m}
	}
	return parsed, nil
}

func (im *imported) publish(td spiffeid.TrustDomain, h *held, parsed map[string]parsedEntry, received time.Time) {
	im.held, im.parsed, im.received = h, parsed, received
	v := &View{Origin: td, Head: h.head, ReceivedAt: received}
	for _, k := range h.ledger.keys() {
		switch m := parsed[k].value.(type) {
		case *controlpb.CatalogService:
			v.Services = append(v.Services, m)
		case *controlpb.GatewayRecord:
			v.Gateways = append(v.Gateways, m)
		case *trust.Bundle:
			v.Bundle = m
		case *Seen:
			v.Seen = m
		case *Denial:
			v.Denied = append(v.Denied, *m)
		}
	}
	im.view = v
}

// keepEvidenceLocked keeps the first fork that is seen.
func (s *Store) keepEvidenceLocked(im *imported, td spiffeid.TrustDomain, second *controlpb.SignedHead, now time.Time) {
	if im.conflict != nil || im.held == nil {
		return
	}
	im.conflict = &Conflict{First: im.held.signed, Second: second, SeenAt: now.UTC().Truncate(time.Millisecond)}
	if err := s.dir.WriteState(file(td, conflictSuffix), marshalConflict(im.conflict)); err != nil {
		s.cfg.Logger.Error("evidence of a catalog fork not written", "trust_domain", td.String(), "error", err)
	}
}

// View returns what is held of origin, or nil.
func (s *Store) View(origin spiffeid.TrustDomain) *View {
	im := s.find(origin)
	if im == nil {
		return nil
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.view
}

// Mark returns the newest (epoch, seq) and hash accepted from origin, zeros for none.
func (s *Store) Mark(origin spiffeid.TrustDomain) (epoch, seq uint64, hash [32]byte) {
	im := s.find(origin)
	if im == nil {
		return 0, 0, hash
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.mark.epoch, im.mark.seq, im.mark.hash
}

// Have returns what to ask origin's updates from: the mark when its entries are held, else zeros, for a snapshot.
func (s *Store) Have(origin spiffeid.TrustDomain) (epoch, seq uint64) {
	im := s.find(origin)
	if im == nil {
		return 0, 0
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	if im.held == nil {
		return 0, 0
	}
	return im.held.head.Epoch, im.held.head.Seq
}

// Remember raises the mark of origin to one that was kept elsewhere (Peer.status), in case this store lost its own. A lower one
// changes nothing.
func (s *Store) Remember(origin spiffeid.TrustDomain, epoch, seq uint64, hash [32]byte) {
	im := s.origin(origin)
	im.mu.Lock()
	defer im.mu.Unlock()
	if epoch > im.mark.epoch || epoch == im.mark.epoch && seq > im.mark.seq {
		im.mark = mark{epoch, seq, hash}
	}
}

// Signed returns the newest signed head held of origin, or nil: what an origin that lost its memory asks for.
func (s *Store) Signed(origin spiffeid.TrustDomain) *controlpb.SignedHead {
	im := s.find(origin)
	if im == nil {
		return nil
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	if im.held == nil {
		return nil
	}
	return im.held.signed
}

// Freshness judges the age of what is held: stale after one ttl, withdrawn after three unless a tunnel to the origin is alive. A
// head counts from when it came, or from when it was issued if that was longer ago than clocks can differ.
func (s *Store) Freshness(origin spiffeid.TrustDomain, tunnelAlive bool) federation.Freshness {
	v := s.View(origin)
	if v == nil {
		return federation.Withdrawn
	}
	now := s.cfg.Now()
	age := max(now.Sub(v.ReceivedAt), now.Sub(v.Head.IssuedAt)-MaxSkew)
	switch {
	case age <= v.Head.TTL:
		return federation.Fresh
	case age <= 3*v.Head.TTL, tunnelAlive:
		return federation.Stale
	}
	return federation.Withdrawn
}

// Conflict returns the evidence of a fork, or nil.
func (s *Store) Conflict(origin spiffeid.TrustDomain) *Conflict {
	im := s.find(origin)
	if im == nil {
		return nil
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.conflict
}

// Forget removes everything about origin, the mark and the evidence included (eviction, member reset-epoch).
func (s *Store) Forget(origin spiffeid.TrustDomain) error {
	im := s.find(origin)
	if im == nil {
		return nil
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	for _, suffix := range []string{catalogSuffix, conflictSuffix} {
		if err := s.dir.Remove(file(origin, suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forget catalog of %s: %w", origin, err)
		}
	}
	im.gone = true
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.origins[origin] == im {
		delete(s.origins, origin)
	}
	return nil
}

// Origins lists whose catalogs are held, sorted.
func (s *Store) Origins() []spiffeid.TrustDomain {
	s.mu.Lock()
	all := make(map[spiffeid.TrustDomain]*imported, len(s.origins))
	for td, im := range s.origins {
		all[td] = im
	}
	s.mu.Unlock()
	for td, im := range all {
		im.mu.Lock()
		if im.view == nil {
			delete(all, td)
		}
		im.mu.Unlock()
	}
	return sortedKeys(all)
}

// marshalStored is 8 bytes of arrival time in milliseconds and a snapshot.
func marshalStored(received time.Time, h *held) []byte {
	b := binary.BigEndian.AppendUint64(nil, uint64(received.UnixMilli()))
	out, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend(b, h.update(0, 0))
	if err != nil { // the message was unmarshalled from bytes of the same form
		return b
	}
	return out
}

func unmarshalStored(b []byte) (time.Time, *controlpb.CatalogUpdate, error) {
	if len(b) < 8 {
		return time.Time{}, nil, errors.New("stored catalog is too short")
	}
	var u controlpb.CatalogUpdate
	if err := proto.Unmarshal(b[8:], &u); err != nil {
		return time.Time{}, nil, fmt.Errorf("stored catalog: %w", err)
	}
	return time.UnixMilli(int64(binary.BigEndian.Uint64(b))).UTC(), &u, nil
}

// marshalConflict is 8 bytes of time, the length of the first head, both heads.
func marshalConflict(c *Conflict) []byte {
	first, err1 := proto.Marshal(c.First)
	second, err2 := proto.Marshal(c.Second)
	if err1 != nil || err2 != nil {
		return nil
	}
	b := binary.BigEndian.AppendUint64(nil, uint64(c.SeenAt.UnixMilli()))
	b = binary.BigEndian.AppendUint32(b, uint32(len(first)))
	return append(append(b, first...), second...)
}

func unmarshalConflict(b []byte) *Conflict {
	c := &Conflict{First: &controlpb.SignedHead{}, Second: &controlpb.SignedHead{}}
	if len(b) < 12 || int(binary.BigEndian.Uint32(b[8:])) > len(b)-12 {
		return nil
	}
	n := 12 + int(binary.BigEndian.Uint32(b[8:]))
	if proto.Unmarshal(b[12:n], c.First) != nil || proto.Unmarshal(b[n:], c.Second) != nil {
		return nil
	}
	c.SeenAt = time.UnixMilli(int64(binary.BigEndian.Uint64(b))).UTC()
	return c
}
