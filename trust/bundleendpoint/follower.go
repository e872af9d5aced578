// SPDX-License-Identifier: Apache-2.0

package bundleendpoint

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	minBackoff = 10 * time.Second
	maxBackoff = time.Hour
)

// FollowerConfig of a Follower.
type FollowerConfig struct {
	Dir      *datadir.Dir   // bundles are kept below bundles/; required
	WebRoots *x509.CertPool // of https_web; nil: the system's
	// AllowLocal lets endpoints be at loopback and link-local addresses: for federations on one machine.
	AllowLocal bool
	// Dial replaces the network; the rule on addresses is then its own.
	Dial   func(ctx context.Context, network, addr string) (net.Conn, error)
	Now    func() time.Time
	Logger *slog.Logger
}

// Followed is what is known of one foreign trust domain.
type Followed struct {
	Endpoint  Endpoint
	Bundle    *trust.Bundle // in force; nil: none yet
	Confirmed time.Time     // when the endpoint last said so; zero: never, it is the configuration's
	Next      time.Time     // when it is asked again; zero: never
	Failures  int           // in a row
	Err       error         // of the last attempt; nil after a success
}

// Follower keeps the bundles of foreign trust domains. Make it with NewFollower.
type Follower struct {
	cfg FollowerConfig

	mu      sync.Mutex
	entries map[spiffeid.TrustDomain]*entry
	changed chan struct{}
	wake    chan struct{} // cap 1: entries were added or removed
}

type entry struct {
	state  Followed
	inline string // SHA-256 of the inline bundle, hexadecimal
	cancel context.CancelFunc
}

// stored is the file of a trust domain.
type stored struct {
	Bundle    json.RawMessage `json:"bundle"`
	Confirmed time.Time       `json:"confirmed"`
	Inline    string          `json:"inline,omitempty"`
}

// NewFollower makes a follower of nobody.
func NewFollower(cfg FollowerConfig) (*Follower, error) {
	if cfg.Dir == nil {
		return nil, errors.New("bundle follower: no data directory")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Follower{cfg: cfg, entries: map[spiffeid.TrustDomain]*entry{}, changed: make(chan struct{}), wake: make(chan struct{}, 1)}, nil
}

// Set says whom to follow from now on, in place of whom it followed before. Endpoints that fail Check, and the second of one trust
// domain, are left out and returned as an error.
func (f *Follower) Set(list []Endpoint) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	next := map[spiffeid.TrustDomain]*entry{}
	changed := false
	for _, e := range list {
		if err := e.Check(); err != nil {
			errs = append(errs, fmt.Errorf("trust domain %s: %w", e.TrustDomain, err))
			continue
		}
		if next[e.TrustDomain] != nil {
			errs = append(errs, fmt.Errorf("trust domain %s stands twice", e.TrustDomain))
			continue
		}
		if old := f.entries[e.TrustDomain]; old != nil && old.same(e) {
			next[e.TrustDomain] = old
			continue
		}
		next[e.TrustDomain] = f.load(e)
		changed = true
	}
	for td, old := range f.entries {
		if next[td] != old {
			changed = true
			if old.cancel != nil {
				old.cancel()
			}
		}
	}
	if changed {
		f.entries = next
		f.changedLocked()
		select {
		case f.wake <- struct{}{}:
		default:
		}
	}
	return errors.Join(errs...)
}

func (e *entry) same(o Endpoint) bool {
	have := e.state.Endpoint
	return have.URL == o.URL && have.Profile == o.Profile && have.EndpointID == o.EndpointID && e.inline == inlineHash(o.Bundle)
}

func inlineHash(b *trust.Bundle) string {
	if b == nil {
		return ""
	}
	sum := sha256.Sum256(b.Marshal())
	return hex.EncodeToString(sum[:])
}

func file(td spiffeid.TrustDomain) string { return "bundles/" + td.String() }

// load begins with what is on disk, unless the operator has given another bundle since.
func (f *Follower) load(e Endpoint) *entry {
	n := &entry{state: Followed{Endpoint: e}, inline: inlineHash(e.Bundle)}
	have, s, err := f.read(e.TrustDomain)
	switch {
	case err == nil && (n.inline == "" || s.Inline == n.inline):
		n.state.Bundle, n.state.Confirmed = have, s.Confirmed
		if e.URL == "" {
			n.state.Bundle, n.state.Confirmed = e.Bundle, time.Time{}
		}
		return n
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		f.cfg.Logger.Error("followed bundle not read", "trust_domain", e.TrustDomain, "err", err)
		n.state.Err = err
	}
	if e.Bundle != nil {
		n.state.Bundle = e.Bundle
		if err := f.write(n); err != nil {
			f.cfg.Logger.Error("followed bundle not saved", "trust_domain", e.TrustDomain, "err", err)
		}
	}
	return n
}

func (f *Follower) read(td spiffeid.TrustDomain) (*trust.Bundle, *stored, error) {
	data, err := f.cfg.Dir.ReadState(file(td))
	if err != nil {
		return nil, nil, err
	}
	var s stored
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, nil, err
	}
	b, err := trust.ParseBundle(td, s.Bundle)
	return b, &s, err
}

func (f *Follower) write(e *entry) error {
	data, err := json.Marshal(stored{Bundle: e.state.Bundle.Marshal(), Confirmed: e.state.Confirmed, Inline: e.inline})
	if err != nil {
		return err
	}
	return f.cfg.Dir.WriteState(file(e.state.Endpoint.TrustDomain), data)
}

func (f *Follower) changedLocked() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// Changed is closed at the next change of what Followed returns, other than a plain confirmation.
func (f *Follower) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// Followed returns what is known, sorted by trust domain.
func (f *Follower) Followed() []Followed {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]Followed, 0, len(f.entries))
	for _, e := range f.entries {
		out = append(out, e.state)
	}
	slices.SortFunc(out, func(a, b Followed) int {
		return strings.Compare(a.Endpoint.TrustDomain.String(), b.Endpoint.TrustDomain.String())
	})
	return out
}

// Run asks the endpoints until ctx ends, one goroutine each, and returns after they have ended.
func (f *Follower) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		f.mu.Lock()
		for _, e := range f.entries {
			if e.cancel == nil && e.state.Endpoint.URL != "" {
				var own context.Context
				own, e.cancel = context.WithCancel(ctx)
				wg.Go(func() { f.follow(own, e) })
			}
		}
		f.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-f.wake:
		}
	}
}

// follow keeps one bundle.
func (f *Follower) follow(ctx context.Context, e *entry) {
	for ctx.Err() == nil {
		f.mu.Lock()
		held, endpoint := e.state.Bundle, e.state.Endpoint
		f.mu.Unlock()
		next, err := f.fetch(ctx, endpoint, held)
		if ctx.Err() != nil {
			return
		}
		wait := f.settle(e, next, err)
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
}

// settle takes the outcome of one attempt and returns how long to wait.
func (f *Follower) settle(e *entry, next *trust.Bundle, err error) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := &e.state
	td := s.Endpoint.TrustDomain
	if f.entries[td] != e {
		return 0 // the configuration changed meanwhile: another entry speaks for it, and may have begun anew
	}
	if err == nil {
		before, when := s.Bundle, s.Confirmed
		s.Bundle, s.Confirmed = next, f.cfg.Now()
		if err = f.write(e); err != nil { // in force only when it survives a restart: else an older one could come back
			s.Bundle, s.Confirmed = before, when
			err = fmt.Errorf("not saved: %w", err)
		} else if before == nil || !before.Equal(next) {
			f.cfg.Logger.Info("bundle of a foreign trust domain changed", "trust_domain", td, "sequence", next.Sequence(), "roots", len(next.Roots()))
			f.changedLocked()
		}
	}
	failed := s.Err != nil
	s.Err = err
	if err == nil {
		s.Failures = 0
		if failed {
			f.cfg.Logger.Info("bundle endpoint answers again", "trust_domain", td)
			f.changedLocked()
		}
	} else {
		s.Failures++
		if !failed {
			f.cfg.Logger.Warn("bundle endpoint not followed", "trust_domain", td, "url", s.Endpoint.URL, "err", err)
			f.changedLocked()
		}
	}
	wait := s.wait()
	s.Next = f.cfg.Now().Add(wait)
	return wait
}

// wait is the time until the next attempt, ±10 %.
func (s *Followed) wait() time.Duration {
	every := DefaultRefreshHint
	if s.Bundle != nil && s.Bundle.RefreshHint() > 0 {
		every = s.Bundle.RefreshHint()
	}
	every = min(max(every, trust.MinRefreshHint), trust.MaxRefreshHint)
	if s.Failures > 0 {
		every = min(every, maxBackoff, minBackoff<<min(s.Failures-1, 10))
	}
	return every - every/10 + rand.N(every/5+1)
}
