// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"testing"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestSessionsOfOneIdentity: an identity may have as many sessions as its sidecars need, but not those that others need.
func TestSessionsOfOneIdentity(t *testing.T) {
	id := func(sa string) spiffeid.ID {
		td, err := spiffeid.ParseTrustDomain("us-east.acme")
		if err != nil {
			t.Fatal(err)
		}
		id, err := spiffeid.Workload(td, "shop", sa)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	var l localSessions
	greedy := 0
	var leave func()
	for {
		f, err := l.enter(id("greedy"))
		if err != nil {
			break
		}
		leave = f
		greedy++
	}
	if greedy != maxLocalSessions/2 {
		t.Errorf("one identity got %d of %d sessions", greedy, maxLocalSessions)
	}
	modest := 0
	for _, err := l.enter(id("modest")); err == nil; _, err = l.enter(id("modest")) {
		modest++
	}
	if modest != sessionsEach {
		t.Errorf("another one got %d afterwards, want %d", modest, sessionsEach)
	}
	leave()
	if _, err := l.enter(id("greedy")); err == nil {
		t.Error("who has many gets what it gave back although others have taken more than half")
	}
	for n := l.total; n < maxLocalSessions; n++ {
		if _, err := l.enter(id("w" + string(rune('a'+n%26)) + string(rune('a'+n/26%26)) + string(rune('a'+n/676)))); err != nil {
			t.Fatalf("session %d: %v", n, err)
		}
	}
	if _, err := l.enter(id("late")); err == nil {
		t.Error("more sessions than there are")
	}
}
