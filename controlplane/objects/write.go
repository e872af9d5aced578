// SPDX-License-Identifier: Apache-2.0

package objects

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"github.com/strait-mesh/strait/controlplane/api"
)

// Owner is the field owner of what the control plane writes itself.
const Owner = "strait-controlplane"

func (s *Store) resource(ref api.Ref) (dynamic.ResourceInterface, api.Kind, error) {
	k, ok := api.KindNamed(ref.Kind)
	if !ok {
		return nil, k, fmt.Errorf("%s: no such kind", ref)
	}
	r := s.client.Resource(k.Resource())
	if k.Namespaced {
		return r.Namespace(ref.Namespace), k, nil
	}
	return r, k, nil
}

// Apply writes the fields that object has, as Owner, and takes them from other owners. object is a pointer to a type of api; its
// status is left out.
func (s *Store) Apply(ctx context.Context, kind string, object any) error {
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(object)
	if err != nil {
		return fmt.Errorf("apply %s: %w", kind, err)
	}
	u := &unstructured.Unstructured{Object: content}
	ref := api.Ref{Kind: kind, Namespace: u.GetNamespace(), Name: u.GetName()}
	r, k, err := s.resource(ref)
	if err != nil {
		return err
	}
	u.SetGroupVersionKind(k.GroupVersionKind)
	for _, f := range [][]string{{"status"}, {"metadata", "creationTimestamp"}, {"metadata", "resourceVersion"}, {"metadata", "uid"},
		{"metadata", "generation"}, {"metadata", "managedFields"}} {
		unstructured.RemoveNestedField(u.Object, f...)
	}
	if _, err := r.Apply(ctx, u.GetName(), u, metav1.ApplyOptions{FieldManager: Owner, Force: true}); err != nil {
		return fmt.Errorf("apply %s: %w", ref, err)
	}
	return nil
}

// SetSpec replaces whole fields of an object's spec, lists included: Apply leaves in them what other owners have put there.
func (s *Store) SetSpec(ctx context.Context, ref api.Ref, fields map[string]any) error {
	r, _, err := s.resource(ref)
	if err != nil {
		return err
	}
	patch, err := json.Marshal(map[string]any{"spec": fields})
	if err == nil {
		_, err = r.Patch(ctx, ref.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: Owner})
	}
	if err != nil {
		return fmt.Errorf("set fields of %s: %w", ref, err)
	}
	return nil
}

// Delete removes an object; one that is not there is no error.
func (s *Store) Delete(ctx context.Context, ref api.Ref) error {
	r, _, err := s.resource(ref)
	if err != nil {
		return err
	}
	if err := r.Delete(ctx, ref.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete %s: %w", ref, err)
	}
	return nil
}

// UpdateStatus changes the status of an object by f, which gets it as it is (never nil) and returns whether it changed anything.
// It repeats when somebody else writes meanwhile. An object that is not there is no error.
func (s *Store) UpdateStatus(ctx context.Context, ref api.Ref, f func(status map[string]any) bool) error {
	r, _, err := s.resource(ref)
	if err != nil {
		return err
	}
	for {
		o, err := r.Get(ctx, ref.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("status of %s: %w", ref, err)
		}
		status, _ := o.Object["status"].(map[string]any)
		if status == nil {
			status = map[string]any{}
		}
		if !f(status) {
			return nil
		}
		o.Object["status"] = status
		_, err = r.UpdateStatus(ctx, o, metav1.UpdateOptions{FieldManager: Owner})
		switch {
		case err == nil || apierrors.IsNotFound(err):
			return nil
		case apierrors.IsConflict(err) && ctx.Err() == nil:
			continue
		}
		return fmt.Errorf("status of %s: %w", ref, err)
	}
}

// SetConditions merges conditions into an object's status by their type, and writes only when one differs. Their
// LastTransitionTime is now where the status word changed, and stays otherwise.
func (s *Store) SetConditions(ctx context.Context, ref api.Ref, generation int64, conditions []metav1.Condition, now time.Time) error {
	return s.UpdateStatus(ctx, ref, func(status map[string]any) bool {
		var have struct {
			ObservedGeneration int64              `json:"observedGeneration"`
			Conditions         []metav1.Condition `json:"conditions"`
		}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(status, &have); err != nil {
			have.Conditions = nil
		}
		changed := false
		for _, c := range conditions {
			c.LastTransitionTime = metav1.NewTime(now.UTC().Truncate(time.Second))
			changed = meta.SetStatusCondition(&have.Conditions, c) || changed
		}
		observes := ref.Kind != api.KindServiceExport // upstream's status has no such field
		if !changed && (!observes || have.ObservedGeneration >= generation) {
			return false
		}
		list := make([]any, 0, len(have.Conditions))
		for i := range have.Conditions {
			m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&have.Conditions[i])
			if err != nil {
				return false
			}
			list = append(list, m)
		}
		status["conditions"] = list
		if observes {
			status["observedGeneration"] = max(generation, have.ObservedGeneration)
		}
		return true
	})
}
