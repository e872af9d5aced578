// SPDX-License-Identifier: Apache-2.0

package schema_test

import (
	"context"
	"testing"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/install"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	"github.com/strait-mesh/strait/controlplane/api"
)

// TestSchemasAreAccepted holds every CustomResourceDefinition to what an API server demands: structural, within the cost of CEL.
func TestSchemasAreAccepted(t *testing.T) {
	scheme := runtime.NewScheme()
	install.Install(scheme)
	for _, k := range api.Kinds() {
		if k.BuiltIn {
			continue
		}
		var v1 apiextensionsv1.CustomResourceDefinition
		if err := yaml.UnmarshalStrict(k.Schema(), &v1); err != nil {
			t.Errorf("%s: %v", k.Kind, err)
			continue
		}
		if want := k.Plural + "." + k.Group; v1.Name != want || v1.Spec.Names.Kind != k.Kind || (v1.Spec.Scope == "Namespaced") != k.Namespaced {
			t.Errorf("%s: is %s, %s, %s", k.Kind, v1.Name, v1.Spec.Names.Kind, v1.Spec.Scope)
		}
		scheme.Default(&v1)
		var crd apiextensions.CustomResourceDefinition
		if err := scheme.Convert(&v1, &crd, nil); err != nil {
			t.Errorf("%s: %v", k.Kind, err)
			continue
		}
		for _, v := range v1.Spec.Versions {
			crd.Status.StoredVersions = append(crd.Status.StoredVersions, v.Name)
			break
		}
		for _, e := range validation.ValidateCustomResourceDefinition(context.Background(), &crd) {
			if e.Field != "status.storedVersions" {
				t.Errorf("%s: %v", k.Kind, e)
			}
		}
	}
}
