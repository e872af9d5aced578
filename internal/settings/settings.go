// SPDX-License-Identifier: Apache-2.0

package settings

import (
	"fmt"
	"reflect"
	"sort"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/strait-mesh/strait/internal/problem"
)

// MaxFileSize bounds strait.yaml in bytes.
const MaxFileSize = 1 << 20

// Origin says where a value came from.
type Origin string

// The origins, weakest first.
const (
	FromDefault Origin = "default"
	FromFile    Origin = "file"
	FromEnv     Origin = "environment"
	FromFlag    Origin = "flag"
)

// Field is one setting of a bound struct.
type Field struct {
	Name    string
	Help    string
	Default string
	Origin  Origin
	Source  string // "--listen", "STRAIT_LISTEN", "/etc/strait/strait.yaml: gateway.listen"
	value   reflect.Value
}

// Env is the name of the field's environment variable.
func (f *Field) Env() string {
	return "STRAIT_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
}

// Type is the flag type shown in help: string, strings, duration, int, bool.
func (f *Field) Type() string {
	switch f.value.Interface().(type) {
	case time.Duration:
		return "duration"
	case []string:
		return "strings"
	case bool:
		return "bool"
	case int, int64, float64:
		return "number"
	default:
		return "string"
	}
}

// String is the present value as text.
func (f *Field) String() string {
	if f == nil || !f.value.IsValid() {
		return ""
	}
	if l, ok := f.value.Interface().([]string); ok {
		return strings.Join(l, ",")
	}
	return fmt.Sprint(f.value.Interface())
}

// Set parses text into the field without changing its origin.
func (f *Field) Set(text string) error {
	switch f.value.Interface().(type) {
	case time.Duration:
		d, err := time.ParseDuration(text)
		if err != nil {
			return fmt.Errorf("%q is no duration (like 30s or 5m)", text)
		}
		f.value.SetInt(int64(d))
	case []string:
		var l []string
		for _, s := range strings.Split(text, ",") {
			if s = strings.TrimSpace(s); s != "" {
				l = append(l, s)
			}
		}
		f.value.Set(reflect.ValueOf(l))
	case string:
		f.value.SetString(text)
	case bool:
		b, err := strconv.ParseBool(text)
		if err != nil {
			return fmt.Errorf("%q is neither true nor false", text)
		}
		f.value.SetBool(b)
	case int, int64:
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return fmt.Errorf("%q is no whole number", text)
		}
		f.value.SetInt(n)
	case float64:
		n, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return fmt.Errorf("%q is no number", text)
		}
		f.value.SetFloat(n)
	default:
		panic("settings: unsupported field type " + f.value.Type().String()) // a programmer's error
	}
	return nil
}

// Set is the settings of one role.
type Set struct {
	Role   string
	fields []*Field
	byName map[string]*Field
}

// Bind makes the settings of cfg, a pointer to a flat struct, and fills in the defaults. It panics on a malformed struct,
// which is a programmer's error.
func Bind(role string, cfg any) *Set {
	v := reflect.ValueOf(cfg).Elem()
	s := &Set{Role: role, byName: map[string]*Field{}}
	for i := range v.NumField() {
		t := v.Type().Field(i)
		name := t.Tag.Get("name")
		if name == "" {
			continue
		}
		f := &Field{Name: name, Help: t.Tag.Get("help"), Default: t.Tag.Get("default"), Origin: FromDefault, value: v.Field(i)}
		if f.Default != "" {
			if err := f.Set(f.Default); err != nil {
				panic("settings: default of " + name + ": " + err.Error())
			}
		}
		s.fields = append(s.fields, f)
		s.byName[name] = f
	}
	return s
}

// Fields returns the settings in the struct's order.
func (s *Set) Fields() []*Field { return s.fields }

// Field returns the setting of that name, or nil.
func (s *Set) Field(name string) *Field { return s.byName[name] }

// Sources is what Load merges. Flags holds only flags that were given.
type Sources struct {
	Flags    map[string]string
	Env      func(key string) (string, bool)
	File     []byte
	FileName string
	Sections []string // every section the file may have; the set's role is read, the others are left alone
}

// Load merges the sources over the defaults. Errors are *problem.Error of STR-1002.
func (s *Set) Load(src Sources) error {
	if err := s.loadFile(src); err != nil {
		return err
	}
	for _, f := range s.fields {
		if src.Env == nil {
			break
		}
		if text, ok := src.Env(f.Env()); ok {
			if err := s.assign(f, text, FromEnv, f.Env()); err != nil {
				return err
			}
		}
	}
	for name, text := range src.Flags {
		f := s.byName[name]
		if f == nil {
			continue
		}
		if err := s.assign(f, text, FromFlag, "--"+name); err != nil {
			return err
		}
	}
	return nil
}

func (s *Set) assign(f *Field, text string, o Origin, source string) error {
	if err := f.Set(text); err != nil {
		return problem.New(problem.ConfigInvalid, "%s: %v", source, err).WithObject(s.Role, f.Name)
	}
	f.Origin, f.Source = o, source
	return nil
}

func (s *Set) loadFile(src Sources) error {
	if len(src.File) == 0 {
		return nil
	}
	invalid := func(format string, args ...any) error {
		return problem.New(problem.ConfigInvalid, "%s: %s", src.FileName, fmt.Sprintf(format, args...)).
			WithState("nothing was started.")
	}
	if len(src.File) > MaxFileSize {
		return invalid("%d bytes; at most %d are read", len(src.File), MaxFileSize)
	}
	var sections map[string]map[string]any
	if err := yaml.UnmarshalStrict(src.File, &sections); err != nil {
		return invalid("%v", err)
	}
	for name := range sections {
		if !contains(src.Sections, name) && name != s.Role {
			return invalid("unknown section %q; known are %s", name, strings.Join(src.Sections, ", "))
		}
	}
	for _, key := range sortedKeys(sections[s.Role]) {
		f := s.byName[key]
		if f == nil {
			return invalid("unknown key %s.%s%s", s.Role, key, s.nearest(key))
		}
		text, err := scalar(sections[s.Role][key])
		if err != nil {
			return invalid("%s.%s: %v", s.Role, key, err)
		}
		if err := s.assign(f, text, FromFile, src.FileName+": "+s.Role+"."+key); err != nil {
			return err
		}
	}
	return nil
}

// Table renders the merged settings with the origin of each value, a line each.
func (s *Set) Table() string {
	width := 0
	for _, f := range s.fields {
		width = max(width, len(f.Name))
	}
	var b strings.Builder
	for _, f := range s.fields {
		from := string(f.Origin)
		if f.Source != "" {
			from = f.Source
		}
		fmt.Fprintf(&b, "%-*s  %-40s  # %s\n", width, f.Name, f.String(), from)
	}
	return b.String()
}

func (s *Set) nearest(key string) string {
	best, at := "", 4
	for _, f := range s.fields {
		if d := distance(key, f.Name); d < at {
			best, at = f.Name, d
		}
	}
	if best == "" {
		return ""
	}
	return "; did you mean " + best + "?"
}

func scalar(v any) (string, error) {
	switch v := v.(type) {
	case nil:
		return "", nil
	case string:
		return v, nil
	case bool, int, int64:
		return fmt.Sprint(v), nil
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64), nil
	case []any:
		parts := make([]string, 0, len(v))
		for _, e := range v {
			s, err := scalar(e)
			if err != nil {
				return "", err
			}
			parts = append(parts, s)
		}
		return strings.Join(parts, ","), nil
	default:
		return "", fmt.Errorf("want a scalar or a list of scalars")
	}
}

func contains(list []string, s string) bool {
	for _, e := range list {
		if e == s {
			return true
		}
	}
	return false
}

func sortedKeys(m map[string]any) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

// distance is the Levenshtein distance.
func distance(a, b string) int {
	prev := make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur := make([]int, len(b)+1)
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
		}
		prev = cur
	}
	return prev[len(b)]
}
