// SPDX-License-Identifier: Apache-2.0

package http_test

import (
	"io"
	"net"
	nethttp "net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"github.com/strait-mesh/strait/sidecar/http"
)

// gatedConn delivers what it reads when it gets the gate's token.
type gatedConn struct {
	net.Conn
	gate chan struct{}
}

func (g *gatedConn) Read(b []byte) (int, error) {
	n, err := g.Conn.Read(b)
	<-g.gate
	g.gate <- struct{}{}
	return n, err
}

// A connection whose far end has stopped takes nothing new before it is given up, and again as soon as it is heard of.
func TestSilentConnectionTakesNothingNew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		gated := &gatedConn{Conn: far, gate: make(chan struct{}, 1)}
		gated.gate <- struct{}{}
		var served sync.WaitGroup
		served.Go(func() {
			(&http2.Server{}).ServeConn(gated, &http2.ServeConnOpts{Handler: nethttp.HandlerFunc(func(w nethttp.ResponseWriter, _ *nethttp.Request) {
				w.WriteHeader(nethttp.StatusNoContent)
			})})
		})
		defer served.Wait()
		c, err := http.NewClientConn(near, http.ConnConfig{
			Protocol: http.ProtoH2, PingEvery: time.Second, PingTimeout: 5 * time.Second, SuspectAfter: 1700 * time.Millisecond,
		})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		call := func() {
			t.Helper()
			r, err := nethttp.NewRequest(nethttp.MethodGet, "http://callee/", nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := c.RoundTrip(r)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
		}
		call()
		time.Sleep(time.Minute)
		if !c.Ready() {
			t.Fatal("an idle connection whose pings are answered is not ready")
		}
		<-gated.gate
		time.Sleep(3 * time.Second)
		if c.Ready() {
			t.Error("ready although nothing is heard")
		}
		gated.gate <- struct{}{}
		synctest.Wait()
		if !c.Ready() {
			t.Fatal("not ready although the far end is back")
		}
		call()
	})
}
