// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/itchyny/gojq"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	"github.com/strait-mesh/strait/internal/problem"
)

// apiVersion of every JSON and YAML document on standard output. Additive only within v1.
const apiVersion = "cli.strait.dev/v1"

// table is a result for people: columns and rows, with the names for -o name.
type table struct {
	head  []string
	rows  [][]string
	names []string
	wide  int // columns shown only with -o wide, counted from the right
}

func (t *table) add(name string, cells ...string) {
	t.rows = append(t.rows, cells)
	t.names = append(t.names, name)
}

// print writes a result in the format asked for. doc is a proto message or a JSON-marshallable value.
func (e *env) print(kind string, doc any, t *table) error {
	switch e.output {
	case "json", "yaml", "jsonl":
		return e.printDocument(kind, doc)
	case "name":
		for _, n := range t.names {
			fmt.Fprintln(e.out, n)
		}
		return nil
	}
	if e.jq != "" {
		return e.printDocument(kind, doc)
	}
	head, rows := t.head, t.rows
	if e.output != "wide" && t.wide > 0 {
		cut := len(head) - t.wide
		head = head[:cut]
		for i, r := range rows {
			rows[i] = r[:min(cut, len(r))]
		}
	}
	if !e.noHeaders && len(head) > 0 {
		rows = append([][]string{head}, rows...)
	}
	writeColumns(e.out, rows, "")
	return nil
}

func (e *env) printDocument(kind string, doc any) error {
	value, err := plainValue(doc)
	if err != nil {
		return fmt.Errorf("print %s: %w", kind, err)
	}
	if m, ok := value.(map[string]any); ok {
		m["apiVersion"], m["kind"] = apiVersion, kind
	}
	if e.jq != "" {
		return e.filter(value)
	}
	return e.printPlain(value)
}

func (e *env) printPlain(value any) error { return writePlain(e.out, e.output, value) }

// writePlain writes maps, slices and scalars as YAML, as one line of JSON, or as indented JSON.
func writePlain(w io.Writer, format string, value any) error {
	switch format {
	case "yaml":
		text, err := yaml.Marshal(value)
		if err != nil {
			return err
		}
		_, err = w.Write(text)
		return err
	case "jsonl":
		return json.NewEncoder(w).Encode(value)
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(value)
}

func (e *env) filter(value any) error {
	query, err := gojq.Parse(e.jq)
	if err != nil {
		return problem.New(problem.Usage, "--jq: %v", err)
	}
	iter := query.Run(value)
	for {
		v, ok := iter.Next()
		if !ok {
			return nil
		}
		if err, ok := v.(error); ok {
			return problem.New(problem.Usage, "--jq: %v", err)
		}
		if s, ok := v.(string); ok {
			fmt.Fprintln(e.out, s)
			continue
		}
		text, err := gojq.Marshal(v)
		if err != nil {
			return err
		}
		fmt.Fprintln(e.out, string(text))
	}
}

// plainValue turns doc into maps, slices and scalars.
func plainValue(doc any) (any, error) {
	var text []byte
	var err error
	if m, ok := doc.(proto.Message); ok {
		text, err = protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	} else {
		text, err = json.Marshal(doc)
	}
	if err != nil {
		return nil, err
	}
	var value any
	err = json.Unmarshal(text, &value)
	return value, err
}

// writeColumns aligns cells by their width in characters.
func writeColumns(w io.Writer, rows [][]string, indent string) {
	var widths []int
	for _, r := range rows {
		for i, c := range r {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(c))
		}
	}
	for _, r := range rows {
		var b strings.Builder
		b.WriteString(indent)
		for i, c := range r {
			b.WriteString(c)
			if i < len(r)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c)+2))
			}
		}
		fmt.Fprintln(w, strings.TrimRight(b.String(), " "))
	}
}

// glyph is the sign of a state; the word always stands beside it.
func (e *env) glyph(state string) string {
	glyphs := map[string]string{"ok": "✓", "warn": "!", "fail": "✗", "skip": "-", "wait": "…"}
	if e.ascii {
		glyphs = map[string]string{"ok": "+", "warn": "!", "fail": "x", "skip": "-", "wait": "."}
	}
	if g, ok := glyphs[state]; ok {
		return g
	}
	return "-"
}

// progress prints a line on standard error unless --quiet.
func (e *env) progress(format string, args ...any) {
	if !e.quiet {
		fmt.Fprintf(e.err, format+"\n", args...)
	}
}
