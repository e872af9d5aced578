// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/trust/ca"

	"crypto/x509"
)

// TestLedger: what left is written down, by whom it was asked for, and nothing twice.
func TestLedger(t *testing.T) {
	a, dir, clk := newCA(t)
	csr := request(t, p256(), &x509.CertificateRequest{})
	want := map[string]string{}
	for _, by := range []string{"registration", "operator anna"} {
		leaf := chain(t, must(a.IssueCSRFor(by, csr, web, 0)))[0]
		want[fmt.Sprintf("%032x", leaf.SerialNumber)] = by
	}
	if _, _, err := a.IssueServing([]string{"x"}, []net.IP{{127, 0, 0, 1}}, 0); err != nil {
		t.Fatal(err)
	}
	run(t, a, "prepare", "activate")
	b := reopen(t, dir, clk)
	id := issue(t, b)
	want[fmt.Sprintf("%032x", id.Chain[0].SerialNumber)] = "control plane"
	kinds := map[string]int{}
	seen := map[string]bool{}
	for _, e := range must(ca.Ledger(dir)) {
		kinds[e.Kind]++
		if seen[e.Serial] {
			t.Errorf("serial %s twice", e.Serial)
		}
		seen[e.Serial] = true
		if by, ok := want[e.Serial]; ok {
			if e.By != by || e.ID != web.String() || e.Kind != "svid" || !e.At.Equal(t0) || e.NotAfter.Sub(t0) != ca.DefaultTTL || len(e.Issuer) < 20 {
				t.Errorf("%+v, want it asked for by %s", e, by)
			}
			delete(want, e.Serial)
		}
	}
	if len(want) > 0 || kinds["root"] != 2 || kinds["issuer"] != 3 || kinds["serving"] != 1 {
		t.Errorf("missing %v; written down: %v", want, kinds)
	}
	for _, name := range must(dir.List("ca/issued")) {
		if st := must(os.Stat(dir.Path("ca/issued", name))); st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o", name, st.Mode().Perm())
		}
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	issue(t, a)
}

// TestSerialsOverRestarts: whoever issues from one data directory, at once or one after the other, gives out every serial once, and
// every certificate that left is in the ledger.
func TestSerialsOverRestarts(t *testing.T) {
	_, dir, clk := newCA(t)
	csr := request(t, p256(), &x509.CertificateRequest{})
	var mu sync.Mutex
	seen, counters := map[string]bool{}, map[string]bool{}
	for range 5 {
		a := reopen(t, dir, clk)
		b := reopen(t, dir, clk) // two at once: LOCK forbids it, the ledger bears it
		var wg sync.WaitGroup
		for _, c := range []*ca.CA{a, a, a, b} {
			wg.Go(func() {
				for range 20 {
					leaf, err := c.IssueCSR(csr, web, 0)
					if err != nil {
						t.Error(err)
						return
					}
					s := fmt.Sprintf("%032x", must(x509.ParseCertificate(leaf[0])).SerialNumber)
					mu.Lock()
					if seen[s] || counters[s[16:]] {
						t.Errorf("serial %s twice", s)
					}
					seen[s], counters[s[16:]] = true, true
					mu.Unlock()
				}
			})
		}
		wg.Wait()
	}
	for _, e := range must(ca.Ledger(dir)) {
		delete(seen, e.Serial)
	}
	if len(seen) > 0 {
		t.Errorf("%d certificates are not in the ledger", len(seen))
	}
}

// TestLedgerFails: what could not be written down does not leave, and what is written half does no harm.
func TestLedgerFails(t *testing.T) {
	_, dir, clk := newCA(t)
	for n := 1; n < 6; n++ {
		k := &ca.Crash{Once: true}
		a := must(ca.Open(dir, k.With(ca.Config{Now: clk.Now})))
		k.At = k.Writes() + n
		failed := 0
		for range 6 {
			if id, err := a.IssueKey(web, 0); err != nil {
				failed++
			} else if e := must(ca.Ledger(dir)); e[len(e)-1].Serial != fmt.Sprintf("%032x", id.Chain[0].SerialNumber) {
				t.Errorf("the last line is not of the certificate that left")
			}
		}
		if failed != 1 {
			t.Errorf("write %d fails, and %d certificates with it", n, failed)
		}
	}
	names := must(dir.List("ca/issued"))
	f := must(os.OpenFile(dir.Path("ca/issued", names[0]), os.O_WRONLY|os.O_APPEND, 0))
	if _, err := f.WriteString(`{"serial":"00`); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	clk.add(100 * 24 * time.Hour)
	issue(t, reopen(t, dir, clk))
}

// TestLedgerIsBounded: files go 30 days after the last certificate in them has ended, and the newest stays for its number.
func TestLedgerIsBounded(t *testing.T) {
	a, dir, clk := newCA(t)
	most := 0
	for range 200 {
		clk.add(24*time.Hour + time.Second)
		issue(t, a)
		most = max(most, len(must(dir.List("ca/issued"))))
	}
	if most > 40 {
		t.Errorf("%d files", most)
	}
	oldest := clk.Now()
	for _, e := range must(ca.Ledger(dir)) {
		if e.Kind == "svid" && e.At.Before(oldest) {
			oldest = e.At
		}
	}
	if age := clk.Now().Sub(oldest); age < 31*24*time.Hour || age > 35*24*time.Hour {
		t.Errorf("the oldest line is from %v ago", age)
	}
	block := func() string { names := must(dir.List("ca/issued")); return names[len(names)-1] }
	was := block()
	clk.add(1000 * 24 * time.Hour)
	issue(t, reopen(t, dir, clk))
	if now := block(); strings.Compare(was, now) >= 0 {
		t.Errorf("block %s after %s", now, was)
	}
}

func TestLedgerLines(t *testing.T) {
	a, dir, _ := newCA(t)
	issue(t, a)
	for _, name := range must(dir.List("ca/issued")) {
		for line := range strings.Lines(string(must(dir.ReadFile("ca/issued/" + name)))) {
			var m map[string]any
			if err := json.Unmarshal([]byte(line), &m); err != nil {
				t.Fatal(err)
			}
			for _, field := range []string{"serial", "id", "kind", "issuer", "not_after", "at", "by"} {
				if m[field] == nil {
					t.Errorf("%s lacks %s: %s", name, field, line)
				}
			}
		}
	}
}
