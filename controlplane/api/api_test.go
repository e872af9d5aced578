// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"bytes"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/mcs-api/config/crd"

	"github.com/strait-mesh/strait/controlplane/api"
)

// TestVendoredSchema holds the copy of upstream's ServiceExport to the version it names.
func TestVendoredSchema(t *testing.T) {
	k, _ := api.KindNamed(api.KindServiceExport)
	if !bytes.Equal(k.Schema(), crd.ServiceExportCRD) {
		t.Errorf("crds/serviceexports.yaml is not the file of %s", api.MCSModule)
	}
}

func TestKinds(t *testing.T) {
	for _, k := range api.Kinds() {
		if len(k.Schema()) == 0 {
			t.Errorf("%s: no schema", k.Kind)
		}
		for _, name := range []string{k.Kind, k.Plural, "FAILOVERPOLICIES"} {
			if got, ok := api.KindNamed(name); !ok || name != "FAILOVERPOLICIES" && got != k {
				t.Errorf("%s: found %v", name, got)
			}
		}
		if got, ok := api.KindFor(k.GroupVersionKind); !ok || got != k {
			t.Errorf("%v: found %v", k.GroupVersionKind, got)
		}
	}
	if _, ok := api.KindFor(schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "Service"}); ok {
		t.Error("another group's Service was found")
	}
	if _, ok := api.KindNamed("route"); ok {
		t.Error("route was found")
	}
}

func TestWorkloadDefaults(t *testing.T) {
	w := &api.Workload{ObjectMeta: metav1.ObjectMeta{Name: "web-1"}}
	if w.Account() != api.DefaultServiceAccount || w.ProxyName() != "web-1" || w.Host() != "127.0.0.1" {
		t.Errorf("%s %s %s", w.Account(), w.ProxyName(), w.Host())
	}
	w.Labels = map[string]string{api.AppLabel: "web"}
	if w.Account() != "web" {
		t.Errorf("by label: %s", w.Account())
	}
	w.Spec = api.WorkloadSpec{ServiceAccount: "sa", Proxy: "p", Address: "10.0.0.1"}
	if w.Account() != "sa" || w.ProxyName() != "p" || w.Host() != "10.0.0.1" {
		t.Errorf("%s %s %s", w.Account(), w.ProxyName(), w.Host())
	}
}

func TestSort(t *testing.T) {
	o := &api.Objects{Workloads: []*api.Workload{{ObjectMeta: metav1.ObjectMeta{Namespace: "b", Name: "a"}}, {ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "b"}},
		{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "a"}}}}
	o.Sort()
	if o.Workloads[0].Name != "a" || o.Workloads[0].Namespace != "a" || o.Workloads[2].Namespace != "b" {
		t.Errorf("%v", o.Workloads)
	}
	if got := (api.Ref{Kind: "Peer", Name: "x"}).String(); got != "Peer x" {
		t.Error(got)
	}
}
