// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
)

const (
	snapshotFile   = "snapshot/discovery"
	snapshotFormat = 1
	// keepParked is how long the snapshot keeps what nobody subscribes any more: a service that is called on demand is still
	// known after a restart.
	keepParked = 24 * time.Hour
)

// snapshotLoop writes what is held after each change, at most once in SnapshotEvery, and once at the end.
func (c *Client) snapshotLoop(ctx context.Context) {
	failing := false
	save := func() {
		err := c.saveSnapshot()
		if err != nil && !failing {
			c.log.Error("snapshot not written", "err", err)
		}
		failing = err != nil
	}
	for {
		select {
		case <-ctx.Done():
			save()
			return
		case <-c.store.saveKick:
			sleep(ctx, c.cfg.SnapshotEvery)
			save()
		}
	}
}

func (c *Client) saveSnapshot() error {
	snap, ok := c.store.snapshot()
	if !ok {
		return nil
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(snap)
	if err == nil {
		err = c.cfg.DataDir.WriteState(snapshotFile, data)
	}
	if err != nil {
		c.store.mu.Lock()
		defer c.store.mu.Unlock()
		c.store.dirty = true // the next change, or the end, tries again
		return fmt.Errorf("snapshot: %w", err)
	}
	return nil
}

// loadSnapshot parks what the snapshot holds until somebody subscribes to it. A missing snapshot is none.
func (c *Client) loadSnapshot() error {
	data, err := c.cfg.DataDir.ReadState(snapshotFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	snap := &controlpb.DiscoverySnapshot{}
	if err := proto.Unmarshal(data, snap); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	if snap.GetFormat() != snapshotFormat {
		return fmt.Errorf("snapshot: format %d, want %d", snap.GetFormat(), snapshotFormat)
	}
	return c.store.load(snap)
}

// snapshot returns what is held as a message, unless nothing changed since the last one.
func (s *store) snapshot() (*controlpb.DiscoverySnapshot, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.dirty {
		return nil, false
	}
	s.dirty = false
	now := s.now()
	snap := &controlpb.DiscoverySnapshot{Format: snapshotFormat, SavedMs: now.UnixMilli()}
	add := func(k key, it item, wanted time.Time) {
		r := &controlpb.SnapshotResource{
			TypeUrl: k.typeURL, Name: k.name, Version: it.version, Absent: it.state == Absent, WantedMs: wanted.UnixMilli(),
		}
		if it.state == Known {
			body, err := proto.MarshalOptions{Deterministic: true}.Marshal(it.msg)
			if err != nil {
				return // it was unmarshalled from valid bytes; leaving it out costs one request
			}
			r.Body = body
		}
		snap.Resources = append(snap.Resources, r)
	}
	for k, it := range s.items {
		add(k, it, now)
	}
	for t := range s.synced {
		add(key{t, wildcard}, item{state: Absent}, now)
	}
	for k, p := range s.parked {
		if age := now.Sub(p.wanted); age >= -keepParked && age < keepParked {
			add(k, p.item, p.wanted)
		}
	}
	slices.SortFunc(snap.Resources, func(a, b *controlpb.SnapshotResource) int {
		return compareKeys(key{a.TypeUrl, a.Name}, key{b.TypeUrl, b.Name})
	})
	return snap, true
}

// load parks the resources of snap. Those that cannot be read are left out and returned as an error.
func (s *store) load(snap *controlpb.DiscoverySnapshot) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, r := range snap.GetResources() {
		p := parked{item: item{state: Absent}, wanted: time.UnixMilli(r.GetWantedMs())}
		if !r.GetAbsent() {
			msg, err := unmarshal(r.GetTypeUrl(), r.GetBody())
			if err != nil {
				errs = append(errs, fmt.Errorf("%s %s: %w", r.GetTypeUrl(), r.GetName(), err))
				continue
			}
			p.item = item{state: Known, version: r.GetVersion(), msg: msg}
		}
		s.parked[key{r.GetTypeUrl(), r.GetName()}] = p
	}
	return errors.Join(errs...)
}
