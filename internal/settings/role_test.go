// SPDX-License-Identifier: Apache-2.0

package settings_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/settings"
)

type roleConfig struct {
	DataDir   string   `name:"data-dir"`
	Listen    string   `name:"listen" default:":1" help:"where to listen"`
	Upstreams []string `name:"upstream"`
	Fast      bool     `name:"fast"`
}

func TestResolve(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "strait.yaml"), []byte("sidecar: {listen: ':2'}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var c roleConfig
	err := settings.Bind("sidecar", &c).Resolve([]string{"--data-dir", dir, "--upstream", "a=1", "--upstream=b=2", "--fast"}, env(nil), []string{"sidecar"}, nil)
	if err != nil || c.Listen != ":2" || strings.Join(c.Upstreams, ";") != "a=1;b=2" || !c.Fast {
		t.Errorf("err %v, config %+v", err, c)
	}

	var out strings.Builder
	err = settings.Bind("sidecar", &roleConfig{}).Resolve([]string{"config", "--listen", ":3"}, env(nil), nil, &out)
	if !errors.Is(err, settings.ErrPrinted) || !strings.Contains(out.String(), ":3") || !strings.Contains(out.String(), "--listen") {
		t.Errorf("config: err %v, out %q", err, out.String())
	}
	out.Reset()
	if err := settings.Bind("sidecar", &roleConfig{}).Resolve([]string{"-h"}, env(nil), nil, &out); !errors.Is(err, settings.ErrHelp) || !strings.Contains(out.String(), "where to listen") {
		t.Errorf("help: err %v, out %q", err, out.String())
	}
}

func TestResolveRefuses(t *testing.T) {
	for _, args := range [][]string{{"--lisen", "x"}, {"extra"}, {"--fast=maybe"}} {
		err := settings.Bind("sidecar", &roleConfig{}).Resolve(args, env(nil), nil, nil)
		if !problem.Is(err, problem.Usage) && !problem.Is(err, problem.ConfigInvalid) {
			t.Errorf("%v: err = %v", args, err)
		}
	}
	err := settings.Bind("sidecar", &roleConfig{}).Resolve([]string{"--config", "/nonexistent/file"}, env(nil), nil, nil)
	if !problem.Is(err, problem.ConfigInvalid) {
		t.Errorf("missing file: %v", err)
	}
}
