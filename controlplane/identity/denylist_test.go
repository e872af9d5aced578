// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/identity"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// wall is a clock that a test sets.
type wall struct{ t time.Time }

func (w *wall) now() time.Time { return w.t }

func (w *wall) add(d time.Duration) { w.t = w.t.Add(d) }

type list struct {
	*identity.DenyList
	t     *testing.T
	dir   *datadir.Dir
	clock *wall
	web   spiffeid.ID
}

func newList(t *testing.T) *list {
	t.Helper()
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "data"))
	must(t, err)
	td, err := spiffeid.ParseTrustDomain("us-east.acme")
	must(t, err)
	web, err := spiffeid.Workload(td, "shop", "web")
	must(t, err)
	l := &list{t: t, dir: dir, clock: &wall{time.Date(2026, 9, 1, 12, 0, 0, 400e6, time.UTC)}, web: web}
	l.open()
	return l
}

func (l *list) open() {
	l.t.Helper()
	var err error
	l.DenyList, err = identity.OpenDenyList(l.dir, l.clock.now)
	must(l.t, err)
}

// issue is when a certificate issued now says that it was.
func (l *list) issue() time.Time {
	l.t.Helper()
	must(l.t, l.Issuing())
	return l.clock.t.Truncate(time.Second)
}

func (l *list) want(issued time.Time, denied bool, what string) {
	l.t.Helper()
	if _, got := l.Denied(l.web, issued); got != denied {
		l.t.Errorf("%s: denied %v", what, got)
	}
}

func TestEvictAndReadmit(t *testing.T) {
	l := newList(t)
	before := l.issue()
	if err := l.Readmit(l.web); !errors.Is(err, identity.ErrNotWithdrawn) {
		t.Errorf("readmitted what is not withdrawn: %v", err)
	}
	l.want(before, false, "before the eviction")
	must(t, l.Add(l.web, "stolen"))
	l.want(before, true, "issued before the eviction")
	l.want(before.Add(time.Hour), true, "issued after the eviction")
	l.want(time.Time{}, true, "by name")
	if reason, denied := l.Issuable(l.web); !denied || reason != "stolen" {
		t.Errorf("issuable: %q, %v", reason, denied)
	}

	l.clock.add(time.Minute)
	same := l.issue() // in the second of the readmission, and before it
	l.clock.add(100 * time.Millisecond)
	must(t, l.Readmit(l.web))
	l.want(before, true, "an old certificate after the readmission")
	l.want(same, true, "one of the same second after the readmission")
	l.want(time.Time{}, false, "by name after the readmission")
	if _, denied := l.Issuable(l.web); !denied {
		t.Error("a certificate issued in the same second would stay out: it is not to be issued")
	}
	l.clock.add(499 * time.Millisecond) // 12:01:00.999
	if _, denied := l.Issuable(l.web); !denied {
		t.Error("issuable within the same second")
	}
	l.clock.add(time.Millisecond)
	if _, denied := l.Issuable(l.web); denied {
		t.Error("not issuable in the next second")
	}
	l.want(l.issue(), false, "a new certificate")
	fence, _ := l.Find(l.web)
	l.clock.add(time.Hour)
	must(t, l.Readmit(l.web))
	if d, _ := l.Find(l.web); d != fence {
		t.Errorf("a second readmission changed %+v to %+v", fence, d)
	}
	l.open()
	l.want(same, true, "an old certificate after a restart")
	l.want(fence.IssuedBefore, false, "a new certificate after a restart")
}

func TestRevokeWhatWasIssued(t *testing.T) {
	l := newList(t)
	before := l.issue()
	must(t, l.AddIssued(l.web, "key leaked"))
	l.want(before, true, "issued before")
	l.want(time.Time{}, false, "by name")
	first, _ := l.Find(l.web)
	l.clock.add(10 * time.Second)
	l.want(l.issue(), false, "issued after")
	must(t, l.AddIssued(l.web, "leaked again"))
	if d, _ := l.Find(l.web); !d.IssuedBefore.After(first.IssuedBefore) {
		t.Errorf("%v, then %v", first.IssuedBefore, d.IssuedBefore)
	}
	must(t, l.Add(l.web, "evicted"))
	must(t, l.AddIssued(l.web, "key leaked"))
	l.want(time.Time{}, true, "evicted: not to be lifted by withdrawing less")
}

// TestClockStepRevivesNothing: fault row F25. Whatever the clock does, a certificate that was issued before the readmission stays out.
func TestClockStepRevivesNothing(t *testing.T) {
	for _, restart := range []bool{false, true} {
		for _, step := range []time.Duration{-25 * time.Hour, -time.Hour, -30 * time.Second, 0, time.Hour, 25 * time.Hour} {
			l := newList(t)
			early := l.issue()
			l.clock.add(2 * time.Hour) // the clock is wrong while this one is issued
			late := l.issue()
			l.clock.add(step)
			if restart {
				l.open()
			}
			must(t, l.Add(l.web, "stolen"))
			l.clock.add(time.Second)
			if restart {
				l.open()
			}
			must(t, l.Readmit(l.web))
			l.want(early, true, "issued by a right clock")
			l.want(late, true, "issued by a clock that was ahead")
			l.clock.add(-step)
			l.want(early, true, "and after the clock was set again")
			l.want(late, true, "and after the clock was set again")
			d, _ := l.Find(l.web)
			l.clock.t = d.IssuedBefore
			l.want(l.issue(), false, "once the clock is past all that")
		}
	}
}

// TestOldFile: lists that were written before a readmission could be told from an eviction mean evictions.
func TestOldFile(t *testing.T) {
	l := newList(t)
	must(t, l.dir.WriteState("ca/denied", []byte(`{"`+l.web.String()+`":{"reason":"one","at":"2026-08-01T10:00:00Z"}}`)))
	l.open()
	l.want(l.clock.t.Add(time.Hour), true, "a later certificate")
	if d, ok := l.Find(l.web); !ok || d.Reason != "one" || !d.Rule().Total() || len(l.All()) != 1 {
		t.Errorf("%+v", d)
	}
}

// TestDamagedList: a list that cannot be read is not taken for an empty one, at the second start either.
func TestDamagedList(t *testing.T) {
	l := newList(t)
	must(t, l.Add(l.web, "stolen"))
	must(t, os.WriteFile(l.dir.Path("ca/denied"), []byte("noise"), 0o600))
	for range 2 {
		if _, err := identity.OpenDenyList(l.dir, nil); !errors.Is(err, datadir.ErrCorrupt) {
			t.Fatalf("opened: %v", err)
		}
	}
	must(t, os.Remove(l.dir.Path("ca/denied.corrupt-1")))
	l.open()
}

// TestBackdate: certificates name the time of issue as readers of the list compute it.
func TestBackdate(t *testing.T) {
	if ca.Backdate != trust.Backdate {
		t.Errorf("the CA dates back by %v, readers assume %v", ca.Backdate, trust.Backdate)
	}
}

// TestReadmittedIdentity: through the door, an old certificate stays out after the readmission, and is not renewed; a new one gets in.
func TestReadmittedIdentity(t *testing.T) {
	d := openDoor(t, nil)
	web := d.workload("web")
	old := d.source(web)
	must(t, d.denied.Add(web, "stolen"))
	must(t, d.denied.Readmit(web))
	renew := func(s *trust.Source) error {
		csr, _ := request(t)
		_, err := controlpb.NewIdentityClient(d.dial(s)).Renew(t.Context(), &controlpb.RenewRequest{CsrDer: csr})
		return wire.FromStatus(err)
	}
	if err := renew(old); err == nil {
		t.Error("the old certificate got in")
	}
	eventually(t, "the next second", func() bool { _, denied := d.denied.Issuable(web); return !denied })
	must(t, renew(d.source(web)))
	if err := renew(old); err == nil || problem.Is(err, problem.AccessDenied) {
		t.Errorf("the old certificate: %v", err)
	}
}
