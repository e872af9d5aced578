// SPDX-License-Identifier: Apache-2.0

package objects

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/strait-mesh/strait/controlplane/api"
)

// Config is what Open needs.
type Config struct {
	REST *rest.Config
	// Quiet is how long no change must come before a snapshot is made; default 20 ms. Delay bounds the wait; default 200 ms.
	// Longer ones make fewer snapshots of a burst and each change later.
	Quiet, Delay time.Duration
	Logger       *slog.Logger
}

// Store is an open view of the configuration.
type Store struct {
	config    Config
	client    dynamic.Interface
	informers map[string]cache.SharedIndexInformer
	decoded   map[string]*cached // by kind and key; owned by run

	cancel  context.CancelFunc
	wg      sync.WaitGroup
	dirty   chan struct{}
	factory dynamicinformer.DynamicSharedInformerFactory

	mu      sync.Mutex
	current *api.Objects
	changed chan struct{} // closed when current is replaced
}

// cached is an object as it was read at one resource version.
type cached struct {
	version    string
	value      any
	unreadable *api.Unreadable
}

// Open returns when every kind was read once, or when ctx ends.
func Open(ctx context.Context, c Config) (*Store, error) {
	if c.REST == nil {
		return nil, errors.New("open objects: no API")
	}
	if c.Quiet <= 0 {
		c.Quiet = 20 * time.Millisecond
	}
	if c.Delay < c.Quiet {
		c.Delay = max(c.Quiet, 200*time.Millisecond)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	client, err := dynamic.NewForConfig(c.REST)
	if err != nil {
		return nil, fmt.Errorf("open objects: %w", err)
	}
	runCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s := &Store{
		config: c, client: client, informers: map[string]cache.SharedIndexInformer{}, decoded: map[string]*cached{},
		cancel: cancel, dirty: make(chan struct{}, 1), changed: make(chan struct{}), current: &api.Objects{},
		factory: dynamicinformer.NewDynamicSharedInformerFactory(client, 0),
	}
	for _, k := range api.Kinds() {
		inf := s.factory.ForResource(k.Resource()).Informer()
		if err := inf.SetTransform(slim); err != nil {
			cancel()
			return nil, fmt.Errorf("open objects: %w", err)
		}
		if _, err := inf.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { s.mark() }, UpdateFunc: func(any, any) { s.mark() }, DeleteFunc: func(any) { s.mark() },
		}); err != nil {
			cancel()
			return nil, fmt.Errorf("open objects: %w", err)
		}
		s.informers[k.Kind] = inf
	}
	s.factory.Start(runCtx.Done())
	for _, k := range api.Kinds() {
		if !cache.WaitForCacheSync(ctx.Done(), s.informers[k.Kind].HasSynced) {
			s.stop()
			return nil, fmt.Errorf("open objects: %s: %w", k.Plural, context.Cause(ctx))
		}
	}
	s.rebuild()
	s.wg.Go(func() { s.run(runCtx) })
	return s, nil
}

// slim drops what nobody reads here.
func slim(o any) (any, error) {
	if u, ok := o.(*unstructured.Unstructured); ok {
		u.SetManagedFields(nil)
	}
	return o, nil
}

func (s *Store) mark() {
	select {
	case s.dirty <- struct{}{}:
	default:
	}
}

// run makes snapshots: after Quiet without a change, at the latest Delay after the first.
func (s *Store) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.dirty:
		}
		limit, quiet := time.NewTimer(s.config.Delay), time.NewTimer(s.config.Quiet)
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				waiting = false
			case <-s.dirty:
				quiet.Reset(s.config.Quiet)
			case <-quiet.C:
				waiting = false
			case <-limit.C:
				waiting = false
			}
		}
		limit.Stop()
		quiet.Stop()
		if ctx.Err() != nil {
			return
		}
		s.rebuild()
	}
}

// Objects is the newest snapshot. It is shared: do not change it.
func (s *Store) Objects() *api.Objects {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current
}

// UID is the identity of an object as it is watched now, empty while there is none.
func (s *Store) UID(ref api.Ref) string {
	inf := s.informers[ref.Kind]
	if inf == nil {
		return ""
	}
	key := ref.Name
	if ref.Namespace != "" {
		key = ref.Namespace + "/" + ref.Name
	}
	item, _, err := inf.GetStore().GetByKey(key)
	if u, ok := item.(*unstructured.Unstructured); ok && err == nil {
		return string(u.GetUID())
	}
	return ""
}

// Changed returns a channel that is closed when a snapshot newer than the present one is there. Take it before Objects.
func (s *Store) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// Close ends the watches and waits.
func (s *Store) Close() error {
	s.stop()
	return nil
}

func (s *Store) stop() {
	s.cancel()
	s.factory.Shutdown()
	s.wg.Wait()
}

// rebuild reads what changed and swaps the snapshot, unless nothing did.
func (s *Store) rebuild() {
	next := map[string]*cached{}
	o := &api.Objects{}
	same := true
	for _, k := range api.Kinds() {
		for _, item := range s.informers[k.Kind].GetStore().List() {
			u, ok := item.(*unstructured.Unstructured)
			if !ok {
				continue
			}
			key := k.Kind + "/" + u.GetNamespace() + "/" + u.GetName()
			version := string(u.GetUID()) + "/" + u.GetResourceVersion()
			c := s.decoded[key]
			if c == nil || c.version != version {
				same = false
				c = decode(k, u)
				c.version = version
				if c.unreadable != nil {
					s.config.Logger.Warn("an object of the configuration cannot be read", "object", c.unreadable.Ref.String(), "error", c.unreadable.Error)
				}
			}
			next[key] = c
			add(o, c)
		}
	}
	if same && len(next) == len(s.decoded) {
		return
	}
	s.decoded = next
	o.Sort()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = o
	close(s.changed)
	s.changed = make(chan struct{})
}
