// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/federation/join"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	joinKeyFile  = "identity/join.key"
	gatewaysFile = "peers/own-gateways"
	catalogsDir  = "catalogs"

	tickEvery       = time.Second
	maxAlarms       = 64
	alarmsPerMinute = 20
	gatewayKept     = 24 * time.Hour   // how long a gateway without link stays listed
	freshnessGrace  = 15 * time.Second // after a start, and after a link's end: tunnels are not believed down yet
)

// Manager is the control plane's side of the federation.
type Manager struct {
	controlpb.UnimplementedGatewaysServer

	cfg     Config
	log     *slog.Logger
	now     func() time.Time
	joinKey ed25519.PrivateKey
	tokens  *join.Tokens
	origin  *catalog.Origin
	store   *catalog.Store
	epoch   *epochTerm
	started time.Time

	ctx    context.Context // ends when Run does; parent of everything that links start
	cancel context.CancelFunc
	wg     sync.WaitGroup // goroutines that are not a link's

	view     atomic.Pointer[View]
	handlers sync.Map   // method → Handler
	joining  sync.Mutex // one Join at a time

	mu       sync.Mutex
	stopped  bool
	changed  chan struct{}
	revision uint64
	peers    map[spiffeid.TrustDomain]*peer
	gateways map[string]*gateway
	links    map[string]*link
	offers   map[spiffeid.TrustDomain]map[string][]byte
	offered  map[spiffeid.TrustDomain]string // fingerprint of what the origin was given
	alarms   []Alarm

	own         *trust.Bundle // that bundleEntry is of
	bundleEntry []byte
	denied      []catalog.Denial // that denials and evicted are of
	denials     map[string][]byte
	evicted     map[spiffeid.ID]bool // own identities that are withdrawn altogether
}

// gateway is an own gateway, linked or remembered.
type gateway struct {
	hello     *controlpb.GatewayHello
	tunnels   []*controlpb.Tunnel
	connected bool
	lastSeen  time.Time
}

// storedGateway is one line of the state file of own gateways.
type storedGateway struct {
	Name      string    `json:"name"`
	Local     string    `json:"local"`
	Advertise []string  `json:"advertise,omitempty"`
	Zone      string    `json:"zone,omitempty"`
	Version   string    `json:"version,omitempty"`
	LastSeen  time.Time `json:"lastSeen"`
}

// New reads what the data directory holds. It starts nothing.
func New(cfg Config) (*Manager, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	m := &Manager{
		cfg: cfg, log: cfg.Logger, now: cfg.Now, started: cfg.Now(), changed: make(chan struct{}),
		gateways: map[string]*gateway{}, links: map[string]*link{},
		offers: map[spiffeid.TrustDomain]map[string][]byte{}, offered: map[spiffeid.TrustDomain]string{},
	}
	if m.joinKey, err = loadJoinKey(cfg); err != nil {
		return nil, err
	}
	if m.tokens, err = join.OpenTokens(cfg.Dir, join.TokensConfig{Now: cfg.Now, Logger: cfg.Logger}); err != nil {
		return nil, err
	}
	dir, err := cfg.Dir.Sub(catalogsDir)
	if err != nil {
		return nil, fmt.Errorf("catalogs: %w", err)
	}
	m.store, err = catalog.OpenStore(dir, catalog.StoreConfig{
		Self: cfg.TrustDomain, AllowLoopback: cfg.AllowLoopback, Now: cfg.Now, Logger: cfg.Logger,
	})
	if err != nil {
		return nil, err
	}
	epochs := cfg.Epochs
	if epochs == nil {
		epochs = NewFileEpochs(cfg.Dir)
	}
	m.epoch = &epochTerm{store: epochs, wait: m.waitHeads}
	m.origin, err = catalog.NewOrigin(catalog.OriginConfig{
		Self: cfg.TrustDomain, Signer: cfg.Signer, Epoch: m.epoch.get, TTL: cfg.CatalogTTL, Now: cfg.Now, Logger: cfg.Logger,
		BundleSequence: func() uint64 {
			if b := cfg.Bundle(); b != nil {
				return b.Sequence()
			}
			return 0
		},
	})
	if err != nil {
		return nil, err
	}
	m.peers, err = readRecords(cfg.Dir, func(name string, err error) {
		m.log.Error("peer record is not readable; the peer has to join again", "file", name, "error", err)
	})
	if err != nil {
		return nil, err
	}
	if err := m.readGateways(); err != nil {
		m.log.Warn("own gateways are not remembered", "error", err)
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.builtins()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.setOwnLocked(cfg.Bundle())
	m.setDeniedLocked(m.ownDenials())
	for _, td := range m.domainsLocked() {
		m.takeBundleLocked(td)
	}
	m.changedLocked()
	return m, nil
}

func loadJoinKey(cfg Config) (ed25519.PrivateKey, error) {
	seed, err := cfg.Dir.ReadState(joinKeyFile)
	switch {
	case err == nil && len(seed) == ed25519.SeedSize:
		return ed25519.NewKeyFromSeed(seed), nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("join key: %w", err)
	}
	seed = make([]byte, ed25519.SeedSize)
	_, _ = rand.Read(seed)
	if err := cfg.Dir.WriteState(joinKeyFile, seed); err != nil {
		return nil, fmt.Errorf("join key: %w", err)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

func (m *Manager) readGateways() error {
	data, err := m.cfg.Dir.ReadState(gatewaysFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var list []storedGateway
	if err := json.Unmarshal(data, &list); err != nil {
		return err
	}
	for _, g := range list {
		if g.LastSeen.IsZero() { // it was linked when this was written
			g.LastSeen = m.started
		}
		m.gateways[g.Name] = &gateway{lastSeen: g.LastSeen, hello: &controlpb.GatewayHello{
			Name: g.Name, LocalAddress: g.Local, Advertise: g.Advertise, Zone: g.Zone, Version: g.Version,
		}}
	}
	return nil
}

func (m *Manager) writeGatewaysLocked() {
	list := make([]storedGateway, 0, len(m.gateways))
	for _, name := range sortedKeys(m.gateways) {
		g := m.gateways[name]
		list = append(list, storedGateway{
			Name: name, Local: g.hello.GetLocalAddress(), Advertise: g.hello.GetAdvertise(), Zone: g.hello.GetZone(),
			Version: g.hello.GetVersion(), LastSeen: g.lastSeen,
		})
	}
	data, err := json.Marshal(list)
	if err == nil {
		err = m.cfg.Dir.WriteState(gatewaysFile, data)
	}
	if err != nil {
		m.log.Warn("own gateways could not be remembered", "error", err)
	}
}

// Run does the background work until ctx ends: it signs catalogs, proves and expires joins, introduces, mirrors. It returns after
// everything that the Manager started has ended; links that gateways still hold are closed.
func (m *Manager) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, m.cancel)
	defer stop()
	m.spawn(m.runOrigin)
	m.spawn(m.runSigned)
	m.spawn(m.runTicks)
	m.spawn(m.runTrust)
	m.spawn(m.runIntroductions)
	if m.cfg.Objects != nil {
		m.spawn(m.runMirror)
	}
	<-m.ctx.Done()
	m.mu.Lock()
	m.stopped = true
	m.mu.Unlock()
	m.wg.Wait()
	return nil
}

// spawn runs f until it returns; f ends with m.ctx. After Run's end nothing is started.
func (m *Manager) spawn(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.spawnLocked(f)
}

func (m *Manager) spawnLocked(f func()) {
	if m.stopped {
		return
	}
	m.wg.Add(1)
	go m.run(f)
}

func (m *Manager) run(f func()) {
	defer m.wg.Done()
	f()
}

func (m *Manager) runOrigin() {
	if err := m.origin.Run(m.ctx); err != nil && m.ctx.Err() == nil {
		m.log.Error("catalog signing ended", "error", err)
	}
}

// runSigned tells the links that heads were signed.
func (m *Manager) runSigned() {
	for {
		changed := m.origin.Changed()
		m.mu.Lock()
		m.wakeLinksLocked()
		m.mu.Unlock()
		select {
		case <-changed:
		case <-m.ctx.Done():
			return
		}
	}
}

func (m *Manager) runTicks() {
	t := time.NewTicker(min(tickEvery, m.cfg.ProbeEvery))
	defer t.Stop()
	for {
		select {
		case <-t.C:
			m.refreshTrust()
			m.tick()
		case <-m.ctx.Done():
			return
		}
	}
}

// tick expires joins, starts probes, meetings and head-of questions that are due, and publishes what time alone has changed.
func (m *Manager) tick() {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	for name, g := range m.gateways {
		if !g.connected && now.Sub(g.lastSeen) > gatewayKept {
			delete(m.gateways, name)
			m.writeGatewaysLocked()
		}
	}
	for td, p := range m.peers {
		if unfinished(p.rec.State) && !p.rec.Expires.IsZero() && !now.Before(p.rec.Expires) {
			m.log.Info("unfinished join expired", "peer", td.String(), "cluster", p.rec.Cluster.String())
			if err := m.removeLocked(td); err != nil {
				m.log.Error("expired join could not be removed", "peer", td.String(), "error", err)
			}
			continue
		}
		m.dueLocked(p, now)
	}
	m.changedLocked()
}

func unfinished(s State) bool { return s == StateAwaiting || s == StateJoining }

// dueLocked starts at most one background task for a peer.
func (m *Manager) dueLocked(p *peer, now time.Time) {
	if p.busy || now.Before(p.next) {
		return
	}
	var task func(spiffeid.TrustDomain) error
	switch {
	case p.rec.State == StateJoining && p.bundle == nil:
		if m.linkLocked("") == nil {
			return
		}
		task = m.meet
	case p.rec.State == StateJoining && p.rec.Role == roleIntroduced && !p.rec.ProbeOut && m.upLocked(p.rec.TrustDomain):
		task = m.prove
	case p.rec.State == StateReady && !p.headAsked && m.upLocked(p.rec.TrustDomain):
		task = m.askHead
	default:
		return
	}
	p.busy = true
	td := p.rec.TrustDomain
	m.spawnLocked(func() { m.background(td, task) })
}

func (m *Manager) background(td spiffeid.TrustDomain, task func(spiffeid.TrustDomain) error) {
	err := task(td)
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.peers[td]
	if p == nil {
		return
	}
	p.busy = false
	if err == nil {
		p.delay, p.next = 0, time.Time{}
		return
	}
	first := m.cfg.ProbeEvery
	if p.bundle == nil {
		first = m.cfg.IntroduceEvery
	}
	p.delay = min(max(2*p.delay, first), 5*time.Minute)
	p.next = m.now().Add(p.delay)
	m.log.Debug("peer task failed", "peer", td.String(), "error", err, "retry_in", p.delay.String())
}

// View returns the newest snapshot; never nil.
func (m *Manager) View() *View { return m.view.Load() }

// Changed returns a channel that is closed at the next change of View. Take it before View, or a change may be missed.
func (m *Manager) Changed() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed
}

// update changes one peer's record: f works on a copy, which is on disk before anybody sees it. f may return errUnchanged.
func (m *Manager) update(td spiffeid.TrustDomain, f func(r *record) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.updateLocked(td, f)
}

var errUnchanged = errors.New("unchanged")

func (m *Manager) updateLocked(td spiffeid.TrustDomain, f func(r *record) error) error {
	old := m.peers[td]
	rec := &record{TrustDomain: td}
	if old != nil {
		rec = old.rec.clone()
	}
	if err := f(rec); err != nil {
		if errors.Is(err, errUnchanged) {
			return nil
		}
		return err
	}
	p, err := newPeer(rec)
	if err != nil {
		return err
	}
	if err := writeRecord(m.cfg.Dir, rec); err != nil {
		return err
	}
	if old != nil {
		if bytes.Equal(old.rec.Bundle, rec.Bundle) {
			p.bundle = old.bundle // the same pointer: nothing changed for readers
		}
		p.headAsked, p.refused, p.lastUp, p.busy, p.next, p.delay = old.headAsked, old.refused, old.lastUp, old.busy, old.next, old.delay
		p.bundleErr, p.aheadOfUs = old.bundleErr, old.aheadOfUs
		if old.rec.State != rec.State {
			p.next, p.delay = time.Time{}, 0
		}
	}
	m.peers[td] = p
	m.changedLocked()
	return nil
}

func (m *Manager) removeLocked(td spiffeid.TrustDomain) error {
	if err := m.cfg.Dir.Remove(peerFile(td)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("peer %s: %w", td, err)
	}
	delete(m.peers, td)
	for other, p := range m.peers {
		m.forgetToldLocked(other, p, td)
	}
	m.changedLocked()
	return nil
}

// forgetToldLocked lets td be introduced to other again, should it come back.
func (m *Manager) forgetToldLocked(other spiffeid.TrustDomain, p *peer, td spiffeid.TrustDomain) {
	for i, t := range p.rec.Told {
		if t != td {
			continue
		}
		rec := p.rec.clone()
		rec.Told = append(rec.Told[:i], rec.Told[i+1:]...)
		delete(rec.Waiting, td)
		if err := writeRecord(m.cfg.Dir, rec); err != nil {
			m.log.Error("peer record could not be written", "peer", other.String(), "error", err)
			return
		}
		p.rec = rec
		return
	}
}

func (m *Manager) alarm(kind string, cluster federation.ClusterName, text string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.alarmLocked(kind, cluster, text)
	m.changedLocked()
}

// alarmLocked keeps and logs an alarm. A peer can cause them, so what exceeds alarmsPerMinute is dropped.
func (m *Manager) alarmLocked(kind string, cluster federation.ClusterName, text string) {
	now := m.now()
	if n := len(m.alarms); n >= alarmsPerMinute && now.Sub(m.alarms[n-alarmsPerMinute].At) < time.Minute {
		m.log.Debug("alarm dropped", "kind", kind, "cluster", cluster.String(), "text", text)
		return
	}
	m.log.Warn("alarm", "kind", kind, "cluster", cluster.String(), "text", text)
	alarms := append(append([]Alarm(nil), m.alarms...), Alarm{At: now, Cluster: cluster, Kind: kind, Text: text})
	m.alarms = alarms[max(0, len(alarms)-maxAlarms):]
}
