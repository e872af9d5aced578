// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Compile makes the resources. It changes nothing in in and keeps no reference to what the caller may change later.
func Compile(in Input) Output {
	if in.Objects == nil {
		in.Objects = &api.Objects{}
	}
	r := &run{
		in: in, services: map[federation.ServiceName]*service{}, proxies: map[proxyKey]*proxy{},
		denied: map[spiffeid.ID]bool{}, conditions: map[api.Ref]*ConditionUpdate{},
		out: Output{Resources: map[string]map[string]proto.Message{}, Catalog: map[spiffeid.TrustDomain]map[string]proto.Message{},
			Exports: map[federation.ServiceName][]federation.ClusterName{}},
	}
	for _, t := range []string{controlpb.TypeSelf, controlpb.TypeService, controlpb.TypeGateway, controlpb.TypeBundle,
		controlpb.TypePeer, controlpb.TypeGrant, controlpb.TypeDenied} {
		r.out.Resources[t] = map[string]proto.Message{}
	}
	r.indexDenied()
	r.indexPeers()
	r.indexProxies()
	r.indexServices()
	r.exports()
	r.failover()
	r.access()
	r.emitMembers()
	r.emitServices()
	r.emitSelves()
	r.emitOffers()
	r.finish()
	return r.out
}

// run is one compilation.
type run struct {
	in         Input
	out        Output
	peers      []*peer // sound ones, by cluster
	byCluster  map[federation.ClusterName]*peer
	services   map[federation.ServiceName]*service
	order      []*service
	proxies    map[proxyKey]*proxy
	denied     map[spiffeid.ID]bool
	conditions map[api.Ref]*ConditionUpdate
	failoverOf map[federation.ServiceName]*failoverPolicy
}

// peer is a sound member with what the configuration says of it.
type peer struct {
	Peer
	same map[string]bool // nil: none; "*": all
}

func (p *peer) sameIn(namespace string) bool { return p.same["*"] || p.same[namespace] }

type proxyKey struct{ namespace, name string }

func (k proxyKey) String() string { return k.namespace + "/" + k.name }

// proxy is one sidecar: its session, where there is one, and the workloads it stands for.
type proxy struct {
	key       proxyKey
	id        spiffeid.ID
	session   *Session
	workloads []*workload
	verdicts  map[string][]InstanceHealth // by workload
}

// workload is one sound instance.
type workload struct {
	obj   *api.Workload
	id    spiffeid.ID
	proxy *proxy
}

// zone is the workload's own, else its sidecar's, else the cluster's.
func (w *workload) zone(self federation.Locality) string {
	if w.obj.Spec.Zone != "" {
		return w.obj.Spec.Zone
	}
	if w.proxy.session != nil && w.proxy.session.Locality.Zone != "" {
		return w.proxy.session.Locality.Zone
	}
	return self.Zone
}

// service is one local Service.
type service struct {
	obj       *api.Service
	name      federation.ServiceName
	ports     []*port
	drained   *api.Drain // the own cluster is, for this service
	exportID  string     // seed: identity of the ServiceExport
	policies  []*accessPolicy
	locked    bool // an AccessPolicy is on it that could not be understood and has no good version
	revisions []string
}

// port is one port of a service.
type port struct {
	spec      *api.ServicePort
	name      federation.PortName
	protocol  controlpb.Protocol
	instances []*instance
	exported  map[federation.ClusterName]bool // ready peers
}

// instance is a workload behind a port.
type instance struct {
	*workload
	number int32
}

// indexDenied says to every proxy whom it must not talk to. Nobody withdraws an identity of another trust domain.
func (r *run) indexDenied() {
	for _, d := range r.in.Denied {
		if d.ID.IsZero() || d.ID.TrustDomain() != r.in.Self.TrustDomain {
			continue
		}
		r.putDenied(d)
		if d.IssuedBefore.IsZero() {
			r.denied[d.ID] = true // else it may be here again, with a new certificate
		}
	}
	for i := range r.in.Peers {
		p := &r.in.Peers[i]
		for _, d := range p.Denied {
			if d.ID.TrustDomain() != p.TrustDomain || p.TrustDomain == r.in.Self.TrustDomain {
				r.problem("peer %s withdraws %s, which is not its own: it is not listened to", p.Cluster, d.ID)
				continue
			}
			r.putDenied(d)
		}
	}
}

func (r *run) putDenied(d Denied) {
	m := &controlpb.Denied{SpiffeId: d.ID.String(), Reason: d.Reason}
	if !d.IssuedBefore.IsZero() {
		m.IssuedBeforeMs = d.IssuedBefore.UnixMilli()
	}
	r.put(controlpb.TypeDenied, d.ID.String(), m)
}

func (r *run) indexPeers() {
	r.byCluster = map[federation.ClusterName]*peer{}
	objects := map[string]*api.Peer{}
	for _, o := range r.in.Objects.Peers {
		objects[o.Name] = o
	}
	sorted := slices.Clone(r.in.Peers)
	slices.SortStableFunc(sorted, func(a, b Peer) int {
		return cmp.Or(cmp.Compare(a.TrustDomain.String(), b.TrustDomain.String()), cmp.Compare(a.Cluster, b.Cluster))
	})
	domains := map[spiffeid.TrustDomain]bool{r.in.Self.TrustDomain: true}
	claims := map[federation.ClusterName]int{}
	for _, p := range sorted {
		claims[p.Cluster]++
	}
	for _, p := range sorted {
		switch {
		case p.TrustDomain.IsZero() || p.Cluster.IsZero():
			r.problem("peer %s (%s) has no name or no trust domain", p.Cluster, p.TrustDomain)
			continue
		case domains[p.TrustDomain]:
			r.problem("peer %s claims the trust domain %s, which is taken", p.Cluster, p.TrustDomain)
			continue
		case p.Cluster == r.in.Self.Cluster, claims[p.Cluster] > 1 && !owns(objects[string(p.Cluster)], p.TrustDomain):
			// of several, the one that the Peer object names; without it, none
			r.problem("the peer of trust domain %s claims the cluster name %s, which is taken", p.TrustDomain, p.Cluster)
			continue
		}
		m := &peer{Peer: p}
		sameness := p.Sameness
		if o := objects[string(p.Cluster)]; o != nil {
			sameness = o.Spec.Sameness
			if o.Spec.TrustDomain != "" && o.Spec.TrustDomain != p.TrustDomain.String() {
				r.problem("peer %s has the trust domain %s but its Peer object says %s: no sameness applies", p.Cluster, p.TrustDomain, o.Spec.TrustDomain)
				sameness = nil
			}
		}
		for _, ns := range sameness {
			if m.same == nil {
				m.same = map[string]bool{}
			}
			m.same[ns] = true
		}
		domains[p.TrustDomain] = true
		r.byCluster[p.Cluster] = m
		r.peers = append(r.peers, m)
	}
	slices.SortFunc(r.peers, func(a, b *peer) int { return cmp.Compare(a.Cluster, b.Cluster) })
}

func owns(o *api.Peer, td spiffeid.TrustDomain) bool {
	return o != nil && o.Spec.TrustDomain == td.String()
}

// indexProxies finds the sidecars, and the workloads that each may stand for.
func (r *run) indexProxies() {
	for i := range r.in.Sessions {
		s := &r.in.Sessions[i]
		ns, _, ok := s.ID.Workload()
		if !ok || ns != s.Namespace || s.Proxy == "" || s.ID.TrustDomain() != r.in.Self.TrustDomain {
			r.problem("a sidecar with the identity %s calls itself %s/%s: it is not listened to", s.ID, s.Namespace, s.Proxy)
			continue
		}
		if r.denied[s.ID] {
			continue
		}
		k := proxyKey{s.Namespace, s.Proxy}
		if have := r.proxies[k]; have != nil && !betterSession(s, have.session) {
			continue
		}
		p := &proxy{key: k, id: s.ID, session: s, verdicts: map[string][]InstanceHealth{}}
		for _, v := range s.Instances {
			p.verdicts[v.Workload] = append(p.verdicts[v.Workload], v)
		}
		r.proxies[k] = p
	}
	for _, w := range r.in.Objects.Workloads {
		r.indexWorkload(w)
	}
}

// betterSession says that a is to be believed rather than b where both have the same name.
func betterSession(a, b *Session) bool {
	if a.Silent != b.Silent {
		return b.Silent
	}
	if a.Draining != b.Draining {
		return b.Draining
	}
	return cmp.Or(cmp.Compare(a.InboundAddress, b.InboundAddress), cmp.Compare(a.ID.String(), b.ID.String())) < 0
}

func (r *run) indexWorkload(w *api.Workload) {
	ref := api.Ref{Kind: api.KindWorkload, Namespace: w.Namespace, Name: w.Name}
	id, err := spiffeid.Workload(r.in.Self.TrustDomain, w.Namespace, w.Account())
	if err != nil {
		r.condition(ref, w.Generation, "Accepted", false, "InvalidServiceAccount", err.Error())
		return
	}
	k := proxyKey{w.Namespace, w.ProxyName()}
	p := r.proxies[k]
	if p == nil {
		p = &proxy{key: k, id: id}
		r.proxies[k] = p
	}
	if p.id != id {
		if p.session != nil {
			r.condition(ref, w.Generation, "Accepted", true, "Valid", "")
			r.condition(ref, w.Generation, "Attached", false, "IdentityMismatch",
				fmt.Sprintf("sidecar %s proves to be %s, and the workload is %s", k, p.id, id))
			return
		}
		r.condition(ref, w.Generation, "Accepted", false, "Conflict",
			fmt.Sprintf("sidecar %s stands for workloads of %s; one sidecar has one identity", k, p.id))
		return
	}
	r.condition(ref, w.Generation, "Accepted", true, "Valid", "")
	switch { // health is no business of the configuration API
	case r.denied[id]:
		r.condition(ref, w.Generation, "Attached", false, "TrustRefused", "its identity was withdrawn")
	case p.session == nil:
		r.condition(ref, w.Generation, "Attached", false, "NoSession", fmt.Sprintf("sidecar %s has not reported yet", k))
	default:
		r.condition(ref, w.Generation, "Attached", true, "Attached", "sidecar "+k.String())
	}
	p.workloads = append(p.workloads, &workload{obj: w, id: id, proxy: p})
}

// worst is the verdict about an instance over ports: unhealthy where one is, healthy where each verdict is.
func worst(list []InstanceHealth, ports map[string]bool) controlpb.Health {
	healthy, unknown := false, false
	for _, v := range list {
		if v.Port != "" && !ports[v.Port] {
			continue
		}
		switch v.Health {
		case controlpb.Health_HEALTH_UNHEALTHY:
			return controlpb.Health_HEALTH_UNHEALTHY
		case controlpb.Health_HEALTH_HEALTHY:
			healthy = true
		default:
			unknown = true
		}
	}
	if healthy && !unknown {
		return controlpb.Health_HEALTH_HEALTHY
	}
	return controlpb.Health_HEALTH_UNKNOWN
}

func (r *run) indexServices() {
	byNamespace := map[string][]*workload{}
	for _, k := range slices.SortedFunc(maps.Keys(r.proxies), compareProxies) {
		byNamespace[k.namespace] = append(byNamespace[k.namespace], r.proxies[k].workloads...)
	}
	for _, list := range byNamespace {
		slices.SortFunc(list, func(a, b *workload) int { return cmp.Compare(a.obj.Name, b.obj.Name) })
	}
	for _, o := range r.in.Objects.Services {
		name, err := federation.NewServiceName(o.Namespace, o.Name)
		if err != nil {
			r.problem("service %s/%s: %v", o.Namespace, o.Name, err)
			continue
		}
		s := &service{obj: o, name: name, revisions: []string{o.ResourceVersion}}
		var behind []*workload
		for _, w := range byNamespace[o.Namespace] {
			if selects(o.Spec.Selector, w.obj.Labels) {
				behind = append(behind, w)
				s.revisions = append(s.revisions, w.obj.ResourceVersion)
			}
		}
		s.addPorts(behind)
		r.services[name] = s
		r.order = append(r.order, s)
	}
}

func compareProxies(a, b proxyKey) int {
	return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name))
}

// defaultPort is what the only port of a service is called where it has no name.
const defaultPort = "default"

func (s *service) addPorts(behind []*workload) {
	seen := map[federation.PortName]bool{}
	for i := range s.obj.Spec.Ports {
		sp := &s.obj.Spec.Ports[i]
		name := federation.PortName(sp.Name)
		if sp.Name == "" {
			name = defaultPort
		}
		if _, err := federation.ParsePortName(string(name)); err != nil || seen[name] {
			continue
		}
		seen[name] = true
		p := &port{spec: sp, name: name, protocol: protocolOf(sp), exported: map[federation.ClusterName]bool{}}
		for _, w := range behind {
			if n, ok := target(sp, string(name), w.obj); ok {
				p.instances = append(p.instances, &instance{w, n})
			}
		}
		s.ports = append(s.ports, p)
	}
}

// target is the port on which w serves sp.
func target(sp *api.ServicePort, name string, w *api.Workload) (int32, bool) {
	if t := sp.TargetPort.StrVal; t != "" {
		n, ok := w.Spec.Ports[t]
		return n, ok
	}
	// the API fills an absent targetPort with the port: what the workload itself says of a port of that name goes before it
	if sp.TargetPort.IntVal != 0 && sp.TargetPort.IntVal != sp.Port {
		return sp.TargetPort.IntVal, true
	}
	if n, ok := w.Spec.Ports[name]; ok {
		return n, true
	}
	return sp.Port, sp.Port > 0
}

// selects says that labels have all of selector. An empty selector selects nothing.
func selects(selector, labels map[string]string) bool {
	for k, v := range selector {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return len(selector) > 0
}

// protocolOf reads appProtocol, else the port's name by its usual prefixes.
func protocolOf(sp *api.ServicePort) controlpb.Protocol {
	p := strings.ToLower(sp.AppProtocol)
	if p == "" {
		p, _, _ = strings.Cut(sp.Name, "-")
	}
	switch p {
	case "http", "kubernetes.io/ws":
		return controlpb.Protocol_PROTOCOL_HTTP1
	case "http2", "h2c", "kubernetes.io/h2c":
		return controlpb.Protocol_PROTOCOL_HTTP2
	case "grpc":
		return controlpb.Protocol_PROTOCOL_GRPC
	}
	return controlpb.Protocol_PROTOCOL_TCP
}

func (p *port) proto() *controlpb.ServicePort {
	return &controlpb.ServicePort{Name: string(p.name), Number: uint32(p.spec.Port), Protocol: p.protocol}
}

func (s *service) ref() *controlpb.ServiceRef {
	return &controlpb.ServiceRef{Namespace: s.name.Namespace, Name: s.name.Name}
}

// revision is the newest resource version that went into the service.
func (s *service) revision() uint64 {
	var newest uint64
	for _, v := range s.revisions {
		if n, err := strconv.ParseUint(v, 10, 64); err == nil {
			newest = max(newest, n)
		}
	}
	return newest
}

func (r *run) put(typeURL, name string, m proto.Message) { r.out.Resources[typeURL][name] = m }

func (r *run) problem(format string, args ...any) {
	r.out.Problems = append(r.out.Problems, fmt.Sprintf(format, args...))
}

// condition sets one condition of an object. The last word on a type wins.
func (r *run) condition(ref api.Ref, generation int64, kind string, ok bool, reason, message string) {
	u := r.conditions[ref]
	if u == nil {
		u = &ConditionUpdate{Ref: ref, Generation: generation}
		r.conditions[ref] = u
	}
	status := metav1.ConditionFalse
	if ok {
		status = metav1.ConditionTrue
	}
	c := metav1.Condition{Type: kind, Status: status, ObservedGeneration: generation, Reason: reason, Message: message}
	for i := range u.Conditions {
		if u.Conditions[i].Type == kind {
			u.Conditions[i] = c
			return
		}
	}
	u.Conditions = append(u.Conditions, c)
}

func (r *run) finish() {
	for _, u := range r.in.Objects.Unreadable {
		r.condition(u.Ref, u.Generation, "Accepted", false, "Invalid", u.Error)
	}
	for _, ref := range slices.SortedFunc(maps.Keys(r.conditions), api.Ref.Compare) {
		r.out.Conditions = append(r.out.Conditions, *r.conditions[ref])
	}
	slices.Sort(r.out.Problems)
	r.out.Problems = slices.Compact(r.out.Problems)
}
