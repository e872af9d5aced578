// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// endpoint is one sidecar of this cluster that may take a stream.
type endpoint struct {
	proxy    string
	address  string
	spiffeID string
	weight   int
	handle   preface.Handle
}

const (
	healthyWeight = 10
	unknownWeight = 1 // of an instance without a verdict: slow start
	failureLasts  = 2 * time.Second
)

// candidates lists the endpoints of in's service with their weights; or says why there is none.
func (g *Gateway) candidates(in *inbound) ([]endpoint, *preface.Refused) {
	v := g.view.Load()
	s := v.services[in.service]
	if s == nil {
		return nil, refusal(preface.CodeNoHealthyInstance, "service_unknown")
	}
	now := g.cfg.Now()
	var good, failed []endpoint
	avoided := false
	for _, l := range s.Local {
		if l.Draining || l.InboundAddress == "" {
			continue
		}
		if id, err := spiffeid.Parse(l.SpiffeId); err != nil || id.TrustDomain() != g.td {
			continue
		} else if _, denied := v.denied.Judge(id, time.Time{}); denied {
			continue
		}
		ep := endpoint{proxy: l.Proxy, address: l.InboundAddress, spiffeID: l.SpiffeId, weight: g.weight(in.service, in.port, l)}
		if ep.weight == 0 {
			continue
		}
		ep.handle = g.handles.of(in.peer, l.Proxy)
		if slices.Contains(in.header.Avoid, ep.handle) || slices.Contains(in.header.Avoid, g.handles.yesterdays(in.peer, l.Proxy)) {
			avoided = true
			continue
		}
		if g.failures.recent(ep.address, now) {
			failed = append(failed, ep)
		} else {
			good = append(good, ep)
		}
	}
	switch {
	case len(good) > 0:
		return good, nil
	case len(failed) > 0:
		return failed, nil
	case avoided:
		return nil, refusal(preface.CodeNoHealthyInstance, "all_avoided")
	}
	return nil, refusal(preface.CodeNoHealthyInstance, "")
}

// weight is by instances: what the sidecar itself said last, else what discovery says.
func (g *Gateway) weight(service federation.ServiceName, port federation.PortName, l *controlpb.LocalEndpoint) int {
	h := g.health.of(l.Proxy, l.SpiffeId, service, port)
	if h == nil {
		h = l.Health
	}
	if h.GetHealthy()+h.GetUnhealthy()+h.GetUnknown() == 0 {
		return unknownWeight
	}
	return int(min(h.GetHealthy(), 1000))*healthyWeight + int(min(h.GetUnknown(), 1000))*unknownWeight
}

// draw takes one endpoint out of list, with a chance by weight.
func draw(list []endpoint) (endpoint, []endpoint) {
	total := 0
	for _, e := range list {
		total += e.weight
	}
	n := rand.IntN(total)
	for i, e := range list {
		if n -= e.weight; n < 0 {
			return e, slices.Delete(slices.Clone(list), i, i+1)
		}
	}
	return list[0], list[1:]
}

// localHealth is what sidecars said of their instances on their local sessions. It is believed only of the endpoint whose
// proxy name and identity are the session's.
type localHealth struct {
	mu    sync.Mutex
	known map[healthKey]sessionHealth
}

type healthKey struct{ proxy, spiffeID string }

type sessionHealth struct {
	session *localSession
	counts  map[string]*controlpb.HealthCounts // "ns/name/port"
}

func (h *localHealth) set(s *localSession, m *controlpb.LocalHealth) {
	counts := make(map[string]*controlpb.HealthCounts, len(m.GetServices()))
	for _, sh := range m.GetServices() {
		name := federation.ServiceName{Namespace: sh.GetService().GetNamespace(), Name: sh.GetService().GetName()}
		counts[exportOf(name, sh.PortName)] = sh.Health
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.known == nil {
		h.known = make(map[healthKey]sessionHealth)
	}
	h.known[healthKey{s.proxy, s.identity.String()}] = sessionHealth{s, counts}
}

func (h *localHealth) forget(s *localSession) {
	h.mu.Lock()
	defer h.mu.Unlock()
	key := healthKey{s.proxy, s.identity.String()}
	if h.known[key].session == s {
		delete(h.known, key)
	}
}

func (h *localHealth) of(proxy, id string, s federation.ServiceName, port federation.PortName) *controlpb.HealthCounts {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.known[healthKey{proxy, id}].counts[exportOf(s, string(port))]
}

// dialFailures remembers which sidecars did not answer lately.
type dialFailures struct {
	mu sync.Mutex
	at map[string]time.Time
}

func (d *dialFailures) note(address string, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.at == nil || len(d.at) > 4096 {
		d.at = make(map[string]time.Time)
	}
	d.at[address] = now
}

func (d *dialFailures) recent(address string, now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	at, ok := d.at[address]
	if ok && now.Sub(at) > failureLasts {
		delete(d.at, address)
		return false
	}
	return ok
}

// handleKeys makes instance handles: opaque, different for each consumer and each day.
type handleKeys struct {
	secret [32]byte // of this process
	now    func() time.Time
}

func (h *handleKeys) of(consumer spiffeid.TrustDomain, proxy string) preface.Handle {
	return h.on(consumer, proxy, h.now().Unix()/86400)
}

func (h *handleKeys) yesterdays(consumer spiffeid.TrustDomain, proxy string) preface.Handle {
	return h.on(consumer, proxy, h.now().Unix()/86400-1)
}

func (h *handleKeys) on(consumer spiffeid.TrustDomain, proxy string, day int64) preface.Handle {
	m := hmac.New(sha256.New, h.secret[:])
	m.Write(binary.BigEndian.AppendUint64(nil, uint64(day)))
	m.Write([]byte(consumer.String()))
	m.Write([]byte{0})
	m.Write([]byte(proxy))
	return preface.Handle(m.Sum(nil)[:8])
}
