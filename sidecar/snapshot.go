// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// maxSnapshot bounds a snapshot file.
const maxSnapshot = 64 << 20

// Snapshot is a Client without a control plane: resources come from a file (Load) or from Put, nobody is reported to,
// and the identity in its Source is whoever's who made it. All methods may be called concurrently.
//
// The file is one JSON object: {"self": {…}, "services": […], "gateways": […], "bundles": […], "denied": […]}, each resource in
// the JSON form of its message in controlpb/resources.proto.
type Snapshot struct {
	source *trust.Source

	apply    sync.Mutex // held while watchers are told, so that they hear things in order
	mu       sync.Mutex
	all      map[string]map[string]proto.Message
	subs     map[string]map[string]bool // type → names; "*" is all
	watchers []*watcher
}

type watcher struct {
	f func(proxyclient.Change) error
}

// NewSnapshot returns an empty Snapshot.
func NewSnapshot(source *trust.Source) *Snapshot {
	return &Snapshot{source: source, all: map[string]map[string]proto.Message{}, subs: map[string]map[string]bool{}}
}

type snapshotFile struct {
	Self     json.RawMessage   `json:"self"`
	Services []json.RawMessage `json:"services"`
	Gateways []json.RawMessage `json:"gateways"`
	Bundles  []json.RawMessage `json:"bundles"`
	Denied   []json.RawMessage `json:"denied"`
}

// Load reads path and replaces everything. A file with anything in it that is not understood changes nothing.
func (s *Snapshot) Load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("load snapshot: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSnapshot+1))
	if err != nil {
		return fmt.Errorf("load snapshot %s: %w", path, err)
	}
	if len(b) > maxSnapshot {
		return fmt.Errorf("load snapshot %s: more than %d bytes", path, maxSnapshot)
	}
	messages, err := parseSnapshot(b)
	if err != nil {
		return fmt.Errorf("load snapshot %s: %w", path, err)
	}
	return s.replace(messages)
}

func parseSnapshot(b []byte) ([]proto.Message, error) {
	var file snapshotFile
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&file); err != nil {
		return nil, err
	}
	if len(file.Self) == 0 {
		return nil, errors.New("no self")
	}
	var out []proto.Message
	read := func(what string, raw json.RawMessage, m proto.Message) error {
		if err := protojson.Unmarshal(raw, m); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		out = append(out, m)
		return nil
	}
	if err := read("self", file.Self, &controlpb.Self{}); err != nil {
		return nil, err
	}
	for _, list := range []struct {
		what string
		raw  []json.RawMessage
		make func() proto.Message
	}{
		{"services", file.Services, func() proto.Message { return &controlpb.Service{} }},
		{"gateways", file.Gateways, func() proto.Message { return &controlpb.Gateway{} }},
		{"bundles", file.Bundles, func() proto.Message { return &controlpb.Bundle{} }},
		{"denied", file.Denied, func() proto.Message { return &controlpb.Denied{} }},
	} {
		for i, raw := range list.raw {
			if err := read(fmt.Sprintf("%s[%d]", list.what, i), raw, list.make()); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// nameOf returns type URL and name of a resource.
func nameOf(m proto.Message) (typeURL, name string) {
	switch m := m.(type) {
	case *controlpb.Self:
		return controlpb.TypeSelf, m.GetName()
	case *controlpb.Service:
		return controlpb.TypeService, m.GetNamespace() + "/" + m.GetName()
	case *controlpb.Gateway:
		return controlpb.TypeGateway, m.GetName()
	case *controlpb.Bundle:
		return controlpb.TypeBundle, m.GetTrustDomain()
	case *controlpb.Denied:
		return controlpb.TypeDenied, m.GetSpiffeId()
	}
	return "", ""
}

func (s *Snapshot) replace(messages []proto.Message) error {
	next := map[string]map[string]bool{}
	for _, m := range messages {
		t, n := nameOf(m)
		if next[t] == nil {
			next[t] = map[string]bool{}
		}
		next[t][n] = true
	}
	s.mu.Lock()
	var gone [][2]string
	for t, byName := range s.all {
		for n := range byName {
			if !next[t][n] {
				gone = append(gone, [2]string{t, n})
			}
		}
	}
	s.mu.Unlock()
	if err := s.Put(messages...); err != nil {
		return err
	}
	for _, g := range gone {
		s.Remove(g[0], g[1])
	}
	return nil
}

// Put adds or replaces resources. An error of a watcher is returned after all were told.
func (s *Snapshot) Put(messages ...proto.Message) error {
	s.apply.Lock()
	defer s.apply.Unlock()
	var errs []error
	for _, m := range messages {
		t, n := nameOf(m)
		if n == "" {
			errs = append(errs, fmt.Errorf("resource %T without a name", m))
			continue
		}
		if b, ok := m.(*controlpb.Bundle); ok {
			if err := s.putBundle(b); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		s.mu.Lock()
		if s.all[t] == nil {
			s.all[t] = map[string]proto.Message{}
		}
		s.all[t][n] = m
		s.mu.Unlock()
		errs = append(errs, s.tell(proxyclient.Change{TypeURL: t, Name: n, Message: m}))
	}
	return errors.Join(errs...)
}

// Remove takes a resource away.
func (s *Snapshot) Remove(typeURL, name string) {
	s.apply.Lock()
	defer s.apply.Unlock()
	s.mu.Lock()
	delete(s.all[typeURL], name)
	s.mu.Unlock()
	if typeURL == controlpb.TypeBundle {
		if td, err := spiffeid.ParseTrustDomain(name); err == nil {
			s.source.SetBundles(s.source.Bundles().Without(td))
		}
	}
	_ = s.tell(proxyclient.Change{TypeURL: typeURL, Name: name}) // nobody refuses a removal
}

func (s *Snapshot) putBundle(b *controlpb.Bundle) error {
	td, err := spiffeid.ParseTrustDomain(b.GetTrustDomain())
	if err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	bundle, err := trust.ParseBundle(td, b.GetJwks())
	if err != nil {
		return fmt.Errorf("bundle of %s: %w", td, err)
	}
	s.source.SetBundles(s.source.Bundles().With(bundle))
	return nil
}

func (s *Snapshot) tell(c proxyclient.Change) error {
	s.mu.Lock()
	subs := s.subs[c.TypeURL]
	heard := subs["*"] || subs[c.Name]
	watchers := slices.Clone(s.watchers)
	s.mu.Unlock()
	if !heard {
		return nil
	}
	var errs []error
	for _, w := range watchers {
		errs = append(errs, w.f(c))
	}
	return errors.Join(errs...)
}

// Source implements Client.
func (s *Snapshot) Source() *trust.Source { return s.source }

// Conn implements Client: there is nobody to report to.
func (s *Snapshot) Conn() grpc.ClientConnInterface { return nil }

// Subscribe implements Client. What is not there is told to be absent.
func (s *Snapshot) Subscribe(typeURL string, names ...string) { s.subscribe(typeURL, names) }

// SubscribeAll implements Client.
func (s *Snapshot) SubscribeAll(typeURL string) { s.subscribe(typeURL, []string{"*"}) }

func (s *Snapshot) subscribe(typeURL string, names []string) {
	s.apply.Lock()
	defer s.apply.Unlock()
	s.mu.Lock()
	if s.subs[typeURL] == nil {
		s.subs[typeURL] = map[string]bool{}
	}
	var news []string
	for _, n := range names {
		if s.subs[typeURL][n] {
			continue
		}
		s.subs[typeURL][n] = true
		if n != "*" {
			news = append(news, n)
			continue
		}
		for have := range s.all[typeURL] {
			news = append(news, have)
		}
	}
	changes := make([]proxyclient.Change, 0, len(news))
	for _, n := range news {
		changes = append(changes, proxyclient.Change{TypeURL: typeURL, Name: n, Message: s.all[typeURL][n]})
	}
	s.mu.Unlock()
	for _, c := range changes {
		_ = s.tell(c) // a refusal is the watcher's to log: there is no control plane to tell
	}
}

// Unsubscribe implements Client.
func (s *Snapshot) Unsubscribe(typeURL string, names ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range names {
		delete(s.subs[typeURL], n)
	}
}

// Watch implements Client.
func (s *Snapshot) Watch(f func(proxyclient.Change) error) (cancel func()) {
	s.apply.Lock()
	defer s.apply.Unlock()
	w := &watcher{f: f}
	s.mu.Lock()
	s.watchers = append(s.watchers, w)
	var changes []proxyclient.Change
	for t, byName := range s.all {
		for n, m := range byName {
			if s.subs[t]["*"] || s.subs[t][n] {
				changes = append(changes, proxyclient.Change{TypeURL: t, Name: n, Message: m})
			}
		}
	}
	s.mu.Unlock()
	for _, c := range changes {
		_ = f(c) // see subscribe
	}
	return func() {
		s.apply.Lock() // no call of f is under way, or begins, after cancel
		defer s.apply.Unlock()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.watchers = slices.DeleteFunc(s.watchers, func(o *watcher) bool { return o == w })
	}
}
