// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/jwtsvid"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestIssueJWT(t *testing.T) {
	d := openDoor(t, nil)
	web := d.workload("web")
	client := controlpb.NewIdentityClient(d.dial(d.source(web)))
	audience := []string{"spiffe://eu-west.acme/ns/shop/sa/checkout", "https://bank.test"}
	r, err := client.IssueJWT(t.Context(), &controlpb.IssueJWTRequest{Audience: audience})
	must(t, err)
	bundles, err := trust.NewBundles(d.ca.Bundle())
	must(t, err)
	for _, a := range audience {
		c, err := jwtsvid.Verify(r.GetToken(), a, bundles, time.Now())
		must(t, err)
		if c.ID != web || !slices.Equal(c.Audience, audience) || c.NotAfter.Unix() != r.GetNotAfterUnix() || c.Issued.IsZero() {
			t.Errorf("%+v, not after %d", c, r.GetNotAfterUnix())
		}
	}
	for name, audience := range map[string][]string{
		"none": nil, "seventeen": slices.Repeat([]string{"a"}, 17), "empty": {"a", ""}, "long": {strings.Repeat("a", 2049)},
		"long together": slices.Repeat([]string{strings.Repeat("a", 2048)}, 5), "control character": {"a\nb"},
		"long as JSON": {strings.Repeat("<", 2048)},
	} {
		if _, err := client.IssueJWT(t.Context(), &controlpb.IssueJWTRequest{Audience: audience}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The largest request that is accepted makes a token that verifies.
func TestIssueJWTOfManyAudiences(t *testing.T) {
	d := openDoor(t, nil)
	client := controlpb.NewIdentityClient(d.dial(d.source(d.workload(strings.Repeat("w", 63)))))
	audience := []string{strings.Repeat("<", 1024)} // as long as JSON can make it
	audience = append(audience, strings.Repeat("a", 2000))
	r, err := client.IssueJWT(t.Context(), &controlpb.IssueJWTRequest{Audience: audience})
	must(t, err)
	bundles, err := trust.NewBundles(d.ca.Bundle())
	must(t, err)
	if _, err := jwtsvid.Verify(r.GetToken(), audience[1], bundles, time.Now()); err != nil {
		t.Errorf("a token of %d bytes: %v", len(r.GetToken()), err)
	}
}

func TestIssueJWTRefuses(t *testing.T) {
	d := openDoor(t, nil)
	q := &controlpb.IssueJWTRequest{Audience: []string{"a"}}
	gateway, err := spiffeid.Gateway(d.td, "gw")
	must(t, err)
	if _, err := controlpb.NewIdentityClient(d.dial(d.source(gateway))).IssueJWT(t.Context(), q); err == nil {
		t.Error("a gateway got a token")
	}
	web := d.workload("web")
	client := controlpb.NewIdentityClient(d.dial(d.source(web)))
	if _, err := client.IssueJWT(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	must(t, d.denied.Add(web, "stolen"))
	if r, err := client.IssueJWT(t.Context(), q); err == nil {
		t.Errorf("a withdrawn identity got %s", r.GetToken())
	}
}

func TestIssueJWTRate(t *testing.T) {
	d := openDoor(t, nil)
	client := controlpb.NewIdentityClient(d.dial(d.source(d.workload("web"))))
	other := controlpb.NewIdentityClient(d.dial(d.source(d.workload("other"))))
	q := &controlpb.IssueJWTRequest{Audience: []string{"a"}}
	began, issued := time.Now(), 0
	for range 400 {
		_, err := client.IssueJWT(t.Context(), q)
		switch status.Code(err) {
		case codes.OK:
			issued++
		case codes.ResourceExhausted:
		default:
			t.Fatal(err)
		}
	}
	if most := 100 + int(time.Since(began).Seconds()*20) + 1; issued > most || issued == 400 {
		t.Errorf("%d tokens issued in %v; at most %d", issued, time.Since(began), most)
	}
	if _, err := other.IssueJWT(t.Context(), q); err != nil {
		t.Errorf("another identity pays for it: %v", err)
	}
}
