// SPDX-License-Identifier: Apache-2.0

package schema

import (
	"context"
	"fmt"
	"strings"
	"sync"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	structural "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/objectmeta"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	apivalidation "k8s.io/apimachinery/pkg/api/validation"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"

	"github.com/strait-mesh/strait/controlplane/api"
)

// kindSchema is the compiled schema of one kind.
type kindSchema struct {
	kind       api.Kind
	structural *structural.Structural
	validator  validation.SchemaValidator
	cel        *cel.Validator
}

var compiled = func() map[string]func() (*kindSchema, error) {
	m := map[string]func() (*kindSchema, error){}
	for _, k := range api.Kinds() {
		m[k.Kind] = sync.OnceValues(func() (*kindSchema, error) { return compileKind(k) })
	}
	return m
}()

func compileKind(k api.Kind) (*kindSchema, error) {
	props, err := openAPI(k)
	if err != nil {
		return nil, err
	}
	s, err := structural.NewStructural(props)
	if err != nil {
		return nil, fmt.Errorf("schema of %s: %w", k.Kind, err)
	}
	v, _, err := validation.NewSchemaValidator(props)
	if err != nil {
		return nil, fmt.Errorf("schema of %s: %w", k.Kind, err)
	}
	return &kindSchema{kind: k, structural: s, validator: v, cel: cel.NewValidator(s, true, celconfig.PerCallLimit)}, nil
}

// openAPI returns the schema of the version of k that is served.
func openAPI(k api.Kind) (*apiextensions.JSONSchemaProps, error) {
	var crd apiextensionsv1.CustomResourceDefinition
	if err := yaml.UnmarshalStrict(k.Schema(), &crd); err != nil {
		return nil, fmt.Errorf("schema of %s: %w", k.Kind, err)
	}
	for _, v := range crd.Spec.Versions {
		if v.Name != k.Version || v.Schema == nil {
			continue
		}
		props := &apiextensions.JSONSchemaProps{}
		if err := apiextensionsv1.Convert_v1_JSONSchemaProps_To_apiextensions_JSONSchemaProps(v.Schema.OpenAPIV3Schema, props, nil); err != nil {
			return nil, fmt.Errorf("schema of %s: %w", k.Kind, err)
		}
		return props, nil
	}
	return nil, fmt.Errorf("schema of %s: no version %s", k.Kind, k.Version)
}

// Validate judges o as the API does: unknown fields, the schema, defaults, CEL. It fills the defaults in and otherwise leaves o
// as it is. A missing namespace is not judged.
func Validate(ctx context.Context, o *unstructured.Unstructured) field.ErrorList {
	ks, errs := lookup(o)
	if len(errs) > 0 {
		return errs
	}
	return ks.validate(ctx, o.Object)
}

func lookup(o *unstructured.Unstructured) (*kindSchema, field.ErrorList) {
	gvk := o.GroupVersionKind()
	if gvk.Kind == "" || o.GetAPIVersion() == "" {
		missing := "kind"
		if gvk.Kind != "" {
			missing = "apiVersion"
		}
		return nil, field.ErrorList{field.Required(field.NewPath(missing), "")}
	}
	k, ok := api.KindFor(gvk)
	if !ok {
		if named, ok := api.KindNamed(gvk.Kind); ok {
			return nil, field.ErrorList{field.NotSupported(field.NewPath("apiVersion"), o.GetAPIVersion(), []string{named.GroupVersion().String()})}
		}
		var known []string
		for _, k := range api.Kinds() {
			known = append(known, k.Kind)
		}
		return nil, field.ErrorList{field.NotSupported(field.NewPath("kind"), gvk.Kind, known)}
	}
	ks, err := compiled[k.Kind]()
	if err != nil {
		return nil, field.ErrorList{field.InternalError(nil, err)}
	}
	return ks, nil
}

func (s *kindSchema) validate(ctx context.Context, obj map[string]any) field.ErrorList {
	var errs field.ErrorList
	errs = append(errs, s.metadata(ctx, obj)...)
	pruned := runtime.DeepCopyJSON(obj)
	for _, p := range pruning.PruneWithOptions(pruned, s.structural, true, structural.UnknownFieldPathOptions{TrackUnknownFieldPaths: true}) {
		errs = append(errs, &field.Error{Type: field.ErrorTypeForbidden, Field: p, Detail: unknownField})
	}
	defaulting.PruneNonNullableNullsWithoutDefaults(obj, s.structural)
	defaulting.Default(obj, s.structural)
	schemaErrs := validation.ValidateCustomResource(nil, obj, s.validator)
	schemaErrs = append(schemaErrs, listtype.ValidateListSetsAndMaps(nil, s.structural, obj)...)
	if len(schemaErrs) == 0 && len(errs) == 0 && s.cel != nil { // as the API does: rules are for values that fit the schema
		schemaErrs, _ = s.cel.Validate(ctx, nil, s.structural, obj, nil, celconfig.RuntimeCELCostBudget)
	}
	return append(errs, schemaErrs...)
}

const unknownField = "unknown field"

func (s *kindSchema) metadata(ctx context.Context, obj map[string]any) field.ErrorList {
	path := field.NewPath("metadata")
	if _, ok := obj["metadata"].(map[string]any); !ok {
		if obj["metadata"] != nil {
			return field.ErrorList{field.TypeInvalid(path, "", "must be an object")}
		}
		return field.ErrorList{field.Required(path.Child("name"), "")}
	}
	meta, _, unknown, err := objectmeta.GetObjectMetaWithOptions(obj, objectmeta.ObjectMetaOptions{ReturnUnknownFieldPaths: true})
	if err != nil {
		return field.ErrorList{field.Invalid(path, nil, err.Error())}
	}
	var errs field.ErrorList
	for _, p := range unknown {
		errs = append(errs, &field.Error{Type: field.ErrorTypeForbidden, Field: p, Detail: unknownField})
	}
	if s.kind.Namespaced && meta.Namespace == "" {
		meta.Namespace = "default" // whoever sends it chooses one
	}
	nameFn := apivalidation.NameIsDNSSubdomain
	if s.kind.Kind == api.KindNamespace {
		nameFn = apivalidation.NameIsDNSLabel
	}
	for _, e := range apivalidation.ValidateObjectMeta(meta, s.kind.Namespaced, nameFn, path) {
		if strings.HasPrefix(e.Field, "metadata.managedFields") {
			continue // the API's own
		}
		errs = append(errs, e)
	}
	return append(errs, objectmeta.Validate(ctx, nil, obj, s.structural, false)...)
}
