// SPDX-License-Identifier: Apache-2.0

package configapi

import (
	"context"
	"fmt"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"

	"github.com/strait-mesh/strait/controlplane/api"
)

// emptyAgain is how long a namespace whose content could not be deleted waits before the next try.
const emptyAgain = time.Second

// startNamespaces runs the controller that empties namespaces which are being deleted.
func (s *Server) startNamespaces(ctx context.Context) error {
	client, err := dynamic.NewForConfig(s.loop.restConfig())
	if err != nil {
		return err
	}
	s.wg.Go(func() { s.runNamespaces(ctx, client) })
	return nil
}

func (s *Server) runNamespaces(ctx context.Context, client dynamic.Interface) {
	k, _ := api.KindNamed(api.KindNamespace)
	for ctx.Err() == nil {
		if err := s.watchNamespaces(ctx, client, client.Resource(k.Resource())); err != nil && ctx.Err() == nil {
			s.config.Logger.Debug("watch namespaces", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(emptyAgain):
		}
	}
}

func (s *Server) watchNamespaces(ctx context.Context, client dynamic.Interface, ns dynamic.NamespaceableResourceInterface) error {
	list, err := ns.List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for i := range list.Items {
		if err := s.emptied(ctx, client, ns, &list.Items[i]); err != nil {
			return err
		}
	}
	w, err := ns.Watch(ctx, metav1.ListOptions{ResourceVersion: list.GetResourceVersion()})
	if err != nil {
		return err
	}
	defer w.Stop()
	for e := range w.ResultChan() {
		o, ok := e.Object.(*unstructured.Unstructured)
		if !ok || e.Type != watch.Added && e.Type != watch.Modified {
			continue
		}
		if err := s.emptied(ctx, client, ns, o); err != nil {
			return err
		}
	}
	return nil
}

// emptied deletes what is in a namespace that is going away, and lets it go when nothing is left.
func (s *Server) emptied(ctx context.Context, client dynamic.Interface, ns dynamic.NamespaceableResourceInterface, o *unstructured.Unstructured) error {
	if o.GetDeletionTimestamp() == nil || !slices.Contains(o.GetFinalizers(), contentFinalizer) {
		return nil
	}
	for _, k := range api.Kinds() {
		if !k.Namespaced {
			continue
		}
		r := client.Resource(k.Resource()).Namespace(o.GetName())
		if err := r.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
			return fmt.Errorf("delete %s of %s: %w", k.Plural, o.GetName(), err)
		}
		left, err := r.List(ctx, metav1.ListOptions{Limit: 1})
		if err != nil {
			return fmt.Errorf("list %s of %s: %w", k.Plural, o.GetName(), err)
		}
		if len(left.Items) > 0 {
			return fmt.Errorf("%s of %s are waiting for their finalizers", k.Plural, o.GetName())
		}
	}
	o = o.DeepCopy()
	o.SetFinalizers(slices.DeleteFunc(o.GetFinalizers(), func(f string) bool { return f == contentFinalizer }))
	if _, err := ns.Update(ctx, o, metav1.UpdateOptions{FieldManager: fieldOwner}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("let namespace %s go: %w", o.GetName(), err)
	}
	return nil
}
