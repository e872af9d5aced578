// SPDX-License-Identifier: Apache-2.0

package discovery

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// model is a subscriber that does what the protocol says and nothing clever, beside the truth in plain maps.
type model struct {
	t         *rapid.T
	server    *Server
	published map[string]uint64 // name → revision; what exists
	hidden    map[string]bool   // what this peer may not see

	stream  *stream
	asked   map[string]bool   // names, "*" included
	held    map[string]string // name → version
	pending []*controlpb.DeltaDiscoveryResponse
}

var modelNames = []string{"a", "b", "c", "d", "e"}

func newModel(t *rapid.T) *model {
	m := &model{t: t, published: map[string]uint64{}, hidden: map[string]bool{}, asked: map[string]bool{}, held: map[string]string{}}
	var err error
	m.server, err = New(Config{
		MaxResponse: 24, // splits answers
		Peer:        func(context.Context) (spiffeid.ID, error) { return spiffeid.ID{}, nil },
		Authorize: func(_ context.Context, _ spiffeid.ID, _, _, name string) error {
			if m.hidden[name] {
				return errors.New("hidden")
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	m.connect()
	return m
}

func (m *model) connect() {
	if m.stream != nil {
		m.server.mu.Lock()
		m.server.removeLocked(m.stream)
		m.server.mu.Unlock()
	}
	m.pending = nil
	m.stream = &stream{server: m.server, ctx: context.Background(), wake: make(chan struct{}, 1), types: map[string]*typeState{}, delta: true}
	m.server.mu.Lock()
	m.server.streams[m.stream] = struct{}{}
	m.server.mu.Unlock()
	if len(m.asked) > 0 {
		m.request(&controlpb.DeltaDiscoveryRequest{
			ResourceNamesSubscribe: slices.Sorted(maps.Keys(m.asked)), InitialResourceVersions: maps.Clone(m.held),
		})
	}
}

func (m *model) request(q *controlpb.DeltaDiscoveryRequest) {
	q.TypeUrl = controlpb.TypeService
	if err := m.server.deltaRequest(m.stream, q); err != nil {
		m.t.Fatalf("request %v: %v", q, err)
	}
}

func (m *model) covered(name string) bool { return m.asked[name] || m.asked[Wildcard] }

// receive takes one response in, if there is one, and leaves it to be answered.
func (m *model) receive() bool {
	r := m.server.deltaResponse(m.stream)
	if r == nil {
		return false
	}
	for _, res := range r.GetResources() {
		if m.hidden[res.GetName()] {
			m.t.Fatalf("%s was sent and must not be seen", res.GetName())
		}
		if m.covered(res.GetName()) {
			m.held[res.GetName()] = res.GetVersion()
		}
	}
	for _, name := range r.GetRemovedResources() {
		delete(m.held, name)
	}
	m.pending = append(m.pending, r)
	if len(m.pending) > maxUnanswered {
		m.t.Fatalf("%d responses without an answer", len(m.pending))
	}
	return true
}

func (m *model) answer(i int, nack bool) {
	r := m.pending[i]
	m.pending = slices.Delete(m.pending, i, i+1)
	q := &controlpb.DeltaDiscoveryRequest{ResponseNonce: r.GetNonce()}
	if nack {
		q.ErrorDetail = &controlpb.RpcStatus{Message: "no"}
	}
	m.request(q)
}

// settle answers and receives until nothing is left to say, and compares.
func (m *model) settle() {
	for more := true; more; {
		more = m.receive()
		for len(m.pending) > 0 {
			m.answer(0, false)
			more = true
		}
	}
	want := map[string]string{}
	for name := range m.published {
		if m.covered(name) && !m.hidden[name] {
			want[name] = m.server.Version(controlpb.TypeService, name)
		}
	}
	if !maps.Equal(m.held, want) {
		m.t.Fatalf("subscribed to %v\nheld %v\nwant %v", m.asked, m.held, want)
	}
	for name := range want {
		if acked, subscribed, nacks := m.server.Acked(controlpb.TypeService, name); acked != 1 || subscribed != 1 || len(nacks) != 0 {
			m.t.Fatalf("%s: acked %d of %d, nacks %v", name, acked, subscribed, nacks)
		}
	}
	m.checkIndex()
}

// checkIndex holds the index to what it must contain and nothing else: neither names nor streams are left behind.
func (m *model) checkIndex() {
	t := m.server.types[controlpb.TypeService]
	if t == nil {
		return
	}
	for name, e := range t.entries {
		if _, exists := m.published[name]; exists != (e.resource != nil) {
			m.t.Fatalf("%s: exists %v, indexed %v", name, exists, e.resource != nil)
		}
		if e.resource == nil && len(e.subscribers) == 0 {
			m.t.Fatalf("%s is left behind", name)
		}
		for st := range e.subscribers {
			if st != m.stream {
				m.t.Fatalf("%s: a stream that has ended is left behind", name)
			}
			if !m.covered(name) {
				m.t.Fatalf("%s: not subscribed and indexed as such", name)
			}
		}
	}
}

// TestDeltaModel drives the incremental variant with random changes, subscriptions, answers and reconnects. Whatever the order,
// a subscriber that answers ends up with exactly what it may see of what it asked for.
func TestDeltaModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newModel(t)
		if err := m.server.Replace(controlpb.TypeService, nil); err != nil {
			t.Fatal(err)
		}
		name := rapid.SampledFrom(modelNames)
		revision := uint64(0)
		t.Repeat(map[string]func(*rapid.T){
			"set": func(t *rapid.T) {
				n := name.Draw(t, "name")
				revision = rapid.Uint64Range(1, 3).Draw(t, "revision") // returns to earlier content, too
				m.published[n] = revision
				if err := m.server.Set(controlpb.TypeService, n, &controlpb.Service{Name: n, Revision: revision}); err != nil {
					t.Fatal(err)
				}
			},
			"delete": func(t *rapid.T) {
				n := name.Draw(t, "name")
				delete(m.published, n)
				m.server.Delete(controlpb.TypeService, n)
			},
			"replace": func(t *rapid.T) {
				m.published = rapid.MapOf(name, rapid.Uint64Range(1, 3)).Draw(t, "all")
				all := map[string]proto.Message{}
				for n, r := range m.published {
					all[n] = &controlpb.Service{Name: n, Revision: r}
				}
				if err := m.server.Replace(controlpb.TypeService, all); err != nil {
					t.Fatal(err)
				}
			},
			"hide": func(t *rapid.T) {
				n := name.Draw(t, "name")
				m.hidden[n] = !m.hidden[n]
				m.server.Judge()
			},
			"subscribe": func(t *rapid.T) {
				n := rapid.SampledFrom(append([]string{Wildcard}, modelNames...)).Draw(t, "name")
				m.asked[n] = true
				m.request(&controlpb.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{n}})
			},
			"unsubscribe": func(t *rapid.T) {
				n := rapid.SampledFrom(append([]string{Wildcard}, modelNames...)).Draw(t, "name")
				delete(m.asked, n)
				m.request(&controlpb.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{n}})
				for h := range m.held {
					if !m.covered(h) {
						delete(m.held, h)
					}
				}
			},
			"receive": func(*rapid.T) {
				if len(m.pending) < maxUnanswered {
					m.receive()
				}
			},
			"answer": func(t *rapid.T) {
				if len(m.pending) > 0 {
					m.answer(rapid.IntRange(0, len(m.pending)-1).Draw(t, "which"), false)
				}
			},
			"reconnect": func(*rapid.T) { m.connect() },
			"settle":    func(*rapid.T) { m.settle() },
		})
		m.settle()
	})
}

// TestRefusalsInAnyOrder mixes NACKs in: what is refused is not sent again, and a change repairs it.
func TestRefusalsInAnyOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newModel(t)
		if err := m.server.Replace(controlpb.TypeService, nil); err != nil {
			t.Fatal(err)
		}
		m.asked[Wildcard] = true
		m.request(&controlpb.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{Wildcard}})
		for i := range rapid.IntRange(1, 20).Draw(t, "changes") {
			n := rapid.SampledFrom(modelNames).Draw(t, "name")
			if err := m.server.Set(controlpb.TypeService, n, &controlpb.Service{Name: n, Revision: uint64(i + 1)}); err != nil {
				t.Fatal(err)
			}
			m.published[n] = uint64(i + 1)
			for m.receive() && len(m.pending) < maxUnanswered {
			}
			for len(m.pending) > 0 {
				m.answer(rapid.IntRange(0, len(m.pending)-1).Draw(t, "which"), rapid.Bool().Draw(t, "refuse"))
			}
			if m.receive() {
				t.Fatalf("after every answer there is a response: %v", m.pending)
			}
		}
		for n := range m.published { // a change repairs every refusal
			if err := m.server.Set(controlpb.TypeService, n, &controlpb.Service{Name: n, Revision: 1000}); err != nil {
				t.Fatal(err)
			}
		}
		m.settle()
	})
}

// FuzzRequest: whatever one peer asks for is refused or answered, and never crashes or grows the index beyond its bounds.
func FuzzRequest(f *testing.F) {
	for _, q := range []*controlpb.DeltaDiscoveryRequest{
		{TypeUrl: controlpb.TypeService, ResourceNamesSubscribe: []string{"a", "*"}},
		{TypeUrl: controlpb.TypeService, ResourceNamesUnsubscribe: []string{"a", "*"}, ResponseNonce: "1", ErrorDetail: &controlpb.RpcStatus{Code: 3}},
		{TypeUrl: controlpb.TypeService, InitialResourceVersions: map[string]string{"a": "x", "": ""}},
	} {
		data, err := proto.Marshal(q)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, data)
	}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		s, err := New(Config{
			MaxNames: 8, Peer: func(context.Context) (spiffeid.ID, error) { return spiffeid.ID{}, nil },
			Authorize: func(_ context.Context, _ spiffeid.ID, _, _, name string) error {
				if strings.HasPrefix(name, "b") {
					return errors.New("hidden")
				}
				return nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		s.Open()
		for i := range 3 {
			if err := s.Set(controlpb.TypeService, fmt.Sprint(string(rune('a'+i))), &controlpb.Service{Revision: uint64(i)}); err != nil {
				t.Fatal(err)
			}
		}
		st := &stream{server: s, ctx: context.Background(), wake: make(chan struct{}, 1), types: map[string]*typeState{}}
		s.streams[st] = struct{}{}
		for _, data := range [][]byte{first, second, first} {
			delta, sotw := &controlpb.DeltaDiscoveryRequest{}, &controlpb.DiscoveryRequest{}
			if proto.Unmarshal(data, delta) == nil && s.deltaRequest(st, delta) == nil {
				for range 100 {
					if s.deltaResponse(st) == nil {
						break
					}
				}
			}
			if proto.Unmarshal(data, sotw) == nil && s.sotwRequest(st, sotw) == nil {
				for range 100 {
					if s.sotwResponse(st) == nil {
						break
					}
				}
			}
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.removeLocked(st)
		for _, ti := range s.types {
			if len(ti.all) > 0 || len(ti.entries) > 3 {
				t.Fatalf("%d names and %d wildcards are left behind", len(ti.entries), len(ti.all))
			}
		}
	})
}
