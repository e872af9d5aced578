// SPDX-License-Identifier: Apache-2.0

package gossip

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/memberlist"
	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func td(s string) spiffeid.TrustDomain {
	d, err := spiffeid.ParseTrustDomain(s)
	if err != nil {
		panic(err)
	}
	return d
}

// mesh connects gossips in memory. Every pair has a session unless it is cut.
type mesh struct {
	mu    sync.Mutex
	nodes map[string]*node
	cut   map[[2]string]bool
}

type node struct {
	*Gossip
	name string
	m    *mesh
	stop func() error
}

func newMesh() *mesh { return &mesh{nodes: map[string]*node{}, cut: map[[2]string]bool{}} }

// start runs a gossip and joins everybody it has a session with.
func (m *mesh) start(t *testing.T, name string) *node {
	t.Helper()
	n := &node{name: name, m: m}
	g, err := New(Config{Name: name, Federation: "acme", Link: n, KnownCluster: func(c federation.ClusterName) bool { return !strings.HasPrefix(string(c), "unknown") }})
	if err != nil {
		t.Fatal(err)
	}
	n.Gossip = g
	m.mu.Lock()
	m.nodes[name] = n
	m.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	n.stop = sync.OnceValue(func() error {
		m.mu.Lock()
		delete(m.nodes, name)
		m.mu.Unlock()
		cancel()
		return <-done
	})
	t.Cleanup(func() {
		if err := n.stop(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	})
	return n
}

func (n *node) reach(peer string) (*node, bool) {
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	p, ok := n.m.nodes[peer]
	return p, ok && !n.m.cut[[2]string{n.name, peer}] && !n.m.cut[[2]string{peer, n.name}]
}

func (n *node) Peers() []string {
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	var out []string
	for name := range n.m.nodes {
		if name != n.name && !n.m.cut[[2]string{n.name, name}] && !n.m.cut[[2]string{name, n.name}] {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func (n *node) SendDatagram(peer string, b []byte) error {
	p, ok := n.reach(peer)
	if !ok {
		return errors.New("no session")
	}
	if len(b) > MaxPacket {
		return fmt.Errorf("packet of %d bytes", len(b))
	}
	p.Deliver(n.name, b)
	return nil
}

func (n *node) OpenStream(_ context.Context, peer string) (net.Conn, error) {
	p, ok := n.reach(peer)
	if !ok {
		return nil, errors.New("no session")
	}
	here, there := net.Pipe()
	p.DeliverStream(n.name, there)
	return here, nil
}

func (n *node) alive() string {
	var out []string
	for _, m := range n.Members() {
		if m.Status == "alive" {
			out = append(out, m.Name)
		}
	}
	return strings.Join(out, " ")
}

// until waits for a condition on the bubble's clock.
func until(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(100 * time.Millisecond) {
		if time.Since(start) > limit {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

var fiveNames = []string{"gateway-1.ap-south", "gateway-1.eu-west", "gateway-1.us-east", "gateway-2.eu-west", "gateway-2.us-east"}

func startFive(t *testing.T, m *mesh) []*node {
	t.Helper()
	var ns []*node
	for _, name := range fiveNames {
		ns = append(ns, m.start(t, name))
	}
	for _, n := range ns {
		until(t, n.name+" sees everybody", 30*time.Second, func() bool { return n.alive() == strings.Join(fiveNames, " ") })
	}
	return ns
}

// drain takes hints that are there.
func drain(n *node) map[spiffeid.TrustDomain]int {
	got := map[spiffeid.TrustDomain]int{}
	for {
		select {
		case h := <-n.Hints():
			got[h]++
		default:
			return got
		}
	}
}

func TestFiveConverge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh()
		ns := startFive(t, m)
		for range 100 { // a burst
			ns[0].Hint(td("ap-south.acme"))
		}
		ns[1].Hint(td("eu-west.acme"))
		for _, n := range ns {
			got := map[spiffeid.TrustDomain]int{}
			until(t, n.name+" hears both hints", 10*time.Second, func() bool {
				for k, v := range drain(n) {
					got[k] += v
				}
				return got[td("ap-south.acme")] > 0 && got[td("eu-west.acme")] > 0
			})
		}
		time.Sleep(10 * time.Second)
		for _, n := range ns {
			if got := drain(n)[td("ap-south.acme")]; got > 1 {
				t.Errorf("%s: a burst of 100 hints was heard %d more times", n.name, got)
			}
		}

		// Ten seconds of a hint every 100 ms are at most eleven events.
		for range 100 {
			ns[2].Hint(td("us-east.acme"))
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(10 * time.Second)
		if got := drain(ns[4])[td("us-east.acme")]; got < 8 || got > 12 {
			t.Errorf("100 hints in ten seconds were heard %d times", got)
		}
	})
}

func TestMemberDiesAndReturns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh()
		ns := startFive(t, m)
		if err := ns[0].stop(); err != nil {
			t.Fatal(err)
		}
		rest := strings.Join(fiveNames[1:], " ")
		for _, n := range ns[1:] {
			until(t, n.name+" misses ap-south", 10*time.Minute, func() bool { return n.alive() == rest })
		}
		again := m.start(t, fiveNames[0])
		for _, n := range append(ns[1:], again) {
			until(t, n.name+" sees ap-south again", 5*time.Minute, func() bool { return n.alive() == strings.Join(fiveNames, " ") })
		}
		again.Hint(td("ap-south.acme"))
		until(t, "its hints are heard", 10*time.Second, func() bool { return drain(ns[1])[td("ap-south.acme")] > 0 })
	})
}

func packet(parts ...[]byte) []byte {
	b, err := memberlist.AddLabelHeaderToPacket(joinPacket(parts), "acme")
	if err != nil {
		panic(err)
	}
	return b
}

func message(kind byte, v any) []byte {
	b, err := encode(nil, kind, v)
	if err != nil {
		panic(err)
	}
	return b
}

func serfMessage(kind byte, v any) []byte {
	b, err := encode([]byte{userType}, kind, v)
	if err != nil {
		panic(err)
	}
	return b
}

// poison is what a member that lies can say.
func poison(victim string) [][]byte {
	far := []uint64{math.MaxUint64, math.MaxUint64 - 1, 1 << 62, 1<<62 - 1, 1 << 40}
	var out [][]byte
	for _, t := range far {
		out = append(out,
			serfMessage(leaveIntentType, &leaveIntent{LTime: t, Node: victim}),
			serfMessage(leaveIntentType, &leaveIntent{LTime: t, Node: "gateway-1.evil", Prune: true}),
			serfMessage(joinIntentType, &joinIntent{LTime: t, Node: victim}),
			serfMessage(userEventType, &userEvent{LTime: t, Name: "cat/eu-west.acme"}))
	}
	for _, inc := range []uint32{math.MaxUint32, math.MaxUint32 - 1, 1 << 31, 1 << 30} {
		out = append(out,
			message(deadType, &accusation{Incarnation: inc, Node: victim, From: victim}),
			message(deadType, &accusation{Incarnation: inc, Node: victim, From: "gateway-1.ap-south"}),
			message(suspectType, &accusation{Incarnation: inc, Node: victim, From: "gateway-1.ap-south"}),
			message(aliveType, &alive{Incarnation: inc, Node: victim, Addr: net.IPv4(127, 0, 0, 1), Port: 22, Vsn: ownVersions}))
	}
	return append(out,
		serfMessage(leaveIntentType, &leaveIntent{LTime: 50, Node: victim}),
		message(deadType, &accusation{Incarnation: 1, Node: victim, From: victim}),
		message(aliveType, &alive{Incarnation: 5, Node: victim, Vsn: []byte{5, 5, 5, 5, 5, 5}}),
		message(aliveType, &alive{Incarnation: 5, Node: "x.unknown", Vsn: ownVersions}),
		message(compressType, map[string]any{"Algo": 0, "Buf": make([]byte, 500)}),
		serfMessage(4, map[string]any{"Name": "_serf_install-key", "LTime": 1}),
		serfMessage(9, map[string]any{"DestName": victim}),
		serfMessage(userEventType, &userEvent{LTime: 3, Name: "deploy", Payload: []byte("x")}),
		[]byte{userType}, []byte{aliveType}, []byte{99}, []byte{compoundType, 255},
	)
}

// TestOnePoisonedMember: a member with a good session lies about everybody and uses up every clock. Nobody believes it, and the
// hints go on.
func TestOnePoisonedMember(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh()
		ns := startFive(t, m)
		evil := &node{name: "gateway-1.evil", m: m} // has sessions, and does not run what we run
		var err error
		if evil.Gossip, err = New(Config{Name: evil.name, Federation: "acme", Link: evil}); err != nil {
			t.Fatal(err)
		}
		defer evil.tr.Shutdown()
		m.mu.Lock()
		m.nodes[evil.name] = evil
		m.mu.Unlock()
		for _, victim := range fiveNames {
			for _, n := range ns {
				for _, msg := range poison(victim) {
					n.Deliver("gateway-1.evil", packet(msg))
				}
				n.Deliver("gateway-1.evil", packet(poison(victim)...))
			}
			time.Sleep(time.Minute)
		}
		for i := range 20000 {
			ns[1].Deliver("gateway-1.evil", packet(message(aliveType, &alive{Incarnation: 1, Node: fmt.Sprintf("gateway-%d.evil", i), Vsn: ownVersions})))
		}
		evilState := &pushPull{join: true, user: message(serfPushPullType, &serfPushPull{
			LTime: math.MaxUint64, EventLTime: math.MaxUint64, QueryLTime: math.MaxUint64, LeftMembers: fiveNames,
			StatusLTimes: map[string]uint64{fiveNames[0]: math.MaxUint64 - 1}})}
		nearState := &pushPull{join: true, user: message(serfPushPullType, &serfPushPull{
			LTime: 1000, EventLTime: 1000, QueryLTime: 1000, LeftMembers: fiveNames, StatusLTimes: map[string]uint64{
				fiveNames[0]: 999, fiveNames[1]: 999, fiveNames[2]: 999, fiveNames[3]: 999, fiveNames[4]: 999}})}
		for _, name := range fiveNames {
			for s := stateAlive; s <= stateLeft; s++ {
				evilState.nodes = append(evilState.nodes, nodeState{Name: name, State: s, Incarnation: math.MaxUint32, Vsn: ownVersions})
			}
			nearState.nodes = append(nearState.nodes, nodeState{Name: name, State: stateLeft, Incarnation: 100, Vsn: ownVersions},
				nodeState{Name: "bad." + name, Vsn: []byte{9, 9, 9, 9, 9, 9}})
		}
		for _, n := range ns {
			for _, s := range []*pushPull{evilState, nearState} {
				exchange(t, n, "gateway-1.evil", s)
			}
		}
		time.Sleep(10 * time.Minute)

		for _, n := range ns {
			for _, name := range fiveNames {
				if !strings.Contains(n.alive(), name) {
					t.Errorf("%s believes that %s is gone: %v", n.name, name, n.Members())
				}
			}
			if c := len(n.Members()); c > len(fiveNames)+1+maxPerCluster {
				t.Errorf("%s knows %d members", n.name, c)
			}
			drain(n)
		}
		for i, n := range ns {
			name := td(fmt.Sprintf("c%d.acme", i))
			n.Hint(name)
			for _, o := range ns {
				got := 0
				until(t, fmt.Sprintf("%s hears %s after the attack", o.name, n.name), 10*time.Second, func() bool { got += drain(o)[name]; return got > 0 })
			}
		}
	})
}

// exchange opens a push/pull stream to n as a peer and takes its answer.
func exchange(t *testing.T, n *node, from string, p *pushPull) {
	t.Helper()
	here, there := net.Pipe()
	n.DeliverStream(from, there)
	b, err := p.marshal()
	if err != nil {
		t.Fatal(err)
	}
	if err := memberlist.AddLabelHeaderToStream(here, "acme"); err != nil {
		t.Fatal(err)
	}
	if _, err := here.Write(b); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64<<10)
	if _, err := here.Read(buf); err != nil {
		t.Fatalf("no answer: %v", err)
	}
	here.Close()
}

// TestHeardOf: a gateway that we have no session with is known by hearsay, and nothing is sent to it.
func TestHeardOf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh()
		a, b, c := fiveNames[0], fiveNames[1], fiveNames[2]
		m.cut[[2]string{a, c}] = true
		na, nb, nc := m.start(t, a), m.start(t, b), m.start(t, c)
		until(t, "b sees both", time.Minute, func() bool { return nb.alive() == a+" "+b+" "+c })
		heard := func() string {
			for _, m := range na.Members() {
				if m.Name == c {
					return m.Status
				}
			}
			return ""
		}
		until(t, "a hears of c", 2*time.Minute, func() bool { return heard() == "heard" })
		nc.Hint(td("us-east.acme"))
		until(t, "c's hint comes through b", 30*time.Second, func() bool { return drain(na)[td("us-east.acme")] > 0 })
		m.mu.Lock()
		clear(m.cut)
		m.mu.Unlock()
		na.Join(c)
		until(t, "a sees c", 10*time.Second, func() bool { return heard() == "alive" })
	})
}

// TestForeignFederation: packets and streams with another label are not heard.
func TestForeignFederation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh()
		n := m.start(t, fiveNames[0])
		until(t, "it runs", time.Second, func() bool { return len(n.Members()) == 1 })
		live := joinPacket([][]byte{message(aliveType, &alive{Incarnation: 1, Node: fiveNames[1], Vsn: ownVersions})})
		for _, label := range []string{"other", ""} {
			b, err := memberlist.AddLabelHeaderToPacket(live, label)
			if err != nil {
				t.Fatal(err)
			}
			n.Deliver(fiveNames[1], b)
		}
		here, there := net.Pipe()
		n.DeliverStream(fiveNames[1], there)
		if err := memberlist.AddLabelHeaderToStream(here, "other"); err != nil {
			t.Fatal(err)
		}
		if _, err := here.Read(make([]byte, 1)); err == nil {
			t.Error("a stream of another federation is answered")
		}
		time.Sleep(time.Minute)
		if got := len(n.Members()); got != 1 {
			t.Errorf("%d members", got)
		}
		n.Deliver(fiveNames[1], packet(live))
		until(t, "the own federation is heard", time.Second, func() bool { return len(n.Members()) == 2 && n.Members()[1].Status == "heard" })
	})
}

// TestSlowLink: a link that blocks holds up only packets to that peer, and stops with Run.
func TestSlowLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		block := make(chan struct{})
		tr := newTransport(Config{Name: fiveNames[0], Federation: "acme", Link: blockedLink{block}, KnownCluster: func(federation.ClusterName) bool { return true }, Logger: discard()})
		for range 10 * sendQueue {
			if _, err := tr.WriteToAddress([]byte{1}, memberlist.Address{Name: fiveNames[1]}); err != nil {
				t.Fatal(err)
			}
		}
		tr.mu.Lock()
		if got := len(tr.senders[fiveNames[1]]); got > sendQueue {
			t.Errorf("%d packets wait", got)
		}
		tr.mu.Unlock()
		close(block)
		time.Sleep(2 * idleSender)
		tr.mu.Lock()
		if len(tr.senders) != 0 {
			t.Error("an idle sender is still there")
		}
		tr.mu.Unlock()
		tr.Shutdown()
		if _, err := tr.DialAddressTimeout(memberlist.Address{Name: "gateway-9.eu-west"}, time.Second); !errors.Is(err, errNoSession) {
			t.Errorf("dialling without a session: %v", err)
		}
	})
}

type blockedLink struct{ block chan struct{} }

func (blockedLink) Peers() []string { return []string{fiveNames[1]} }
func (l blockedLink) SendDatagram(string, []byte) error {
	<-l.block
	return nil
}
func (blockedLink) OpenStream(ctx context.Context, _ string) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestStopWaits runs on the real clock: when Run returns, nothing of Serf is left.
func TestStopWaits(t *testing.T) {
	m := newMesh()
	a, b := m.start(t, fiveNames[0]), m.start(t, fiveNames[1])
	deadline := time.Now().Add(20 * time.Second)
	for a.alive() != fiveNames[0]+" "+fiveNames[1] && time.Now().Before(deadline) {
		a.Join(fiveNames[1])
		b.Join(fiveNames[0])
		select {
		case <-a.Hints():
		case <-time.After(10 * time.Millisecond):
		}
	}
	before := goleak.IgnoreCurrent()
	if err := a.stop(); err != nil {
		t.Error(err)
	}
	if err := b.stop(); err != nil {
		t.Error(err)
	}
	if err := goleak.Find(before); err != nil {
		t.Error(err)
	}
	a.Hint(td("x.acme"))
	a.Deliver(fiveNames[1], packet([]byte{pingType}))
	here, there := net.Pipe()
	a.DeliverStream(fiveNames[1], there)
	if _, err := here.Read(make([]byte, 1)); err == nil {
		t.Error("a stopped gossip takes streams")
	}
	if a.Members() != nil {
		t.Error("a stopped gossip has members")
	}
}

func TestConfig(t *testing.T) {
	good := Config{Name: "gateway-1.us-east", Federation: "acme", Link: blockedLink{}}
	for name, edit := range map[string]func(*Config){
		"no name": func(c *Config) { c.Name = "" }, "no cluster": func(c *Config) { c.Name = "gateway-1" }, "dotted": func(c *Config) { c.Name = "a.b.c" },
		"no federation": func(c *Config) { c.Federation = "" }, "no link": func(c *Config) { c.Link = nil },
	} {
		c := good
		edit(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if Name("gateway-1", "us-east") != good.Name {
		t.Error("Name")
	}
}
