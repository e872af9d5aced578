// SPDX-License-Identifier: Apache-2.0

package strait_test

import (
	"os/exec"
	"strings"
	"testing"
)

// forbidden says what each binary must not link, by import path prefix: protobuf descriptors and API machinery are what makes a
// Go process fat, and the data plane pays for it in every pod.
var forbidden = map[string][]string{
	"./cmd/strait-proxy": {
		"go.etcd.io/", "k8s.io/", "sigs.k8s.io/structured-merge-diff", "github.com/envoyproxy/", "go.opentelemetry.io/otel",
		"github.com/grpc-ecosystem/", "github.com/spf13/cobra", "github.com/google/cel-go", "github.com/itchyny/gojq", "github.com/spiffe/go-spiffe/v2/workloadapi",
		module + "/controlplane/configapi", module + "/controlplane/federate", module + "/controlplane/discovery", module + "/internal/wan", module + "/e2e",
	},
	"./cmd/strait": {
		"github.com/quic-go/", "github.com/hashicorp/", module + "/gateway", module + "/sidecar", module + "/federation/gossip",
		module + "/controlplane/proxyclient", module + "/e2e", "testing",
	},
}

func TestDependencies(t *testing.T) {
	for binary, prefixes := range forbidden {
		out, err := exec.Command("go", "list", "-deps", binary).CombinedOutput()
		if err != nil {
			t.Fatalf("go list -deps %s: %v\n%s", binary, err, out)
		}
		for _, dep := range strings.Fields(string(out)) {
			for _, p := range prefixes {
				if dep == p || strings.HasPrefix(dep, strings.TrimSuffix(p, "/")+"/") || strings.HasSuffix(p, "otel") && strings.HasPrefix(dep, p) {
					t.Errorf("%s links %s", binary, dep)
				}
			}
		}
	}
}
