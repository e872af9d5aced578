// SPDX-License-Identifier: Apache-2.0

package problem_test

import (
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/strait-mesh/strait/internal/problem"
)

func TestHuman(t *testing.T) {
	err := problem.New(problem.GatewayNotReachable, "quic %s no answer in 5s", "203.0.113.7:7443").
		WithHeadline("eu-west could not join federation %s", "acme").WithWhy("a firewall drops it").
		WithFix("open port %d/udp", 7443).WithFix("run the same join again").WithState("nothing was changed on either side")
	want := `error: eu-west could not join federation acme                                              [STR-2104]
  what  quic 203.0.113.7:7443 no answer in 5s
  why   a firewall drops it
  fix   open port 7443/udp
        run the same join again
  state nothing was changed on either side. More: strait explain STR-2104
`
	if got := err.Human(); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if got := err.Exit(); got != problem.ExitFailed {
		t.Errorf("exit %d, want 1", got)
	}
}

// What the error does not say comes from the registry.
func TestDefaultsFromTheRegistry(t *testing.T) {
	err := problem.New(problem.TokenExpired, "")
	entry, _ := problem.Lookup(problem.TokenExpired)
	if err.Title() != entry.Title || err.Reason() != entry.Why || err.Fixes()[0] != entry.Fix[0] || err.Exit() != problem.ExitAuth {
		t.Errorf("title %q, why %q, fix %q, exit %d", err.Title(), err.Reason(), err.Fixes(), err.Exit())
	}
	if err.Condition() != "nothing was changed." || err.Error() != entry.Title {
		t.Errorf("condition %q, text %q", err.Condition(), err.Error())
	}
	unknown := problem.New("STR-0000", "odd")
	if unknown.Title() != "STR-0000" || unknown.Exit() != problem.ExitFailed || unknown.Reason() != "" {
		t.Errorf("a code outside the registry: %q, exit %d", unknown.Title(), unknown.Exit())
	}
}

// Each With makes a copy: an error that is shared does not change under its readers.
func TestCopies(t *testing.T) {
	base := problem.New(problem.Usage, "x").WithFix("one")
	a, b := base.WithFix("two"), base.WithFix("three")
	if len(base.Fixes()) != 1 || a.Fixes()[1] != "two" || b.Fixes()[1] != "three" {
		t.Errorf("base %q, a %q, b %q", base.Fixes(), a.Fixes(), b.Fixes())
	}
	if c := base.WithCluster("eu-west").WithObject("Peer eu-west", "spec").Retry(); c.Cluster != "eu-west" || c.Object != "Peer eu-west" || c.Field != "spec" || !c.Retryable || base.Retryable {
		t.Errorf("%+v", c)
	}
}

// From finds the coded error in a chain, and gives STR-9001 to one that nobody gave a code.
func TestFrom(t *testing.T) {
	coded := problem.New(problem.StateCorrupt, "peers").Wrap(fs.ErrInvalid)
	wrapped := fmt.Errorf("open: %w", coded)
	if got := problem.From(wrapped); got != coded || !problem.Is(wrapped, problem.StateCorrupt) || !errors.Is(wrapped, fs.ErrInvalid) {
		t.Errorf("got %v", got)
	}
	bare := errors.New("disk on fire")
	if got := problem.From(bare); got.Code != problem.Internal || !errors.Is(got, bare) || got.Exit() != problem.ExitFailed {
		t.Errorf("got %v", got)
	}
	if problem.From(nil) != nil || problem.Is(nil, problem.Internal) {
		t.Error("nil is not an error")
	}
}
