// SPDX-License-Identifier: Apache-2.0

package schema

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Bounds of a file. A file that needs more is refused.
const (
	MaxBytes = 4 << 20
	maxDepth = 64
	maxNodes = 200_000 // aliases counted each time
	maxLine  = 1 << 21
)

// document is one object of a file with the place of each of its fields.
type document struct {
	value map[string]any
	at    map[string]place // by field path; see child and index
	root  place
}

type place struct{ line, column int }

// syntaxError is what is wrong with the text itself.
type syntaxError struct {
	place
	field   string
	message string
}

func (e *syntaxError) Error() string { return e.message }

// parseYAML reads every document of data.
func parseYAML(data []byte) (docs []*document, err error) {
	defer func() {
		if p := recover(); p != nil { // the parser is not ours
			docs, err = nil, &syntaxError{message: "this is not YAML"}
		}
	}()
	if len(data) > MaxBytes {
		return nil, &syntaxError{message: fmt.Sprintf("larger than %d bytes", MaxBytes)}
	}
	budget := maxNodes
	for dec := yaml.NewDecoder(bytes.NewReader(data)); ; {
		var n yaml.Node
		switch err := dec.Decode(&n); {
		case errors.Is(err, io.EOF):
			return docs, nil
		case err != nil:
			return docs, yamlError(err)
		}
		d, err := readDocument(&n, &budget)
		if err != nil {
			return docs, err
		}
		if d != nil {
			docs = append(docs, d)
		}
	}
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

func yamlError(err error) error {
	text := err.Error()
	e := &syntaxError{message: "this is not YAML: " + yamlLine.ReplaceAllString(text, "")}
	if m := yamlLine.FindStringSubmatch(text); m != nil && m[1] != "" {
		e.line, _ = strconv.Atoi(m[1])
		e.column = 1
	}
	return e
}

func readDocument(n *yaml.Node, budget *int) (*document, error) {
	if n.Kind != yaml.DocumentNode || len(n.Content) != 1 {
		return nil, nil
	}
	top := n.Content[0]
	if top.Kind == yaml.ScalarNode && top.Tag == "!!null" {
		return nil, nil // an empty document
	}
	d := &document{at: map[string]place{}, root: place{top.Line, top.Column}}
	w := &walker{at: d.at, budget: budget}
	v, err := w.value(top, "", 0)
	if err != nil {
		return nil, err
	}
	m, ok := v.(map[string]any)
	if !ok {
		return nil, &syntaxError{place: d.root, message: "an object is a mapping with apiVersion, kind and metadata"}
	}
	d.value = m
	return d, nil
}

// walker turns nodes into what JSON would hold, and remembers where each came from.
type walker struct {
	at     map[string]place
	budget *int
}

func (w *walker) fail(n *yaml.Node, field, format string, args ...any) error {
	return &syntaxError{place: place{n.Line, n.Column}, field: field, message: fmt.Sprintf(format, args...)}
}

func (w *walker) value(n *yaml.Node, path string, depth int) (any, error) {
	if depth > maxDepth {
		return nil, w.fail(n, "", "nested deeper than %d levels", maxDepth)
	}
	if *w.budget--; *w.budget < 0 {
		return nil, w.fail(n, "", "more than %d values, each use of an alias counted", maxNodes)
	}
	if _, ok := w.at[path]; !ok {
		w.at[path] = place{n.Line, n.Column}
	}
	switch n.Kind {
	case yaml.AliasNode:
		return w.value(n.Alias, path, depth+1)
	case yaml.MappingNode:
		return w.mapping(n, path, depth)
	case yaml.SequenceNode:
		list := make([]any, 0, len(n.Content))
		for i, c := range n.Content {
			v, err := w.value(c, index(path, i), depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		return list, nil
	case yaml.ScalarNode:
		return w.scalar(n, path)
	}
	return nil, w.fail(n, path, "this is not YAML")
}

func (w *walker) mapping(n *yaml.Node, path string, depth int) (any, error) {
	m := make(map[string]any, len(n.Content)/2)
	var merges []*yaml.Node
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if k.Tag == "!!merge" {
			merges = append(merges, v)
			continue
		}
		if k.Kind == yaml.AliasNode {
			k = k.Alias
		}
		if k.Kind != yaml.ScalarNode {
			return nil, w.fail(k, path, "a key must be a word")
		}
		p := child(path, k.Value)
		if _, twice := m[k.Value]; twice {
			return nil, w.fail(k, p, "the key %q stands twice", shorten(k.Value))
		}
		value, err := w.value(v, p, depth+1)
		if err != nil {
			return nil, err
		}
		m[k.Value] = value
		w.at[keyOf(p)] = place{k.Line, k.Column}
	}
	for _, v := range merges {
		if err := w.merge(m, v, path, depth+1); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// merge adds the keys of a merged mapping, or of each in a list, that are not there yet.
func (w *walker) merge(m map[string]any, n *yaml.Node, path string, depth int) error {
	if depth > maxDepth {
		return w.fail(n, "", "nested deeper than %d levels", maxDepth)
	}
	switch n.Kind {
	case yaml.AliasNode:
		return w.merge(m, n.Alias, path, depth+1)
	case yaml.SequenceNode:
		for _, c := range n.Content {
			if err := w.merge(m, c, path, depth+1); err != nil {
				return err
			}
		}
		return nil
	case yaml.MappingNode:
		v, err := w.mapping(n, path, depth+1)
		if err != nil {
			return err
		}
		for k, x := range v.(map[string]any) {
			if _, ok := m[k]; !ok {
				m[k] = x
			}
		}
		return nil
	}
	return w.fail(n, path, "only a mapping can be merged")
}

func (w *walker) scalar(n *yaml.Node, path string) (any, error) {
	switch n.ShortTag() {
	case "!!null":
		return nil, nil
	case "!!bool":
		var b bool
		if err := n.Decode(&b); err != nil {
			return nil, w.fail(n, path, "not a boolean")
		}
		return b, nil
	case "!!int":
		var i int64
		if err := n.Decode(&i); err != nil {
			return nil, w.fail(n, path, "the number %s does not fit", shorten(n.Value))
		}
		return i, nil
	case "!!float":
		var f float64
		if err := n.Decode(&f); err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
			return nil, w.fail(n, path, "%s is no number that JSON has", shorten(n.Value))
		}
		return f, nil
	case "!!str", "!!timestamp":
		return strings.ToValidUTF8(n.Value, "\uFFFD"), nil
	}
	return nil, w.fail(n, path, "the tag %s is not allowed", shorten(n.Tag))
}

// child and index build field paths as the API writes them: dots and brackets.
func child(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

func index(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }

// keyOf is where the key of a field stands.
func keyOf(path string) string { return path + "\x00" }

// find returns the place of a field, or of what is nearest around it. A missing field is shown at the key of its parent.
func (d *document) find(path string, wantKey bool) place {
	path = normalise(path)
	if wantKey {
		if p, ok := d.at[keyOf(path)]; ok {
			return p
		}
	}
	for p := path; p != ""; p = parent(p) {
		if at, ok := d.at[p]; ok {
			if p != path {
				if k, ok := d.at[keyOf(p)]; ok {
					return k
				}
			}
			return at
		}
	}
	return d.root
}

// normalise turns "a[key]" of maps into "a.key", so that list indices alone keep brackets.
func normalise(path string) string {
	var b strings.Builder
	for len(path) > 0 {
		open := strings.IndexByte(path, '[')
		if open < 0 {
			break
		}
		end := strings.IndexByte(path[open:], ']')
		if end < 0 {
			break
		}
		inside := path[open+1 : open+end]
		b.WriteString(path[:open])
		if _, err := strconv.Atoi(inside); err == nil {
			b.WriteString("[" + inside + "]")
		} else {
			b.WriteString("." + strings.Trim(inside, `"'`))
		}
		path = path[open+end+1:]
	}
	return b.String() + path
}

func parent(path string) string {
	if i := strings.LastIndexAny(path, ".["); i > 0 {
		return path[:i]
	}
	return ""
}
