// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	maxUpdate      = 16 << 20 // one catalog update on the wire
	maxHave        = 1024
	pullBackoffMin = 100 * time.Millisecond
	pullBackoffMax = 10 * time.Second
	updateTimeout  = 30 * time.Second // to write one update
	offersDir      = "catalogs/offers"
	// hintPatience is how long after a hint an update is waited for where the subscription is; then another gateway of the peer is asked.
	hintPatience = time.Second
	updateRate   = 20 // updates of one peer a second; an honest origin signs at most as many
	updateBurst  = 100
)

// takeOffer keeps what a consumer may see, and serves it from then on, also without the control plane.
func (g *Gateway) takeOffer(o *controlpb.Offer) {
	td, err := spiffeid.ParseTrustDomain(o.ConsumerTrustDomain)
	if err != nil {
		return
	}
	if o.Withdrawn {
		g.offers.Drop(td)
		g.forgetOffer(td)
		return
	}
	if _, err := g.offers.Apply(td, o.Update); err != nil {
		g.log.Warn("offer not applied", "peer", td.String(), "error", err.Error())
		return
	}
	g.saveOffer(td)
	g.gossip.Hint(g.td)
}

func offerFile(td spiffeid.TrustDomain) string { return offersDir + "/" + td.String() }

func (g *Gateway) saveOffer(td spiffeid.TrustDomain) {
	if g.cfg.DataDir == nil {
		return
	}
	u := g.offers.Update(td, 0, 0)
	if u == nil {
		return
	}
	b, err := proto.Marshal(u)
	if err == nil {
		err = g.cfg.DataDir.WriteState(offerFile(td), b)
	}
	if err != nil {
		g.log.Warn("offer not kept on disk", "peer", td.String(), "error", err.Error())
	}
}

func (g *Gateway) forgetOffer(td spiffeid.TrustDomain) {
	if g.cfg.DataDir != nil {
		_ = g.cfg.DataDir.Remove(offerFile(td))
	}
}

// loadOffers takes back what was kept on disk. A peer that has left since is dropped with the first view.
func (g *Gateway) loadOffers() {
	if g.cfg.DataDir == nil {
		return
	}
	names, err := g.cfg.DataDir.List(offersDir)
	if err != nil {
		return
	}
	for _, name := range names {
		td, err := spiffeid.ParseTrustDomain(name)
		if err != nil {
			continue
		}
		b, err := g.cfg.DataDir.ReadState(offerFile(td))
		u := &controlpb.CatalogUpdate{}
		if err == nil {
			err = proto.Unmarshal(b, u)
		}
		if err == nil {
			_, err = g.offers.Apply(td, u)
		}
		if err != nil {
			g.log.Warn("kept offer not usable", "peer", td.String(), "error", err.Error())
		}
	}
}

// serveCatalog streams what the peer may see: first what is new since its mark, then each change.
func (g *Gateway) serveCatalog(ctx context.Context, s *tunnel.Session, st tunnel.Stream) {
	_ = st.SetReadDeadline(time.Now().Add(10 * time.Second))
	b, err := tunnel.ReadFrame(st, maxHave)
	have := &controlpb.CatalogMark{}
	if err != nil || proto.Unmarshal(b, have) != nil {
		return
	}
	_ = st.SetReadDeadline(time.Time{})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	gone := make(chan struct{})
	g.wg.Go(func() {
		defer close(gone)
		_, _ = tunnel.ReadFrame(st, 0) // the reader says nothing more
		cancel()
	})
	defer func() { st.Reset(); <-gone }()
	td, epoch, seq := s.Peer(), have.Epoch, have.Seq
	for {
		changed := g.offers.Changed(td)
		tunnels := g.tun.Changed() // also when a peer becomes ready
		ready := g.view.Load().ready(td)
		if ready {
			tunnels = nil
		}
		if u := g.offers.Update(td, epoch, seq); u != nil && ready {
			b, err := proto.Marshal(u)
			if err != nil || len(b) > maxUpdate {
				g.log.Error("catalog not served", "peer", td.String(), "bytes", len(b))
				return
			}
			_ = st.SetWriteDeadline(time.Now().Add(updateTimeout))
			if err := tunnel.WriteFrame(st, b); err != nil {
				return
			}
			if h, err := catalog.ParseHead(u.GetHead().GetHead()); err == nil {
				epoch, seq = h.Epoch, h.Seq
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-tunnels:
		}
	}
}

// pull keeps a subscription to one peer's catalog.
type pull struct {
	cancel context.CancelFunc
	kick   chan struct{} // a hint came
	again  chan struct{} // start over from nothing
	pace   *rate.Limiter // of the updates taken: each costs a signature and a hash over all entries
}

// syncPulls runs one pull for each peer that is ready.
func (g *Gateway) syncPulls(ctx context.Context, v *view) {
	g.pullMu.Lock()
	defer g.pullMu.Unlock()
	for td, p := range g.pulls {
		if !v.ready(td) {
			p.cancel()
			delete(g.pulls, td)
		}
	}
	for td, p := range v.peers {
		if !p.ready || g.pulls[td] != nil {
			continue
		}
		pctx, cancel := context.WithCancel(ctx)
		p := &pull{cancel: cancel, kick: make(chan struct{}, 1), again: make(chan struct{}, 1),
			pace: rate.NewLimiter(updateRate, updateBurst)}
		g.pulls[td] = p
		g.wg.Go(func() { g.pullLoop(pctx, td, p) })
	}
}

// followHints has the catalogs pulled again of which gossip says that they changed. Subscriptions stream anyhow.
func (g *Gateway) followHints(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case td, ok := <-g.gossip.Hints():
			if !ok {
				return nil
			}
			g.pullMu.Lock()
			if p := g.pulls[td]; p != nil {
				wake(p.kick)
			}
			g.pullMu.Unlock()
		}
	}
}

func (g *Gateway) resync(td spiffeid.TrustDomain) {
	g.pullMu.Lock()
	defer g.pullMu.Unlock()
	if p := g.pulls[td]; p != nil {
		wake(p.again)
	}
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (g *Gateway) pullLoop(ctx context.Context, td spiffeid.TrustDomain, p *pull) {
	backoff := pullBackoffMin
	var not []*tunnel.Session // whose gateway lags behind
	for ctx.Err() == nil {
		s := g.awaitSession(ctx, td, not...)
		if s == nil {
			return
		}
		n, err := g.pullFrom(ctx, s, td, p)
		if ctx.Err() != nil {
			return
		}
		not = nil
		if n > 0 {
			backoff = pullBackoffMin
		}
		if errors.Is(err, errLags) {
			g.log.Info("catalog is asked of another gateway", "peer", td.String(), "tunnel", s.ID(), "gateway", s.Gateway())
			not, backoff = []*tunnel.Session{s}, pullBackoffMin
		}
		g.log.Debug("catalog subscription ended", "peer", td.String(), "tunnel", s.ID(), "error", errString(err))
		t := time.NewTimer(backoff/2 + rand.N(backoff))
		select {
		case <-ctx.Done():
		case <-p.kick:
		case <-t.C:
		}
		t.Stop()
		backoff = min(2*backoff, pullBackoffMax)
	}
}

// pullFrom follows td's catalog through s until that breaks; it returns how many updates it took.
func (g *Gateway) pullFrom(ctx context.Context, s *tunnel.Session, td spiffeid.TrustDomain, p *pull) (n int, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st, err := s.OpenCatalog(ctx)
	if err != nil {
		return 0, err
	}
	defer st.Reset()
	var taken atomic.Int64 // when the last update was, Unix nanoseconds
	lags := false
	ended := make(chan struct{})
	defer func() {
		cancel()
		<-ended
		if lags {
			err = errLags
		}
	}()
	g.wg.Go(func() {
		defer close(ended)
		lags = g.supervisePull(ctx, p, &taken)
		st.Reset()
	})
	epoch, seq := g.imports.Mark(td)
	b, err := proto.Marshal(&controlpb.CatalogMark{Epoch: epoch, Seq: seq})
	if err != nil {
		return 0, err
	}
	if err := tunnel.WriteFrame(st, b); err != nil {
		return 0, err
	}
	for ; ; n++ {
		if err := p.pace.Wait(ctx); err != nil {
			return n, err
		}
		b, err := tunnel.ReadFrame(st, maxUpdate)
		if err != nil {
			return n, err
		}
		u := &controlpb.CatalogUpdate{}
		if err := proto.Unmarshal(b, u); err != nil {
			return n, err
		}
		// A gateway that serves something else than its origin signed for us is not believed, and not asked at once again.
		if _, err := catalog.VerifyHead(u.GetHead(), g.cfg.Client.Source().Bundles(), td, g.td, g.cfg.Now()); err != nil {
			return 0, fmt.Errorf("catalog of %s: %w", td, err)
		}
		if _, err := g.imports.Apply(td, u); err != nil {
			return 0, fmt.Errorf("catalog of %s: %w", td, err)
		}
		taken.Store(time.Now().UnixNano())
		g.link.importsChanged()
	}
}

// errLags says that a gateway serves no update of which gossip has told.
var errLags = errors.New("the gateway serves no update although there is one")

// supervisePull returns when a subscription is to end: with ctx, to begin again, or because of a hint that no update has come for. A
// gateway that has lost its control plane, that was withdrawn by it, or that withholds, does not keep the catalog from us while there
// is another one.
func (g *Gateway) supervisePull(ctx context.Context, p *pull, taken *atomic.Int64) (lags bool) {
	t := time.NewTimer(time.Hour)
	defer t.Stop()
	var hinted time.Time
	for {
		select {
		case <-ctx.Done():
			return false
		case <-p.again:
			return false
		case <-p.kick:
			if hinted.IsZero() {
				hinted = time.Now()
				t.Reset(hintPatience)
			}
		case <-t.C:
			if !hinted.IsZero() && taken.Load() < hinted.Add(-2*hintPatience).UnixNano() { // gossip may be the slower one
				return true
			}
			hinted = time.Time{}
		}
	}
}

func headSum(u *controlpb.CatalogUpdate) [32]byte {
	return sha256.Sum256(append(append([]byte(nil), u.GetHead().GetHead()...), u.GetHead().GetSignature()...))
}
