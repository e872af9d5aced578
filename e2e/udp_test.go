// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
)

// TestNoUDP: with UDP blocked from the start, join and calls work over TCP, and the command line says so.
func TestNoUDP(t *testing.T) {
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west"}, NoUDP: true})
	us, eu := f.Clusters["us-east"], f.Clusters["eu-west"]
	us.Up()
	eu.Up()
	began := time.Now()
	joined := eu.Try("join", f.Token("us-east", "eu-west", "shop"), "--sameness", "shop")
	if joined.Code != 0 || !strings.Contains(joined.Err, "tcp ") || !strings.Contains(joined.Err, "udp does not pass") {
		t.Fatalf("join: exit %d\n%s%s", joined.Code, joined.Out, joined.Err)
	}
	t.Logf("joined after %v:\n%s", time.Since(began).Round(10*time.Millisecond), joined.Err)

	site, shop := newBackend(t, "site@eu-west"), newBackend(t, "shop@us-east")
	back := eu.StartSidecar("site", eu.Register(harness.Workload{Name: "site-1", Service: "site", Address: site.addr, Token: true}), []string{"shop/shop:http"})
	web := us.StartSidecar("shop", us.Register(harness.Workload{Name: "shop-1", Service: "shop", Address: shop.addr, Token: true}), []string{"shop/site:http"})
	eu.CLI("export", "shop/site", "--to", "us-east")
	us.CLI("export", "shop/shop", "--to", "eu-west")
	reaches(t, "http://"+web.Upstreams[0]+"/", site.name)
	reaches(t, "http://"+back.Upstreams[0]+"/", shop.name)

	for _, c := range []*harness.Cluster{us, eu} {
		for name, m := range c.Members() {
			if len(m.Tunnels) == 0 || m.Tunnels[0].State != "up" || m.Tunnels[0].Transport != "tcp" {
				t.Errorf("%s shows the tunnels to %s as %v", c.Name, name, m.Tunnels)
			}
		}
		if list := c.CLI("member", "list"); !strings.Contains(list, "up tcp") {
			t.Errorf("member list:\n%s", list)
		}
	}
	ping := us.CLI("ping", "eu-west", "-c", "2")
	if !strings.Contains(ping, "tcp") || strings.Contains(ping, "quic") || !strings.Contains(ping, "2 probes, 2 answered") {
		t.Errorf("ping:\n%s", ping)
	}
	t.Logf("\n%s\n%s", ping, us.CLI("member", "list"))

	l := startLoad(t, "http://"+web.Upstreams[0]+"/", 50)
	harness.Eventually(t, 20*time.Second, "200 calls", func() error { return enough(l, 200) })
	if n, text := failures(l.since(time.Time{})); n > 0 {
		t.Errorf("%d calls failed:%s", n, text)
	}
}
