// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
)

func newTraceCmd(e *env) *cobra.Command {
	var slow, failed, failover bool
	var limit uint32
	c := &cobra.Command{Use: "trace [ID]", Short: "Show recent cross-cluster traces", Args: cobra.MaximumNArgs(1),
		Long: `Show recent traces, or one by its id. Spans stay in the cluster they belong to; every member is asked for its own. One trace is drawn as
a waterfall; several are listed unless -o waterfall asks for drawings.`,
		Example: "  strait trace --failover -o waterfall\n  strait trace 4b1f2c",
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &controlpb.TraceRequest{Limit: limit}
			if len(args) == 1 {
				req.Id = args[0]
			}
			for word, set := range map[string]bool{"slow": slow, "errors": failed, "failover": failover} {
				if !set {
					continue
				}
				if req.Filter != "" {
					return problem.New(problem.Usage, "--slow, --errors and --failover exclude each other")
				}
				req.Filter = word
			}
			return traceRun(cmd.Context(), e, req)
		}}
	c.Flags().BoolVar(&slow, "slow", false, "the slowest")
	c.Flags().BoolVar(&failed, "errors", false, "those with an error")
	c.Flags().BoolVar(&failover, "failover", false, "those that failed over or were retried")
	c.Flags().Uint32Var(&limit, "limit", 10, "how many traces at most")
	return c
}

func traceRun(ctx context.Context, e *env, req *controlpb.TraceRequest) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	r, err := op.Trace(ctx, req)
	if err != nil {
		return e.callError(err)
	}
	if req.Id != "" && len(r.Traces) == 0 {
		return problem.New(problem.TraceNotFound, "no member keeps a trace that begins with %s", req.Id)
	}
	switch {
	case e.jq != "" || e.output == "json" || e.output == "yaml" || e.output == "jsonl":
		err = e.print("TraceList", r, nil)
	case e.output == "waterfall" || req.Id != "":
		for i, t := range r.Traces {
			if i > 0 {
				fmt.Fprintln(e.out)
			}
			fmt.Fprint(e.out, waterfall(t, 30))
		}
	default:
		t := &table{head: []string{"TRACE", "START", "DURATION", "REQUEST", "PATH", "NOTE"}}
		for _, tr := range r.Traces {
			h := summarize(tr)
			t.add(tr.Id, short(tr.Id), time.Unix(0, h.start).UTC().Format("15:04:05.000"), ms(h.end-h.start)+"ms", h.request, h.path, h.note)
		}
		err = e.print("TraceList", r, t)
	}
	if err != nil {
		return err
	}
	return e.partial(r.Unreachable)
}

func short(id string) string {
	if len(id) > 16 {
		return id[:16]
	}
	return id
}

func ms(nanos int64) string { return strconv.FormatInt((nanos+500_000)/1_000_000, 10) }
