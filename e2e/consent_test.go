// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/strait-mesh/strait/e2e/harness"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/federation/join"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// attractsNothing: ap-south exports a name that us-east has too; without sameness it gets no call of it, not even when every
// instance elsewhere is gone.
func (w *grantsWorld) attractsNothing() {
	t := w.t
	lure, honest := newBackend(t, "lure"), newBackend(t, "honest")
	w.ap.StartSidecar("popular", w.ap.Register(harness.Workload{Name: "popular-1", Service: "popular", Address: lure.addr, Token: true}), nil)
	w.ap.CLI("export", "shop/popular", "--to", "*")
	w.us.StartSidecar("popular", w.us.Register(harness.Workload{Name: "popular-1", Service: "popular", Address: honest.addr, Token: true}), nil)
	plain, pinned := "http://"+w.web.Upstreams[3]+"/", "http://"+w.web.Upstreams[4]+"/"
	reaches(t, pinned, "lure") // control: it is a member, and the service is reachable by the name that says whose it is
	before := lure.served.Load()
	reaches(t, plain, "honest")
	client := &http.Client{Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	for range 200 {
		if body, code, err := get(t.Context(), client, plain); err != nil || code != 200 || body != "honest" {
			t.Fatalf("plain name: %q %d %v", body, code, err)
		}
	}
	honest.stop()
	harness.Eventually(t, 15*time.Second, "us-east to see that its only instance is gone", func() error {
		body, code, err := get(t.Context(), client, plain)
		if err == nil && code < 500 {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	})
	for range 20 {
		if body, code, err := get(t.Context(), client, plain); err == nil && code < 500 {
			t.Errorf("without any instance of its own: %d %s", code, body)
		}
	}
	if n := lure.served.Load() - before; n != 0 {
		t.Errorf("the peer without sameness attracted %d calls", n)
	}
}

// introductions: a member's word about others takes no name that exists, and grants nothing.
func (w *grantsWorld) introductions() {
	t := w.t
	id, err := w.red.ca.IssueKey(w.red.identity("/strait/controlplane"), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	parse := func(td string) spiffeid.TrustDomain {
		v, err := spiffeid.ParseTrustDomain(td)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	introduce := func(td, cluster string) string {
		in := join.Introduction{
			Federation: "acme", Introducer: w.red.td, Receiver: parse("eu-west.acme"), Subject: parse(td), Cluster: federation.ClusterName(cluster),
			Region: "nowhere", BundleHash: foreignCA(t, td).Bundle().Hash(), TokenID: "0123456789abcdef", Issued: time.Now(), Expires: time.Now().Add(join.IntroductionTTL),
		}
		gw, err := spiffeid.Gateway(in.Subject, "gateway-1")
		if err != nil {
			t.Fatal(err)
		}
		in.Gateways = []join.TokenGateway{{ID: gw, Addresses: []string{"127.0.0.1:9"}}}
		body, err := join.SignIntroduction(in, id)
		if err != nil {
			t.Fatal(err)
		}
		a, err := ask(t.Context(), w.usTunnel, "introduce", body)
		if err != nil {
			t.Fatalf("introduce %s: %v", cluster, err)
		}
		return a.ErrorCode
	}
	before := w.eu.CLI("member", "list", "--no-headers")
	taken := string(problem.NameTaken)
	for _, c := range []struct{ td, cluster string }{
		{"ap-south.acme", "ap-south"},     // a member, under another root
		{"ap-south.evil", "ap-south"},     // a member's name, of another trust domain
		{"ap-south.acme", "new-name"},     // a member's trust domain, under another name
		{"eu-west.acme", "eu-west"},       // the receiver itself
		{"eu-west.evil", "eu-west"},       // its name
		{"us-east.acme", "us-east"},       // the introducer, under another root
		{"x.ap-south.acme", "ap-south-x"}, // a sub-domain of a member's
	} {
		if code := introduce(c.td, c.cluster); code != taken {
			t.Errorf("introduced %s as %s: answer %q, want %s", c.td, c.cluster, code, taken)
		}
	}
	if after := w.eu.CLI("member", "list", "--no-headers"); memberNames(after) != memberNames(before) {
		t.Errorf("refused introductions changed the members:\n%s\n%s", before, after)
	}
	// Control: a name that nobody has waits for an operator, and is trusted with nothing.
	if code := introduce("mars.acme", "mars"); code != "" {
		t.Fatalf("a new name was refused: %s", code)
	}
	if out := w.eu.CLI("member", "list", "--no-headers"); !strings.Contains(lineOf(out, "mars"), "awaiting") {
		t.Errorf("an introduced cluster does not await approval:\n%s", out)
	}
	mars := redTeamOf(t, foreignCA(t, "mars.acme"), w.eu)
	if _, err := mars.tunnel(w.eu, "/strait/gateway/gateway-1"); err == nil {
		t.Error("an introduced cluster got a session before it was approved")
	}
	w.eu.CLI("member", "evict", "mars", "--yes")
	if code := introduce("mars.acme", "mars"); code != taken {
		t.Errorf("an evicted name was introduced again: answer %q", code)
	}
}

func memberNames(list string) string {
	var names []string
	for line := range strings.Lines(list) {
		if fields := strings.Fields(line); len(fields) > 0 {
			names = append(names, fields[0])
		}
	}
	return strings.Join(names, " ")
}

func lineOf(text, prefix string) string {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(strings.TrimLeft(line, "* "), prefix) {
			return line
		}
	}
	return ""
}

// stream is an open response that must end; ended says when it did.
type stream struct {
	ended chan error
	close func()
}

func watchStream(r io.Reader, stop func()) *stream {
	s := &stream{ended: make(chan error, 1), close: stop}
	go func() {
		_, err := io.Copy(io.Discard, r)
		s.ended <- err
	}()
	return s
}

// openStreams opens one endless response through the raw client and one through the sidecars.
func (w *grantsWorld) openStreams() []*stream {
	t := w.t
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	raw := &streamConn{ctx: context.WithoutCancel(ctx), s: w.usTunnel, h: w.header(nil)}
	c, err := w.red.inner(ctx, raw, "/ns/shop/sa/web", siteSNI)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(c, "GET /drip HTTP/1.1\r\nHost: site.shop\r\n\r\n")
	first := make([]byte, 12)
	if _, err := io.ReadFull(c, first); err != nil || string(first) != "HTTP/1.1 200" {
		t.Fatalf("stream over the tunnel: %q, %v", first, err)
	}
	resp, err := http.Get("http://" + w.web.Upstreams[0] + "/drip")
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("stream through the sidecars: %v %v", resp, err)
	}
	return []*stream{watchStream(c, func() { raw.Close() }), watchStream(resp.Body, func() { resp.Body.Close() })}
}

// withdrawn waits until every stream has ended, and checks that it did within 5 s of since and by a reset.
func (w *grantsWorld) withdrawn(what string, since time.Time, streams []*stream) {
	t := w.t
	for i, s := range streams {
		select {
		case err := <-s.ended:
			took := time.Since(since)
			if took > 5*time.Second {
				t.Errorf("%s: open stream %d ended after %v", what, i, took)
			}
			if err == nil {
				t.Errorf("%s: open stream %d ended as if it were complete", what, i)
			}
			t.Logf("%s: open stream %d ended after %v: %v", what, i, took.Round(time.Millisecond), err)
		case <-time.After(15 * time.Second):
			t.Errorf("%s: open stream %d goes on after %v", what, i, time.Since(since))
		}
		s.close()
	}
}

func (w *grantsWorld) unexport() {
	t := w.t
	streams := w.openStreams()
	since := time.Now()
	w.eu.CLI("unexport", "shop/site")
	w.withdrawn("unexport", since, streams)
	hello := clientHello(t, siteSNI)
	if st, _ := probe(t, w.usTunnel, w.header(nil), hello); st.Code != preface.CodeNotExported {
		t.Errorf("after unexport: %s %s", st.Code, st.Reason)
	}
	if body, code, err := get(t.Context(), http.DefaultClient, "http://"+w.web.Upstreams[0]+"/"); err == nil && code == 200 {
		t.Errorf("after unexport the client still got %d %q", code, body)
	}
	if took := time.Since(since); took > 5*time.Second {
		t.Errorf("unexport had full effect only after %v", took)
	}
	w.eu.CLI("export", "shop/site", "--to", "us-east", "--ports", "http")
	reaches(t, "http://"+w.web.Upstreams[0]+"/", "site")
}

func (w *grantsWorld) evict() {
	t := w.t
	streams := w.openStreams()
	since := time.Now()
	w.eu.CLI("member", "evict", "us-east", "--yes")
	w.withdrawn("evict", since, streams)
	select {
	case <-w.usTunnel.Done():
	case <-time.After(5 * time.Second):
		t.Error("the session of an evicted member goes on")
	}
	if took := time.Since(since); took > 5*time.Second {
		t.Errorf("the session of the evicted member ended after %v", took)
	}
	if _, err := w.red.tunnel(w.eu, "/strait/gateway/red2"); err == nil {
		t.Error("an evicted member got a new session")
	}
	if body, code, err := get(t.Context(), http.DefaultClient, "http://"+w.web.Upstreams[0]+"/"); err == nil && code == 200 {
		t.Errorf("after evict the client still got %d %q", code, body)
	}
	// The other member keeps what it has.
	asSouth := w.header(func(h *tunnel.Header) { h.Service, h.Source = "shop/south", "spiffe://ap-south.acme/ns/shop/sa/web" })
	if got, err := w.get(w.south, w.apTunnel, asSouth, "http.south.shop.svc.eu-west.acme", "/"); err != nil || got != "200 south" {
		t.Errorf("after evicting us-east, ap-south gets %q, %v", got, err)
	}
}
