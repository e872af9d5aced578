// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"strings"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	minPause = 100 * time.Millisecond
	maxPause = 5 * time.Second
	// header keeps a server from answering requests that somebody was tricked into sending (Workload Endpoint, section 6).
	header = "workload.spiffe.io"
)

var errRefresh = errors.New("nothing came for most of an identity's lifetime")

// retry runs stream until h ends. A stream that returns true has delivered something that was taken.
func (h *Handle) retry(what string, stream func(context.Context) (taken bool, err error)) {
	pause := minPause
	for failures := 1; h.ctx.Err() == nil; failures++ {
		h.conn.ResetConnectBackoff()
		taken, err := stream(metadata.AppendToOutgoingContext(h.ctx, header, "true"))
		if h.ctx.Err() != nil {
			return
		}
		if taken {
			pause, failures = minPause, 1
		}
		if failures&(failures-1) == 0 && !errors.Is(err, errRefresh) { // 1, 2, 4, … so that a day without a server does not fill a disk
			h.log.Warn("workload API: "+what+" interrupted", "attempts", failures, "err", err)
		}
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-h.ctx.Done():
		}
		pause = min(2*pause, maxPause)
	}
}

func (h *Handle) x509Loop(client workload.SpiffeWorkloadAPIClient) {
	h.retry("X.509", func(ctx context.Context) (taken bool, err error) {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		late := time.AfterFunc(h.refreshIn(), func() { cancel(errRefresh) })
		defer late.Stop()
		stream, err := client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		for err == nil {
			var m *workload.X509SVIDResponse
			if m, err = stream.Recv(); err != nil {
				break
			}
			if err = h.take(m); err == nil {
				taken = true
				late.Reset(h.refreshIn())
			}
		}
		if errors.Is(context.Cause(ctx), errRefresh) {
			return taken, errRefresh
		}
		h.failed(err)
		return taken, err
	})
}

// refreshIn is how long a stream may be silent: until three quarters of the lifetime of the identity that ends first, and then a
// tenth of what is left, at least 1 s.
func (h *Handle) refreshIn() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.cfg.Now()
	wait := time.Hour
	for _, id := range h.identities {
		if id == nil {
			continue
		}
		life := id.NotAfter.Sub(id.NotBefore)
		if due := id.NotBefore.Add(life / 4 * 3).Sub(now); due > 0 {
			wait = min(wait, due)
		} else {
			wait = min(wait, max(id.NotAfter.Sub(now)/10, 0))
		}
	}
	return max(wait, time.Second)
}

// jwtLoop begins when the own trust domain is known.
func (h *Handle) jwtLoop(client workload.SpiffeWorkloadAPIClient) {
	select {
	case <-h.ready:
	case <-h.ctx.Done():
		return
	}
	h.retry("JWT keys", func(ctx context.Context) (taken bool, err error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := client.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
		for err == nil {
			var m *workload.JWTBundlesResponse
			if m, err = stream.Recv(); err != nil {
				break
			}
			var keys []trust.JWTKey
			if keys, err = readJWTKeys(m, h.Bundle().TrustDomain()); err == nil {
				err = h.takeJWTKeys(keys)
			}
			taken = taken || err == nil
		}
		if status.Code(err) == codes.Unimplemented {
			err = h.takeJWTKeys(nil)
			if err == nil {
				<-h.ctx.Done() // it will not learn that while it runs
			}
		}
		return taken, err
	})
}

// failed remembers what Status and Open say. Nothing that is in force changes.
func (h *Handle) failed(err error) {
	if s, ok := status.FromError(err); ok && err != nil {
		switch s.Code() {
		case codes.PermissionDenied:
			err = fmt.Errorf("it knows no entry for this process (%.200s)", s.Message())
		case codes.Unavailable:
			err = fmt.Errorf("it does not answer (%.300s)", s.Message())
		case codes.InvalidArgument, codes.Unimplemented:
			err = fmt.Errorf("it is no Workload API (%.200s)", s.Message())
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lastErr = err
}

// take judges one message and puts in force what holds of it. An error asks for the message once more, later.
func (h *Handle) take(m *workload.X509SVIDResponse) error {
	o, err := readOffer(m, h.cfg.Now())
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.offered = o.offered
	chosen, own, missing := h.choose(o)
	h.unmet = missing
	refused := errors.Join(o.refused...)
	if own == nil || h.bundle == nil && len(missing) > 0 {
		return unmet(missing, refused)
	}
	if h.bundle == nil {
		if err := h.loadLocked(own.TrustDomain()); err != nil {
			h.fatal = err
			h.cancel()
			return err
		}
	}
	if err := h.publishLocked(own, h.jwtKeysLocked()); err != nil {
		return err
	}
	for i, id := range chosen {
		if id != nil {
			h.identities[i] = id
		}
	}
	if chosen[0] != nil {
		h.cfg.Source.SetIdentity(chosen[0])
		h.log.Debug("workload API: identity", "id", chosen[0].ID, "not_after", chosen[0].NotAfter)
	}
	h.federateLocked(o.federated)
	h.updated, h.lastErr = h.cfg.Now(), nil
	h.tellLocked()
	select {
	case <-h.ready:
	default:
		close(h.ready)
		h.log.Info("workload API: identity obtained", "id", h.identities[0].ID, "not_after", h.identities[0].NotAfter)
	}
	if refused != nil {
		h.log.Warn("workload API: part of the offer is refused", "err", refused)
	}
	if len(missing) > 0 {
		return unmet(missing, refused)
	}
	return nil
}

// unmet is why a message does not suffice.
func unmet(missing []string, refused error) error {
	if refused != nil {
		return fmt.Errorf("refused: %w", refused)
	}
	return fmt.Errorf("%s is not among what it offers", strings.Join(missing, " and "))
}

// choose finds an SVID for each want, nil for those without, and the bundle that they came with.
func (h *Handle) choose(o *offer) (chosen []*trust.Identity, own *trust.Bundle, missing []string) {
	var td spiffeid.TrustDomain
	if h.bundle != nil {
		td = h.bundle.TrustDomain()
	}
	chosen = make([]*trust.Identity, len(h.cfg.Wants))
	for i, w := range h.cfg.Wants {
		for _, s := range o.svids {
			id := s.identity
			if !w.Fits(id.ID) || !td.IsZero() && id.ID.TrustDomain() != td || own != nil && s.bundle.Hash() != own.Hash() {
				continue
			}
			if have := h.identities[i]; chosen[i] == nil || have != nil && have.ID == id.ID {
				chosen[i] = id
			}
		}
		if chosen[i] == nil {
			missing = append(missing, w.Text)
			continue
		}
		if own == nil {
			td = chosen[i].ID.TrustDomain()
			for _, s := range o.svids {
				if s.identity == chosen[i] {
					own = s.bundle
				}
			}
		}
	}
	return chosen, own, missing
}

func (h *Handle) file(td spiffeid.TrustDomain) string {
	if h.cfg.File != "" {
		return h.cfg.File
	}
	return "bundles/" + td.String() + ".json"
}

// loadLocked reads the bundle of the run before.
func (h *Handle) loadLocked(td spiffeid.TrustDomain) error {
	data, err := h.cfg.Dir.ReadFile(h.file(td))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("workload API: %w", err)
	}
	if h.bundle, err = trust.ParseBundle(td, data); err != nil {
		return fmt.Errorf("workload API: %s: %w", h.cfg.Dir.Path(h.file(td)), err)
	}
	return nil
}

func (h *Handle) jwtKeysLocked() []trust.JWTKey {
	if h.bundle == nil {
		return nil
	}
	return h.bundle.JWTKeys()
}

// publishLocked puts the own bundle in force, with the next number when it says something new.
func (h *Handle) publishLocked(roots *trust.Bundle, keys []trust.JWTKey) error {
	next, err := roots.WithJWTKeys(keys)
	if err != nil {
		return err
	}
	last := uint64(0)
	if h.bundle != nil {
		last = h.bundle.Sequence()
	}
	if next = next.WithSequence(last); h.bundle != nil && next.Equal(h.bundle) {
		next = h.bundle
	} else {
		next = next.WithSequence(last + 1)
		if err := h.cfg.Dir.WriteFile(h.file(next.TrustDomain()), next.Marshal()); err != nil {
			return fmt.Errorf("workload API: %w", err)
		}
		h.log.Info("workload API: bundle", "trust_domain", next.TrustDomain(), "sequence", next.Sequence(), "roots", len(next.Roots()))
	}
	h.bundle = next
	h.cfg.Source.UpdateBundles(func(all *trust.Bundles) *trust.Bundles {
		if all.Get(next.TrustDomain()) == next {
			return all
		}
		return all.With(next)
	})
	return nil
}

func (h *Handle) takeJWTKeys(keys []trust.JWTKey) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	before := h.bundle
	err := h.publishLocked(h.bundle, keys)
	if h.bundle != before {
		h.tellLocked()
	}
	return err
}

// federateLocked puts the federated bundles in force that Config.Federated lets in, and takes back those that it put there before.
func (h *Handle) federateLocked(offered map[spiffeid.TrustDomain]*trust.Bundle) {
	if h.cfg.Federated == nil {
		return
	}
	own := h.bundle.TrustDomain()
	h.cfg.Source.UpdateBundles(func(all *trust.Bundles) *trust.Bundles {
		for td, b := range h.federated {
			if offered[td] == nil && all.Get(td) == b {
				all = all.Without(td)
				delete(h.federated, td)
			}
		}
		for td, b := range offered {
			if have := all.Get(td); td == own || !h.cfg.Federated(td) || have != nil && have.Hash() == b.Hash() {
				continue
			}
			all = all.With(b)
			h.federated[td] = b
		}
		return all
	})
}

func (h *Handle) tellLocked() {
	close(h.changed)
	h.changed = make(chan struct{})
}
