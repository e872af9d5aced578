// SPDX-License-Identifier: Apache-2.0

package proxyclient_test

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/proxyclient"
)

// TestHerd is F21 in small: all proxies return after a restart of their control plane, none is without configuration meanwhile,
// and what it costs is measured. The figure holds both ends of each connection: certificates, handshakes and streams.
func TestHerd(t *testing.T) {
	const proxies = 20
	c := newCluster(t)
	c.serve()
	publish := func() {
		must(t, c.discovery.Replace(controlpb.TypeBundle, nil))
		must(t, c.discovery.Replace(controlpb.TypeService, map[string]proto.Message{"shop/checkout": service("checkout", 1)}))
	}
	publish()
	clients := make([]*proxyclient.Client, proxies)
	for i := range clients {
		name := fmt.Sprintf("shop/web-%d", i)
		cfg := c.config(proxyclient.Sidecar, name, c.sidecarToken(name, "web"), newDir(t))
		cfg.SnapshotEvery = time.Second
		clients[i], _ = open(t, cfg)
		clients[i].Subscribe(controlpb.TypeService, "shop/checkout")
	}
	synced := func() bool {
		acked, subscribed, _ := c.discovery.Acked(controlpb.TypeService, "shop/checkout")
		return acked == proxies && subscribed == proxies
	}
	eventually(t, "all synced", synced)
	c.stop()
	for _, client := range clients {
		eventually(t, "noticed", func() bool { return !client.Status().Connected })
	}
	c.newDiscovery()
	publish()
	before, begin := cpu(t), time.Now()
	c.serve()
	eventually(t, "all back", func() bool {
		for _, client := range clients {
			if revision(t, client, "shop/checkout") != 1 {
				t.Fatal("a proxy is without configuration")
			}
		}
		return synced()
	})
	t.Logf("%d proxies back after %v, %v CPU each", proxies, time.Since(begin).Round(time.Millisecond), (cpu(t)-before)/proxies)
}

func cpu(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	must(t, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
