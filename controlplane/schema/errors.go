// SPDX-License-Identifier: Apache-2.0

package schema

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/strait-mesh/strait/internal/problem"
)

// Error is one thing that is wrong in a file.
type Error struct {
	File    string       `json:"file"`
	Line    int          `json:"line"`   // from 1; 0: the file as a whole
	Column  int          `json:"column"` // from 1, in characters
	Kind    string       `json:"kind,omitempty"`
	Object  string       `json:"object,omitempty"` // "<namespace>/<name>"
	Field   string       `json:"field,omitempty"`
	Code    problem.Code `json:"code"`
	Message string       `json:"message"`
	Source  string       `json:"source,omitempty"` // the line, or the part of it around the column

	skip int // characters of the line before Source
}

// Error returns "file:line:column: kind object: field: message".
func (e *Error) Error() string {
	parts := []string{e.position()}
	if o := e.subject(); o != "" {
		parts = append(parts, o)
	}
	if e.Field != "" {
		parts = append(parts, e.Field)
	}
	return strings.Join(append(parts, e.Message), ": ")
}

func (e *Error) position() string {
	if e.Line == 0 {
		return e.File
	}
	return fmt.Sprintf("%s:%d:%d", e.File, e.Line, e.Column)
}

func (e *Error) subject() string { return strings.TrimSpace(e.Kind + " " + e.Object) }

// Human renders the error with its line and a caret under the place.
func (e *Error) Human() string {
	head := e.position()
	for _, s := range []string{e.subject(), e.Field} {
		if s != "" {
			head += "  " + s
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%-99s [%s]\n", head, e.Code)
	if e.Line == 0 || e.Source == "" {
		fmt.Fprintf(&b, "  %s", e.Message)
		return b.String()
	}
	gutter := fmt.Sprintf("  %d | ", e.Line)
	line, caret := clip(e.Source, e.Column-e.skip)
	fmt.Fprintf(&b, "%s%s\n%s^ %s", gutter, line, strings.Repeat(" ", len(gutter)+caret), e.Message)
	return b.String()
}

// maxSource is how much of a line is shown, in characters.
const maxSource = 160

// clip returns the part of a line around column (from 1) that is shown, and where in it the column is (from 0).
func clip(line string, column int) (string, int) {
	runes := []rune(line)
	for i, r := range runes {
		if r == '\t' || r < ' ' || r == 0x7f || r == utf8.RuneError {
			runes[i] = ' '
		}
	}
	at := min(max(0, column-1), len(runes))
	start := 0
	if at > maxSource-20 {
		start = at - maxSource/2
	}
	end := min(len(runes), start+maxSource)
	return string(runes[start:end]), at - start
}

// Errors are all that is wrong, in the order of the files.
type Errors []*Error

// Error joins the messages.
func (l Errors) Error() string {
	all := make([]string, len(l))
	for i, e := range l {
		all[i] = e.Error()
	}
	return strings.Join(all, "\n")
}

// Problem returns the list as one problem, with the code of its first error.
func (l Errors) Problem() *problem.Error {
	if len(l) == 0 {
		return nil
	}
	e := l[0]
	p := problem.New(e.Code, "%s", l.Error()).WithObject(e.subject(), e.Field).WithState("nothing was written.").Wrap(l)
	return p
}

// maxMessage bounds what of a wrong value is repeated, in bytes.
const maxMessage = 600

func shorten(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
	if len(s) <= maxMessage {
		return s
	}
	cut := maxMessage
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "…"
}
