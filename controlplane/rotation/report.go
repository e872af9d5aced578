// SPDX-License-Identifier: Apache-2.0

package rotation

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Phases of a rotation; the CA's words.
const (
	Steady    = "steady"
	Prepared  = "prepared"
	Activated = "activated"
)

// Kind says what a row is about. Words as in the operator API.
type Kind string

// The kinds.
const (
	Member   Kind = "member"
	Proxy    Kind = "proxy"
	Operator Kind = "operator" // a certificate of strait access issue: nobody waits for it
	Tokens   Kind = "tokens"   // JWT-SVIDs of the old key that have not ended
)

// operatorPrefix keeps operators apart from processes, whose names have no colon.
const operatorPrefix = "operator:"

// OperatorName is an operator's name for Issued.
func OperatorName(name string) string { return operatorPrefix + name }

// Situation is what a report is made of, beside what the Tracker remembers.
type Situation struct {
	Phase             string
	Sequence          uint64    // of our bundle now
	RenewIssuedBefore time.Time // identities issued before are to be renewed; zero: none
	Connected         map[string]spiffeid.ID
	Members           []MemberState
	// Withdrawn says whether an identity issued at that time was withdrawn. nil: none was.
	Withdrawn func(id spiffeid.ID, issued time.Time) bool
}

// MemberState is what another member has said.
type MemberState struct {
	Cluster   string
	Seen      uint64 // sequence of our bundle that all of its live processes have
	Reachable bool
	LastSeen  time.Time
}

// Row is one member, process or operator.
type Row struct {
	Kind         Kind
	Name         string
	Sequence     uint64 // of our bundle that it acknowledged
	Acknowledged bool   // and that is the present one
	Renewed      bool   // holds no identity that is to be renewed
	Reachable    bool
	LastSeen     time.Time
	Blocks       bool   // the next step waits for it
	Lacks        string // what it does not have; empty: nothing
}

// Report lists members, processes, tokens and operators, each by name.
func (t *Tracker) Report(s Situation) []Row {
	var rows []Row
	for _, m := range s.Members {
		r := Row{Kind: Member, Name: m.Cluster, Sequence: m.Seen, Acknowledged: m.Seen >= s.Sequence, Renewed: true, Reachable: m.Reachable, LastSeen: m.LastSeen}
		if !r.Acknowledged {
			r.Lacks = fmt.Sprintf("has bundle %d of ours, not %d", m.Seen, s.Sequence)
			if !m.Reachable {
				r.Lacks += ", and is unreachable"
			}
		}
		r.Blocks = s.Phase == Activated && !r.Acknowledged
		rows = append(rows, r)
	}
	rows = append(rows, t.processRows(s)...)
	rows = append(rows, t.tokenRows(s)...)
	slices.SortStableFunc(rows, func(a, b Row) int {
		order := []Kind{Member, Proxy, Tokens, Operator}
		return cmp.Or(cmp.Compare(slices.Index(order, a.Kind), slices.Index(order, b.Kind)), cmp.Compare(a.Name, b.Name))
	})
	return rows
}

func (t *Tracker) processRows(s Situation) []Row {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	var rows []Row
	add := func(name string, p *process, connected bool) {
		if s.Withdrawn != nil && s.Withdrawn(p.ID, p.Own.Issued) {
			return
		}
		if operator, ok := strings.CutPrefix(name, operatorPrefix); ok {
			rows = append(rows, operatorRow(operator, p, s))
			return
		}
		rows = append(rows, processRow(name, p, connected, now, s))
	}
	for name, p := range t.processes {
		id, connected := s.Connected[name]
		connected = connected && id == p.ID
		if connected || now.Before(p.ends()) {
			add(name, p, connected)
		}
	}
	for name, id := range s.Connected {
		if p := t.processes[name]; p == nil || p.ID != id {
			add(name, &process{ID: id, Seen: now}, true)
		}
	}
	return rows
}

// tokenRows says that JWT-SVIDs of the old key may still be shown: the phase after activate lasts until they have ended.
func (t *Tracker) tokenRows(s Situation) []Row {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.Phase != Activated || !t.now().Before(t.tokens) {
		return nil
	}
	return []Row{{Kind: Tokens, Name: "JWT-SVIDs", Sequence: s.Sequence, Acknowledged: true, Reachable: true, Blocks: true,
		Lacks: "of the old key are valid until " + clock(t.tokens)}}
}

func operatorRow(name string, p *process, s Situation) Row {
	r := Row{Kind: Operator, Name: name, Acknowledged: true, Renewed: !p.Own.Issued.Before(s.RenewIssuedBefore), LastSeen: p.Own.Issued}
	if s.Phase == Prepared {
		r.Renewed = true
	}
	if !r.Renewed {
		r.Lacks = fmt.Sprintf("has a certificate of %s, which ends with the old root", clock(p.Own.Issued))
	}
	return r
}

func processRow(name string, p *process, connected bool, now time.Time, s Situation) Row {
	r := Row{Kind: Proxy, Name: name, Sequence: p.Sequence, Acknowledged: p.Sequence >= s.Sequence, Reachable: connected, LastSeen: p.Seen}
	if connected {
		r.LastSeen = now
	}
	application := p.Application != nil && now.Before(p.Application.NotAfter) && p.Application.Issued.Before(s.RenewIssuedBefore)
	r.Renewed = !p.Own.Issued.Before(s.RenewIssuedBefore) && !application
	var lacks []string
	if !r.Acknowledged {
		lacks = append(lacks, fmt.Sprintf("has bundle %d, not %d", p.Sequence, s.Sequence))
	}
	switch {
	case r.Renewed || s.Phase == Prepared:
	case application && !p.Own.Issued.Before(s.RenewIssuedBefore):
		lacks = append(lacks, "its application holds an identity of "+clock(p.Application.Issued))
	case p.Own.Issued.IsZero():
		lacks = append(lacks, "it is not known which identity it holds")
	default:
		lacks = append(lacks, "holds an identity of "+clock(p.Own.Issued))
	}
	if len(lacks) > 0 && !connected {
		lacks = append(lacks, fmt.Sprintf("is not connected since %s, and may return until its identity ends at %s", clock(p.Seen), clock(p.ends())))
	}
	r.Lacks = strings.Join(lacks, "; ")
	switch s.Phase {
	case Prepared:
		r.Blocks = connected && !r.Acknowledged
	case Activated:
		r.Blocks = !r.Acknowledged || !r.Renewed
	}
	return r
}

func clock(t time.Time) string {
	if t.IsZero() {
		return "an unknown time"
	}
	return t.UTC().Format(time.RFC3339)
}

// Waiting returns the rows that the next step waits for.
func Waiting(rows []Row) []Row {
	var out []Row
	for _, r := range rows {
		if r.Blocks {
			out = append(out, r)
		}
	}
	return out
}

// Broken returns the rows of whom or what stops working when the old root is retired now.
func Broken(rows []Row) []Row {
	var out []Row
	for _, r := range rows {
		if r.Blocks || r.Kind == Operator && !r.Renewed {
			out = append(out, r)
		}
	}
	return out
}
