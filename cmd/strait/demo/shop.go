// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// instance is one application process of the shop, as far as the mesh can see: a listener that can go away and come back.
type instance struct {
	service, cluster, name string
	calls                  []string // URLs that it calls for each request
	addr                   string

	mu     sync.Mutex
	server *http.Server
	errors float64 // share of requests answered 500
	served atomic.Int64
}

var shopClient = &http.Client{
	Timeout:   5 * time.Second,
	Transport: &http.Transport{MaxIdleConnsPerHost: 64, IdleConnTimeout: 30 * time.Second, DisableCompression: true},
}

// start listens on the instance's address; port 0 picks one, which it then keeps.
func (i *instance) start() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.server != nil {
		return nil
	}
	l, err := net.Listen("tcp", i.addr)
	if err != nil {
		return fmt.Errorf("%s: %w", i.name, err)
	}
	i.addr = l.Addr().String()
	i.server = &http.Server{Handler: i, ReadHeaderTimeout: 5 * time.Second}
	go func(s *http.Server) { _ = s.Serve(l) }(i.server)
	return nil
}

// stop closes the listener and every connection at once, like a crash.
func (i *instance) stop() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.server != nil {
		_ = i.server.Close()
		i.server = nil
	}
}

func (i *instance) running() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.server != nil
}

func (i *instance) setErrors(share float64) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.errors = share
}

// ServeHTTP answers with who it is, after its own calls have answered.
func (i *instance) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	i.served.Add(1)
	i.mu.Lock()
	share := i.errors
	i.mu.Unlock()
	if share > 0 && rand.Float64() < share {
		http.Error(w, "broken by the demo", http.StatusInternalServerError)
		return
	}
	answer := map[string]any{"service": i.service, "cluster": i.cluster, "instance": i.name}
	var below []json.RawMessage
	for _, url := range i.calls {
		body, code, err := call(r.Context(), url, r.Header)
		if err != nil || code >= 500 {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusBadGateway)
			_ = json.NewEncoder(w).Encode(map[string]any{"service": i.service, "cluster": i.cluster, "error": fmt.Sprint(code, " ", err)})
			return
		}
		if json.Valid(body) {
			below = append(below, body)
		}
	}
	if below != nil {
		answer["calls"] = below
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer)
}

// call makes one GET and hands the trace context on, as an instrumented application does.
func call(ctx context.Context, url string, in http.Header) ([]byte, int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, 0, err
	}
	for _, h := range []string{"Traceparent", "Tracestate"} {
		if v := in.Get(h); v != "" {
			req.Header.Set(h, v)
		}
	}
	resp, err := shopClient.Do(req)
	if err != nil {
		return nil, 0, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return body, resp.StatusCode, err
}

// load sends requests at a steady rate, whatever the answers do.
type load struct {
	url   string
	every time.Duration

	sent, ok, failed atomic.Int64
	mu               sync.Mutex
	lastError        string
	recent           [30]struct{ ok, failed int64 } // by second
	second           int64
}

// run ends after every request under way has.
func (l *load) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, 256)
	t := time.NewTicker(l.every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		select {
		case slots <- struct{}{}:
		default:
			l.note(errors.New("256 requests under way"))
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			body, code, err := call(ctx, l.url, http.Header{})
			if err == nil && code != http.StatusOK {
				err = fmt.Errorf("%d: %.200s", code, body)
			}
			if ctx.Err() == nil {
				l.note(err)
			}
		})
	}
}

func (l *load) note(err error) {
	l.sent.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now().Unix()
	if now != l.second {
		l.second = now
		l.recent[now%int64(len(l.recent))] = struct{ ok, failed int64 }{}
	}
	slot := &l.recent[now%int64(len(l.recent))]
	if err != nil {
		l.failed.Add(1)
		slot.failed++
		l.lastError = err.Error()
		return
	}
	l.ok.Add(1)
	slot.ok++
}

// last returns what happened in the last full seconds.
func (l *load) last(seconds int) (rps, okShare float64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var ok, failed int64
	for i := range seconds {
		s := l.recent[(l.second-1-int64(i)+int64(len(l.recent)))%int64(len(l.recent))]
		ok += s.ok
		failed += s.failed
	}
	if ok+failed == 0 {
		return 0, 0
	}
	return float64(ok+failed) / float64(seconds), float64(ok) / float64(ok+failed)
}
