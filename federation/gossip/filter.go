// SPDX-License-Identifier: Apache-2.0

package gossip

import (
	"bytes"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/serf/serf"

	"github.com/strait-mesh/strait/federation"
)

// Limits of what one peer may say.
const (
	maxClockJump = 1 << 20 // by which a clock or an incarnation may be ahead of what was accepted
	// bigJump is an advance of an incarnation that an honest member needs once, after a restart; for one member it is accepted
	// once a minute.
	bigJump        = 1 << 10
	maxIncarnation = 1 << 31 // never reached honestly; beyond it memberlist's counter could wrap
	maxClock       = 1 << 62
	aloneFor       = 30 * time.Second // how long the only other cluster must claim a far clock
	maxPacketIn    = 8 << 10
	maxMeta        = 32
	maxPerCluster  = 64 // members of one cluster that one cluster may speak of
	memberMemory   = time.Hour
	packetRate     = 100 // per second and peer
	packetBurst    = 400
	streamRate     = 1
	streamBurst    = 10
)

// filter judges what peers say before memberlist and serf hear it.
//
//   - Of another cluster's members a peer may say only that they are alive; suspicion, death and leaving are believed from the
//     member's own cluster. About ourselves accusations pass, so that we can refute them.
//   - Members that we have no session with, and those of unknown clusters, are dropped one by one.
//   - Clocks and incarnations that are far ahead are dropped, so that nobody can use them up.
//   - Addresses are replaced by the synthetic ones, senders by who sent.
//   - Queries, relays, user messages on streams, compression and encryption are refused.
type filter struct {
	self  string
	own   federation.ClusterName
	known func(federation.ClusterName) bool
	peers func() []string

	mu      sync.Mutex
	members map[string]*memberSeen // by name
	tellers map[pair]map[string]time.Time
	clocks  [3]clock
	packets map[string]*bucket
	streams map[string]*bucket
}

type pair struct{ teller, subject federation.ClusterName }

type memberSeen struct {
	incarnation uint32
	jumped      time.Time
	heard       time.Time
}

// The Lamport clocks of serf.
const (
	memberClock = iota
	eventClock
	queryClock
)

func newFilter(cfg Config) *filter {
	own, _ := clusterOf(cfg.Name)
	f := &filter{
		self: cfg.Name, own: own, known: cfg.KnownCluster, peers: cfg.Link.Peers,
		members: map[string]*memberSeen{}, tellers: map[pair]map[string]time.Time{}, packets: map[string]*bucket{}, streams: map[string]*bucket{},
	}
	for i := range f.clocks {
		f.clocks[i].claims = map[federation.ClusterName]claim{}
	}
	return f
}

// clusterOf is the cluster in a member's name.
func clusterOf(name string) (c federation.ClusterName, ok bool) {
	_, c, err := ParseName(name)
	return c, err == nil
}

// packet returns what may pass of a packet, in a form that is well-formed; nil for nothing.
func (f *filter) packet(from string, b []byte, now time.Time) []byte {
	sender, ok := clusterOf(from)
	if !ok || len(b) > maxPacketIn {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !take(f.packets, from, packetRate, packetBurst, now) {
		return nil
	}
	parts, err := splitPacket(b)
	if err != nil {
		return nil
	}
	var out [][]byte
	for _, p := range parts {
		if m, err := f.messageLocked(from, sender, p, now); err == nil && len(m) > 0 && len(m) <= maxPacketIn {
			out = append(out, m)
		}
	}
	if len(out) == 0 {
		return nil
	}
	return joinPacket(out)
}

func (f *filter) allowStream(from string, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return take(f.streams, from, streamRate, streamBurst, now)
}

// messageLocked judges one message and encodes it anew.
func (f *filter) messageLocked(from string, sender federation.ClusterName, b []byte, now time.Time) ([]byte, error) {
	kind, body := b[0], b[1:]
	switch kind {
	case pingType:
		var m ping
		if err := decode(body, &m); err != nil {
			return nil, err
		}
		m.SourceNode, m.SourceAddr, m.SourcePort = from, syntheticIP(from), syntheticPort
		return encode(nil, kind, &m)
	case indirectPingType:
		var m indirectPing
		if err := decode(body, &m); err != nil {
			return nil, err
		}
		if _, ok := clusterOf(m.Node); !ok {
			return nil, errRefused
		}
		m.Target, m.Port = syntheticIP(m.Node), syntheticPort
		m.SourceNode, m.SourceAddr, m.SourcePort = from, syntheticIP(from), syntheticPort
		return encode(nil, kind, &m)
	case ackType:
		var m ack
		if err := decode(body, &m); err != nil {
			return nil, err
		}
		m.Payload = nil
		return encode(nil, kind, &m)
	case nackType:
		var m nack
		if err := decode(body, &m); err != nil {
			return nil, err
		}
		return encode(nil, kind, &m)
	case suspectType, deadType:
		var m accusation
		if err := decode(body, &m); err != nil {
			return nil, err
		}
		if !f.mayAccuse(sender, m.Node) || !f.memberLocked(sender, m.Node, now) || !f.incarnationLocked(m.Node, m.Incarnation, now) {
			return nil, errRefused
		}
		if m.From != m.Node { // leaving is said in one's own name, everything else in the sender's
			m.From = from
		}
		return encode(nil, kind, &m)
	case aliveType:
		var m alive
		if err := decode(body, &m); err != nil {
			return nil, err
		}
		if !f.memberLocked(sender, m.Node, now) || !f.incarnationLocked(m.Node, m.Incarnation, now) || !plausible(m.Vsn, m.Meta) {
			return nil, errRefused
		}
		m.Addr, m.Port = syntheticIP(m.Node), syntheticPort
		return encode(nil, kind, &m)
	case userType:
		return f.serfMessageLocked(sender, body, now)
	}
	return nil, errRefused
}

func (f *filter) serfMessageLocked(sender federation.ClusterName, b []byte, now time.Time) ([]byte, error) {
	if len(b) == 0 {
		return nil, errTruncated
	}
	kind, body := b[0], b[1:]
	switch kind {
	case leaveIntentType:
		var m leaveIntent
		if err := decode(body, &m); err != nil {
			return nil, err
		}
		if !f.mayAccuse(sender, m.Node) || !f.memberLocked(sender, m.Node, now) || !f.clockLocked(memberClock, sender, m.LTime, now) {
			return nil, errRefused
		}
		m.Prune = false
		return encode([]byte{userType}, kind, &m)
	case joinIntentType:
		var m joinIntent
		if err := decode(body, &m); err != nil {
			return nil, err
		}
		if !f.memberLocked(sender, m.Node, now) || !f.clockLocked(memberClock, sender, m.LTime, now) {
			return nil, errRefused
		}
		return encode([]byte{userType}, kind, &m)
	case userEventType:
		var m userEvent
		if err := decode(body, &m); err != nil {
			return nil, err
		}
		if _, ok := parseHint(m.Name, m.Payload); !ok || !f.clockLocked(eventClock, sender, m.LTime, now) {
			return nil, errRefused
		}
		return encode([]byte{userType}, kind, &m)
	}
	return nil, errRefused
}

// pushPull judges a push/pull in place.
func (f *filter) pushPull(from string, p *pushPull, now time.Time) {
	sender, ok := clusterOf(from)
	if !ok {
		p.nodes, p.user = nil, nil
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p.nodes = slices.DeleteFunc(p.nodes, func(n nodeState) bool {
		return !f.memberLocked(sender, n.Name, now) || !plausible(n.Vsn, n.Meta) ||
			n.State != stateAlive && !f.mayAccuse(sender, n.Name) || n.State < stateAlive || n.State > stateLeft ||
			!f.incarnationLocked(n.Name, n.Incarnation, now)
	})
	for i := range p.nodes {
		p.nodes[i].Addr, p.nodes[i].Port = syntheticIP(p.nodes[i].Name), syntheticPort
	}
	p.user = f.serfStateLocked(sender, p.user, now)
}

// serfStateLocked judges serf's part of a push/pull.
func (f *filter) serfStateLocked(sender federation.ClusterName, b []byte, now time.Time) []byte {
	var m serfPushPull
	if len(b) == 0 || b[0] != serfPushPullType || decode(b[1:], &m) != nil {
		return nil
	}
	// The clocks sent are the next to be used.
	if !f.clockLocked(memberClock, sender, m.LTime, now) || !f.clockLocked(eventClock, sender, m.EventLTime, now) || !f.clockLocked(queryClock, sender, m.QueryLTime, now) {
		return nil
	}
	for name, t := range m.StatusLTimes {
		if t > m.LTime || !f.memberLocked(sender, name, now) {
			delete(m.StatusLTimes, name)
		}
	}
	m.LeftMembers = slices.DeleteFunc(m.LeftMembers, func(name string) bool {
		_, timed := m.StatusLTimes[name]
		return !timed || !f.mayAccuse(sender, name)
	})
	if len(m.Events) > eventBuffer {
		m.Events = m.Events[:eventBuffer]
	}
	for _, e := range m.Events {
		if e == nil {
			continue
		}
		e.Events = slices.DeleteFunc(e.Events, func(p pastEvent) bool {
			_, ok := parseHint(p.Name, p.Payload)
			return !ok || e.LTime > m.EventLTime
		})
		if e.LTime > m.EventLTime {
			e.LTime = 0
		}
	}
	out, err := encode(nil, serfPushPullType, &m)
	if err != nil {
		return nil
	}
	return out
}

// mayAccuse reports whether sender may say that name is suspect, dead or gone: of its own cluster, and of us, who refute it.
func (f *filter) mayAccuse(sender federation.ClusterName, name string) bool {
	c, ok := clusterOf(name)
	return ok && (c == sender || name == f.self)
}

// memberLocked reports whether memberlist and serf may hear of a member: only of those we have a session with (and of ourselves),
// so that claims cannot dilute gossip or make us probe nobodies. Other members of known clusters are remembered as heard of; one
// cluster may speak of so many of each cluster.
func (f *filter) memberLocked(sender federation.ClusterName, name string, now time.Time) bool {
	c, ok := clusterOf(name)
	if !ok {
		return false
	}
	live := f.peers()
	if slices.Contains(live, name) || name == f.self {
		return true
	}
	if c != f.own && !f.known(c) && !slices.ContainsFunc(live, func(p string) bool { pc, ok := clusterOf(p); return ok && pc == c }) {
		return false
	}
	told := f.tellers[pair{sender, c}]
	if told == nil {
		told = map[string]time.Time{}
		f.tellers[pair{sender, c}] = told
	}
	if _, again := told[name]; again || len(told) < maxPerCluster {
		told[name] = now
	}
	return false
}

// heard lists members that somebody spoke of and that we have no session with.
func (f *filter) heard() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for _, told := range f.tellers {
		for name := range told {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// incarnationLocked accepts an incarnation that is not far ahead of the highest accepted for that member.
func (f *filter) incarnationLocked(name string, n uint32, now time.Time) bool {
	m := f.members[name]
	if m == nil {
		m = &memberSeen{}
	}
	if n > m.incarnation {
		if n >= maxIncarnation || n-m.incarnation > maxClockJump {
			return false
		}
		if n-m.incarnation > bigJump {
			if !m.jumped.IsZero() && now.Sub(m.jumped) < time.Minute {
				return false
			}
			m.jumped = now
		}
		m.incarnation = n
	}
	m.heard = now
	f.members[name] = m
	return true
}

// forget drops members that were not heard of for an hour, and the limits of peers that are gone.
func (f *filter) forget(now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, m := range f.members {
		if now.Sub(m.heard) > memberMemory {
			delete(f.members, name)
		}
	}
	for p, told := range f.tellers {
		for name, t := range told {
			if now.Sub(t) > memberMemory {
				delete(told, name)
			}
		}
		if len(told) == 0 {
			delete(f.tellers, p)
		}
	}
	for _, buckets := range []map[string]*bucket{f.packets, f.streams} {
		for name, b := range buckets {
			if now.Sub(b.at) > time.Minute {
				delete(buckets, name)
			}
		}
	}
	live := map[federation.ClusterName]bool{}
	for _, p := range f.peers() {
		if c, ok := clusterOf(p); ok {
			live[c] = true
		}
	}
	for i := range f.clocks {
		for c := range f.clocks[i].claims {
			if !live[c] {
				delete(f.clocks[i].claims, c)
			}
		}
	}
}

// clock is the highest value accepted of one of serf's Lamport clocks, and the claims of a higher one by cluster.
type clock struct {
	highest uint64
	claims  map[federation.ClusterName]claim
}

type claim struct {
	time  uint64
	since time.Time
}

// clockLocked accepts a time that is not far ahead of the highest accepted. One that is may be right when we are new or were away:
// it is believed once two clusters claim it, or our own does, or when for a while there was only one other cluster to hear.
func (f *filter) clockLocked(which int, sender federation.ClusterName, t uint64, now time.Time) bool {
	c := &f.clocks[which]
	if t <= c.highest+maxClockJump {
		c.highest = max(c.highest, t)
		return true
	}
	if t >= maxClock {
		return false
	}
	mine, again := c.claims[sender]
	if !again || max(t, mine.time)-min(t, mine.time) > maxClockJump {
		mine = claim{time: t, since: now}
		c.claims[sender] = mine
	}
	agree := sender == f.own || f.onlyCluster(sender) && now.Sub(mine.since) >= aloneFor
	for other, u := range c.claims {
		if other != sender && max(t, u.time)-min(t, u.time) <= maxClockJump {
			agree = true
		}
	}
	if agree {
		c.highest = t
		clear(c.claims)
	}
	return agree
}

// onlyCluster reports whether no other foreign cluster has a live session.
func (f *filter) onlyCluster(c federation.ClusterName) bool {
	for _, p := range f.peers() {
		if pc, ok := clusterOf(p); ok && pc != c && pc != f.own {
			return false
		}
	}
	return true
}

// ownVersions is what this build of memberlist and serf announces. One member that speaks another version would fail the whole
// merge for everybody, so it is not heard.
var ownVersions = []byte{
	memberlist.ProtocolVersionMin, memberlist.ProtocolVersionMax, serf.ProtocolVersionMap[serfProtocol],
	serf.ProtocolVersionMin, serf.ProtocolVersionMax, serfProtocol,
}

// plausible accepts a member's versions and meta data.
func plausible(vsn, meta []byte) bool { return len(meta) <= maxMeta && bytes.Equal(vsn, ownVersions) }

// bucket limits a peer's rate.
type bucket struct {
	tokens float64
	at     time.Time
}

func take(m map[string]*bucket, key string, rate, burst float64, now time.Time) bool {
	b := m[key]
	if b == nil {
		b = &bucket{tokens: burst, at: now}
		m[key] = b
	}
	if d := now.Sub(b.at).Seconds(); d > 0 {
		b.tokens, b.at = min(burst, b.tokens+d*rate), now
	}
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}
