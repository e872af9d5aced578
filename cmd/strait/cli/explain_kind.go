// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/internal/problem"
)

// schemaNode is what is shown of a schema: the same text that the configuration API validates by.
type schemaNode struct {
	Type        string                `json:"type,omitempty"`
	Description string                `json:"description,omitempty"`
	Default     any                   `json:"default,omitempty"`
	Enum        []any                 `json:"enum,omitempty"`
	Minimum     *float64              `json:"minimum,omitempty"`
	Maximum     *float64              `json:"maximum,omitempty"`
	Required    []string              `json:"required,omitempty"`
	Properties  map[string]schemaNode `json:"properties,omitempty"`
	Items       *schemaNode           `json:"items,omitempty"`
	IntOrString bool                  `json:"x-kubernetes-int-or-string,omitempty"`
	Raw         json.RawMessage       `json:"additionalProperties,omitempty"`
}

// explainField describes KIND[.FIELD…] from the schemas in the binary.
func explainField(e *env, k api.Kind, path []string) error {
	node, err := kindSchema(k)
	if err != nil {
		return err
	}
	name := k.Kind
	for _, field := range path {
		node = node.inner()
		next, ok := node.Properties[field]
		if !ok {
			return problem.New(problem.NotFound, "%s has no field %q", name, field).
				WithWhy("its fields are %s", strings.Join(slices.Sorted(maps.Keys(node.Properties)), ", ")).WithFix("strait explain %s", name)
		}
		node, name = next, name+"."+field
	}
	if e.output != "table" && e.output != "wide" || e.jq != "" {
		return e.print("Field", map[string]any{"name": name, "group": k.Group, "version": k.Version, "schema": node}, &table{names: []string{name}})
	}
	e.renderField(name, k, node)
	return nil
}

func kindSchema(k api.Kind) (schemaNode, error) {
	var crd struct {
		Spec struct {
			Versions []struct {
				Name   string `json:"name"`
				Schema struct {
					OpenAPIV3Schema schemaNode `json:"openAPIV3Schema"`
				} `json:"schema"`
			} `json:"versions"`
		} `json:"spec"`
	}
	if err := yaml.Unmarshal(k.Schema(), &crd); err != nil {
		return schemaNode{}, fmt.Errorf("schema of %s: %w", k.Kind, err)
	}
	for _, v := range crd.Spec.Versions {
		if v.Name == k.Version {
			return v.Schema.OpenAPIV3Schema, nil
		}
	}
	return schemaNode{}, fmt.Errorf("schema of %s has no version %s", k.Kind, k.Version)
}

// inner is the node whose properties are fields: of a list its elements, of a map its values.
func (n schemaNode) inner() schemaNode {
	for len(n.Properties) == 0 {
		switch v := n.values(); {
		case n.Items != nil:
			n = *n.Items
		case v != nil:
			n = *v
		default:
			return n
		}
	}
	return n
}

func (n schemaNode) values() *schemaNode {
	var v schemaNode
	if len(n.Raw) == 0 || json.Unmarshal(n.Raw, &v) != nil {
		return nil
	}
	return &v
}

func (n schemaNode) typeText() string {
	switch v := n.values(); {
	case n.IntOrString:
		return "integer or string"
	case n.Items != nil:
		return "list of " + n.Items.typeText()
	case v != nil:
		return "map of " + v.typeText()
	default:
		return n.Type
	}
}

// limits says what a value may be, and what it is when it is left out.
func (n schemaNode) limits() string {
	var parts []string
	if len(n.Enum) > 0 {
		words := make([]string, len(n.Enum))
		for i, v := range n.Enum {
			words[i] = fmt.Sprint(v)
			if v == "" {
				words[i] = `""`
			}
		}
		parts = append(parts, strings.Join(words, "|"))
	}
	if n.Minimum != nil && n.Maximum != nil {
		parts = append(parts, fmt.Sprintf("%v to %v", *n.Minimum, *n.Maximum))
	} else if n.Minimum != nil {
		parts = append(parts, fmt.Sprintf("from %v", *n.Minimum))
	}
	if n.Default != nil {
		text, err := json.Marshal(n.Default)
		if err == nil {
			parts = append(parts, "default "+string(text))
		}
	}
	return strings.Join(parts, ", ")
}

func (e *env) renderField(name string, k api.Kind, node schemaNode) {
	gv := k.GroupVersion().String()
	fmt.Fprintf(e.out, "%s  %s  (%s)\n", name, node.typeText(), gv)
	if node.Description != "" {
		fmt.Fprintf(e.out, "\n  %s\n", strings.ReplaceAll(strings.TrimSpace(node.Description), "\n", "\n  "))
	}
	if l := node.limits(); l != "" {
		fmt.Fprintf(e.out, "\n  %s\n", l)
	}
	node = node.inner()
	if len(node.Properties) == 0 {
		return
	}
	fmt.Fprintln(e.out, "\nFIELDS")
	var rows [][]string
	for _, field := range slices.Sorted(maps.Keys(node.Properties)) {
		p := node.Properties[field]
		limits := p.limits()
		if slices.Contains(node.Required, field) {
			limits = strings.TrimSuffix("required, "+limits, ", ")
		}
		description, _, _ := strings.Cut(strings.TrimSpace(p.Description), "\n")
		rows = append(rows, []string{field, p.typeText(), limits, description})
	}
	writeColumns(e.out, rows, "  ")
}
