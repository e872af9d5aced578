// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// OriginConfig makes an Origin.
type OriginConfig struct {
	Self   spiffeid.TrustDomain
	Signer func() *trust.Identity // the catalog signer's current identity; nil result: not now
	// Epoch re-reads the signer's term before every signature: it returns the term's epoch, raised in the store by
	// compare-and-swap to at least atLeast, or an error when another process holds the term. Each new term has a higher epoch
	// than every one before.
	Epoch          func(ctx context.Context, atLeast uint64) (uint64, error)
	BundleSequence func() uint64 // of our trust bundle; nil: 0
	// TTL of heads (0: DefaultTTL). They are signed again every third of it. A higher one notices a silent control plane later.
	TTL time.Duration
	// Debounce is how long a change waits for others before it is signed (0: 50 ms).
	Debounce time.Duration
	Now      func() time.Time
	Logger   *slog.Logger
}

func (c *OriginConfig) defaults() error {
	if c.Self.IsZero() || c.Signer == nil || c.Epoch == nil {
		return errors.New("catalog origin: Self, Signer and Epoch are required")
	}
	if c.TTL == 0 {
		c.TTL = DefaultTTL
	}
	if c.TTL < 3*time.Millisecond || c.TTL > MaxTTL {
		return fmt.Errorf("catalog origin: ttl %v is not within 3ms and %v", c.TTL, MaxTTL)
	}
	if c.Debounce == 0 {
		c.Debounce = 50 * time.Millisecond
	}
	if c.BundleSequence == nil {
		c.BundleSequence = func() uint64 { return 0 }
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	return nil
}

// Origin is what this cluster offers, one catalog for each consumer. Run signs; the other methods may be called concurrently,
// also before Run, and never sign themselves.
type Origin struct {
	cfg  OriginConfig
	kick chan struct{}

	mu      sync.Mutex
	offers  map[spiffeid.TrustDomain]*offer
	epoch   uint64                          // of the newest signature
	seqs    map[spiffeid.TrustDomain]uint64 // used in this epoch, also for consumers that are gone
	atLeast uint64                          // the next signature's epoch
	changed chan struct{}
}

type offer struct {
	want  map[string][]byte
	dirty bool
	held  *held // signed
}

// NewOrigin starts nothing.
func NewOrigin(cfg OriginConfig) (*Origin, error) {
	if err := cfg.defaults(); err != nil {
		return nil, err
	}
	return &Origin{
		cfg: cfg, kick: make(chan struct{}, 1), changed: make(chan struct{}),
		offers: map[spiffeid.TrustDomain]*offer{}, seqs: map[spiffeid.TrustDomain]uint64{},
	}, nil
}

// Run signs what changed and signs everything again every ttl/3, until ctx ends. While the signer or its term is not there it
// tries again each second (or each ttl/3, if that is shorter).
func (o *Origin) Run(ctx context.Context) error {
	resign := time.NewTicker(o.cfg.TTL / 3)
	defer resign.Stop()
	retry := time.NewTimer(0)
	defer retry.Stop()
	<-retry.C
	all := true
	said := ""
	for {
		if err := o.sign(ctx, all); err != nil && ctx.Err() == nil {
			if err.Error() != said { // once for each cause: a replica without the term waits for long
				o.cfg.Logger.Warn("catalog heads not signed", "error", err)
			}
			said = err.Error()
			retry.Reset(min(time.Second, o.cfg.TTL/3))
		} else {
			all, said = false, ""
		}
		select {
		case <-ctx.Done():
			return nil
		case <-resign.C:
			all = true
		case <-retry.C:
		case <-o.kick:
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(o.cfg.Debounce):
			}
		}
	}
}

// sign signs every changed offer, or all of them. The term is read again before each signature.
func (o *Origin) sign(ctx context.Context, all bool) error {
	for _, c := range o.Consumers() {
		o.mu.Lock()
		atLeast := o.atLeast
		due := all || o.dueLocked(c)
		o.mu.Unlock()
		if !due {
			continue
		}
		id := o.cfg.Signer()
		if id == nil {
			return errors.New("no signer identity")
		}
		epoch, err := o.cfg.Epoch(ctx, atLeast)
		if err != nil {
			return fmt.Errorf("signer term: %w", err)
		}
		if err := o.signOne(c, epoch, id); err != nil {
			return err
		}
	}
	return nil
}

func (o *Origin) dueLocked(c spiffeid.TrustDomain) bool {
	of := o.offers[c]
	return of != nil && (of.dirty || of.held == nil || of.held.head.Epoch < max(o.epoch, o.atLeast))
}

// signOne signs what consumer is offered now, under epoch. A new epoch starts its sequences at one.
func (o *Origin) signOne(consumer spiffeid.TrustDomain, epoch uint64, id *trust.Identity) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	of := o.offers[consumer]
	if of == nil {
		return nil
	}
	if epoch == 0 || epoch < o.epoch || epoch < o.atLeast {
		return fmt.Errorf("signer term: epoch %d is behind %d", epoch, max(o.epoch, o.atLeast))
	}
	if epoch > o.epoch {
		o.epoch = epoch
		clear(o.seqs)
	}
	var l *ledger
	if of.held != nil && of.held.head.Epoch == epoch {
		l = of.held.ledger
	}
	seq := o.seqs[consumer]
	next, changed := l.advance(of.want, seq+1)
	if changed || l == nil {
		if l == nil { // nothing of this epoch is held by anybody: deltas begin here
			next = next.clone()
			next.floor = seq + 1
		}
		seq++
	}
	h := Head{
		TrustDomain: o.cfg.Self, Consumer: consumer, Epoch: epoch, Seq: seq, Hash: next.hash(), Count: next.live,
		IssuedAt: o.cfg.Now().UTC().Truncate(time.Millisecond), TTL: o.cfg.TTL, BundleSequence: o.cfg.BundleSequence(),
	}
	signed, err := Sign(h, id)
	if err != nil {
		return err
	}
	o.seqs[consumer] = seq
	of.held, of.dirty = &held{head: h, signed: signed, ledger: next}, false
	close(o.changed)
	o.changed = make(chan struct{})
	return nil
}

// Set replaces what consumer is offered: entry bodies by key (ServiceKey, GatewayKey, BundleKey, SeenKey, DenialKey). The bodies
// belong to the origin from then on. More than a consumer's default quota is refused with *QuotaError.
func (o *Origin) Set(consumer spiffeid.TrustDomain, entries map[string][]byte) error {
	size, denials := 0, 0
	for k, b := range entries {
		if !known(k) || len(k) > maxKeySize {
			return &ForeignError{Origin: o.cfg.Self, Key: k, Why: "an entry of no known kind"}
		}
		size += len(k) + len(b)
		if strings.HasPrefix(k, denialPrefix) {
			denials++
		}
	}
	if denials > MaxDenials {
		return &QuotaError{Origin: o.cfg.Self, Quota: "denials", Have: denials, Limit: MaxDenials}
	}
	if len(entries) > DefaultMaxEntries {
		return &QuotaError{Origin: o.cfg.Self, Quota: "entries", Have: len(entries), Limit: DefaultMaxEntries}
	}
	if size > DefaultMaxBytes {
		return &QuotaError{Origin: o.cfg.Self, Quota: "bytes", Have: size, Limit: DefaultMaxBytes}
	}
	o.mu.Lock()
	of := o.offers[consumer]
	if of == nil {
		of = &offer{}
		o.offers[consumer] = of
	}
	of.want, of.dirty = maps.Clone(entries), true
	o.mu.Unlock()
	o.wake()
	return nil
}

func (o *Origin) wake() {
	select {
	case o.kick <- struct{}{}:
	default:
	}
}

// Drop forgets a consumer.
func (o *Origin) Drop(consumer spiffeid.TrustDomain) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.offers, consumer)
}

// Consumers lists to whom something is offered, sorted.
func (o *Origin) Consumers() []spiffeid.TrustDomain {
	o.mu.Lock()
	defer o.mu.Unlock()
	return sortedKeys(o.offers)
}

func sortedKeys[V any](m map[spiffeid.TrustDomain]V) []spiffeid.TrustDomain {
	return slices.SortedFunc(maps.Keys(m), func(a, b spiffeid.TrustDomain) int { return strings.Compare(a.String(), b.String()) })
}

// Update returns what a consumer that has (epoch, seq) is missing: a delta, a snapshot, the head alone when nothing is missing,
// or nil when nothing is signed yet.
func (o *Origin) Update(consumer spiffeid.TrustDomain, haveEpoch, haveSeq uint64) *controlpb.CatalogUpdate {
	o.mu.Lock()
	var h *held
	if of := o.offers[consumer]; of != nil {
		h = of.held
	}
	o.mu.Unlock()
	return h.update(haveEpoch, haveSeq)
}

// Head returns the newest signed head for consumer, or nil.
func (o *Origin) Head(consumer spiffeid.TrustDomain) *Head {
	o.mu.Lock()
	defer o.mu.Unlock()
	if of := o.offers[consumer]; of != nil && of.held != nil {
		h := of.held.head
		return &h
	}
	return nil
}

// Changed returns a channel that is closed when any head is signed next.
func (o *Origin) Changed() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.changed
}

// Meet takes a head of our own that a peer holds, which may come from before a backup was restored. If it is ahead of what we
// sign, the next signature jumps above its epoch. A jump of more than MaxEpochJump is refused. Ask the peers and meet their heads
// before Run.
func (o *Origin) Meet(sh *controlpb.SignedHead, bundles *trust.Bundles) error {
	h, err := ParseHead(sh.GetHead())
	if err != nil {
		return &HeadError{Reason: "malformed", Err: err}
	}
	// as of its own time: the backup may be older than the signer's certificate lived, and believing an old head of ours only
	// raises our epoch, within bounds
	if h, err = VerifyHead(sh, bundles, o.cfg.Self, h.Consumer, h.IssuedAt); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.aheadLocked(h) || h.Epoch < o.atLeast {
		return nil
	}
	if have := max(o.epoch, o.atLeast); have > 0 && h.Epoch-min(h.Epoch, have) > MaxEpochJump {
		return fmt.Errorf("meet own head %d.%d with %d: %w", h.Epoch, h.Seq, have, ErrEpochJump)
	}
	o.atLeast = h.Epoch + 1
	o.wake()
	return nil
}

// aheadLocked reports whether h is not one that this process signed.
func (o *Origin) aheadLocked(h *Head) bool {
	if h.Epoch != o.epoch {
		return h.Epoch > o.epoch
	}
	seq := o.seqs[h.Consumer]
	if h.Seq != seq {
		return h.Seq > seq
	}
	of := o.offers[h.Consumer]
	return of != nil && of.held != nil && of.held.head.Hash != h.Hash
}
