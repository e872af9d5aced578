// SPDX-License-Identifier: Apache-2.0

package objects

import (
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/strait-mesh/strait/controlplane/api"
)

// TestStrictReading: P7. A field that this version does not know makes the object unreadable; what it targets is still known.
func TestStrictReading(t *testing.T) {
	k, _ := api.KindNamed(api.KindAccessPolicy)
	meta := map[string]any{"name": "p", "namespace": "shop", "generation": int64(3)}
	rule := map[string]any{"action": "allow", "unless": []any{"x"}}
	spec := map[string]any{"targetRefs": []any{map[string]any{"kind": "Service", "name": "web"}}, "rules": []any{rule}}
	c := decode(k, &unstructured.Unstructured{Object: map[string]any{"apiVersion": "strait.dev/v1alpha1", "kind": "AccessPolicy", "metadata": meta, "spec": spec}})
	if c.unreadable == nil || len(c.unreadable.Targets) != 1 || c.unreadable.Targets[0].Name != "web" || c.unreadable.Generation != 3 {
		t.Fatalf("got %+v, %+v", c.value, c.unreadable)
	}
	delete(rule, "unless")
	if c := decode(k, &unstructured.Unstructured{Object: map[string]any{"metadata": meta, "spec": spec, "status": map[string]any{"new": true}}}); c.unreadable != nil {
		t.Errorf("a status of another version: %v", c.unreadable.Error)
	}
	spec["targetRefs"] = "web"
	if c := decode(k, &unstructured.Unstructured{Object: map[string]any{"metadata": meta, "spec": spec}}); c.unreadable == nil || c.unreadable.Targets != nil {
		t.Error("a wrong type was read")
	}
	s, _ := api.KindNamed(api.KindService)
	svc := map[string]any{"metadata": meta, "spec": map[string]any{"clusterIP": "None", "ports": []any{map[string]any{"port": int64(80), "targetPort": "http"}}}}
	if c := decode(s, &unstructured.Unstructured{Object: svc}); c.unreadable != nil || c.value.(*api.Service).Spec.Ports[0].TargetPort.StrVal != "http" {
		t.Errorf("upstream's kinds have more fields: %+v", c)
	}
}
