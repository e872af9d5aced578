// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
)

// Promise P1. Requests and answers that carry canaries flow from us-east to eu-west, through both sidecars and both gateways, all
// the while the memory of every process and every packet is searched for them.
func TestPayloadIsReadableOnlyAtItsEnds(t *testing.T) {
	for _, transport := range []string{"quic", "tcp"} {
		t.Run(transport, func(t *testing.T) { payloadIsReadableOnlyAtItsEnds(t, transport == "tcp") })
	}
}

func newCanary() string {
	b := make([]byte, 24)
	_, _ = rand.Read(b)
	return "canary-" + hex.EncodeToString(b)
}

func payloadIsReadableOnlyAtItsEnds(t *testing.T, noUDP bool) {
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west"}, NoUDP: noUDP})
	f.Up("shop")
	us, eu := f.Clusters["us-east"], f.Clusters["eu-west"]

	ask, answer := newCanary(), newCanary() // one in requests, one in answers
	app := newBackend(t, "site")
	app.handle = func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || r.Method == http.MethodPost && (!bytes.Contains(body, []byte(ask)) || !strings.Contains(r.URL.Path+r.Header.Get("X-Canary"), ask)) {
			http.Error(w, "the canary did not arrive", http.StatusBadRequest)
			return
		}
		w.Header().Set("X-Canary", answer)
		_, _ = io.WriteString(w, strings.Repeat(answer+" ", 1000))
	}
	callee := eu.StartSidecar("site", eu.Register(harness.Workload{Name: "site-1", Service: "site", Address: app.addr, Token: true}), nil)
	eu.CLI("export", "shop/site", "--to", "us-east")
	web := us.StartSidecar("web", us.Register(harness.Workload{Name: "web", Service: "web", Token: true}), []string{"shop/site:http"})

	secrets := [][]byte{[]byte(ask), []byte(answer)}
	net := startCapture(t, secrets...)
	url := "http://" + web.Upstreams[0]
	reaches(t, url+"/", answer)
	served := canaryLoad(t, url, ask, answer)

	type holder struct {
		name string
		pid  int
		ends bool
	}
	holders := []holder{
		{"the sidecar of web", web.PID(), true}, {"the sidecar of site", callee.PID(), true}, {"the gateway of us-east", us.Gateways[0].PID(), false},
		{"the gateway of eu-west", eu.Gateways[0].PID(), false},
	}
	// The control is what every process of the path holds for as long as it lives: the trust domain, in bundles and certificates.
	// (The server name is in a gateway's memory only while a hello is read.)
	control := []byte("spiffe://eu-west.acme")
	for look := range 3 {
		before := served.Load()
		harness.Eventually(t, 20*time.Second, "more requests to flow", func() error {
			if n := served.Load() - before; n < 50 {
				return fmt.Errorf("%d so far", n)
			}
			return nil
		})
		for _, h := range holders {
			held, scanned := memoryHolds(t, h.pid, append(secrets, control)...)
			switch {
			case !held[2]:
				t.Errorf("control: the memory of %s (%d MiB searched) does not hold the callee's trust domain", h.name, scanned>>20)
			case h.ends && !(held[0] && held[1]):
				t.Errorf("control: the memory of %s (%d MiB searched) does not hold the canaries: %v", h.name, scanned>>20, held[:2])
			case !h.ends && (held[0] || held[1]):
				t.Errorf("the memory of %s holds a canary: %v", h.name, held[:2])
			}
			if look == 0 {
				t.Logf("%s: %d MiB searched, request and answer canary: %v", h.name, scanned>>20, held[:2])
			}
		}
	}
	if net == nil {
		t.Log("not searched: the packets, because capturing them needs root")
		return
	}
	net.close(t)
	allowed := map[string]string{web.Upstreams[0]: "web and its sidecar", app.addr: "site and its sidecar"}
	captured := map[string]int{}
	for pair, n := range net.seen {
		fields := strings.Fields(pair)
		who := ""
		for _, end := range fields[1:] {
			if w := allowed[end]; w != "" && fields[0] == "tcp" {
				who = w
			}
		}
		if who == "" {
			t.Errorf("%d packets with a canary: %s", n, pair)
		}
		captured[who] += n
	}
	for _, who := range allowed {
		if captured[who] == 0 {
			t.Errorf("control: no packet with a canary between %s", who)
		}
	}
	t.Logf("%d requests; %d packets searched; with a canary: %v", served.Load(), net.packets, captured)
}

// canaryLoad posts requests that carry the canary in path, header and body, one after another, until the test ends.
func canaryLoad(t *testing.T, url, ask, answer string) *atomic.Int64 {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	t.Cleanup(func() { cancel(); <-done })
	var served atomic.Int64
	go func() {
		defer close(done)
		client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{}}
		defer client.CloseIdleConnections()
		body := strings.Repeat(ask+" ", 1000)
		for ctx.Err() == nil {
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/"+ask, strings.NewReader(body))
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("X-Canary", ask)
			resp, err := client.Do(req)
			if err != nil {
				if ctx.Err() == nil {
					t.Errorf("request %d: %v", served.Load(), err)
				}
				return
			}
			got, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if ctx.Err() == nil && (err != nil || resp.StatusCode != 200 || !bytes.Contains(got, []byte(answer))) {
				t.Errorf("request %d: %d %.100q %v", served.Load(), resp.StatusCode, got, err)
				return
			}
			served.Add(1)
		}
	}()
	return &served
}
