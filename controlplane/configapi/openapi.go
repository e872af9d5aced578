// SPDX-License-Identifier: Apache-2.0

package configapi

import (
	"encoding/json"
	"fmt"
	"maps"

	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	generatedopenapi "k8s.io/apiextensions-apiserver/pkg/generated/openapi"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-openapi/pkg/common"
	"k8s.io/kube-openapi/pkg/validation/spec"
	"sigs.k8s.io/yaml"

	"github.com/strait-mesh/strait/controlplane/api"
)

// definitions are those of the libraries, and of the built-in kinds from their schemas.
func definitions(ref common.ReferenceCallback) map[string]common.OpenAPIDefinition {
	defs := generatedopenapi.GetOpenAPIDefinitions(ref)
	maps.Copy(defs, coreDefinitions(ref))
	return defs
}

func coreDefinitions(ref common.ReferenceCallback) map[string]common.OpenAPIDefinition {
	objectMeta, listMeta := metav1.ObjectMeta{}.OpenAPIModelName(), metav1.ListMeta{}.OpenAPIModelName()
	defs := map[string]common.OpenAPIDefinition{}
	for _, d := range []struct{ kind, name, list string }{
		{api.KindNamespace, corev1.Namespace{}.OpenAPIModelName(), corev1.NamespaceList{}.OpenAPIModelName()},
		{api.KindService, corev1.Service{}.OpenAPIModelName(), corev1.ServiceList{}.OpenAPIModelName()},
	} {
		s, err := kindSchema(d.kind)
		if err != nil {
			panic(err) // embedded; every test that starts a server reads it
		}
		s.Properties["metadata"] = refTo(ref, objectMeta)
		defs[d.name] = common.OpenAPIDefinition{Schema: *s, Dependencies: []string{objectMeta}}
		item, list := refTo(ref, d.name), spec.Schema{}
		list.Type = spec.StringOrArray{"object"}
		list.Required = []string{"items"}
		list.Properties = map[string]spec.Schema{
			"apiVersion": *spec.StringProperty(), "kind": *spec.StringProperty(),
			"metadata": refTo(ref, listMeta),
			"items":    *spec.ArrayProperty(&item),
		}
		defs[d.list] = common.OpenAPIDefinition{Schema: list, Dependencies: []string{listMeta, d.name}}
	}
	return defs
}

func kindSchema(kind string) (*spec.Schema, error) {
	k, _ := api.KindNamed(kind)
	var crd apiextensionsv1.CustomResourceDefinition
	if err := yaml.Unmarshal(k.Schema(), &crd); err != nil {
		return nil, fmt.Errorf("schema of %s: %w", kind, err)
	}
	data, err := json.Marshal(crd.Spec.Versions[0].Schema.OpenAPIV3Schema)
	if err != nil {
		return nil, fmt.Errorf("schema of %s: %w", kind, err)
	}
	s := &spec.Schema{}
	if err := json.Unmarshal(data, s); err != nil {
		return nil, fmt.Errorf("schema of %s: %w", kind, err)
	}
	return s, nil
}

func refTo(ref common.ReferenceCallback, name string) spec.Schema {
	return spec.Schema{SchemaProps: spec.SchemaProps{Ref: ref(name)}}
}
