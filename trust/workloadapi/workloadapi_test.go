// SPDX-License-Identifier: Apache-2.0

package workloadapi_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/workloadapi"
)

// wire is the API without go-spiffe's client.
func (r *rig) wire() workload.SpiffeWorkloadAPIClient {
	r.t.Helper()
	c, err := grpc.NewClient("unix:"+r.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(r.t, err)
	r.t.Cleanup(func() { _ = c.Close() })
	return workload.NewSpiffeWorkloadAPIClient(c)
}

func secured(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), within)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

func wantCode(t *testing.T, what string, err error, want codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != want {
		t.Errorf("%s: %v, want %s", what, err, want)
	}
	for _, w := range words {
		if !strings.Contains(status.Convert(err).Message(), w) {
			t.Errorf("%s: the message does not say %q: %v", what, w, err)
		}
	}
}

// calls are all RPCs, each as far as its first answer.
func calls(ctx context.Context, c workload.SpiffeWorkloadAPIClient) map[string]error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	out := map[string]error{}
	x, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err == nil {
		_, err = x.Recv()
	}
	out["FetchX509SVID"] = err
	xb, err := c.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	if err == nil {
		_, err = xb.Recv()
	}
	out["FetchX509Bundles"] = err
	jb, err := c.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
	if err == nil {
		_, err = jb.Recv()
	}
	out["FetchJWTBundles"] = err
	_, out["FetchJWTSVID"] = c.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
	_, out["ValidateJWTSVID"] = c.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "x"})
	return out
}

func TestSecurityHeader(t *testing.T) {
	r := serve(t, newAuthority(t, "us-east.acme.test"), "web", nil, self())
	c := r.wire()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	for name, ctx := range map[string]context.Context{
		"none": ctx, "another value": metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "1"),
		"upper case": metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "TRUE"),
		"twice":      metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true", "workload.spiffe.io", "true"),
	} {
		for method, err := range calls(ctx, c) {
			wantCode(t, name+": "+method, err, codes.InvalidArgument, "workload.spiffe.io")
		}
	}
	for method, err := range calls(secured(t), c) {
		if want := map[bool]codes.Code{true: codes.InvalidArgument, false: codes.OK}[method == "ValidateJWTSVID"]; status.Code(err) != want {
			t.Errorf("%s: %v", method, err)
		}
	}
	wit, err := c.FetchWITSVID(secured(t), &workload.WITSVIDRequest{})
	must(t, err)
	_, err = wit.Recv()
	wantCode(t, "WIT", err, codes.Unimplemented)
}

func TestNobodyByDefault(t *testing.T) {
	r := serve(t, newAuthority(t, "us-east.acme.test"), "web", nil)
	c := r.wire()
	refused := func(what string, words ...string) {
		t.Helper()
		for method, err := range calls(secured(t), c) {
			wantCode(t, what+": "+method, err, codes.PermissionDenied, append(words, fmt.Sprintf("uid %d ", os.Getuid()))...)
		}
	}
	refused("no selector", "no process is allowed yet")
	r.server.SetAccess(workloadapi.Access{Proxy: "shop/web", Selectors: []workloadapi.Selector{self()}})
	refused("no workload", "stands for no workload")
	r.server.SetAccess(workloadapi.Access{ID: r.id, Proxy: "shop/web", Selectors: []workloadapi.Selector{self()}, Withdrawn: "stolen"})
	refused("withdrawn", "was withdrawn: stolen")
	if issued, tokens := r.ca.count(); issued+tokens > 0 {
		t.Errorf("%d identities and %d tokens for nobody", issued, tokens)
	}
	if lines := r.log.all(); len(lines) != 1 {
		t.Errorf("%d lines for 15 refusals of one uid within a minute: %q", len(lines), lines)
	}
	if n := r.refusals("no_selector"); n != 5 {
		t.Errorf("%d refusals counted", n)
	}
}

// TestBeforeConfiguration: nobody is refused before the first configuration, and nobody served.
func TestBeforeConfiguration(t *testing.T) {
	ca := newAuthority(t, "us-east.acme.test")
	source := trust.NewSource(trust.SourceConfig{})
	r := &rig{t: t, ca: ca, source: source, log: &logbook{}, refused: map[string]int{}}
	r.id = must2(spiffeid.Workload(ca.td, "shop", "web"))
	r.trusts(ca)
	var err error
	r.server, err = workloadapi.New(workloadapi.Config{Source: source, Issuer: r, FirstWait: 700 * time.Millisecond})
	must(t, err)
	r.socket = filepath.Join(t.TempDir(), "s")
	l, err := workloadapi.Listen(r.socket, nil)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.server.Run(ctx, l) }()
	defer func() { cancel(); must(t, <-done) }()
	for method, err := range calls(secured(t), r.wire()) {
		wantCode(t, method, err, codes.Unavailable, "no configuration yet")
	}
	stream, err := r.wire().FetchX509SVID(secured(t), &workload.X509SVIDRequest{})
	must(t, err)
	r.allow(self())
	_, err = stream.Recv()
	must(t, err)
}

func must2[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// streams opens every stream and waits for its first answer; the functions wait for the next one.
func streams(t *testing.T, r *rig) map[string]func() error {
	t.Helper()
	c, ctx := r.wire(), secured(t)
	x, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	must(t, err)
	xb, err := c.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	must(t, err)
	jb, err := c.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
	must(t, err)
	out := map[string]func() error{
		"FetchX509SVID":    func() error { _, err := x.Recv(); return err },
		"FetchX509Bundles": func() error { _, err := xb.Recv(); return err },
		"FetchJWTBundles":  func() error { _, err := jb.Recv(); return err },
	}
	for name, next := range out {
		if err := next(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	return out
}

// ends waits until each stream has ended, at most five seconds.
func ends(t *testing.T, what string, list map[string]func() error, want codes.Code, words ...string) {
	t.Helper()
	began := time.Now()
	for name, next := range list {
		var err error
		for err == nil {
			err = next()
		}
		wantCode(t, what+": "+name, err, want, words...)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("%s: ended after %v", what, d)
	}
}

// TestWithdrawalEndsStreams: a selector that is removed, an identity that is withdrawn and an end of the server end what is open.
func TestWithdrawalEndsStreams(t *testing.T) {
	uid := uint32(os.Getuid())
	other := uid + 1
	for name, c := range map[string]struct {
		change func(*rig)
		want   codes.Code
		words  string
	}{
		"selector removed":  {func(r *rig) { r.allow() }, codes.PermissionDenied, "no process is allowed"},
		"selector replaced": {func(r *rig) { r.allow(workloadapi.Selector{UID: &other}) }, codes.PermissionDenied, "no selector matches"},
		"field added":       {func(r *rig) { r.allow(workloadapi.Selector{UID: &uid, Path: "/usr/bin/other"}) }, codes.PermissionDenied, "no selector matches"},
		"workload removed":  {func(r *rig) { r.server.SetAccess(workloadapi.Access{Proxy: "shop/web"}) }, codes.PermissionDenied, "no workload"},
		"identity withdrawn": {func(r *rig) {
			r.server.SetAccess(workloadapi.Access{ID: r.id, Proxy: "shop/web", Selectors: []workloadapi.Selector{self()}, Withdrawn: "stolen"})
		}, codes.PermissionDenied, "stolen"},
		"server ends": {func(r *rig) { r.stop() }, codes.Unavailable, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := serve(t, newAuthority(t, "us-east.acme.test"), "web", nil, self())
			list := streams(t, r)
			c.change(r)
			ends(t, name, list, c.want, c.words)
			if name == "server ends" {
				return
			}
			r.allow(self())
			_ = streams(t, r) // and back again
		})
	}
}

// TestCertificateWithdrawn: an identity that was admitted again is given out under a new certificate only.
func TestCertificateWithdrawn(t *testing.T) {
	r := serve(t, newAuthority(t, "us-east.acme.test"), "web", nil, self())
	stream, err := r.wire().FetchX509SVID(secured(t), &workload.X509SVIDRequest{})
	must(t, err)
	first, err := stream.Recv()
	must(t, err)
	r.deny(r.id, time.Now().Add(time.Hour))
	_, err = stream.Recv()
	wantCode(t, "denied", err, codes.PermissionDenied, "withdrawn")
	r.deny(r.id, time.Time{})
	eventually(t, "admitted again", func() bool {
		stream, err := r.wire().FetchX509SVID(secured(t), &workload.X509SVIDRequest{})
		must(t, err)
		m, err := stream.Recv()
		return err == nil && string(m.Svids[0].X509Svid) != string(first.Svids[0].X509Svid)
	})
}

// TestOutage: while the control plane is away the identity is served until its end, then nobody gets anything; and again once it is back.
func TestOutage(t *testing.T) {
	ca := newAuthority(t, "us-east.acme.test")
	ca.ttl = 3 * time.Second
	r := serve(t, ca, "web", func(c *workloadapi.Config) { c.FirstWait = 200 * time.Millisecond; c.RenewEvery = time.Second }, self())
	stream, err := r.wire().FetchX509SVID(secured(t), &workload.X509SVIDRequest{})
	must(t, err)
	_, err = stream.Recv()
	must(t, err)
	ca.set(func() { ca.away = errAway })
	notAfter := time.Now().Add(ca.ttl)
	for err == nil {
		_, err = stream.Recv()
	}
	wantCode(t, "at the end", err, codes.Unavailable, "away")
	if early := time.Until(notAfter); early > 2*time.Second {
		t.Errorf("ended %v before NotAfter", early)
	}
	for method, err := range calls(secured(t), r.wire()) {
		switch method {
		case "FetchX509SVID", "FetchJWTSVID":
			wantCode(t, method, err, codes.Unavailable, "away")
		case "FetchX509Bundles", "FetchJWTBundles":
			wantCode(t, method, err, codes.OK)
		}
	}
	ca.set(func() { ca.away = nil })
	eventually(t, "served again", func() bool { return calls(secured(t), r.wire())["FetchX509SVID"] == nil })
}

// TestLazy: nothing is asked for before somebody who is allowed wants it, and never the key of the process itself.
func TestLazy(t *testing.T) {
	ca := newAuthority(t, "us-east.acme.test")
	r := serve(t, ca, "web", nil, self())
	own, err := ca.identity(r.id)
	must(t, err)
	r.source.SetIdentity(own)
	c := r.wire()
	bundles, err := c.FetchX509Bundles(secured(t), &workload.X509BundlesRequest{})
	must(t, err)
	_, err = bundles.Recv()
	must(t, err)
	if issued, _ := ca.count(); issued != 1 {
		t.Errorf("%d identities issued before one was asked for", issued-1)
	}
	stream, err := c.FetchX509SVID(secured(t), &workload.X509SVIDRequest{})
	must(t, err)
	m, err := stream.Recv()
	must(t, err)
	if len(m.Svids) != 1 || strings.HasPrefix(string(m.Svids[0].X509Svid), string(own.Chain[0].Raw)) {
		t.Error("the process's own certificate is handed out")
	}
	for range 3 { // a change that says nothing new is not sent; one that does is, once
		r.trusts(ca)
	}
	second := newAuthority(t, "eu-west.acme.test")
	r.trusts(ca, second)
	next, err := stream.Recv()
	must(t, err)
	if len(next.FederatedBundles) != 1 || next.FederatedBundles["spiffe://eu-west.acme.test"] == nil {
		t.Errorf("federated with %d", len(next.FederatedBundles))
	}
}

func TestNoKeysForTokens(t *testing.T) {
	ca := newAuthority(t, "us-east.acme.test")
	ca.jwt = nil
	r := serve(t, ca, "web", nil, self())
	stream, err := r.wire().FetchJWTBundles(secured(t), &workload.JWTBundlesRequest{})
	must(t, err)
	_, err = stream.Recv()
	wantCode(t, "no keys", err, codes.PermissionDenied)
	r.source.SetBundles(nil)
	xs, err := r.wire().FetchX509Bundles(secured(t), &workload.X509BundlesRequest{})
	must(t, err)
	_, err = xs.Recv()
	wantCode(t, "no roots", err, codes.PermissionDenied)
}

func TestJWTRequests(t *testing.T) {
	ca := newAuthority(t, "us-east.acme.test")
	r := serve(t, ca, "web", nil, self())
	c := r.wire()
	long := strings.Repeat("a", 2049)
	for name, audience := range map[string][]string{
		"none": nil, "empty": {""}, "seventeen": strings.Split(strings.Repeat("a,", 16)+"a", ","), "long": {long},
		"long together": {long[:2048], long[:2048], long[:2048], long[:2048], "a"},
	} {
		_, err := c.FetchJWTSVID(secured(t), &workload.JWTSVIDRequest{Audience: audience})
		wantCode(t, name, err, codes.InvalidArgument)
	}
	_, err := c.FetchJWTSVID(secured(t), &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://us-east.acme.test/ns/shop/sa/admin"})
	wantCode(t, "another identity", err, codes.PermissionDenied, r.id.String())
	if _, tokens := ca.count(); tokens != 0 {
		t.Errorf("%d tokens were asked for", tokens)
	}
	m, err := c.FetchJWTSVID(secured(t), &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: r.id.String()})
	must(t, err)
	token := m.Svids[0].Svid
	v, err := c.ValidateJWTSVID(secured(t), &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: token})
	must(t, err)
	if v.SpiffeId != r.id.String() || v.Claims.AsMap()["sub"] != r.id.String() {
		t.Errorf("%v", v)
	}
	for name, q := range map[string]*workload.ValidateJWTSVIDRequest{
		"no audience": {Svid: token}, "no token": {Audience: "a"}, "another audience": {Audience: "b", Svid: token},
		"17 KiB": {Audience: "a", Svid: token + strings.Repeat("A", 16<<10)}, "long audience": {Audience: long, Svid: token},
	} {
		_, err := c.ValidateJWTSVID(secured(t), q)
		wantCode(t, name, err, codes.InvalidArgument)
		if strings.Contains(status.Convert(err).Message(), token[len(token)-20:]) {
			t.Errorf("%s: the message repeats the token", name)
		}
	}
	_, err = c.ValidateJWTSVID(secured(t), &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: strings.Repeat("A", 33<<10)})
	wantCode(t, "33 KiB", err, codes.ResourceExhausted)
	// A token that was issued before its identity was withdrawn and admitted again stays out.
	r.deny(r.id, time.Now().Add(time.Minute))
	_, err = c.ValidateJWTSVID(secured(t), &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: token})
	wantCode(t, "withdrawn", err, codes.InvalidArgument, "withdrawn")
}

// TestBounds: calls and connections of one uid, and connections that say nothing.
func TestBounds(t *testing.T) {
	r := serve(t, newAuthority(t, "us-east.acme.test"), "web", func(c *workloadapi.Config) { c.MaxCalls = 4 }, self())
	c := r.wire()
	ctx, cancel := context.WithCancel(secured(t))
	for range 4 {
		s, err := c.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
		must(t, err)
		_, err = s.Recv()
		must(t, err)
	}
	s, err := c.FetchX509Bundles(secured(t), &workload.X509BundlesRequest{})
	must(t, err)
	_, err = s.Recv()
	wantCode(t, "fifth call", err, codes.ResourceExhausted, fmt.Sprintf("uid %d", os.Getuid()))
	cancel()
	eventually(t, "free again", func() bool { return calls(secured(t), c)["FetchX509Bundles"] == nil })

	var silent []net.Conn
	for range 200 {
		c, err := net.Dial("unix", r.socket)
		must(t, err)
		defer c.Close()
		silent = append(silent, c)
	}
	began, cut := time.Now(), 0
	for _, c := range silent {
		must(t, c.SetReadDeadline(began.Add(6*time.Second)))
		buf := make([]byte, 1<<10)
		for err = nil; err == nil; {
			_, err = c.Read(buf)
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			cut++
		}
	}
	if cut != len(silent) {
		t.Errorf("%d of %d silent connections are open after 6 s", len(silent)-cut, len(silent))
	}
	eventually(t, "served afterwards", func() bool { return calls(secured(t), r.wire())["FetchX509Bundles"] == nil })
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "api.sock")
	l, err := workloadapi.Listen(path, nil)
	must(t, err)
	info, err := os.Stat(path)
	must(t, err)
	if info.Mode().Perm() != 0o666 {
		t.Errorf("mode %v", info.Mode())
	}
	if _, err := workloadapi.Listen(path, nil); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("a second listener: %v", err)
	}
	must(t, l.Close())
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Error("the socket is left")
	}

	// A socket that a dead process left is replaced; the one that took its place is not removed.
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	stale.SetUnlinkOnClose(false)
	must(t, stale.Close())
	l, err = workloadapi.Listen(path, nil)
	must(t, err)
	must(t, os.Remove(path))
	other, err := workloadapi.Listen(path, nil)
	must(t, err)
	must(t, l.Close())
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("another's socket was removed: %v", err)
	}
	must(t, other.Close())

	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, []byte("x"), 0o600))
	open := filepath.Join(dir, "open")
	must(t, os.Mkdir(open, 0o700))
	must(t, os.Chmod(open, 0o777))
	for name, path := range map[string]string{
		"a file": file, "a directory that everybody may write": filepath.Join(open, "s"), "a path too long": filepath.Join(dir, strings.Repeat("a", 120)),
		"below a file": filepath.Join(file, "s"),
	} {
		if l, err := workloadapi.Listen(path, nil); err == nil {
			t.Errorf("%s was accepted", name)
			_ = l.Close()
		}
	}
	must(t, os.Chmod(open, 0o777|os.ModeSticky))
	l, err = workloadapi.Listen(filepath.Join(open, "s"), nil)
	must(t, err)
	must(t, l.Close())
	if data, err := os.ReadFile(file); err != nil || string(data) != "x" {
		t.Error("the file was touched")
	}
}

func TestConfig(t *testing.T) {
	if _, err := workloadapi.New(workloadapi.Config{}); err == nil {
		t.Error("a server without a source")
	}
	if _, err := workloadapi.New(workloadapi.Config{Source: trust.NewSource(trust.SourceConfig{})}); err == nil {
		t.Error("a server without an issuer")
	}
}
