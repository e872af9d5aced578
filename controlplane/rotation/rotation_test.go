// SPDX-License-Identifier: Apache-2.0

package rotation_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/controlplane/rotation"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var start = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

type bench struct {
	t   *testing.T
	dir *datadir.Dir
	now time.Time
	*rotation.Tracker
}

func newBench(t *testing.T) *bench {
	t.Helper()
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "d"))
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, dir: dir, now: start}
	b.open()
	return b
}

func (b *bench) open() {
	b.t.Helper()
	var err error
	b.Tracker, err = rotation.Open(rotation.Config{Dir: b.dir, Now: func() time.Time { return b.now }})
	if err != nil {
		b.t.Fatal(err)
	}
}

// run runs the tracker until the returned function, which waits until everything is on disk.
func (b *bench) run() func() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Error(err)
		}
	}
}

func id(sa string) spiffeid.ID {
	td, err := spiffeid.ParseTrustDomain("us-east.acme")
	if err != nil {
		panic(err)
	}
	w, err := spiffeid.Workload(td, "shop", sa)
	if err != nil {
		panic(err)
	}
	return w
}

// issued notes an identity of 36 h, issued now.
func (b *bench) issued(name string, application bool) {
	b.Issued(name, id(name), application, rotation.Identity{Issued: b.now, NotAfter: b.now.Add(36 * time.Hour)})
}

func connected(names ...string) map[string]spiffeid.ID {
	m := map[string]spiffeid.ID{}
	for _, n := range names {
		m[n] = id(n)
	}
	return m
}

// waiting names what the next step waits for.
func waiting(rows []rotation.Row) string {
	var names []string
	for _, r := range rotation.Waiting(rows) {
		names = append(names, fmt.Sprintf("%s %s: %s", r.Kind, r.Name, r.Lacks))
	}
	return fmt.Sprint(names)
}

func (b *bench) expect(what string, s rotation.Situation, want string) {
	b.t.Helper()
	if got := waiting(b.Report(s)); got != want {
		b.t.Errorf("%s: waits for %s\nwant %s", what, got, want)
	}
}

func TestActivateWaitsForWhoIsConnected(t *testing.T) {
	b := newBench(t)
	b.issued("web", false)
	b.issued("gone", false)
	s := rotation.Situation{Phase: rotation.Prepared, Sequence: 2, Connected: connected("web", "fresh"),
		Members: []rotation.MemberState{{Cluster: "eu-west", Seen: 1}}}
	b.expect("nobody has it", s, "[proxy fresh: has bundle 0, not 2 proxy web: has bundle 0, not 2]")
	b.Acknowledged("web", id("web"), 1)
	b.Acknowledged("fresh", id("fresh"), 2)
	b.expect("one has it", s, "[proxy web: has bundle 1, not 2]")
	b.Acknowledged("web", id("web"), 2)
	b.Acknowledged("web", id("web"), 1) // an older stream says so later
	b.expect("who is away and other members know the old root", s, "[]")
}

func TestRetireWaitsForEverybody(t *testing.T) {
	b := newBench(t)
	b.issued("web", false)
	b.issued("gone", false)
	b.issued("cart", true) // its application's
	b.issued("cart", false)
	b.Issued(rotation.OperatorName("alice"), id("alice"), false, rotation.Identity{Issued: b.now, NotAfter: b.now.Add(90 * 24 * time.Hour)})
	b.now = b.now.Add(time.Hour)
	activate := b.now
	s := rotation.Situation{Phase: rotation.Activated, Sequence: 2, RenewIssuedBefore: activate, Connected: connected("web", "cart"),
		Members: []rotation.MemberState{{Cluster: "eu-west", Seen: 1}, {Cluster: "ap-south", Seen: 2, Reachable: true}}}
	for _, n := range []string{"web", "cart"} {
		b.Acknowledged(n, id(n), 2)
	}
	gone := "proxy gone: has bundle 0, not 2; holds an identity of 2026-11-22T12:00:00Z; is not connected since 2026-11-22T12:00:00Z, and may return " +
		"until its identity ends at 2026-11-24T00:00:00Z"
	b.expect("after activate", s, "[member eu-west: has bundle 1 of ours, not 2, and is unreachable proxy cart: holds an identity of 2026-11-22T12:00:00Z "+
		gone+" proxy web: holds an identity of 2026-11-22T12:00:00Z]")
	b.issued("web", false)
	b.issued("cart", false)
	s.Members[0].Seen = 2
	b.expect("an application holds an old one", s, "[proxy cart: its application holds an identity of 2026-11-22T12:00:00Z "+gone+"]")
	b.issued("cart", true)
	b.Issued("web", id("web"), false, rotation.Identity{Issued: start, NotAfter: start.Add(36 * time.Hour)}) // an older connection is seen later
	b.expect("one that is gone for good", s, "["+gone+"]")
	withdrawn := s
	withdrawn.Withdrawn = func(w spiffeid.ID, issued time.Time) bool { return w == id("gone") && issued.Equal(start) }
	b.expect("it was withdrawn", withdrawn, "[]")
	b.now = start.Add(36*time.Hour + time.Second)
	b.expect("its identity has ended", s, "[]")

	broken := rotation.Broken(b.Report(s))
	if len(broken) != 1 || broken[0].Kind != rotation.Operator || broken[0].Name != "alice" || broken[0].Lacks == "" {
		t.Errorf("retire breaks %+v", broken)
	}
	if rows := b.Report(s); rows[0].Kind != rotation.Member || rows[0].Name != "ap-south" || rows[len(rows)-1].Kind != rotation.Operator {
		t.Errorf("order %+v", rows)
	}
}

// Tokens that the old key has signed are waited for, also after a restart; what the new one signs is not.
func TestRetireWaitsForTokens(t *testing.T) {
	b := newBench(t)
	stop := b.run()
	b.TokenIssued(start.Add(5 * time.Minute))
	b.TokenIssued(start.Add(time.Minute))
	stop()
	b.open()
	s := rotation.Situation{Phase: rotation.Activated, Sequence: 2}
	b.now = start.Add(5*time.Minute - time.Second)
	b.expect("before they end", s, "[tokens JWT-SVIDs: of the old key are valid until 2026-11-22T12:06:00Z]")
	prepared := s
	prepared.Phase = rotation.Prepared
	b.expect("activate", prepared, "[]")
	b.now = start.Add(6 * time.Minute)
	b.expect("after", s, "[]")
}

// A process that took the name of another is another: it has acknowledged nothing.
func TestNameIsTaken(t *testing.T) {
	b := newBench(t)
	b.issued("web", false)
	b.Acknowledged("web", id("web"), 7)
	s := rotation.Situation{Phase: rotation.Prepared, Sequence: 7, Connected: map[string]spiffeid.ID{"web": id("other")}}
	b.expect("before it was seen", s, "[proxy web: has bundle 0, not 7]")
	b.Seen("web", id("other"))
	b.expect("after", s, "[proxy web: has bundle 0, not 7]")
}

func TestSurvivesRestart(t *testing.T) {
	b := newBench(t)
	stop := b.run()
	changed := b.Changed()
	b.issued("web", false)
	b.issued("web", true)
	b.Acknowledged("web", id("web"), 3)
	b.issued("ended", false)
	select {
	case <-changed:
	default:
		t.Error("nobody was told")
	}
	s := rotation.Situation{Phase: rotation.Activated, Sequence: 3, RenewIssuedBefore: b.now}
	want := waiting(b.Report(s))
	stop()
	b.open()
	b.expect("after a restart", s, want)
	if rows := b.Report(s); len(rows) != 2 || !rows[1].Acknowledged || !rows[1].Renewed || rows[0].Acknowledged {
		t.Errorf("after a restart %+v", rows)
	}

	b.now = start.Add(37 * time.Hour)
	stop = b.run()
	b.issued("web", false)
	stop()
	data, err := b.dir.ReadState("rotation/renewed")
	if err != nil || len(data) == 0 {
		t.Fatal(err)
	}
	b.now = start // what has ended is forgotten, not only hidden
	b.open()
	if rows := b.Report(s); len(rows) != 1 || rows[0].Name != "web" {
		t.Errorf("a day later %+v", rows)
	}
}

func TestDamagedFile(t *testing.T) {
	b := newBench(t)
	stop := b.run()
	b.issued("web", false)
	stop()
	file := b.dir.Path("rotation/renewed")
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, data[:len(data)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	b.open()
	if rows := b.Report(rotation.Situation{}); len(rows) != 0 {
		t.Errorf("%+v", rows)
	}
}
