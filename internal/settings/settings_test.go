// SPDX-License-Identifier: Apache-2.0

package settings_test

import (
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/internal/settings"
)

type config struct {
	Listen    string        `name:"listen" default:":7443" help:"where to listen"`
	Advertise []string      `name:"advertise" help:"addresses"`
	Grace     time.Duration `name:"drain-grace" default:"30s"`
	Open      bool          `name:"open"`
	Ratio     float64       `name:"ratio" default:"1"`
}

func env(m map[string]string) func(string) (string, bool) {
	return func(k string) (string, bool) { v, ok := m[k]; return v, ok }
}

func TestPrecedence(t *testing.T) {
	file := []byte("gateway:\n  listen: :1\n  advertise: [a:1, b:2]\n  drain-grace: 5s\n  ratio: 0.5\nsidecar: {}\n")
	var c config
	s := settings.Bind("gateway", &c)
	err := s.Load(settings.Sources{
		Flags: map[string]string{"listen": ":3"}, Env: env(map[string]string{"STRAIT_LISTEN": ":2", "STRAIT_DRAIN_GRACE": "7s"}),
		File: file, FileName: "strait.yaml", Sections: []string{"gateway", "sidecar"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.Listen != ":3" || c.Grace != 7*time.Second || strings.Join(c.Advertise, " ") != "a:1 b:2" || c.Ratio != 0.5 {
		t.Errorf("merged = %+v", c)
	}
	for name, want := range map[string]settings.Origin{
		"listen": settings.FromFlag, "drain-grace": settings.FromEnv, "advertise": settings.FromFile, "open": settings.FromDefault,
	} {
		if got := s.Field(name).Origin; got != want {
			t.Errorf("origin of %s = %s, want %s", name, got, want)
		}
	}
	if table := s.Table(); !strings.Contains(table, "strait.yaml: gateway.advertise") {
		t.Errorf("table lacks the origin:\n%s", table)
	}
}

func TestRefusals(t *testing.T) {
	for name, tc := range map[string]struct {
		src  settings.Sources
		want string
	}{
		"unknown key":     {settings.Sources{File: []byte("gateway: {lisen: x}")}, "did you mean listen?"},
		"unknown section": {settings.Sources{File: []byte("gatway: {}")}, `unknown section "gatway"`},
		"duplicate key":   {settings.Sources{File: []byte("gateway: {listen: a, listen: b}")}, "listen"},
		"bad duration":    {settings.Sources{Env: env(map[string]string{"STRAIT_DRAIN_GRACE": "soon"})}, `STRAIT_DRAIN_GRACE: "soon" is no duration`},
		"bad flag":        {settings.Sources{Flags: map[string]string{"open": "maybe"}}, "--open"},
		"map value":       {settings.Sources{File: []byte("gateway: {listen: {a: b}}")}, "scalar"},
		"too large":       {settings.Sources{File: make([]byte, settings.MaxFileSize+1)}, "at most"},
	} {
		t.Run(name, func(t *testing.T) {
			tc.src.FileName, tc.src.Sections = "f.yaml", []string{"gateway", "sidecar"}
			var c config
			err := settings.Bind("gateway", &c).Load(tc.src)
			if !problem.Is(err, problem.ConfigInvalid) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("err = %v, want one with %q", err, tc.want)
			}
		})
	}
}
