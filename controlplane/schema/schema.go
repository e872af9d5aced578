// SPDX-License-Identifier: Apache-2.0

package schema

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/internal/problem"
)

// maxErrors bounds what is reported of one file.
const maxErrors = 50

// Parse reads every object of a YAML (or JSON) file and judges it. name is what the errors call the file. The objects are as
// written, without the defaults; when anything is wrong, Parse returns Errors and no object.
func Parse(name string, data []byte) ([]*unstructured.Unstructured, error) {
	file := &source{name: name, data: data}
	docs, err := parseYAML(data)
	if err != nil {
		var s *syntaxError
		if !errors.As(err, &s) {
			s = &syntaxError{message: err.Error()}
		}
		file.add(&Error{Line: s.line, Column: s.column, Field: s.field, Code: problem.InvalidObject, Message: shorten(s.message)})
		return nil, file.errs
	}
	var objects []*unstructured.Unstructured
	seen := map[api.Ref]bool{}
	for _, d := range docs {
		if len(file.errs) >= maxErrors {
			break
		}
		o := &unstructured.Unstructured{Object: d.value}
		objects = append(objects, o.DeepCopy())
		errs := Validate(context.Background(), o)
		ref := api.Ref{Kind: o.GetKind(), Namespace: o.GetNamespace(), Name: o.GetName()}
		if len(errs) == 0 && seen[ref] {
			errs = field.ErrorList{field.Duplicate(field.NewPath("metadata", "name"), o.GetName())}
		}
		seen[ref] = true
		for _, e := range errs {
			file.add(file.judged(d, o, e))
		}
	}
	if len(file.errs) > 0 {
		return nil, file.sorted()
	}
	return objects, nil
}

// source is a file with what was found in it.
type source struct {
	name  string
	data  []byte
	lines [][]byte
	errs  Errors
}

func (f *source) add(e *Error) {
	if len(f.errs) >= maxErrors {
		return
	}
	e.File = f.name
	if e.Line > 0 {
		if f.lines == nil {
			f.lines = bytes.Split(f.data, []byte("\n"))
		}
		if e.Line <= len(f.lines) {
			line := bytes.TrimRight(f.lines[e.Line-1], "\r")
			if len(line) > maxLine {
				line = line[:maxLine]
			}
			// keep what Human shows, not a line of megabytes
			if len(line) <= 4*maxSource || utf8.RuneCount(line) <= maxSource {
				e.Source = string(line)
			} else {
				runes := []rune(string(line))
				start := min(max(0, e.Column-1-maxSource/2), len(runes))
				e.Source = string(runes[start:min(len(runes), start+maxSource)])
				e.skip = start
			}
		}
	}
	f.errs = append(f.errs, e)
}

func (f *source) sorted() Errors {
	slices.SortStableFunc(f.errs, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return f.errs
}

// judged turns what the schema says into what a reader of the file sees.
func (f *source) judged(d *document, o *unstructured.Unstructured, e *field.Error) *Error {
	path := strings.TrimPrefix(strings.TrimPrefix(e.Field, "<nil>"), ".")
	if path == "nil" {
		path = ""
	}
	unknown := e.Detail == unknownField
	at := d.find(path, unknown)
	name := o.GetName()
	if ns := o.GetNamespace(); ns != "" {
		name = ns + "/" + name
	}
	out := &Error{
		Line: at.line, Column: at.column, Kind: shorten(o.GetKind()), Object: shorten(name), Field: shorten(path),
		Code: problem.InvalidObject, Message: message(e),
	}
	if o.GetKind() == api.KindFailoverPolicy && strings.HasSuffix(e.Detail, flaps) {
		out.Code = problem.ReturnNotAboveTrip
	}
	return out
}

// flaps ends the message of the rule that return is above trip.
const flaps = "or traffic flaps"

func message(e *field.Error) string {
	switch {
	case e.Detail == unknownField:
		return unknownField
	case e.Type == field.ErrorTypeRequired && e.Detail == "":
		return "is required"
	case e.Type == field.ErrorTypeInvalid && (strings.HasSuffix(e.Detail, flaps) || e.Detail != "" && !strings.HasPrefix(e.Detail, "in body")):
		return shorten(strings.TrimPrefix(e.Detail, "Invalid value: "))
	}
	return shorten(strings.Replace(e.ErrorBody(), " in body", "", 1))
}
