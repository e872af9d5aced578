// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
)

// env is what a command may touch of the outside, and the global flags.
type env struct {
	in       io.Reader
	out, err io.Writer
	getenv   func(string) (string, bool)
	now      func() time.Time

	dataDir   string
	context   string
	namespace string
	output    string
	jq        string
	noHeaders bool
	ascii     bool
	quiet     bool
	verbose   bool
	yes       bool
	timeout   time.Duration
	wait      string
}

// lookup is the value of a STRAIT_ variable.
func (e *env) lookup(key string) string {
	v, _ := e.getenv(key)
	return v
}

// defaultDataDir is /var/lib/strait for root, else $XDG_STATE_HOME/strait (DESIGN 13).
func (e *env) defaultDataDir() string {
	if d := e.lookup("STRAIT_DATA_DIR"); d != "" {
		return d
	}
	if state := e.lookup("XDG_STATE_HOME"); state != "" {
		return filepath.Join(state, "strait")
	}
	if os.Geteuid() == 0 {
		return "/var/lib/strait"
	}
	return filepath.Join(e.lookup("HOME"), ".local", "state", "strait")
}

// configHome is where contexts.yaml lives.
func (e *env) configHome() string {
	if c := e.lookup("XDG_CONFIG_HOME"); c != "" {
		return filepath.Join(c, "strait")
	}
	return filepath.Join(e.lookup("HOME"), ".config", "strait")
}

// confirm refuses a risky command that was not confirmed: standard input is never asked, so that scripts and people
// get the same answer.
func (e *env) confirm(what string) error {
	if e.yes {
		return nil
	}
	return problem.New(problem.ConfirmationNeeded, "%s", what).WithFix("run it again with --yes")
}
