// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
)

// withdrawWorkloadCmds are the commands of "strait workload" that withdraw and readmit.
func withdrawWorkloadCmds(e *env) []*cobra.Command {
	var reason string
	evict := &cobra.Command{Use: "evict NAME|SPIFFE-ID", Short: "Withdraw a workload's identity; takes effect within 5 seconds", Args: cobra.ExactArgs(1),
		Long: `Withdraw the identity of a workload: every connection of it ends within 5 seconds, on every process that the control plane reaches, and no
new or resumed one is accepted, whatever certificate it presents. Tokens that were issued for it are revoked. Workloads that share
the service account share the identity, and go with it. Who cannot be reached is listed as not confirmed, and refuses the identity at
its next contact (exit 10).`,
		Example: "  strait workload evict shop/checkout-1 --reason 'host stolen' --yes\n  strait workload evict spiffe://us-east.acme/ns/shop/sa/checkout --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			return workloadEvictRun(cmd.Context(), e, args[0], reason)
		}}
	evict.Flags().StringVar(&reason, "reason", "", "why, for those who ask later (strait trust withdrawals)")
	readmit := &cobra.Command{Use: "readmit NAME|SPIFFE-ID", Short: "Admit an identity again; what it held before stays out", Args: cobra.ExactArgs(1),
		Long: `Admit a withdrawn identity again. Certificates and tokens that were issued before stay withdrawn: the workload comes back with a new
token. It takes a SPIFFE ID of a gateway or an operator, too.`,
		Example: "  strait workload readmit shop/checkout-1\n  strait workload register shop/checkout-1 --token-out checkout.token      # then restart its sidecar with it",
		RunE: func(cmd *cobra.Command, args []string) error {
			return workloadReadmitRun(cmd.Context(), e, args[0])
		}}
	return []*cobra.Command{evict, readmit}
}

// withdrawTrustCmds are the commands of "strait trust" that withdraw, and show what is withdrawn.
func withdrawTrustCmds(e *env) []*cobra.Command {
	req := &controlpb.TrustRevokeRequest{}
	revoke := &cobra.Command{Use: "revoke SPIFFE-ID", Short: "Withdraw an identity: a workload, a gateway or an operator", Args: cobra.ExactArgs(1),
		Long: `Withdraw any identity of this cluster: every connection of it ends within 5 seconds, on every process that the control plane reaches, and
members are told. With --issued-before-now only what was issued until now is withdrawn, for a key that has leaked: the holder registers
again with a new token.`,
		Example: "  strait trust revoke spiffe://us-east.acme/strait/gateway/gateway-2 --reason 'host lost' --yes\n" +
			"  strait trust revoke spiffe://us-east.acme/strait/operator/ada --issued-before-now --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			req.SpiffeId = args[0]
			return trustRevokeRun(cmd.Context(), e, req)
		}}
	revoke.Flags().StringVar(&req.Reason, "reason", "", "why, for those who ask later (strait trust withdrawals)")
	revoke.Flags().BoolVar(&req.IssuedBeforeNow, "issued-before-now", false, "only certificates and tokens issued until now")
	list := &cobra.Command{Use: "withdrawals", Short: "List withdrawn identities, and who has not confirmed yet", Args: cobra.NoArgs,
		Long: `List the identities that were withdrawn, newest first, with the processes of this cluster and the members that have not confirmed it: they
are not reached now, and refuse the identity at their next contact. An identity that was readmitted stays listed with the time
before which its certificates stay out.`,
		Example: "  strait trust withdrawals\n  strait trust withdrawals -o json --jq '.withdrawals[] | select(.unconfirmed != [])'",
		RunE:    func(cmd *cobra.Command, _ []string) error { return trustWithdrawalsRun(cmd.Context(), e) }}
	return []*cobra.Command{revoke, list}
}

// workloadIdentity is the SPIFFE ID of a workload that is given by its name, or as such.
func (e *env) workloadIdentity(ctx context.Context, op controlpb.OperatorClient, name string) (string, error) {
	if strings.HasPrefix(name, "spiffe://") {
		return name, nil
	}
	ns, workload, ok := strings.Cut(name, "/")
	if !ok {
		ns, workload = e.namespace, ns
	}
	if ns == "" {
		return "", problem.New(problem.Usage, "a workload is named NAMESPACE/NAME, or NAME with -n, or by its SPIFFE ID")
	}
	o, err := e.getObject(ctx, "Workload", ns, workload)
	if err != nil {
		return "", err
	}
	var w api.Workload
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &w); err != nil {
		return "", err
	}
	st, err := op.Status(ctx, &controlpb.StatusRequest{})
	if err != nil {
		return "", e.callError(err)
	}
	id := "spiffe://" + st.TrustDomain + "/ns/" + ns + "/sa/" + w.Account()
	e.progress("workload %s/%s has the identity %s", ns, workload, id)
	return id, nil
}

func workloadEvictRun(ctx context.Context, e *env, name, reason string) error {
	if err := e.confirm("evicting " + name + " cuts every connection of its identity"); err != nil {
		return err
	}
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	id, err := e.workloadIdentity(ctx, op, name)
	if err != nil {
		return err
	}
	r, err := op.WorkloadEvict(ctx, &controlpb.WorkloadEvictRequest{SpiffeId: id, Reason: reason})
	if err != nil {
		return e.callError(err)
	}
	return e.withdrawn("evicted", &controlpb.WithdrawalStatus{SpiffeId: id, Reason: reason, Confirmed: r.Confirmed, Unconfirmed: r.Unconfirmed})
}

func workloadReadmitRun(ctx context.Context, e *env, name string) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	id, err := e.workloadIdentity(ctx, op, name)
	if err != nil {
		return err
	}
	r, err := op.WorkloadReadmit(ctx, &controlpb.WorkloadReadmitRequest{SpiffeId: id})
	if err != nil {
		return e.callError(err)
	}
	return e.withdrawn("readmitted", r)
}

func trustRevokeRun(ctx context.Context, e *env, req *controlpb.TrustRevokeRequest) error {
	if err := e.confirm("revoking " + req.SpiffeId + " cuts every connection of it"); err != nil {
		return err
	}
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	r, err := op.TrustRevoke(ctx, req)
	if err != nil {
		return e.callError(err)
	}
	return e.withdrawn("revoked", r)
}

// withdrawn prints what came of a change, and says with a code of its own when somebody has not confirmed it.
func (e *env) withdrawn(word string, s *controlpb.WithdrawalStatus) error {
	t := &table{}
	text := fmt.Sprintf("%s %s; confirmed by %s", s.SpiffeId, word, processes(s.Confirmed))
	if s.IssuedBeforeUnix != 0 {
		text += ", what was issued before " + stamp(s.IssuedBeforeUnix) + " stays out"
	}
	t.add(s.SpiffeId, text)
	if err := e.print("Withdrawal", s, t); err != nil {
		return err
	}
	if len(s.Unconfirmed) == 0 {
		return nil
	}
	return problem.New(problem.WithdrawalUnconfirmed, "%d have not confirmed it", len(s.Unconfirmed)).
		WithWhy("%s", strings.Join(s.Unconfirmed, "\n")).WithState("the change is in force on the control plane, and everywhere else that has confirmed it.")
}

func processes(n uint32) string {
	if n == 1 {
		return "1 process"
	}
	return fmt.Sprintf("%d processes", n)
}

func stamp(unix int64) string { return time.Unix(unix, 0).UTC().Format("2006-01-02 15:04:05Z") }

func trustWithdrawalsRun(ctx context.Context, e *env) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	r, err := op.Withdrawals(ctx, &controlpb.WithdrawalsRequest{})
	if err != nil {
		return e.callError(err)
	}
	return e.renderWithdrawals(r)
}

func (e *env) renderWithdrawals(r *controlpb.WithdrawalsResponse) error {
	t := &table{head: []string{"IDENTITY", "SINCE", "WITHDRAWN", "REASON", "CONFIRMED", "NOT CONFIRMED"}}
	for _, s := range r.Withdrawals {
		what := "altogether"
		if s.IssuedBeforeUnix != 0 {
			what = "issued before " + stamp(s.IssuedBeforeUnix)
		}
		missing, rest := s.Unconfirmed, ""
		if most := 3; len(missing) > most && e.output != "wide" {
			missing, rest = missing[:most], fmt.Sprintf(", and %d more (-o wide)", len(missing)-most)
		}
		t.add(s.SpiffeId, s.SpiffeId, stamp(s.AtUnix), what, s.Reason, fmt.Sprint(s.Confirmed), strings.Join(missing, ", ")+rest)
	}
	return e.print("Withdrawals", r, t)
}
