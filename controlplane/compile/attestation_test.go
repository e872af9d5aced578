// SPDX-License-Identifier: Apache-2.0

package compile_test

import (
	"testing"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/compile"
	"github.com/strait-mesh/strait/controlplane/controlpb"
)

func attested(w *api.Workload, list ...api.UnixSelector) *api.Workload {
	w.Spec.Attestation = &api.Attestation{Unix: list}
	return w
}

func number(n int64) *int64 { return &n }

// TestWorkloadAPI: a sidecar learns the selectors of every workload that it stands for and of no other; one that would match everybody,
// or another uid than was written, does not get to it.
func TestWorkloadAPI(t *testing.T) {
	in := shop(t)
	w := in.Objects.Workloads
	attested(w[0], api.UnixSelector{UID: number(1001)}, api.UnixSelector{UID: number(1000), Path: "/usr/bin/web"}, api.UnixSelector{})
	attested(w[1], api.UnixSelector{GID: number(0)}, api.UnixSelector{UID: number(1001)}, api.UnixSelector{UID: number(1 << 32)}, api.UnixSelector{UID: number(-1)})
	in.Objects.Workloads = append(w,
		attested(workload("shop", "other-1", "other", "other", nil), api.UnixSelector{UID: number(7)}),
		attested(workload("shop", "stranger", "stranger", "web", nil), api.UnixSelector{UID: number(8)})) // another service account than the sidecar's
	in.Objects.Sort()
	out := compile.Compile(in)
	self := get[*controlpb.Self](t, out, controlpb.TypeSelf, "shop/web")
	want(t, &controlpb.Self{WorkloadApi: self.WorkloadApi}, `
workload_api: {gid: 0} workload_api: {uid: 1000 path: "/usr/bin/web"} workload_api: {uid: 1001}`)
	other := get[*controlpb.Self](t, out, controlpb.TypeSelf, "shop/other")
	want(t, &controlpb.Self{WorkloadApi: other.WorkloadApi}, `workload_api: {uid: 7}`)
}
