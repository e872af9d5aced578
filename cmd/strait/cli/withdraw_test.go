// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/cmd/strait/cli"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
)

const webID = "spiffe://us-east.acme/ns/shop/sa/web"

func TestWithdrawalsTable(t *testing.T) {
	r := cli.NewRendering(at, "table", false)
	err := r.Withdrawals(&controlpb.WithdrawalsResponse{Withdrawals: []*controlpb.WithdrawalStatus{
		{SpiffeId: webID, Reason: "host stolen", AtUnix: at.Add(-time.Hour).Unix(), Confirmed: 4, Unconfirmed: []string{"shop/cart-1 (last seen 2026-11-22T13:00:00Z)", "member eu-west (unreachable)"}},
		{SpiffeId: "spiffe://us-east.acme/strait/gateway/gw-2", Reason: "lost", AtUnix: at.Unix(), IssuedBeforeUnix: at.Unix(), Confirmed: 6},
		{SpiffeId: "spiffe://us-east.acme/ns/shop/sa/many", AtUnix: at.Unix(), Unconfirmed: []string{"a", "b", "c", "d", "e"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "withdrawals", r.Out.String(), `
IDENTITY                                   SINCE                 WITHDRAWN                           REASON       CONFIRMED  NOT CONFIRMED
spiffe://us-east.acme/ns/shop/sa/web       2026-11-22 13:08:24Z  altogether                          host stolen  4          shop/cart-1 (last seen 2026-11-22T13:00:00Z), member eu-west (unreachable)
spiffe://us-east.acme/strait/gateway/gw-2  2026-11-22 14:08:24Z  issued before 2026-11-22 14:08:24Z  lost         6
spiffe://us-east.acme/ns/shop/sa/many      2026-11-22 14:08:24Z  altogether                                       0          a, b, c, and 2 more (-o wide)
`)
}

// Who has not confirmed a withdrawal is named, and makes the command end with a code of its own.
func TestWithdrawnUnconfirmed(t *testing.T) {
	r := cli.NewRendering(at, "table", false)
	if err := r.Withdrawn("evicted", &controlpb.WithdrawalStatus{SpiffeId: webID, Confirmed: 1}); err != nil {
		t.Error(err)
	}
	err := r.Withdrawn("readmitted", &controlpb.WithdrawalStatus{SpiffeId: webID, Confirmed: 2, IssuedBeforeUnix: at.Unix(), Unconfirmed: []string{"member eu-west (unreachable)"}})
	if code := r.Report(err); !problem.Is(err, problem.WithdrawalUnconfirmed) || code != problem.ExitPartial || !strings.Contains(r.Err.String(), "member eu-west (unreachable)") {
		t.Errorf("exit %d: %v\n%s", code, err, r.Err.String())
	}
	equal(t, "withdrawn", r.Out.String(), `
spiffe://us-east.acme/ns/shop/sa/web evicted; confirmed by 1 process
spiffe://us-east.acme/ns/shop/sa/web readmitted; confirmed by 2 processes, what was issued before 2026-11-22 14:08:24Z stays out
`)
}
