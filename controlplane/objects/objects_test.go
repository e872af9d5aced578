// SPDX-License-Identifier: Apache-2.0

package objects_test

import (
	"encoding/json"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/configapi"
	"github.com/strait-mesh/strait/controlplane/objects"
)

// TestStore runs against the real API: its snapshot follows what is written, in bursts, and its helpers write what they say.
func TestStore(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir() + "/store"
	s, err := configapi.Start(ctx, configapi.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	st, err := objects.Open(ctx, objects.Config{REST: s.RESTConfig()})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()

	until := func(what string, ok func(*api.Objects) bool) *api.Objects {
		t.Helper()
		deadline := time.After(20 * time.Second)
		for {
			changed := st.Changed()
			if o := st.Objects(); ok(o) {
				return o
			}
			select {
			case <-changed:
			case <-deadline:
				t.Fatalf("never: %s", what)
			}
		}
	}
	for _, name := range []string{"c", "a", "b"} {
		w := &api.Workload{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: map[string]string{"app": "web"}},
			Spec: api.WorkloadSpec{Ports: map[string]int32{"http": 8080}}}
		if err := st.Apply(ctx, api.KindWorkload, w); err != nil {
			t.Fatal(err)
		}
	}
	if err := st.Apply(ctx, api.KindPeer, &api.Peer{ObjectMeta: metav1.ObjectMeta{Name: "eu-west"}, Spec: api.PeerSpec{TrustDomain: "eu-west.acme"}}); err != nil {
		t.Fatal(err)
	}
	o := until("three workloads and a peer", func(o *api.Objects) bool { return len(o.Workloads) == 3 && len(o.Peers) == 1 })
	if o.Workloads[0].Name != "a" || o.Workloads[2].Name != "c" || o.Workloads[0].Spec.Ports["http"] != 8080 || o.Workloads[0].Account() != "web" {
		t.Errorf("workloads %+v", o.Workloads[0])
	}
	if len(o.Namespaces) != 1 || o.Namespaces[0].Name != "shop" {
		t.Errorf("namespaces %v", o.Namespaces)
	}
	kept := o.Workloads[1]

	ref := api.Ref{Kind: api.KindWorkload, Namespace: "shop", Name: "a"}
	set := []metav1.Condition{{Type: "Accepted", Status: metav1.ConditionTrue, Reason: "Valid", ObservedGeneration: 1}}
	now := time.Unix(1_800_000_000, 0)
	if err := st.SetConditions(ctx, ref, 1, set, now); err != nil {
		t.Fatal(err)
	}
	more := []metav1.Condition{{Type: "Attached", Status: metav1.ConditionFalse, Reason: "NoSession", ObservedGeneration: 1}}
	if err := st.SetConditions(ctx, ref, 1, more, now.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	o = until("two conditions", func(o *api.Objects) bool { return len(o.Workloads[0].Status.Conditions) == 2 })
	if c := o.Workloads[0].Status.Conditions[0]; !c.LastTransitionTime.Time.Equal(now) || o.Workloads[0].Status.ObservedGeneration != 1 {
		t.Errorf("condition %+v", c)
	}
	if o.Workloads[1] != kept {
		t.Error("an object that did not change was read again")
	}
	version := o.Workloads[0].ResourceVersion
	if err := st.SetConditions(ctx, ref, 1, append(set, more...), now.Add(2*time.Hour)); err != nil {
		t.Fatal(err)
	}
	d, err := dynamic.NewForConfig(s.RESTConfig())
	if err != nil {
		t.Fatal(err)
	}
	k, _ := api.KindNamed(api.KindWorkload)
	got, err := d.Resource(k.Resource()).Namespace("shop").Get(ctx, "a", metav1.GetOptions{})
	if err != nil || got.GetResourceVersion() != version {
		t.Errorf("conditions that are the same were written: %v", err)
	}
	// What an operator wrote into a list stays there when we apply the list without it, and goes when we set it.
	peer := api.Ref{Kind: api.KindPeer, Name: "eu-west"}
	kp, _ := api.KindNamed(api.KindPeer)
	edit := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "strait.dev/v1alpha1", "kind": "Peer",
		"metadata": map[string]any{"name": "eu-west"}, "spec": map[string]any{"sameness": []any{"shop"}}}}
	if _, err := d.Resource(kp.Resource()).Apply(ctx, "eu-west", edit, metav1.ApplyOptions{FieldManager: "operator"}); err != nil {
		t.Fatal(err)
	}
	if err := st.Apply(ctx, api.KindPeer, &api.Peer{ObjectMeta: metav1.ObjectMeta{Name: "eu-west"}, Spec: api.PeerSpec{TrustDomain: "eu-west.acme"}}); err != nil {
		t.Fatal(err)
	}
	until("the operator's edit", func(o *api.Objects) bool { return len(o.Peers[0].Spec.Sameness) == 1 })
	if err := st.SetSpec(ctx, peer, map[string]any{"sameness": []string{}}); err != nil {
		t.Fatal(err)
	}
	until("sameness withdrawn", func(o *api.Objects) bool {
		return len(o.Peers[0].Spec.Sameness) == 0 && o.Peers[0].Spec.TrustDomain == "eu-west.acme"
	})
	x := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "multicluster.x-k8s.io/v1beta1", "kind": "ServiceExport",
		"metadata": map[string]any{"name": "web", "namespace": "shop"}}}
	kx, _ := api.KindNamed(api.KindServiceExport)
	if _, err := d.Resource(kx.Resource()).Namespace("shop").Create(ctx, x, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := st.SetConditions(ctx, api.Ref{Kind: api.KindServiceExport, Namespace: "shop", Name: "web"}, 1,
		[]metav1.Condition{{Type: "Valid", Status: metav1.ConditionFalse, Reason: "NoService"}}, now); err != nil {
		t.Error(err)
	}
	if err := st.Delete(ctx, ref); err != nil {
		t.Fatal(err)
	}
	if err := st.Delete(ctx, ref); err != nil {
		t.Errorf("twice: %v", err)
	}
	if err := st.SetConditions(ctx, ref, 1, set, now); err != nil {
		t.Errorf("status of what is gone: %v", err)
	}
	o = until("gone", func(o *api.Objects) bool { return len(o.Workloads) == 2 && len(o.ServiceExports) == 1 })
	if data, err := json.Marshal(o); err != nil || len(data) == 0 {
		t.Error(err)
	}
}
