// SPDX-License-Identifier: Apache-2.0

package http

import (
	nethttp "net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"
)

// TestParseAuthority (T13): one service however its name is spelt, and nothing for what is no name.
func TestParseAuthority(t *testing.T) {
	rows := []struct{ in, host, port string }{
		{"", "", ""}, {"checkout.shop", "checkout.shop", ""}, {"Checkout.SHOP.", "checkout.shop", ""}, {"checkout.shop:8080", "checkout.shop", "8080"},
		{"checkout.shop.:80", "checkout.shop", "80"}, {"[::1]", "::1", ""}, {"[2001:DB8::0:1]:443", "2001:db8::1", "443"}, {"10.0.0.1:1", "10.0.0.1", "1"},
		{"under_score.a", "under_score.a", ""}, {"localhost", "localhost", ""},
	}
	for _, row := range rows {
		if host, port, err := ParseAuthority(row.in); err != nil || host != row.host || port != row.port {
			t.Errorf("%q: %q, %q, %v, want %q, %q", row.in, host, port, err, row.host, row.port)
		}
	}
	for _, bad := range []string{
		".", "..", "a..b", ".a", "a.", "a:", "a:b", "a:0", "a:65536", "a:080808", "a:1:2", "user@a", "a/b", "a b", "a\x00", "a%2e", "[::1", "::1", "[::1%eth0]", "[1.2.3.4]",
		"a\r\nb", "ä.b", strings.Repeat("a", 64), strings.Repeat("a.", 300), "[::1]x", "[::1]:x", "*",
	} {
		if host, port, err := ParseAuthority(bad); err == nil && bad != "a." {
			t.Errorf("%q: accepted as %q, %q", bad, host, port)
		}
	}
}

func FuzzParseAuthority(f *testing.F) {
	for _, s := range []string{"checkout.shop:8080", "[::1]:80", "A.b.", "", "a..b", "x:99999", "[fe80::1%25eth0]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		host, port, err := ParseAuthority(s)
		if err != nil {
			return
		}
		if host != strings.ToLower(host) || strings.HasSuffix(host, ".") || strings.ContainsAny(host, "/@%[] \r\n\x00") {
			t.Errorf("%q: host %q is not normal", s, host)
		}
		again := host
		if a, err := netip.ParseAddr(host); err == nil && a.Is6() {
			again = "[" + host + "]"
		} else if strings.Contains(host, ":") {
			t.Errorf("%q: host %q", s, host)
		}
		if port != "" {
			again += ":" + port
		}
		if h, p, err := ParseAuthority(again); err != nil || h != host || p != port {
			t.Errorf("%q: %q, %q do not parse to themselves: %q, %q, %v", s, host, port, h, p, err)
		}
	})
}

// FuzzNormalPath: what is accepted is its own normal form, means the same as what came, holds none of what is refused,
// and is what net/http's client writes.
func FuzzNormalPath(f *testing.F) {
	for _, s := range []string{"/", "/a/%62", "/%2e%2e/x", "/a//b", "/..;/x", "/%e4%b8%ad", "/[x]", "/a%20b|c", "//host/x", "/%", "/\\", "/a;b"} {
		f.Add(s, true)
		f.Add(s, false)
	}
	f.Fuzz(func(t *testing.T, raw string, strict bool) {
		path, err := normalPath(raw, strict)
		if err != nil {
			return
		}
		if again, err := normalPath(path, strict); err != nil || again != path {
			t.Errorf("%q: %q becomes %q, %v", raw, path, again, err)
		}
		before, err1 := url.PathUnescape(raw)
		after, err2 := url.PathUnescape(path)
		if err1 != nil || err2 != nil || before != after {
			t.Errorf("%q means %q (%v), %q means %q (%v)", raw, before, err1, path, after, err2)
		}
		for _, segment := range strings.Split(after, "/") {
			if name, _, _ := strings.Cut(segment, ";"); name == "." || name == ".." {
				t.Errorf("%q: dot segment in %q", raw, path)
			}
		}
		if strings.ContainsAny(after, "\\\x00") || strict && (strings.Contains(path, "//") || strings.Contains(path, ";")) {
			t.Errorf("%q: accepted as %q", raw, path)
		}
		u, err := withPath(&url.URL{Path: "/old", RawQuery: "q=1"}, path)
		if err != nil || u.RequestURI() != path+"?q=1" {
			t.Errorf("%q: judged %q, written %q, %v", raw, path, u.RequestURI(), err)
		}
	})
}

func FuzzIdentityName(f *testing.F) {
	f.Add("X_forwarded-Client_cert")
	f.Add("x-strait-anything")
	f.Add("X-Forwarded-For")
	f.Fuzz(func(t *testing.T, name string) {
		folded := strings.Map(func(r rune) rune {
			switch {
			case r == '_':
				return '-'
			case r >= 'A' && r <= 'Z':
				return r + 'a' - 'A'
			}
			return r
		}, name)
		want := folded == "x-forwarded-client-cert" || strings.HasPrefix(folded, "x-strait-")
		if got := identityName(name); got != want {
			t.Errorf("%q: %v, want %v", name, got, want)
		}
	})
}

func TestGRPCTimeout(t *testing.T) {
	rows := map[string]time.Duration{"1S": time.Second, "250m": 250 * time.Millisecond, "99999999n": 99999999, "2H": 2 * time.Hour, "3M": 3 * time.Minute, "7u": 7000}
	for in, want := range rows {
		if got, ok := parseGRPCTimeout(in); !ok || got != want {
			t.Errorf("%q: %v, %v", in, got, ok)
		}
	}
	for _, bad := range []string{"", "S", "1", "1s", "-1S", "123456789S", "1.5S", "0x1S"} {
		if got, ok := parseGRPCTimeout(bad); ok {
			t.Errorf("%q: %v", bad, got)
		}
	}
	if got, ok := parseGRPCTimeout("99999999H"); !ok || got <= 0 {
		t.Errorf("largest: %v, %v", got, ok)
	}
}

func TestWantsJSON(t *testing.T) {
	rows := map[string]bool{
		"": false, "*/*": false, "text/html": false, "application/json": true, "Application/JSON;q=0.9": true, "text/html,application/json": false,
		"application/problem+json, text/plain": true, "image/png, application/*": true,
	}
	for accept, want := range rows {
		if got := wantsJSON([]string{accept}); got != want {
			t.Errorf("%q: %v", accept, got)
		}
	}
}

func TestEndToEnd(t *testing.T) {
	h := nethttp.Header{"Connection": {"close, X-A", "x-b"}, "X-A": {"1"}, "X-B": {"1"}, "X-C": {"1"}, "Te": {"trailers, gzip"}, "Keep-Alive": {"1"},
		"Transfer-Encoding": {"chunked"}, "Upgrade": {"h2c"}, "Http2-Settings": {"x"}, "Proxy-Authorization": {"x"}}
	out := endToEnd(h)
	if len(out) != 2 || out.Get("X-C") != "1" || out.Get("Te") != "trailers" {
		t.Errorf("left: %v", out)
	}
	if len(h) != 10 {
		t.Error("the original was changed")
	}
}

func TestNormalPath(t *testing.T) {
	rows := []struct{ raw, loose, strict string }{ // "" is refused
		{"/", "/", "/"}, {"/a/b.c-d_e~f", "/a/b.c-d_e~f", "/a/b.c-d_e~f"}, {"/%61%2d%7e", "/a-~", "/a-~"}, {"/%e4%B8%ad", "/%E4%B8%AD", "/%E4%B8%AD"},
		{"/a b\"|", "/a%20b%22%7C", "/a%20b%22%7C"}, {"/ä", "/%C3%A4", "/%C3%A4"}, {"/!$&'()*+,=:@", "/!$&'()*+,=:@", "/!$&'()*+,=:@"}, {"/%21%3b", "/%21%3B", ""},
		{"//a", "//a", ""}, {"/a//", "/a//", ""}, {"/a;b", "/a;b", ""}, {"/...", "/...", "/..."}, {"/.a/a.", "/.a/a.", "/.a/a."}, {"/%252e", "/%252e", "/%252e"},
		{"/a%2fb", "", ""}, {"/a%2Fb", "", ""}, {"/a%5cb", "", ""}, {"/a\\b", "", ""}, {"/a%00", "", ""}, {"/a%0a", "", ""}, {"/a\x7f", "", ""}, {"/.", "", ""}, {"/a/..", "", ""},
		{"/%2e", "", ""}, {"/.%2E/", "", ""}, {"/..;x", "", ""}, {"/%2e;/", "", ""}, {"/%", "", ""}, {"/%4", "", ""}, {"/%4g", "", ""}, {"/a#b", "", ""}, {"", "", ""}, {"a", "", ""}, {"*", "", ""},
	}
	for _, row := range rows {
		for strict, want := range map[bool]string{false: row.loose, true: row.strict} {
			if got, err := normalPath(row.raw, strict); got != want || (err == nil) != (want != "") {
				t.Errorf("%q, strict %v: %q, %v, want %q", row.raw, strict, got, err, want)
			}
		}
	}
}
