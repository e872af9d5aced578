// SPDX-License-Identifier: Apache-2.0

package gossip

import (
	"bytes"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/federation"
)

func discard() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

type peersOnly []string

func (p peersOnly) Peers() []string { return p }

func testFilter(peers ...string) *filter {
	known := func(c federation.ClusterName) bool { return !strings.HasPrefix(string(c), "unknown") }
	f := newFilter(Config{Name: "gateway-1.us-east", Link: blockedLink{}, KnownCluster: known})
	f.peers = peersOnly(peers).Peers
	return f
}

func TestFilterMessages(t *testing.T) {
	now := time.Now()
	const evil, self, third, mate = "gateway-1.evil", "gateway-1.us-east", "gateway-1.eu-west", "gateway-2.evil"
	live := func(node string, inc uint32) []byte {
		return message(aliveType, &alive{Incarnation: inc, Node: node, Addr: []byte{127, 0, 0, 1}, Port: 22, Vsn: ownVersions})
	}
	for _, c := range []struct {
		name string
		msg  []byte
		ok   bool
	}{
		{"another cluster's member is alive", live(third, 1), true},
		{"a member we have no session with is alive", live("gateway-2.eu-west", 1), false},
		{"an unknown cluster's member is alive", live("gateway-1.unknown", 1), false},
		{"a malformed name is alive", live("gateway-1", 1), false},
		{"alive with a far incarnation", live(third, 1<<21), false},
		{"alive in another version", message(aliveType, &alive{Node: third, Vsn: []byte{5, 5, 5, 5, 5, 5}}), false},
		{"alive with much to say", message(aliveType, &alive{Node: third, Vsn: ownVersions, Meta: make([]byte, 100)}), false},
		{"another cluster's member is dead", message(deadType, &accusation{Node: third, From: evil}), false},
		{"another cluster's member leaves", message(deadType, &accusation{Node: third, From: third}), false},
		{"another cluster's member is suspect", message(suspectType, &accusation{Node: third, From: evil}), false},
		{"its own mate is dead", message(deadType, &accusation{Node: mate, From: evil}), true},
		{"it leaves", message(deadType, &accusation{Node: evil, From: evil}), true},
		{"we are suspect", message(suspectType, &accusation{Node: self, From: third}), true},
		{"we are suspect, far ahead", message(suspectType, &accusation{Node: self, Incarnation: 1 << 21}), false},
		{"another's leave intent", serfMessage(leaveIntentType, &leaveIntent{LTime: 1, Node: third}), false},
		{"its leave intent", serfMessage(leaveIntentType, &leaveIntent{LTime: 1, Node: evil}), true},
		{"its leave intent, far ahead", serfMessage(leaveIntentType, &leaveIntent{LTime: 1 << 21, Node: evil}), false},
		{"a join intent", serfMessage(joinIntentType, &joinIntent{LTime: 1, Node: third}), true},
		{"a hint", serfMessage(userEventType, &userEvent{LTime: 1, Name: "cat/evil.acme"}), true},
		{"a hint, far ahead", serfMessage(userEventType, &userEvent{LTime: 1 << 21, Name: "cat/evil.acme"}), false},
		{"a hint with a payload", serfMessage(userEventType, &userEvent{LTime: 1, Name: "cat/evil.acme", Payload: []byte{1}}), false},
		{"a hint of nobody", serfMessage(userEventType, &userEvent{LTime: 1, Name: "cat/E VIL"}), false},
		{"another event", serfMessage(userEventType, &userEvent{LTime: 1, Name: "deploy"}), false},
		{"a query", serfMessage(4, map[string]any{"LTime": 1}), false},
		{"a relay", serfMessage(9, map[string]any{"DestName": third}), false},
		{"compression", message(compressType, map[string]any{"Algo": 0}), false},
		{"encryption", []byte{encryptType, 1, 2, 3}, false},
		{"a ping", message(pingType, &ping{SeqNo: 1, Node: self, SourceNode: third}), true},
		{"an ack", message(ackType, &ack{SeqNo: 1, Payload: make([]byte, 1000)}), true},
		{"nothing", nil, false},
		{"a type alone", []byte{aliveType}, false},
	} {
		f := testFilter(evil, third, mate)
		if got := f.packet(evil, c.msg, now); (got != nil) != c.ok {
			t.Errorf("%s: passed %v, want %v", c.name, got != nil, c.ok)
		}
	}

	// What passes is rewritten: no address and no sender but the real ones.
	f := testFilter(evil, third)
	var a alive
	if err := decode(f.packet(evil, live(third, 1), now)[1:], &a); err != nil || !net.IP(a.Addr).Equal(syntheticIP(third)) || a.Port != syntheticPort {
		t.Errorf("alive %+v, %v", a, err)
	}
	var p ping
	if err := decode(f.packet(evil, message(pingType, &ping{Node: self, SourceNode: third, SourceAddr: []byte{1, 2, 3, 4}}), now)[1:], &p); err != nil || p.SourceNode != evil || !net.IP(p.SourceAddr).Equal(syntheticIP(evil)) {
		t.Errorf("ping %+v, %v", p, err)
	}
	// Of a compound packet the good part passes.
	if got := f.packet(evil, joinPacket([][]byte{message(deadType, &accusation{Node: third}), live(third, 2)}), now); len(got) == 0 || got[0] != aliveType {
		t.Errorf("compound: %x", got)
	}
}

// TestFarClocks: a clock that is far ahead is believed when two clusters agree, from our own cluster, and from the only other
// cluster after a while.
func TestFarClocks(t *testing.T) {
	now := time.Now()
	event := func(t uint64) []byte { return serfMessage(userEventType, &userEvent{LTime: t, Name: "cat/x.acme"}) }
	const evil, eu, us2 = "gateway-1.evil", "gateway-1.eu-west", "gateway-2.us-east"

	f := testFilter(evil, eu)
	if f.packet(evil, event(1<<40), now) != nil || f.packet(evil, event(1<<40), now.Add(time.Hour)) != nil {
		t.Error("one of two clusters alone moves the clock")
	}
	if f.packet(eu, event(1<<30), now) != nil {
		t.Error("two that disagree move the clock")
	}
	if f.packet(eu, event(5), now) == nil || f.packet(eu, event(1<<20), now) == nil {
		t.Error("a near clock is refused")
	}
	f = testFilter(evil, eu, "gateway-1.ap-south")
	f.packet(eu, event(1<<30), now)
	if f.packet("gateway-1.ap-south", event(1<<30+7), now) == nil {
		t.Error("two that agree are not believed")
	}
	if f.packet(eu, event(1<<30+8), now) == nil || f.packet(evil, event(1<<40), now) != nil {
		t.Error("after that")
	}
	f = testFilter(us2, evil, eu)
	if f.packet(us2, event(1<<30), now) == nil {
		t.Error("our own cluster is not believed")
	}
	f = testFilter(eu)
	if f.packet(eu, event(1<<30), now) != nil {
		t.Error("the only cluster is believed at once")
	}
	if f.packet(eu, event(1<<30+20), now.Add(aloneFor)) == nil {
		t.Error("the only cluster is never believed")
	}
	if f.packet(eu, event(1<<62), now.Add(time.Hour)) != nil {
		t.Error("a clock that is nearly used up is believed")
	}

	// Incarnations: one big jump a minute.
	f = testFilter(evil, eu, "gateway-9.eu-west")
	live := func(inc uint32) []byte {
		return message(aliveType, &alive{Incarnation: inc, Node: eu, Vsn: ownVersions})
	}
	if f.packet(evil, live(1<<19), now) == nil || f.packet(evil, live(1<<20), now) != nil || f.packet(evil, live(1<<20), now.Add(time.Minute)) == nil {
		t.Error("big jumps of an incarnation are not one a minute")
	}
}

func TestFilterLimits(t *testing.T) {
	now := time.Now()
	f := testFilter("gateway-1.evil")
	msg := message(nackType, &nack{})
	passed := 0
	for range 10 * packetBurst {
		if f.packet("gateway-1.evil", msg, now) != nil {
			passed++
		}
	}
	if passed != packetBurst {
		t.Errorf("%d packets at once passed, want %d", passed, packetBurst)
	}
	if f.packet("gateway-1.evil", msg, now.Add(time.Second)) == nil {
		t.Error("the rate does not recover")
	}
	if f.packet("gateway-1.eu-west", msg, now) == nil {
		t.Error("one peer's flood is another's loss")
	}
	now = now.Add(time.Hour)
	for range 200 {
		f.packet("gateway-1.evil", message(aliveType, &alive{Node: "g" + time.Duration(passed).String()[:1] + "x" + string(rune('a'+passed%26)) + ".evil", Vsn: ownVersions}), now)
		passed++
	}
	for i := range 300 {
		f.mu.Lock()
		f.memberLocked("evil", "m"+strings.Repeat("x", i%60)+string(rune('a'+i%26))+".eu-west", now)
		f.mu.Unlock()
	}
	if n := len(f.tellers[pair{"evil", "eu-west"}]); n > maxPerCluster {
		t.Errorf("evil spoke of %d members of eu-west", n)
	}
	f.forget(now.Add(2 * memberMemory))
	if len(f.members)+len(f.tellers)+len(f.packets) != 0 {
		t.Error("nothing is forgotten")
	}
}

// FuzzPacket: whatever a peer sends, the filter answers, and what it lets pass is already in the form it would give it.
func FuzzPacket(f *testing.F) {
	for _, p := range poison("gateway-1.eu-west") {
		f.Add(p)
	}
	f.Add(joinPacket(poison("gateway-1.us-east")[:4]))
	f.Add(message(aliveType, &alive{Incarnation: 1, Node: "gateway-1.eu-west", Vsn: ownVersions}))
	f.Fuzz(func(t *testing.T, b []byte) {
		now := time.Now()
		out := testFilter("gateway-1.evil").packet("gateway-1.evil", b, now)
		if out == nil {
			return
		}
		if again := testFilter("gateway-1.evil").packet("gateway-1.evil", out, now); !bytes.Equal(again, out) {
			t.Errorf("%x passes as %x, which passes as %x", b, out, again)
		}
	})
}

// FuzzStream: whatever comes on a stream is refused or becomes a well-formed message.
func FuzzStream(f *testing.F) {
	p := &pushPull{join: true, nodes: []nodeState{{Name: "gateway-1.eu-west", Vsn: ownVersions}}, user: message(serfPushPullType, &serfPushPull{LTime: 1})}
	b, err := p.marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(message(pingType, &ping{}))
	f.Fuzz(func(t *testing.T, b []byte) {
		tr := &transport{label: "acme", filter: testFilter("gateway-1.evil", "gateway-1.eu-west")}
		r := &guarded{Conn: readOnly{bytes.NewReader(b)}, t: tr, from: "gateway-1.evil"}
		out, err := io.ReadAll(r)
		if err != nil {
			return
		}
		again, err := io.ReadAll(&guarded{Conn: readOnly{bytes.NewReader(out)}, t: tr, from: "gateway-1.evil"})
		if err != nil || len(again) != len(out) {
			t.Errorf("%x passes as %x, which does not: %v", b, out, err)
		}
	})
}

type readOnly struct{ r io.Reader }

func (c readOnly) Read(b []byte) (int, error)     { return c.r.Read(b) }
func (readOnly) Write([]byte) (int, error)        { return 0, io.ErrClosedPipe }
func (readOnly) Close() error                     { return nil }
func (readOnly) LocalAddr() net.Addr              { return peerAddr("x") }
func (readOnly) RemoteAddr() net.Addr             { return peerAddr("x") }
func (readOnly) SetDeadline(time.Time) error      { return nil }
func (readOnly) SetReadDeadline(time.Time) error  { return nil }
func (readOnly) SetWriteDeadline(time.Time) error { return nil }
