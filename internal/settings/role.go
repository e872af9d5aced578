// SPDX-License-Identifier: Apache-2.0

package settings

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/strait-mesh/strait/internal/problem"
)

// ErrHelp is returned by Resolve after help was asked for and printed.
var ErrHelp = errors.New("help requested")

// ErrPrinted is returned by Resolve after the merged configuration was asked for and printed.
var ErrPrinted = errors.New("configuration printed")

// Resolve reads one role's command line: flags, and the optional word "config", which prints the merged settings with
// their origins instead of running. The component file is --config FILE, or strait.yaml in the directory that the
// setting "data-dir" names, when it exists. extra are flags that every role has beside its settings.
func (s *Set) Resolve(args []string, getenv func(string) (string, bool), sections []string, out io.Writer) error {
	given := map[string]string{}
	fl := flag.NewFlagSet(s.Role, flag.ContinueOnError)
	fl.SetOutput(io.Discard)
	file := ""
	fl.StringVar(&file, "config", "", "component file (default: strait.yaml in the data directory)")
	for _, f := range s.fields {
		fl.Var(&recorder{f, given}, f.Name, f.Help)
	}
	show := false
	if len(args) > 0 && args[0] == "config" {
		show, args = true, args[1:]
	}
	switch err := fl.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(out, s.usage())
		return ErrHelp
	case err != nil:
		return problem.New(problem.Usage, "strait %s: %v", s.Role, err).WithFix("strait %s --help", s.Role).WithState("nothing was started.")
	case fl.NArg() > 0:
		return problem.New(problem.Usage, "strait %s: unexpected argument %q", s.Role, fl.Arg(0)).WithFix("strait %s --help", s.Role)
	}
	src := Sources{Flags: given, Env: getenv, Sections: sections}
	if err := s.readFile(&src, file, given, getenv); err != nil {
		return err
	}
	if err := s.Load(src); err != nil {
		return err
	}
	if show {
		fmt.Fprint(out, s.Table())
		return ErrPrinted
	}
	return nil
}

func (s *Set) readFile(src *Sources, file string, given map[string]string, getenv func(string) (string, bool)) error {
	explicit := file != ""
	if !explicit {
		dir := given["data-dir"]
		if f := s.byName["data-dir"]; f != nil && dir == "" {
			if v, ok := getenv(f.Env()); ok {
				dir = v
			} else {
				dir = f.String()
			}
		}
		if dir == "" {
			return nil
		}
		file = filepath.Join(dir, "strait.yaml")
	}
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) && !explicit {
		return nil
	}
	if err != nil {
		return problem.New(problem.ConfigInvalid, "%v", err).WithState("nothing was started.")
	}
	src.File, src.FileName = data, file
	return nil
}

func (s *Set) usage() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage:\n  strait %s [config] [flags]\n\n", s.Role)
	b.WriteString("With the word config, prints the merged settings and where each came from, and ends.\n")
	b.WriteString("Precedence: flag, STRAIT_* variable, file, default.\n\nFlags:\n")
	fmt.Fprintf(&b, "  --%-26s %s\n", "config FILE", "component file (default: strait.yaml in the data directory)")
	for _, f := range s.fields {
		text := f.Help
		if f.Default != "" {
			text += " (default " + f.Default + ")"
		}
		fmt.Fprintf(&b, "  --%-26s %s\n", f.Name+" "+f.Type(), text)
	}
	return b.String()
}

// recorder notes which flags were given; Load judges and applies them.
type recorder struct {
	field *Field
	given map[string]string
}

func (r *recorder) String() string { return "" }

func (r *recorder) IsBoolFlag() bool { return r.field != nil && r.field.Type() == "bool" }

func (r *recorder) Set(text string) error {
	if old, ok := r.given[r.field.Name]; ok && r.field.Type() == "strings" {
		text = old + "," + text
	}
	r.given[r.field.Name] = text
	return nil
}
