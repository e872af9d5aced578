// SPDX-License-Identifier: Apache-2.0

package objects

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/strait-mesh/strait/controlplane/api"
)

// Config of a Store.
type Config struct {
	REST *rest.Config // required
	// Delay gathers a burst of changes into one snapshot (10 ms), measured from its first.
	Delay  time.Duration
	Logger *slog.Logger
}

// Store follows the configuration.
type Store struct {
	client  dynamic.Interface
	factory dynamicinformer.DynamicSharedInformerFactory
	listers map[string]cache.GenericLister // by kind
	delay   time.Duration
	log     *slog.Logger
	dirty   chan struct{}
	cancel  context.CancelFunc

	current atomic.Pointer[api.Objects]
	mu      sync.Mutex
	changed chan struct{}
}

// Open starts the informers and returns when the first snapshot is whole. Run ends them.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	rc := rest.CopyConfig(cfg.REST)
	rc.QPS, rc.Burst = 200, 400
	rc.WarningHandler = rest.NoWarnings{}
	client, err := dynamic.NewForConfig(rc)
	if err != nil {
		return nil, fmt.Errorf("follow the configuration: %w", err)
	}
	s := &Store{
		client: client, factory: dynamicinformer.NewDynamicSharedInformerFactory(client, 0), listers: map[string]cache.GenericLister{},
		delay: cfg.Delay, log: cfg.Logger, dirty: make(chan struct{}, 1), changed: make(chan struct{}),
	}
	if s.delay <= 0 {
		s.delay = 10 * time.Millisecond
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	mark := func(any) {
		select {
		case s.dirty <- struct{}{}:
		default:
		}
	}
	for _, k := range api.Kinds() {
		inf := s.factory.ForResource(k.Resource())
		s.listers[k.Kind] = inf.Lister()
		if err := inf.Informer().SetTransform(stripManaged); err != nil {
			return nil, err
		}
		if _, err := inf.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: mark, DeleteFunc: mark, UpdateFunc: func(_, o any) { mark(o) },
		}); err != nil {
			return nil, err
		}
	}
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s.cancel = cancel
	s.factory.Start(life.Done())
	for gvr, ok := range s.factory.WaitForCacheSync(ctx.Done()) {
		if !ok {
			cancel()
			s.factory.Shutdown()
			return nil, fmt.Errorf("follow the configuration: %s: %w", gvr.Resource, context.Cause(ctx))
		}
	}
	s.current.Store(s.gather())
	return s, nil
}

// stripManaged drops what nobody here reads and what is most of an object's size.
func stripManaged(o any) (any, error) {
	if u, ok := o.(*unstructured.Unstructured); ok {
		u.SetManagedFields(nil)
	}
	return o, nil
}

// Run makes a new snapshot after each burst of changes, until ctx ends. It returns after the informers have ended.
func (s *Store) Run(ctx context.Context) error {
	defer s.factory.Shutdown()
	defer s.cancel()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.dirty:
		}
		t := time.NewTimer(s.delay)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
		select {
		case <-s.dirty:
		default:
		}
		s.publish()
	}
}

func (s *Store) publish() {
	next := s.gather()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current.Store(next)
	close(s.changed)
	s.changed = make(chan struct{})
}

// Snapshot is the newest whole configuration; shared, do not modify.
func (s *Store) Snapshot() *api.Objects { return s.current.Load() }

// Changed returns a channel that is closed at the next snapshot.
func (s *Store) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

func (s *Store) gather() *api.Objects {
	o := &api.Objects{}
	collect(s, o, "Namespace", &o.Namespaces)
	collect(s, o, "Service", &o.Services)
	collect(s, o, "ServiceExport", &o.ServiceExports)
	collect(s, o, "Federation", &o.Federations)
	collect(s, o, "Peer", &o.Peers)
	collect(s, o, "ExportPolicy", &o.ExportPolicies)
	collect(s, o, "FailoverPolicy", &o.FailoverPolicies)
	collect(s, o, "AccessPolicy", &o.AccessPolicies)
	collect(s, o, "Workload", &o.Workloads)
	o.Sort()
	return o
}

// strictKinds are read strictly: a field of theirs that this version does not know may be a restriction. The upstream kinds
// have fields that Strait does not read by design.
var strictKinds = map[string]bool{"ExportPolicy": true, "FailoverPolicy": true, "AccessPolicy": true}

func collect[T any](s *Store, all *api.Objects, kind string, out *[]*T) {
	lister := s.listers[kind]
	if lister == nil {
		return
	}
	list, err := lister.List(labels.Everything())
	if err != nil {
		s.log.Error("configuration not listed", "kind", kind, "err", err)
		return
	}
	for _, raw := range list {
		u, ok := raw.(*unstructured.Unstructured)
		if !ok || u.GetDeletionTimestamp() != nil {
			continue
		}
		v := new(T)
		if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(u.Object, v, strictKinds[kind]); err != nil {
			all.Unreadable = append(all.Unreadable, unreadable(u, err))
			continue
		}
		*out = append(*out, v)
	}
}

func unreadable(u *unstructured.Unstructured, err error) api.Unreadable {
	r := api.Unreadable{Ref: api.Ref{Kind: u.GetKind(), Namespace: u.GetNamespace(), Name: u.GetName()}, Generation: u.GetGeneration(), Error: err.Error()}
	refs, _, _ := unstructured.NestedSlice(u.Object, "spec", "targetRefs")
	for _, ref := range refs {
		if m, ok := ref.(map[string]any); ok {
			kind, _ := m["kind"].(string)
			name, _ := m["name"].(string)
			group, _ := m["group"].(string)
			r.Targets = append(r.Targets, api.TargetRef{Group: group, Kind: kind, Name: name})
		}
	}
	return r
}

func (s *Store) resource(ref api.Ref) (dynamic.ResourceInterface, error) {
	k, ok := api.KindNamed(ref.Kind)
	if !ok {
		return nil, fmt.Errorf("%s: no such kind", ref)
	}
	r := s.client.Resource(k.Resource())
	if k.Namespaced {
		return r.Namespace(ref.Namespace), nil
	}
	return r, nil
}

func toUnstructured(o any) (*unstructured.Unstructured, error) {
	data, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	u := &unstructured.Unstructured{}
	if err := u.UnmarshalJSON(data); err != nil {
		return nil, err
	}
	unstructured.RemoveNestedField(u.Object, "metadata", "creationTimestamp")
	return u, nil
}

// Apply writes o, an object of package api with kind and version set, by server-side apply as owner. Status is left out.
func (s *Store) Apply(ctx context.Context, o any, owner string) error {
	return s.apply(ctx, o, owner, false)
}

// ApplyStatus writes o's status alone.
func (s *Store) ApplyStatus(ctx context.Context, o any, owner string) error {
	return s.apply(ctx, o, owner, true)
}

func (s *Store) apply(ctx context.Context, o any, owner string, status bool) error {
	u, err := toUnstructured(o)
	if err != nil {
		return err
	}
	ref := api.Ref{Kind: u.GetKind(), Namespace: u.GetNamespace(), Name: u.GetName()}
	r, err := s.resource(ref)
	if err != nil {
		return err
	}
	opts := metav1.ApplyOptions{FieldManager: owner, Force: true}
	if status {
		unstructured.RemoveNestedField(u.Object, "spec")
		_, err = r.ApplyStatus(ctx, u.GetName(), u, opts)
	} else {
		unstructured.RemoveNestedField(u.Object, "status")
		_, err = r.Apply(ctx, u.GetName(), u, opts)
	}
	if err != nil {
		return fmt.Errorf("apply %s: %w", ref, err)
	}
	return nil
}

// Delete removes an object; an absent one is no error.
func (s *Store) Delete(ctx context.Context, ref api.Ref) error {
	r, err := s.resource(ref)
	if err != nil {
		return err
	}
	if err := r.Delete(ctx, ref.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete %s: %w", ref, err)
	}
	return nil
}

// errNoStatus is of kinds without a status.
var errNoStatus = errors.New("the kind has no status")

// SetConditions replaces an object's conditions and observed generation. Transition times of conditions that do not change
// stay. An object that is gone is no error.
func (s *Store) SetConditions(ctx context.Context, ref api.Ref, generation int64, conditions []metav1.Condition, owner string) error {
	if ref.Kind == "Service" || ref.Kind == "Namespace" {
		return fmt.Errorf("conditions of %s: %w", ref, errNoStatus)
	}
	r, err := s.resource(ref)
	if err != nil {
		return err
	}
	have, err := r.Get(ctx, ref.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("conditions of %s: %w", ref, err)
	}
	old := map[string]metav1.Condition{}
	list, _, _ := unstructured.NestedSlice(have.Object, "status", "conditions")
	for _, raw := range list {
		var c metav1.Condition
		if m, ok := raw.(map[string]any); ok && runtime.DefaultUnstructuredConverter.FromUnstructured(m, &c) == nil {
			old[c.Type] = c
		}
	}
	now := metav1.Now()
	next := make([]metav1.Condition, len(conditions))
	for i, c := range conditions {
		c.LastTransitionTime = now
		if o, ok := old[c.Type]; ok && o.Status == c.Status && !o.LastTransitionTime.IsZero() {
			c.LastTransitionTime = o.LastTransitionTime
		}
		c.ObservedGeneration = generation
		next[i] = c
	}
	u := &unstructured.Unstructured{Object: map[string]any{"apiVersion": have.GetAPIVersion(), "kind": have.GetKind(), "metadata": map[string]any{"name": ref.Name}}}
	if ref.Namespace != "" {
		u.SetNamespace(ref.Namespace)
	}
	status := map[string]any{}
	data, err := json.Marshal(api.ConditionStatus{ObservedGeneration: generation, Conditions: next})
	if err == nil {
		err = json.Unmarshal(data, &status)
	}
	if err != nil {
		return err
	}
	if ref.Kind == "ServiceExport" {
		delete(status, "observedGeneration") // upstream's schema has none
	}
	u.Object["status"] = status
	if _, err := r.ApplyStatus(ctx, ref.Name, u, metav1.ApplyOptions{FieldManager: owner, Force: true}); err != nil {
		return fmt.Errorf("conditions of %s: %w", ref, err)
	}
	return nil
}
