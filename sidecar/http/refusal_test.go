// SPDX-License-Identifier: Apache-2.0

package http_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	nethttp "net/http"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/sidecar/http"
)

// TestGeneratedResponses: each refusal has its status, Proxy-Status, trace id and a body in the form the client accepts.
func TestGeneratedResponses(t *testing.T) {
	refuses := func(r *http.Refusal) http.Resolve {
		return func(string, string) (http.Target, error) { return http.Target{}, fmt.Errorf("resolve: %w", r) }
	}
	rows := []struct {
		name    string
		options rigOptions
		request func(*nethttp.Request)
		status  int
		proxy   string
	}{
		{"no endpoints", rigOptions{places: []*place{}}, nil, 503,
			`us-east/shop/web; error=destination_unavailable; details="STR-4102 no_endpoints: 0/0 healthy"`},
		{"unknown service", rigOptions{resolve: func(host, _ string) (http.Target, error) { return http.Target{}, errors.New("no " + host) }}, nil, 502,
			`us-east/shop/web; error=destination_not_found; details="STR-4103 config_missing: no checkout.shop"`},
		{"circuit", rigOptions{resolve: refuses(&http.Refusal{Reason: federation.CircuitOpen, Code: "STR-4102", Message: `a "quoted\"` + "\n"})}, nil, 503,
			`us-east/shop/web; error=connection_limit_reached; details="STR-4102 circuit_open: a \"quoted\\\"?"`},
		{"rate", rigOptions{resolve: refuses(&http.Refusal{Reason: federation.RateLimited, Code: "STR-4102"})}, nil, 429, `us-east/shop/web; error=http_request_denied; details="STR-4102 rate_limited"`},
		{"bad host", rigOptions{}, func(r *nethttp.Request) { r.Host = "a..b" }, 400,
			`us-east/shop/web; error=http_request_error; details="STR-6102: host is not a name or an address with an optional port"`},
	}
	each(t, func(t *testing.T, e engine) {
		for _, row := range rows {
			for _, c := range clients {
				t.Run(row.name+"-"+c.name, func(t *testing.T) {
					r := newRig(t, e, row.options)
					do := func(method, accept string) (*nethttp.Response, []byte) {
						req := newRequest(method, "/", nil)
						req.Header.Set("Accept", accept)
						if row.request != nil {
							row.request(req)
						}
						resp, err := c.make(r).Do(req)
						if err != nil {
							t.Fatal(err)
						}
						defer resp.Body.Close()
						body, err := io.ReadAll(resp.Body)
						if err != nil {
							t.Fatal(err)
						}
						if resp.StatusCode != row.status || resp.Header.Get("Proxy-Status") != row.proxy || len(resp.Header.Get("X-Strait-Trace")) != 32 {
							t.Errorf("status %d, %s, trace %q; want %d, %s", resp.StatusCode, resp.Header.Get("Proxy-Status"), resp.Header.Get("X-Strait-Trace"), row.status, row.proxy)
						}
						return resp, body
					}
					resp, body := do("GET", "application/json")
					var p struct{ Code, Title, Why, Reason, Trace string }
					if err := json.Unmarshal(body, &p); err != nil || !strings.HasPrefix(p.Code, "STR-") || p.Title == "" || p.Why == "" || p.Trace != resp.Header.Get("X-Strait-Trace") {
						t.Errorf("json %s: %+v, %v", body, p, err)
					}
					if _, body := do("GET", "text/html, application/json"); !strings.HasPrefix(string(body), p.Code+": "+p.Title) || !strings.Contains(string(body), "fix: ") {
						t.Errorf("text %s", body)
					}
					if _, body := do("HEAD", "*/*"); len(body) != 0 {
						t.Errorf("head with body %s", body)
					}
				})
			}
		}
	})
}

// TestDenied: the callee's refusal reaches the client with the callee's name and the callee's trace id, and nothing was
// picked behind it.
func TestDenied(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		r := newRig(t, e, rigOptions{backends: []string{backend(t, func(nethttp.ResponseWriter, *nethttp.Request) { t.Error("reached") })}})
		r.mu.Lock()
		r.allow = func(c http.Call) *http.Refusal {
			if c.Peer != callerID || c.Method != "DELETE" || c.Path != "/a/b" || c.Authority != "checkout.shop" {
				t.Errorf("judged %+v", c)
			}
			return &http.Refusal{Message: "no rule allows shop/web"}
		}
		r.mu.Unlock()
		resp, err := r.client().Do(newRequest("DELETE", "/a/b?c", nil))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if got := resp.Header.Get("Proxy-Status"); resp.StatusCode != 403 || !strings.HasPrefix(got, "eu-west/shop/checkout; error=http_request_denied; ") || resp.Header.Get("X-Strait-Trace") == "" {
			t.Errorf("status %d, %s, trace %q", resp.StatusCode, got, resp.Header.Get("X-Strait-Trace"))
		}
	})
}

// TestTimeout: a route's deadline is a 504 before the response's head, and a broken body after it.
func TestTimeout(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		for _, begun := range []bool{false, true} {
			t.Run(fmt.Sprintf("response begun %v", begun), func(t *testing.T) {
				r := newRig(t, e, rigOptions{
					backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) {
						if begun {
							w.WriteHeader(200)
							w.(nethttp.Flusher).Flush()
						}
						<-r.Context().Done()
					})},
					resolve: func(string, string) (http.Target, error) {
						return http.Target{Service: service, Timeout: 50 * time.Millisecond}, nil
					},
				})
				resp, err := r.client().Do(newRequest("GET", "/", nil))
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				_, err = io.ReadAll(resp.Body)
				if begun && (resp.StatusCode != 200 || err == nil) || !begun && (resp.StatusCode != 504 || !strings.Contains(resp.Header.Get("Proxy-Status"), "STR-4105 deadline_exceeded")) {
					t.Errorf("status %d, %v, %q", resp.StatusCode, err, resp.Header.Get("Proxy-Status"))
				}
				if o := r.picker.await(t, 1)[0]; o.Result != http.TimedOut {
					t.Errorf("outcome %+v", o)
				}
			})
		}
	})
}
