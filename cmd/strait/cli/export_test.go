// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
)

// Root is the command tree, writing to out and errw.
func Root(out, errw io.Writer) *cobra.Command {
	root := newRoot(&env{in: strings.NewReader(""), out: out, err: errw, now: time.Now, getenv: func(string) (string, bool) { return "", false }})
	root.SetOut(out)
	root.SetErr(errw)
	return root
}

// Globals are the values of the global flags as a command sees them after vars were applied.
func Globals(vars map[string]string, args ...string) (map[string]string, error) {
	e := &env{in: strings.NewReader(""), out: io.Discard, err: io.Discard, now: time.Now, getenv: func(k string) (string, bool) {
		v, ok := vars[k]
		return v, ok
	}}
	root := newRoot(e)
	got := map[string]string{}
	probe := &cobra.Command{Use: "probe", RunE: func(cmd *cobra.Command, _ []string) error {
		for _, name := range []string{"data-dir", "context", "namespace", "output", "jq", "no-headers", "ascii", "quiet", "verbose", "yes", "wait", "timeout"} {
			got[name] = cmd.Flag(name).Value.String()
		}
		return nil
	}}
	root.AddCommand(probe)
	root.SetArgs(append([]string{"probe"}, args...))
	return got, root.Execute()
}

// Rendering is an environment at a fixed time for the renderers.
type Rendering struct {
	Out, Err bytes.Buffer
	e        *env
}

// NewRendering makes one; format is that of -o.
func NewRendering(now time.Time, format string, ascii bool) *Rendering {
	r := &Rendering{}
	r.e = &env{out: &r.Out, err: &r.Err, now: func() time.Time { return now }, output: format, ascii: ascii, getenv: func(string) (string, bool) { return "", false }}
	return r
}

// Why renders strait why.
func (r *Rendering) Why(w *controlpb.WhyResponse) { r.e.renderWhy(w) }

// Check renders strait check and returns its exit code.
func (r *Rendering) Check(c *controlpb.CheckResponse, failOn string) int {
	err := r.e.reportCheck(c, failOn)
	if code, ok := err.(exitError); ok {
		return int(code)
	}
	return problem.ExitOK
}

// MemberList renders strait member list.
func (r *Rendering) MemberList(l *controlpb.MemberListResponse) error { return r.e.renderMembers(l) }

// Member renders strait member describe.
func (r *Rendering) Member(m *controlpb.Member) error { return r.e.print("Member", m, memberTable(m)) }

// Status renders strait status.
func (r *Rendering) Status(s *controlpb.StatusResponse) error { return r.e.renderStatus(s) }

// Stages renders the progress of a join.
func (r *Rendering) Stages(recv func() (*controlpb.JoinProgress, error)) (*controlpb.JoinProgress, error) {
	return r.e.stages(recv)
}

// Joined renders the result of a join.
func (r *Rendering) Joined(st *controlpb.StatusResponse, last *controlpb.JoinProgress) error {
	return r.e.renderJoined(st, last)
}

// Report renders an error and returns its exit code.
func (r *Rendering) Report(err error) int { return r.e.report(context.Background(), err) }

// Withdrawn renders what came of a withdrawal.
func (r *Rendering) Withdrawn(word string, s *controlpb.WithdrawalStatus) error {
	return r.e.withdrawn(word, s)
}

// Withdrawals renders strait trust withdrawals.
func (r *Rendering) Withdrawals(w *controlpb.WithdrawalsResponse) error {
	return r.e.renderWithdrawals(w)
}

// TrustStatus renders strait trust status.
func (r *Rendering) TrustStatus(s *controlpb.TrustStatusResponse) error {
	return r.e.renderTrustStatus(s)
}

// TrustRoots renders strait trust roots.
func (r *Rendering) TrustRoots(s *controlpb.TrustStatusResponse) error { return r.e.renderRoots(s) }

// LeftBehind renders whom a step of a rotation has left behind.
func (r *Rendering) LeftBehind(action string, s *controlpb.TrustStatusResponse) {
	r.e.leftBehind(action, s)
}
