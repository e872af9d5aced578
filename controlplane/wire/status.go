// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
)

// grpcCodes maps the exit code of a problem to the gRPC code that generic clients understand best.
var grpcCodes = map[int]codes.Code{
	problem.ExitUsage:       codes.InvalidArgument,
	problem.ExitNotReady:    codes.FailedPrecondition,
	problem.ExitAuth:        codes.PermissionDenied,
	problem.ExitNotFound:    codes.NotFound,
	problem.ExitCheckFailed: codes.FailedPrecondition,
	problem.ExitWarnings:    codes.FailedPrecondition,
	problem.ExitInvalid:     codes.InvalidArgument,
	problem.ExitDiffers:     codes.FailedPrecondition,
	problem.ExitPartial:     codes.Unavailable,
}

// ToStatus returns err as a gRPC status error. A *problem.Error travels whole, as a controlpb.Problem detail; an error
// that is a status already, or the end of a context, keeps its code; anything else becomes STR-9001. nil stays nil.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	var p *problem.Error
	if !errors.As(err, &p) {
		if s, ok := status.FromError(err); ok {
			return s.Err()
		}
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			return status.FromContextError(err).Err()
		}
		p = problem.From(err)
	}
	code := codes.Unknown
	switch c, ok := grpcCodes[p.Exit()]; {
	case p.Retryable:
		code = codes.Unavailable
	case ok:
		code = c
	case p.Code == problem.Internal:
		code = codes.Internal
	}
	s := status.New(code, p.Error())
	if d, derr := s.WithDetails(ProblemToProto(p)); derr == nil {
		s = d
	}
	return s.Err()
}

// FromStatus is the inverse: it returns the *problem.Error that travelled with err. A status without one becomes
// NoControlPlane when it says that nobody answers, AccessDenied when it says so, and STR-9001 otherwise; the ends of a
// context stay what they are. Errors that are no status are returned unchanged.
func FromStatus(err error) error {
	if err == nil {
		return nil
	}
	s, ok := status.FromError(err)
	if !ok {
		return err
	}
	for _, d := range s.Details() {
		if p, ok := d.(*controlpb.Problem); ok {
			return ProblemFromProto(p).Wrap(err)
		}
	}
	switch s.Code() {
	case codes.Canceled:
		return errors.Join(context.Canceled, err)
	case codes.DeadlineExceeded:
		return errors.Join(context.DeadlineExceeded, err)
	case codes.Unavailable:
		return problem.New(problem.NoControlPlane, "%s", s.Message()).Retry().Wrap(err)
	case codes.PermissionDenied, codes.Unauthenticated:
		return problem.New(problem.AccessDenied, "%s", s.Message()).Wrap(err)
	default:
		return problem.New(problem.Internal, "%s: %s", s.Code(), s.Message()).Wrap(err)
	}
}

// ProblemToProto returns p as a message. The why and the fixes of the registry are filled in, so that a reader with
// another version of the registry shows the same text.
func ProblemToProto(p *problem.Error) *controlpb.Problem {
	if p == nil {
		return nil
	}
	return &controlpb.Problem{
		Code: string(p.Code), Title: p.Title(), What: p.What, Why: p.Reason(), Fix: p.Fixes(), State: p.State,
		Retryable: p.Retryable, Cluster: p.Cluster, Object: p.Object, Field: p.Field, Exit: int32(p.Exit()),
	}
}

// ProblemFromProto is the inverse of ProblemToProto. nil stays nil.
func ProblemFromProto(m *controlpb.Problem) *problem.Error {
	if m == nil {
		return nil
	}
	e := &problem.Error{
		Code: problem.Code(m.GetCode()), Headline: m.GetTitle(), What: m.GetWhat(), Why: m.GetWhy(), Fix: m.GetFix(),
		State: m.GetState(), Retryable: m.GetRetryable(), Cluster: m.GetCluster(), Object: m.GetObject(), Field: m.GetField(),
	}
	if e.Code == "" {
		e.Code = problem.Internal
	}
	return e
}
