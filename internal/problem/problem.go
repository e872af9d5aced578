// SPDX-License-Identifier: Apache-2.0

package problem

import (
	_ "embed"
	"errors"
	"fmt"
	"sort"
	"strings"
	"sync"

	"sigs.k8s.io/yaml"
)

// Code is a stable message code, "STR-1234".
type Code string

// Exit codes of the command line (UX 1.1).
const (
	ExitOK          = 0
	ExitFailed      = 1
	ExitUsage       = 2
	ExitNotReady    = 3
	ExitAuth        = 4
	ExitNotFound    = 5
	ExitCheckFailed = 6
	ExitWarnings    = 7
	ExitInvalid     = 8
	ExitDiffers     = 9
	ExitPartial     = 10
	ExitInterrupted = 130
)

// Entry is one row of the registry.
type Entry struct {
	Code     Code     `json:"code"`
	Name     string   `json:"name"`
	Severity string   `json:"severity"`
	Exit     int      `json:"exit"`
	Title    string   `json:"title"`
	Why      string   `json:"why"`
	Fix      []string `json:"fix"`
	Since    string   `json:"since"`
	Metric   string   `json:"metric,omitempty"`
}

//go:embed codes.yaml
var codesYAML []byte

var registry = sync.OnceValue(func() map[Code]Entry {
	var entries []Entry
	if err := yaml.UnmarshalStrict(codesYAML, &entries); err != nil {
		panic("problem: codes.yaml: " + err.Error()) // our own file; a test parses it
	}
	m := make(map[Code]Entry, len(entries))
	for _, e := range entries {
		m[e.Code] = e
	}
	return m
})

// Lookup returns the registry's row for code.
func Lookup(code Code) (Entry, bool) {
	e, ok := registry()[code]
	return e, ok
}

// Entries returns all rows, sorted by code.
func Entries() []Entry {
	all := make([]Entry, 0, len(registry()))
	for _, e := range registry() {
		all = append(all, e)
	}
	sort.Slice(all, func(i, j int) bool { return all[i].Code < all[j].Code })
	return all
}

// Error is an error with the five parts that a user sees. Empty Why and Fix are taken from the registry.
type Error struct {
	Code      Code
	Headline  string // one line; empty: the registry's title
	What      string
	Why       string
	Fix       []string
	State     string
	Retryable bool
	Cluster   string
	Object    string
	Field     string
	cause     error
}

// New makes an error of code; what says what happened, with its figures.
func New(code Code, what string, args ...any) *Error {
	if len(args) > 0 {
		what = fmt.Sprintf(what, args...)
	}
	return &Error{Code: code, What: what}
}

// Error returns "headline: what".
func (e *Error) Error() string {
	title := e.Title()
	switch {
	case e.What == "" || e.What == title:
		return title
	default:
		return title + ": " + e.What
	}
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.cause }

// Title is the headline, or the registry's title.
func (e *Error) Title() string {
	if e.Headline != "" {
		return e.Headline
	}
	if r, ok := Lookup(e.Code); ok {
		return r.Title
	}
	return string(e.Code)
}

// Reason is why, from the error or from the registry.
func (e *Error) Reason() string {
	if e.Why != "" {
		return e.Why
	}
	r, _ := Lookup(e.Code)
	return r.Why
}

// Fixes is how to repair it, from the error or from the registry.
func (e *Error) Fixes() []string {
	if len(e.Fix) > 0 {
		return e.Fix
	}
	r, _ := Lookup(e.Code)
	return r.Fix
}

// Exit is the exit code of the command line.
func (e *Error) Exit() int {
	if r, ok := Lookup(e.Code); ok && r.Exit != 0 {
		return r.Exit
	}
	return ExitFailed
}

func (e *Error) with(f func(*Error)) *Error {
	c := *e
	f(&c)
	return &c
}

// WithHeadline returns a copy with another headline.
func (e *Error) WithHeadline(format string, args ...any) *Error {
	return e.with(func(c *Error) { c.Headline = fmt.Sprintf(format, args...) })
}

// WithWhy returns a copy that says why.
func (e *Error) WithWhy(format string, args ...any) *Error {
	return e.with(func(c *Error) { c.Why = fmt.Sprintf(format, args...) })
}

// WithFix returns a copy with one more way to repair it.
func (e *Error) WithFix(format string, args ...any) *Error {
	return e.with(func(c *Error) {
		c.Fix = append(append([]string(nil), c.Fix...), fmt.Sprintf(format, args...))
	})
}

// WithState returns a copy that says in what state things are now.
func (e *Error) WithState(format string, args ...any) *Error {
	return e.with(func(c *Error) { c.State = fmt.Sprintf(format, args...) })
}

// WithObject returns a copy that names the object and the field concerned.
func (e *Error) WithObject(object, field string) *Error {
	return e.with(func(c *Error) { c.Object, c.Field = object, field })
}

// WithCluster returns a copy that names the cluster concerned.
func (e *Error) WithCluster(cluster string) *Error {
	return e.with(func(c *Error) { c.Cluster = cluster })
}

// Retry returns a copy that may be tried again as it is.
func (e *Error) Retry() *Error { return e.with(func(c *Error) { c.Retryable = true }) }

// Wrap returns a copy with cause.
func (e *Error) Wrap(cause error) *Error { return e.with(func(c *Error) { c.cause = cause }) }

// From returns the *Error in err's chain, or one of code STR-9001 around err. nil stays nil.
func From(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return New(Internal, "%s", err.Error()).Wrap(err)
}

// Is reports whether err carries code.
func Is(err error, code Code) bool {
	var e *Error
	return errors.As(err, &e) && e.Code == code
}

// Human renders the error in the shape of UX 1.1.
func (e *Error) Human() string {
	var b strings.Builder
	head := "error: " + e.Title()
	fmt.Fprintf(&b, "%-90s [%s]\n", head, e.Code)
	line := func(label, text string) {
		if text == "" {
			return
		}
		for i, l := range strings.Split(strings.TrimRight(text, "\n"), "\n") {
			if i > 0 {
				label = ""
			}
			fmt.Fprintf(&b, "  %-5s %s\n", label, l)
		}
	}
	if e.What != e.Title() {
		line("what", e.What)
	}
	line("why", e.Reason())
	line("fix", strings.Join(e.Fixes(), "\n"))
	line("state", e.Condition()+" More: strait explain "+string(e.Code))
	return b.String()
}

// Condition is the state that things are in now, as a sentence.
func (e *Error) Condition() string {
	switch state := strings.TrimSpace(e.State); {
	case state == "":
		return "nothing was changed."
	case strings.HasSuffix(state, "."):
		return state
	default:
		return state + "."
	}
}
