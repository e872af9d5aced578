// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/jwtsvid"
)

// steps of a rotation by name.
var steps = map[string]func(*ca.CA) error{
	"prepare": (*ca.CA).Prepare, "activate": (*ca.CA).Activate, "retire": (*ca.CA).Retire, "abort": (*ca.CA).Abort,
}

func run(t *testing.T, a *ca.CA, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := steps[name](a); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
}

func verifies(id *trust.Identity, b *trust.Bundle, now time.Time) error {
	_, err := trust.Verify(id.Chain, must(trust.NewBundles(b)), now)
	return err
}

func issue(t *testing.T, a *ca.CA) *trust.Identity {
	t.Helper()
	id, err := a.IssueKey(web, 0)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestRotation walks through a rotation: who verifies what, what is recalled, and what the sequence says.
func TestRotation(t *testing.T) {
	a, dir, clk := newCA(t)
	b1, before := a.Bundle(), issue(t, a)
	tok1, _, err := a.SignJWT(web, []string{"db"})
	if err != nil {
		t.Fatal(err)
	}
	if len(b1.JWTKeys()) != 1 || b1.Sequence() != 1 || a.State().Phase != ca.Steady {
		t.Fatalf("at first: %d JWT keys, sequence %d, %s", len(b1.JWTKeys()), b1.Sequence(), a.State().Phase)
	}
	changed := a.Changed()
	run(t, a, "prepare")
	select {
	case <-changed:
	default:
		t.Error("Prepare changed nothing")
	}
	b2, prepared := a.Bundle(), issue(t, a)
	if b2.Sequence() != 2 || len(b2.Roots()) != 2 || len(b2.JWTKeys()) != 2 || len(prepared.Chain) != 2 {
		t.Errorf("prepared: sequence %d, %d roots, %d JWT keys, a chain of %d", b2.Sequence(), len(b2.Roots()), len(b2.JWTKeys()), len(prepared.Chain))
	}
	if r := b2.Roots(); !r[0].Equal(b1.Roots()[0]) || bytes.Equal(r[0].RawSubject, r[1].RawSubject) || bytes.Equal(r[0].SubjectKeyId, r[1].SubjectKeyId) {
		t.Error("the roots are not oldest first, with names and key identifiers of their own")
	}
	if err := b1.CheckUpdate(b2); err != nil {
		t.Error(err)
	}
	run(t, a, "prepare") // again
	if a.Bundle().Sequence() != 2 {
		t.Error("Prepare twice publishes twice")
	}
	clk.add(time.Minute)
	run(t, a, "activate")
	recall := a.State().RenewIssuedBefore
	b3, activated := a.Bundle(), issue(t, a)
	if b3.Sequence() != 2 || len(activated.Chain) != 3 || !bytes.Equal(activated.Chain[1].RawSubject, activated.Chain[2].RawSubject) {
		t.Errorf("activated: sequence %d, a chain of %d", b3.Sequence(), len(activated.Chain))
	}
	if !trust.Issued(prepared.Chain[0]).Before(recall) || trust.Issued(activated.Chain[0]).Before(recall) {
		t.Errorf("recalled before %s: one issued %s, and not one issued %s", recall, trust.Issued(prepared.Chain[0]), trust.Issued(activated.Chain[0]))
	}
	onlyNew := must(trust.NewBundle(td, b2.Roots()[1:], 3))
	for name, b := range map[string]*trust.Bundle{"old": b1, "both": b2, "new": onlyNew} {
		if err := verifies(activated, b, clk.Now()); err != nil {
			t.Errorf("issued while activated, judged with the %s root: %v", name, err)
		}
	}
	tok2, _, err := a.SignJWT(web, []string{"db"})
	if err != nil {
		t.Fatal(err)
	}
	for _, tok := range []string{tok1, tok2} {
		if _, err := jwtsvid.Verify(tok, "db", must(trust.NewBundles(b2)), t0.Add(time.Minute)); err != nil {
			t.Error(err)
		}
	}
	clk.add(time.Minute)
	run(t, a, "retire")
	b4, after := a.Bundle(), issue(t, a)
	if b4.Sequence() != 3 || len(b4.Roots()) != 1 || !b4.Roots()[0].Equal(b2.Roots()[1]) || len(b4.JWTKeys()) != 1 || len(after.Chain) != 2 {
		t.Errorf("retired: sequence %d, %d roots, %d JWT keys, a chain of %d", b4.Sequence(), len(b4.Roots()), len(b4.JWTKeys()), len(after.Chain))
	}
	if again := a.State().RenewIssuedBefore; !trust.Issued(activated.Chain[0]).Before(again) || trust.Issued(after.Chain[0]).Before(again) {
		t.Errorf("Retire recalls before %s", again)
	}
	for name, tt := range map[string]struct {
		id *trust.Identity
		ok bool
	}{"before": {before, false}, "activated": {activated, true}, "after": {after, true}} {
		if err := verifies(tt.id, b4, clk.Now()); (err == nil) != tt.ok {
			t.Errorf("issued %s, judged at the end: %v", name, err)
		}
	}
	if err := verifies(after, b1, clk.Now()); err == nil {
		t.Error("the root that was retired still verifies new identities")
	}
	names := must(dir.List("ca"))
	if len(names) != 5 { // api, issuer, jwt, root, state
		t.Errorf("left on disk: %v", names)
	}
	re, err := ca.Open(dir, ca.Config{Now: clk.Now})
	if err != nil {
		t.Fatal(err)
	}
	if !re.Bundle().Equal(b4) || !re.State().RenewIssuedBefore.Equal(a.State().RenewIssuedBefore) || !re.State().Since.Equal(a.State().Since) {
		t.Error("opened again it is another CA")
	}
	if err := verifies(issue(t, re), b4, clk.Now()); err != nil {
		t.Error(err)
	}
}

func TestRotationOutOfOrder(t *testing.T) {
	for phase, refused := range map[string][]string{
		"":                  {"activate", "retire", "abort"},
		"prepare":           {"retire"},
		"prepare, activate": {"prepare", "abort"},
	} {
		a, _, _ := newCA(t)
		switch phase {
		case "prepare":
			run(t, a, "prepare")
		case "prepare, activate":
			run(t, a, "prepare", "activate")
		}
		was := a.Bundle()
		for _, step := range refused {
			if err := steps[step](a); !problem.Is(err, problem.RotationPhase) || !a.Bundle().Equal(was) {
				t.Errorf("%s after %q: %v", step, phase, err)
			}
		}
	}
	a, dir, clk := newCA(t)
	run(t, a, "prepare", "abort")
	if b := a.Bundle(); b.Sequence() != 3 || len(b.Roots()) != 1 || len(b.JWTKeys()) != 1 || len(must(dir.List("ca"))) != 5 {
		t.Errorf("aborted: sequence %d, %d roots, files %v", b.Sequence(), len(b.Roots()), must(dir.List("ca")))
	}
	if err := verifies(issue(t, a), a.Bundle(), clk.Now()); err != nil {
		t.Error(err)
	}
}

// TestRecall: one issued in the same second as a recall counts on the right side of it, also when the clock goes back in between.
func TestRecall(t *testing.T) {
	a, _, clk := newCA(t)
	clk.add(300 * time.Millisecond)
	before := issue(t, a)
	run(t, a, "prepare")
	clk.add(300 * time.Millisecond)
	run(t, a, "activate")
	clk.add(100 * time.Millisecond)
	after := issue(t, a)
	for _, back := range []time.Duration{time.Second, time.Minute, 5 * time.Minute} {
		r := a.State().RenewIssuedBefore
		if !trust.Issued(before.Chain[0]).Before(r) || trust.Issued(after.Chain[0]).Before(r) {
			t.Errorf("recall before %s: issued %s before, %s after it", r, trust.Issued(before.Chain[0]), trust.Issued(after.Chain[0]))
		}
		if after.NotBefore.After(clk.Now()) {
			t.Errorf("valid from %s, and it is %s", after.NotBefore, clk.Now())
		}
		if a.State().Phase == ca.Activated {
			before = after
			clk.add(-back)
			run(t, a, "retire")
			after = issue(t, a)
		}
	}
	clk.add(-time.Hour) // further than certificates are back-dated: valid comes first
	if id := issue(t, a); id.NotBefore.After(clk.Now()) {
		t.Errorf("valid from %s, and it is %s", id.NotBefore, clk.Now())
	}
}

// legacy turns a data directory into one of the version before: root, issuer and bundle, without a state and without JWT keys.
func legacy(t *testing.T, dir *datadir.Dir, sequence uint64) {
	t.Helper()
	b := must(trust.ParseBundle(td, must(dir.ReadFile("bundles/own.json"))))
	plain := must(trust.NewBundle(td, b.Roots(), sequence))
	for _, err := range []error{dir.WriteFile("bundles/own.json", plain.Marshal()), os.RemoveAll(dir.Path("ca/issued")), os.Remove(dir.Path("ca/state.json"))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range must(dir.List("ca")) {
		if name != "root.pem" && name != "issuer.pem" && name != "api.pem" {
			if err := dir.Remove("ca/" + name); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestOpenOfTheVersionBefore(t *testing.T) {
	a, dir, clk := newCA(t)
	old := issue(t, a)
	legacy(t, dir, 1)
	b, err := ca.Open(dir, ca.Config{Now: clk.Now})
	if err != nil {
		t.Fatal(err)
	}
	if got := b.Bundle(); got.Sequence() != 2 || len(got.JWTKeys()) != 1 || got.Hash() != a.Bundle().Hash() {
		t.Errorf("sequence %d, %d JWT keys", got.Sequence(), len(got.JWTKeys()))
	}
	if err := verifies(old, b.Bundle(), clk.Now()); err != nil {
		t.Error(err)
	}
	if !b.IssuerNotAfter().Equal(a.IssuerNotAfter()) {
		t.Error("another issuer")
	}
	if _, _, err := b.SignJWT(web, []string{"x"}); err != nil {
		t.Error(err)
	}
	again := must(ca.Open(dir, ca.Config{Now: clk.Now}))
	if !again.Bundle().Equal(b.Bundle()) {
		t.Error("it changes at each Open")
	}
	run(t, again, "prepare", "activate", "retire")
}

// TestCrash ends the process at every write of every step, before and after the write reaches the disk: whatever comes next opens, goes on
// from the phase that it finds, and never publishes two bundles with one sequence.
func TestCrash(t *testing.T) {
	type prefix = []string
	for _, tt := range []struct {
		before prefix
		step   string
		done   string // the phase after the step
	}{
		{nil, "prepare", ca.Prepared}, {prefix{"prepare"}, "activate", ca.Activated}, {prefix{"prepare", "activate"}, "retire", ca.Steady}, {prefix{"prepare"}, "abort", ca.Steady},
	} {
		for _, after := range []bool{false, true} {
			points := 0
			for n := 1; ; n++ {
				k := &ca.Crash{}
				a, dir, clk := newCA(t)
				run(t, a, tt.before...)
				seen := map[uint64]*trust.Bundle{a.Bundle().Sequence(): a.Bundle()}
				before, was := issue(t, a), a.State().Phase
				k.At, k.After = n, after
				crashing := must(ca.Open(dir, k.With(ca.Config{Now: clk.Now})))
				err := steps[tt.step](crashing)
				if k.Writes() < n {
					if err != nil {
						t.Fatalf("%s without a crash: %v", tt.step, err)
					}
					points = n - 1
					break
				}
				if !errors.Is(err, ca.ErrCrash) {
					// what was deleted late: the step has happened all the same
					t.Fatalf("%s, killed at write %d (after: %t): %v", tt.step, n, after, err)
				}
				note := func(a *ca.CA) {
					b := a.Bundle()
					if other := seen[b.Sequence()]; other != nil && !other.Equal(b) {
						t.Fatalf("%s, killed at write %d (after: %t): two bundles of sequence %d", tt.step, n, after, b.Sequence())
					}
					seen[b.Sequence()] = b
				}
				note(crashing)
				b, err := ca.Open(dir, ca.Config{Now: clk.Now})
				if err != nil {
					t.Fatalf("%s, killed at write %d (after: %t): %v", tt.step, n, after, err)
				}
				note(b)
				if err := verifies(before, b.Bundle(), clk.Now()); err != nil && !(tt.step == "retire" && b.State().Phase == tt.done) {
					t.Fatalf("%s, killed at write %d: one issued before it: %v", tt.step, n, err)
				}
				switch phase := b.State().Phase; phase {
				case was:
					run(t, b, tt.step)
				case tt.done:
				default:
					t.Fatalf("%s, killed at write %d: phase %s", tt.step, n, phase)
				}
				note(b)
				if err := verifies(issue(t, b), b.Bundle(), clk.Now()); err != nil {
					t.Fatal(err)
				}
				data := must(dir.ReadFile("bundles/own.json"))
				if own := must(trust.ParseBundle(td, data)); !own.Equal(b.Bundle()) {
					t.Fatalf("%s, killed at write %d: the bundle's file lags", tt.step, n)
				}
				if got, want := len(must(dir.List("ca"))), map[string]int{ca.Steady: 5, ca.Prepared: 7, ca.Activated: 7}[tt.done]; got != want {
					t.Fatalf("%s, killed at write %d: %d files, want %d: %v", tt.step, n, got, want, must(dir.List("ca")))
				}
			}
			t.Logf("%s, after the write %t: %d points", tt.step, after, points)
		}
	}
}

// TestCrashOfOthers: the same for making a CA, opening one of the version before, replacing the issuer, and exporting the root.
func TestCrashOfOthers(t *testing.T) {
	for _, after := range []bool{false, true} {
		for n := 1; ; n++ { // Create
			dir := must(datadir.Create(filepath.Join(t.TempDir(), "strait")))
			k := &ca.Crash{At: n, After: after}
			clk := &clock{now: t0}
			_, err := ca.Create(dir, k.With(ca.Config{TrustDomain: td, Now: clk.Now}))
			if k.Writes() < n {
				break
			}
			if err == nil {
				t.Fatalf("Create, killed at write %d, succeeds", n)
			}
			if _, err := ca.Create(dir, ca.Config{TrustDomain: td, Now: clk.Now}); err != nil && !(after && ca.Exists(dir.Path())) {
				t.Fatalf("Create again after it was killed at write %d: %v", n, err)
			}
			issue(t, must(ca.Open(dir, ca.Config{Now: clk.Now})))
		}
		for n := 1; ; n++ { // the version before
			_, dir, clk := newCA(t)
			legacy(t, dir, 4)
			k := &ca.Crash{At: n, After: after}
			_, err := ca.Open(dir, k.With(ca.Config{Now: clk.Now}))
			if k.Writes() < n {
				break
			}
			if !errors.Is(err, ca.ErrCrash) {
				t.Fatal(err)
			}
			b, err := ca.Open(dir, ca.Config{Now: clk.Now})
			if err != nil || b.Bundle().Sequence() != 5 || len(b.Bundle().JWTKeys()) != 1 {
				t.Fatalf("killed at write %d: %v", n, err)
			}
		}
		for n := 1; ; n++ { // the issuer, in the middle of a rotation
			a, dir, clk := newCA(t)
			run(t, a, "prepare", "activate")
			clk.add(300 * 24 * time.Hour)
			k := &ca.Crash{At: n, After: after}
			crashed, err := ca.Open(dir, k.With(ca.Config{Now: clk.Now}))
			if k.Writes() < n {
				break
			}
			if err == nil { // the present issuer goes on
				if _, err := crashed.IssueKey(web, 0); err == nil {
					t.Fatal("issued by a process that was killed")
				}
			}
			b, err := ca.Open(dir, ca.Config{Now: clk.Now})
			if err != nil {
				t.Fatalf("issuer, killed at write %d: %v", n, err)
			}
			id := issue(t, b)
			for _, root := range b.Bundle().Roots() {
				if err := verifies(id, must(trust.NewBundle(td, []*x509.Certificate{root}, 1)), clk.Now()); err != nil {
					t.Fatal(err)
				}
			}
			if got := b.IssuerNotAfter().Sub(clk.Now()); got < 300*24*time.Hour {
				t.Fatalf("the issuer was not replaced: %v", got)
			}
		}
		for n := 1; ; n++ { // export
			_, dir, clk := newCA(t)
			k := &ca.Crash{At: n, After: after}
			var out bytes.Buffer
			err := ca.ExportRootCrashing(k, dir, &out)
			if k.Writes() < n {
				break
			}
			if !errors.Is(err, ca.ErrCrash) || out.Len() == 0 {
				t.Fatalf("export, killed at write %d: %v", n, err)
			}
			issue(t, must(ca.Open(dir, ca.Config{Now: clk.Now})))
		}
	}
}

// TestFailedWrite: a disk that refuses one write costs that step and nothing else: the CA goes on, and the step can be repeated.
func TestFailedWrite(t *testing.T) {
	for n := 1; n < 16; n++ {
		_, dir, clk := newCA(t)
		k := &ca.Crash{At: n, Once: true}
		a := must(ca.Open(dir, k.With(ca.Config{Now: clk.Now})))
		for _, step := range []string{"prepare", "activate", "retire"} {
			was := a.State().Phase
			if err := steps[step](a); err != nil && a.State().Phase == was {
				if err := steps[step](a); err != nil {
					t.Fatalf("%s again after write %d failed: %v", step, n, err)
				}
			}
			id, err := a.IssueKey(web, 0)
			if err != nil {
				id = issue(t, a)
			}
			if err := verifies(id, a.Bundle(), clk.Now()); err != nil {
				t.Fatal(err)
			}
		}
		b := must(ca.Open(dir, ca.Config{Now: clk.Now}))
		if !b.Bundle().Equal(a.Bundle()) || b.State().Phase != ca.Steady {
			t.Fatalf("after write %d failed memory and disk differ", n)
		}
	}
}

// TestOperations runs random operations, restarts and crashes. Readers hold any bundle that the rules of a rotation let them hold: once
// activated the old one or the new, after Retire only what was published since Prepare. Every identity that is not superseded
// verifies with each of them.
func TestOperations(t *testing.T) {
	for seed := range uint64(8) {
		rng := rand.New(rand.NewPCG(seed, 7))
		a, dir, clk := newCA(t)
		readers := []*trust.Bundle{a.Bundle()} // what honest readers may hold
		var live []*trust.Identity
		published := map[uint64]*trust.Bundle{}
		log := ""
		for op := range 90 {
			clk.add(time.Duration(rng.IntN(3000)) * time.Millisecond)
			phase := a.State().Phase
			k := &ca.Crash{}
			var err error
			did := ""
			switch n := rng.IntN(12); {
			case n < 4:
				id, issueErr := a.IssueKey(web, 0)
				err, did = issueErr, "issue"
				if err == nil {
					live = append(live[max(0, len(live)-5):], id)
				}
			case n == 4:
				did, a = "open", must(ca.Open(dir, ca.Config{Now: clk.Now}))
			case n == 5:
				did = "issuer's year"
				clk.add(280 * 24 * time.Hour)
				live = nil
			case n < 8: // a process that dies on the way
				k.At, k.After = 1+rng.IntN(10), rng.IntN(2) == 0
				did = []string{"prepare", "activate", "retire", "abort"}[rng.IntN(4)]
				if victim, openErr := ca.Open(dir, k.With(ca.Config{Now: clk.Now})); openErr == nil {
					_ = steps[did](victim)
				}
				did += " and die"
				a = must(ca.Open(dir, ca.Config{Now: clk.Now}))
			default:
				did = []string{"prepare", "activate", "retire", "abort"}[rng.IntN(4)]
				err = steps[did](a)
			}
			if err != nil && !problem.Is(err, problem.RotationPhase) {
				t.Fatalf("seed %d, operation %d (%s): %v\n%s", seed, op, did, err, log)
			}
			if end := a.Bundle().NotAfter(); end.Sub(clk.Now()) < 3*365*24*time.Hour {
				break // the life of a root is over
			}
			b := a.Bundle()
			if other := published[b.Sequence()]; other != nil && !other.Equal(b) {
				t.Fatalf("seed %d: two bundles of sequence %d\n%s", seed, b.Sequence(), log)
			}
			published[b.Sequence()] = b
			now := a.State().Phase
			log += fmt.Sprintf("%s → %s\n", did, now)
			if phase == ca.Activated && now == ca.Steady { // everybody has acknowledged both roots before Retire, and has renewed
				readers = slicesFilter(readers, func(r *trust.Bundle) bool { return len(r.Roots()) == 2 && r.Roots()[1].Equal(b.Roots()[0]) })
			}
			if phase == ca.Prepared && now == ca.Steady { // an abort: who held both still holds the old one
				readers = slicesFilter(readers, func(r *trust.Bundle) bool { return r.Roots()[0].Equal(b.Roots()[0]) })
			}
			if last := readers[max(0, len(readers)-1):]; len(last) == 0 || !last[0].Equal(b) {
				readers = append(readers, b)
			}
			recall := a.State().RenewIssuedBefore
			live = slicesFilter(live, func(id *trust.Identity) bool {
				return !trust.Issued(id.Chain[0]).Before(recall) && id.NotAfter.After(clk.Now())
			})
			for _, id := range live {
				for _, r := range readers {
					if err := verifies(id, r, clk.Now()); err != nil {
						t.Fatalf("seed %d, operation %d: an identity of %s, a bundle of sequence %d: %v\n%s", seed, op, trust.Issued(id.Chain[0]), r.Sequence(), err, log)
					}
				}
			}
		}
	}
}

func slicesFilter[T any](list []T, keep func(T) bool) (out []T) {
	for _, v := range list {
		if keep(v) {
			out = append(out, v)
		}
	}
	return out
}

// TestRollback: files of different moments, as a restore may leave them, never bring the sequence back.
func TestRollback(t *testing.T) {
	a, dir, clk := newCA(t)
	state := must(dir.ReadFile("ca/state.json"))
	jwt := must(dir.List("ca"))
	kept := map[string][]byte{}
	for _, n := range jwt {
		kept[n] = must(dir.ReadFile("ca/" + n))
	}
	run(t, a, "prepare", "abort", "prepare") // sequence 4, with the old root in it
	published := a.Bundle()
	if err := dir.WriteFile("ca/state.json", state); err != nil {
		t.Fatal(err)
	}
	b, err := ca.Open(dir, ca.Config{Now: clk.Now})
	if err != nil {
		t.Fatal(err)
	}
	if err := published.CheckUpdate(b.Bundle()); err != nil || b.Bundle().Sequence() != 5 {
		t.Errorf("a state from before with the bundle from now: sequence %d, %v", b.Bundle().Sequence(), err)
	}
	if err := ca.Restored(dir); err != nil {
		t.Fatal(err)
	}
	c := must(ca.Open(dir, ca.Config{Now: clk.Now}))
	if got := c.Bundle().Sequence(); got <= 65536 {
		t.Errorf("sequence %d after a restore", got)
	}
	if err := c.RaiseSequence(70_000); err != nil || c.Bundle().Sequence() != 70_001 {
		t.Errorf("raised to %d, %v", c.Bundle().Sequence(), err)
	}
	if err := c.RaiseSequence(1 << 60); err == nil {
		t.Error("a member's word takes the sequence to its end")
	}
	if err := c.RaiseSequence(5); err != nil || c.Bundle().Sequence() != 70_001 {
		t.Error("raised to below itself")
	}
	legacy(t, dir, 9)
	if err := ca.Restored(dir); err != nil {
		t.Fatal(err)
	}
	if got := must(ca.Open(dir, ca.Config{Now: clk.Now})).Bundle().Sequence(); got != 9+65536+1 {
		t.Errorf("sequence %d after a restore of a version before", got)
	}
}

func TestDamagedState(t *testing.T) {
	a, dir, clk := newCA(t)
	run(t, a, "prepare")
	good := must(dir.ReadFile("ca/state.json"))
	_, text, _ := bytes.Cut(good, []byte("\n"))
	edit := func(f func(map[string]any)) []byte {
		var m map[string]any
		if err := json.Unmarshal(text, &m); err != nil {
			t.Fatal(err)
		}
		f(m)
		data := must(json.Marshal(m))
		return fmt.Appendf(nil, "strait-ca-state/1 sha256:%x\n%s", sha256.Sum256(data), data)
	}
	for name, tt := range map[string]struct {
		data []byte
		code problem.Code
	}{
		"no checksum":    {text, problem.StateCorrupt},
		"half":           {good[:len(good)/2], problem.StateCorrupt},
		"empty":          {nil, problem.StateCorrupt},
		"another phase":  {edit(func(m map[string]any) { m["phase"] = "steady" }), problem.StateCorrupt},
		"no phase":       {edit(func(m map[string]any) { m["phase"] = "x" }), problem.StateCorrupt},
		"unknown":        {edit(func(m map[string]any) { m["x"] = 1 }), problem.StateCorrupt},
		"a newer one":    {edit(func(m map[string]any) { m["version"] = 2 }), problem.VersionSkew},
		"a root twice":   {edit(func(m map[string]any) { r := m["roots"].([]any); m["roots"] = []any{r[0], r[0]} }), problem.StateCorrupt},
		"files are gone": {edit(func(m map[string]any) { m["issuer"] = "ca/issuer-x.pem" }), ""},
		"elsewhere":      {edit(func(m map[string]any) { m["issuer"] = "../../etc/passwd" }), ""},
	} {
		if err := dir.WriteFile("ca/state.json", tt.data); err != nil {
			t.Fatal(err)
		}
		if _, err := ca.Open(dir, ca.Config{Now: clk.Now}); err == nil || tt.code != "" && !problem.Is(err, tt.code) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := dir.WriteFile("ca/state.json", good); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Open(dir, ca.Config{Now: clk.Now}); err != nil {
		t.Error(err)
	}
}

// TestFlippedBits: a bit that a disk has turned in any file of the CA is noticed, or changes nothing.
func TestFlippedBits(t *testing.T) {
	a, dir, clk := newCA(t)
	run(t, a, "prepare", "activate")
	rng := rand.New(rand.NewPCG(1, 2))
	want := issue(t, a)
	opened, refused := 0, 0
	for _, name := range must(dir.List("ca")) {
		good := must(dir.ReadFile("ca/" + name))
		for range 40 {
			bad := bytes.Clone(good)
			bad[rng.IntN(len(bad))] ^= 1 << rng.IntN(8)
			if err := dir.WriteFile("ca/"+name, bad); err != nil {
				t.Fatal(err)
			}
			b, err := ca.Open(dir, ca.Config{TrustDomain: td, Now: clk.Now})
			if err != nil {
				refused++
				continue
			}
			opened++
			if name == "state.json" || !b.Bundle().Equal(a.Bundle()) || verifies(issue(t, b), a.Bundle(), clk.Now()) != nil || verifies(want, b.Bundle(), clk.Now()) != nil {
				t.Errorf("%s with a flipped bit makes another CA", name)
			}
		}
		if err := dir.WriteFile("ca/"+name, good); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d refused, %d without a difference", refused, opened)
}

func pemOf(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}
