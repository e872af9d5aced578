// SPDX-License-Identifier: Apache-2.0

package wire_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
)

func TestProblemTravelsWhole(t *testing.T) {
	p := problem.New(problem.TokenExpired, "the token ended %s ago", "2m").WithWhy("it lives 15 minutes").WithFix("issue another").WithFix("hurry").
		WithState("nothing changed").WithCluster("eu-west").WithObject("token/abc", "spec.ttl").WithHeadline("too late").Retry()
	err := wire.ToStatus(fmt.Errorf("join: %w", p))
	if status.Code(err) != codes.Unavailable {
		t.Errorf("code %v of something that may be tried again", status.Code(err))
	}
	got := wire.FromStatus(err)
	var back *problem.Error
	if !errors.As(got, &back) {
		t.Fatalf("%T", got)
	}
	if back.Human() != p.Human() || back.Exit() != p.Exit() || back.Cluster != "eu-west" || back.Object != "token/abc" || back.Field != "spec.ttl" || !back.Retryable {
		t.Errorf("got\n%s\nwant\n%s", back.Human(), p.Human())
	}
}

func TestStatusOfOtherErrors(t *testing.T) {
	for _, tt := range []struct {
		err  error
		grpc codes.Code
		back func(error) bool
	}{
		{nil, codes.OK, func(err error) bool { return err == nil }},
		{problem.New(problem.NotFound, "x"), codes.NotFound, is(problem.NotFound)},
		{problem.New(problem.AccessDenied, "x"), codes.PermissionDenied, is(problem.AccessDenied)},
		{problem.New(problem.Usage, "x"), codes.InvalidArgument, is(problem.Usage)},
		{errors.New("disk"), codes.Internal, is(problem.Internal)},
		{context.Canceled, codes.Canceled, func(err error) bool { return errors.Is(err, context.Canceled) }},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), codes.DeadlineExceeded, func(err error) bool { return errors.Is(err, context.DeadlineExceeded) }},
		{status.Error(codes.Unavailable, "away"), codes.Unavailable, is(problem.NoControlPlane)},
		{status.Error(codes.PermissionDenied, "no"), codes.PermissionDenied, is(problem.AccessDenied)},
		{status.Error(codes.ResourceExhausted, "full"), codes.ResourceExhausted, is(problem.Internal)},
	} {
		got := wire.ToStatus(tt.err)
		if status.Code(got) != tt.grpc || !tt.back(wire.FromStatus(got)) {
			t.Errorf("%v: status %v, back %v", tt.err, got, wire.FromStatus(got))
		}
	}
	plain := errors.New("plain")
	if wire.FromStatus(plain) != plain {
		t.Error("an error that is no status was changed")
	}
	if wire.ProblemToProto(nil) != nil || wire.ProblemFromProto(nil) != nil {
		t.Error("nil became something")
	}
}

func is(code problem.Code) func(error) bool {
	return func(err error) bool { return problem.Is(err, code) }
}

func TestPolicyRoundTrip(t *testing.T) {
	p := federation.Policy{
		Name: "shop/checkout", Generation: 4, TripPercent: 40, SpillBelowPercent: 60, MinEndpoints: 2, TunnelLossPercent: 3, ReturnPercent: 80,
		ReturnAfter: -time.Millisecond, Ramp: 5 * time.Second,
		Tiers: []federation.Tier{
			{Clusters: []federation.ClusterName{federation.OwnCluster}},
			{Clusters: []federation.ClusterName{"eu-west", "ap-south"}, Weights: map[federation.ClusterName]uint32{"eu-west": 3}},
			{Any: true, Except: []federation.ClusterName{"us-old"}},
		},
		Passive: federation.PassiveHealth{Consecutive5xx: 9, EjectFor: time.Minute},
		Active:  federation.ActiveHealth{Disabled: true, Every: 2 * time.Second},
	}
	got, err := wire.PolicyFromProto(wire.PolicyToProto(p))
	if err != nil || !reflect.DeepEqual(got, p) {
		t.Errorf("%v\ngot  %+v\nwant %+v", err, got, p)
	}
	got, err = wire.PolicyFromProto(nil)
	if err != nil || !reflect.DeepEqual(got, federation.DefaultPolicy()) {
		t.Errorf("nil: %+v, %v", got, err)
	}
	got, err = wire.PolicyFromProto(&controlpb.FailoverPolicy{})
	if err != nil || !reflect.DeepEqual(got, federation.DefaultPolicy()) {
		t.Errorf("empty: %+v, %v", got, err)
	}
	for name, bad := range map[string]*controlpb.FailoverPolicy{
		"return below trip": {TripPercent: 50, ReturnPercent: 40},
		"bad cluster":       {Tiers: []*controlpb.Tier{{Clusters: []string{"US"}}}},
		"reserved cluster":  {Tiers: []*controlpb.Tier{{Clusters: []string{"any"}}}},
		"named twice":       {Tiers: []*controlpb.Tier{{Clusters: []string{"a"}}, {Clusters: []string{"a"}}}},
		"too many tiers":    {Tiers: make([]*controlpb.Tier, 1000)},
	} {
		if _, err := wire.PolicyFromProto(bad); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if _, err := wire.PolicyFromProto(&controlpb.FailoverPolicy{TripPercent: 50, ReturnPercent: 40}); !errors.Is(err, federation.ErrReturnNotAboveTrip) {
		t.Errorf("the reason is lost: %v", err)
	}
}

func shop() *controlpb.Service {
	counts := func(h, u, n uint32) *controlpb.HealthCounts {
		return &controlpb.HealthCounts{Healthy: h, Unhealthy: u, Unknown: n}
	}
	return &controlpb.Service{
		Namespace: "shop", Name: "checkout",
		Local: []*controlpb.LocalEndpoint{{Health: counts(2, 1, 0)}, {Health: counts(1, 0, 1)}, {Health: counts(9, 0, 0), Draining: true}},
		Remote: []*controlpb.RemoteCluster{
			{
				Cluster: "eu-west", Region: "eu", Same: true, Freshness: controlpb.Freshness_FRESHNESS_STALE, TunnelUp: true, Transport: "quic", RttSeconds: 0.08,
				Zones: map[string]*controlpb.HealthCounts{"a": counts(3, 0, 0), "b": counts(1, 2, 0)},
			},
			{Cluster: "ap-south", Limits: &controlpb.OwnerLimits{Drained: true, DrainReason: "upgrade"}},
		},
		Policy: &controlpb.FailoverPolicy{LocallyDrained: []string{"local", "eu-west"}},
	}
}

func TestInputsFromService(t *testing.T) {
	in, err := wire.InputsFromService(shop(), "shop/web-1", "us-east", federation.Locality{Region: "us", Zone: "a"})
	if err != nil {
		t.Fatal(err)
	}
	want := federation.Inputs{
		Service: federation.ServiceName{Namespace: "shop", Name: "checkout"}, Caller: "shop/web-1", Cluster: "us-east",
		Locality: federation.Locality{Region: "us", Zone: "a"}, Policy: federation.DefaultPolicy(),
		Members: []federation.Member{
			{Cluster: "us-east", Region: "us", Local: true, Same: true, Health: federation.Health{Healthy: 3, Unhealthy: 1, Unknown: 1}, Freshness: federation.Fresh, LocallyDrained: true},
			{
				Cluster: "eu-west", Region: "eu", Same: true, Health: federation.Health{Healthy: 4, Unhealthy: 2}, Freshness: federation.Stale, LocallyDrained: true,
				Tunnel: federation.Tunnel{Known: true, Up: true, Transport: "quic", RTT: 80 * time.Millisecond},
			},
			{Cluster: "ap-south", Drained: true, DrainReason: "upgrade"},
		},
	}
	if !reflect.DeepEqual(in, want) {
		t.Errorf("got  %+v\nwant %+v", in, want)
	}
	alone := &controlpb.Service{Namespace: "shop", Name: "x", Local: []*controlpb.LocalEndpoint{{Draining: true, Health: &controlpb.HealthCounts{Healthy: 1}}}}
	if in, err := wire.InputsFromService(alone, "", "us-east", federation.Locality{}); err != nil || in.Members[0].Health.Healthy != 1 {
		t.Errorf("where all drain, all count: %+v, %v", in, err)
	}
	twice := shop()
	twice.Remote = append(twice.Remote, &controlpb.RemoteCluster{Cluster: "us-east"})
	for name, bad := range map[string]*controlpb.Service{
		"own cluster as a peer": twice, "no name": {}, "bad peer": {Namespace: "a", Name: "b", Remote: []*controlpb.RemoteCluster{{}}},
	} {
		if _, err := wire.InputsFromService(bad, "", "us-east", federation.Locality{}); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

// TestDecisionCanBeComputedAgain is what `why` relies on: what was reported is enough to run Step again and see the same.
func TestDecisionCanBeComputedAgain(t *testing.T) {
	in, err := wire.InputsFromService(shop(), "shop/web-1", "us-east", federation.Locality{Region: "us"})
	if err != nil {
		t.Fatal(err)
	}
	now := time.UnixMilli(1_760_000_000_000)
	before, _ := federation.Step(now.Add(-time.Second), federation.State{}, in)
	st, d := federation.Step(now, before, in)
	m, err := wire.DecisionToProto(now, in, st, d, nil)
	if err != nil {
		t.Fatal(err)
	}
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	m = &controlpb.DecisionReport{}
	if err := proto.Unmarshal(data, m); err != nil {
		t.Fatal(err)
	}
	in2, st2, d2, err := wire.DecisionFromProto(m)
	if err != nil {
		t.Fatal(err)
	}
	if st2.Digest() != st.Digest() || m.GetStateDigest() != st.Digest() || d2.Digest() != d.Digest() {
		t.Errorf("digests differ: %s %s, %s %s", st2.Digest(), st.Digest(), d2.Digest(), d.Digest())
	}
	again, dAgain := federation.Step(now, st2, in2)
	if again.Digest() != st.Digest() || dAgain.Digest() != d.Digest() {
		t.Errorf("computed again: %+v, reported %+v", dAgain, d)
	}
}

// FuzzFromProto: what another process sends is refused or converted, and never crashes.
func FuzzFromProto(f *testing.F) {
	for _, m := range []proto.Message{shop(), &controlpb.Service{}, &controlpb.DecisionReport{StateJson: []byte(`{}`), InputsJson: []byte(`{}`)}} {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		svc := &controlpb.Service{}
		if proto.Unmarshal(data, svc) == nil {
			if in, err := wire.InputsFromService(svc, "shop/web", "us-east", federation.Locality{}); err == nil {
				federation.Step(time.UnixMilli(0), federation.State{}, in)
			}
		}
		d := &controlpb.DecisionReport{}
		if proto.Unmarshal(data, d) == nil {
			_, _, _, _ = wire.DecisionFromProto(d)
		}
		p := &controlpb.Problem{}
		if proto.Unmarshal(data, p) == nil {
			_ = wire.ProblemFromProto(p).Human()
		}
	})
}
