// SPDX-License-Identifier: Apache-2.0

package workloadapi

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/internal/peercred"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Selector names processes of this host. Every field that is set must match; one without any matches nobody.
type Selector struct {
	UID, GID *uint32
	Path     string // of the executable
}

// Matches reports whether the selector names the caller.
func (s Selector) Matches(who peercred.Caller) bool {
	if s.UID == nil && s.GID == nil && s.Path == "" {
		return false
	}
	return (s.UID == nil || *s.UID == who.UID) && (s.GID == nil || *s.GID == who.GID) && (s.Path == "" || s.Path == who.Path)
}

func (s Selector) equal(o Selector) bool {
	same := func(a, b *uint32) bool { return a == b || a != nil && b != nil && *a == *b }
	return s.Path == o.Path && same(s.UID, o.UID) && same(s.GID, o.GID)
}

// Access says who is served, and as whom.
type Access struct {
	ID        spiffeid.ID
	Proxy     string // the sidecar's name, for messages
	Hint      string // sent along with SVIDs
	Selectors []Selector
	Withdrawn string // why the identity is given to nobody; empty: it was not withdrawn
}

func (a Access) none() bool { return a.Withdrawn != "" || a.ID.IsZero() || len(a.Selectors) == 0 }

func (a Access) equal(o Access) bool {
	return a.ID == o.ID && a.Proxy == o.Proxy && a.Hint == o.Hint && a.Withdrawn == o.Withdrawn &&
		slices.EqualFunc(a.Selectors, o.Selectors, Selector.equal)
}

// judge returns a status error for a caller that is not served, and one word for it.
func (a Access) judge(who peercred.Caller) (reason string, err error) {
	refuse := func(reason, format string, args ...any) (string, error) {
		return reason, status.Errorf(codes.PermissionDenied, "%s is given no identity by sidecar %s: %s", who, a.Proxy, fmt.Sprintf(format, args...))
	}
	switch {
	case a.ID.IsZero():
		return refuse("no_workload", "it stands for no workload")
	case a.Withdrawn != "":
		return refuse("withdrawn", "%s was withdrawn: %s", a.ID, a.Withdrawn)
	case slices.ContainsFunc(a.Selectors, func(s Selector) bool { return s.Matches(who) }):
		return "", nil
	case len(a.Selectors) == 0:
		return refuse("no_selector", "no process is allowed yet; needed: spec.attestation.unix with {uid: %d} in a Workload of this sidecar", who.UID)
	}
	hint := ""
	if who.PathErr != nil && slices.ContainsFunc(a.Selectors, func(s Selector) bool { return s.Path != "" }) {
		hint = fmt.Sprintf(" (selectors with a path cannot match: %v)", who.PathErr)
	}
	return refuse("not_selected", "no selector matches; needed: spec.attestation.unix with {uid: %d} in a Workload of this sidecar%s", who.UID, hint)
}

// gate holds the present Access and counts calls per uid.
type gate struct {
	now     func() time.Time
	log     *slog.Logger
	refused func(string)
	most    int

	mu      sync.Mutex
	access  Access
	known   bool          // access was said once
	first   chan struct{} // closed when it was
	changed chan struct{}
	calls   map[uint32]int
	logged  map[uint32]*refusals
}

type refusals struct {
	last  time.Time
	count int // since the last line
}

// A refused uid is logged once in logEvery; maxLogged uids are remembered.
const (
	logEvery  = time.Minute
	maxLogged = 1024
)

func newGate(cfg Config) *gate {
	return &gate{
		now: cfg.Now, log: cfg.Logger, refused: cfg.Refused, most: cfg.MaxCalls,
		first: make(chan struct{}), changed: make(chan struct{}), calls: map[uint32]int{}, logged: map[uint32]*refusals{},
	}
}

// set returns the access that was in force before.
func (g *gate) set(a Access) (old Access) {
	a.Selectors = slices.Clone(a.Selectors)
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.known {
		g.known = true
		close(g.first)
	}
	if old = g.access; old.equal(a) {
		return old
	}
	g.access = a
	close(g.changed)
	g.changed = make(chan struct{})
	return old
}

// current returns the present access and a channel that is closed at its next change.
func (g *gate) current() (Access, <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.access, g.changed
}

// enter counts a call of a uid; leave ends it. Without leave there are too many.
func (g *gate) enter(uid uint32) (leave func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.calls[uid] >= g.most {
		g.refused("too_many")
		return nil, status.Errorf(codes.ResourceExhausted, "uid %d has %d calls open; at most as many", uid, g.most)
	}
	g.calls[uid]++
	return func() { g.exit(uid) }, nil
}

func (g *gate) exit(uid uint32) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.calls[uid]--; g.calls[uid] <= 0 {
		delete(g.calls, uid)
	}
}

// judge says whether the caller is served, and logs when it is not.
func (g *gate) judge(a Access, who peercred.Caller) error {
	reason, err := a.judge(who)
	if err == nil {
		return nil
	}
	g.refused(reason)
	if n, due := g.due(who.UID); due {
		text, _, _ := strings.Cut(status.Convert(err).Message(), ";")
		g.log.Warn("workload API: caller refused", "reason", reason, "uid", who.UID, "gid", who.GID, "pid", who.PID, "path", who.Path, "id", a.ID,
			"count", n, "err", text)
	}
	return err
}

// due says whether a refusal of the uid is to be logged now, and how many it stands for.
func (g *gate) due(uid uint32) (count int, due bool) {
	now := g.now()
	g.mu.Lock()
	defer g.mu.Unlock()
	r := g.logged[uid]
	if r == nil {
		if len(g.logged) >= maxLogged {
			clear(g.logged)
		}
		r = &refusals{last: now.Add(-logEvery)}
		g.logged[uid] = r
	}
	r.count++
	if age := now.Sub(r.last); age >= 0 && age < logEvery {
		return 0, false
	}
	count = r.count
	r.last, r.count = now, 0
	return count, true
}
