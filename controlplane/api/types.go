// SPDX-License-Identifier: Apache-2.0

package api

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Namespace is v1 Namespace. The configuration API makes it on the first write into it.
type Namespace struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
}

// Service is the part of v1 Service that Strait reads: which workloads it selects and its ports.
type Service struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              ServiceSpec `json:"spec,omitempty"`
}

// ServiceSpec selects workloads of the same namespace by their labels. An empty selector selects none.
type ServiceSpec struct {
	Selector map[string]string `json:"selector,omitempty"`
	Ports    []ServicePort     `json:"ports,omitempty"`
}

// ServicePort is one port. A single port may be without a name; it is then called "default".
type ServicePort struct {
	Name        string             `json:"name,omitempty"`
	Protocol    string             `json:"protocol,omitempty"`
	AppProtocol string             `json:"appProtocol,omitempty"` // http, http2 (kubernetes.io/h2c), grpc, tcp
	Port        int32              `json:"port"`
	TargetPort  intstr.IntOrString `json:"targetPort,omitempty"` // a workload's port by name, or its number
}

// ServiceExport offers the Service of the same namespace and name to other clusters, together with an ExportPolicy.
type ServiceExport struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Status            ConditionStatus `json:"status,omitempty"`
}

// ConditionStatus is a status of conditions alone.
type ConditionStatus struct {
	ObservedGeneration int64              `json:"observedGeneration,omitempty"`
	Conditions         []metav1.Condition `json:"conditions,omitempty"`
}

// Federation says who we are and how others may join. There is one, named after the federation. Cluster-scoped.
type Federation struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              FederationSpec  `json:"spec,omitempty"`
	Status            ConditionStatus `json:"status,omitempty"`
}

// FederationSpec: cluster, region, zone and trust domain are fixed at init and repeated here.
type FederationSpec struct {
	Cluster          string   `json:"cluster,omitempty"`
	Region           string   `json:"region,omitempty"`
	Zone             string   `json:"zone,omitempty"`
	TrustDomain      string   `json:"trustDomain,omitempty"`
	GatewayAddresses []string `json:"gatewayAddresses,omitempty"` // written into join tokens
	Introducers      []string `json:"introducers,omitempty"`      // clusters whose introductions are accepted without approval
	Drain            []Drain  `json:"drain,omitempty"`            // for every service
	// TrustDomains are foreign ones, of no members, whose identities AccessPolicy rules may name.
	TrustDomains []TrustDomain `json:"trustDomains,omitempty"`
}

// TrustDomain is a foreign trust domain: where its bundle comes from. Following it lets nobody call; AccessPolicy rules do.
type TrustDomain struct {
	Name     string          `json:"name"`
	Endpoint *BundleEndpoint `json:"endpoint,omitempty"`
	// Bundle is a SPIFFE bundle document (JSON) to begin with, or all there is where Endpoint is absent.
	Bundle string `json:"bundle,omitempty"`
}

// BundleEndpoint is where a trust domain publishes its bundle (SPIFFE Federation).
type BundleEndpoint struct {
	URL      string `json:"url"`
	Profile  string `json:"profile"`            // https_web, https_spiffe
	SPIFFEID string `json:"spiffeID,omitempty"` // of the endpoint, for https_spiffe
}

// Drain takes traffic away from a cluster. Where the cluster is the own one, it is an owner's fact for all callers of the
// federation; elsewhere it concerns the callers of this cluster.
type Drain struct {
	Cluster string `json:"cluster"`
	Reason  string `json:"reason,omitempty"`
}

// Peer is one other member, named after its cluster. Cluster-scoped. It is made by joining.
type Peer struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              PeerSpec   `json:"spec,omitempty"`
	Status            PeerStatus `json:"status,omitempty"`
}

// PeerSpec holds what an operator decides about a peer.
type PeerSpec struct {
	TrustDomain string `json:"trustDomain,omitempty"`
	// Sameness lists the namespaces in which the peer's services are the same as ours; "*" is all. Default: none.
	Sameness []string `json:"sameness,omitempty"`
}

// PeerStatus is what the control plane last saw.
type PeerStatus struct {
	ObservedGeneration int64              `json:"observedGeneration,omitempty"`
	State              string             `json:"state,omitempty"`
	Reason             string             `json:"reason,omitempty"`
	Federation         string             `json:"federation,omitempty"`
	Region             string             `json:"region,omitempty"`
	IntroducedBy       string             `json:"introducedBy,omitempty"`
	BundleSHA256       string             `json:"bundleSHA256,omitempty"`
	BundleSequence     int64              `json:"bundleSequence,omitempty"`
	Catalog            *CatalogMark       `json:"catalog,omitempty"`
	Conditions         []metav1.Condition `json:"conditions,omitempty"`
}

// CatalogMark is the newest catalog accepted of a peer.
type CatalogMark struct {
	Epoch int64  `json:"epoch,omitempty"`
	Seq   int64  `json:"seq,omitempty"`
	Hash  string `json:"hash,omitempty"`
}

// ExportPolicy says which services of its namespace may leave, where to, and which of their ports.
type ExportPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              ExportPolicySpec `json:"spec,omitempty"`
	Status            ConditionStatus  `json:"status,omitempty"`
}

// ExportPolicySpec is a list of rules; what no rule names does not leave.
type ExportPolicySpec struct {
	Rules []ExportRule `json:"rules,omitempty"`
}

// ExportRule lets services leave to clusters.
type ExportRule struct {
	Services ServiceSelector `json:"services"`
	To       ExportTo        `json:"to"`
	Ports    []string        `json:"ports,omitempty"` // by name; empty: all
}

// ServiceSelector names services, or selects them by the labels of the Service objects: one of the two.
type ServiceSelector struct {
	Names       []string          `json:"names,omitempty"`
	MatchLabels map[string]string `json:"matchLabels,omitempty"`
}

// ExportTo names the clusters; "*" is any member.
type ExportTo struct {
	Clusters []string `json:"clusters"`
}

// TargetRef names the Service, or its federated face the ServiceImport, of the same namespace.
type TargetRef struct {
	Group string `json:"group,omitempty"`
	Kind  string `json:"kind"`
	Name  string `json:"name"`
}

// FailoverPolicy sets the order of clusters and the thresholds for services of its namespace.
type FailoverPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              FailoverPolicySpec `json:"spec,omitempty"`
	Status            ConditionStatus    `json:"status,omitempty"`
}

// FailoverPolicySpec: what is absent has the default of DESIGN §7.
type FailoverPolicySpec struct {
	TargetRefs []TargetRef     `json:"targetRefs,omitempty"`
	Priorities []Priority      `json:"priorities,omitempty"`
	Trip       *Trip           `json:"trip,omitempty"`
	Return     *Return         `json:"return,omitempty"`
	Spill      *Spill          `json:"spill,omitempty"`
	Health     *FailoverHealth `json:"health,omitempty"`
	Drain      []Drain         `json:"drain,omitempty"`
}

// Priority is one tier.
type Priority struct {
	Clusters []string         `json:"clusters,omitempty"` // "local" is the caller's own
	Weights  map[string]int32 `json:"weights,omitempty"`
	AnyOf    *AnyOf           `json:"anyOf,omitempty"` // any other member
}

// AnyOf is every member that no other tier names.
type AnyOf struct {
	Except []string `json:"except,omitempty"`
}

// Trip says when a member is out.
type Trip struct {
	MinHealthyPercent        *int32   `json:"minHealthyPercent,omitempty"`
	SpillBelowHealthyPercent *int32   `json:"spillBelowHealthyPercent,omitempty"`
	MinEndpoints             *int32   `json:"minEndpoints,omitempty"`
	TunnelLossPercent        *float64 `json:"tunnelLossPercent,omitempty"`
}

// Return says when a member that was out comes back, and how gradually.
type Return struct {
	MinHealthyPercent *int32           `json:"minHealthyPercent,omitempty"`
	After             *metav1.Duration `json:"after,omitempty"`
	Ramp              *metav1.Duration `json:"ramp,omitempty"`
}

// Spill is accepted and not enforced yet; the policy's condition says so.
type Spill struct {
	MaxInflightPerEndpoint *int32 `json:"maxInflightPerEndpoint,omitempty"`
}

// FailoverHealth says how instances are judged.
type FailoverHealth struct {
	Passive *PassiveHealth `json:"passive,omitempty"`
	Active  *ActiveHealth  `json:"active,omitempty"`
}

// PassiveHealth is what callers see themselves.
type PassiveHealth struct {
	Consecutive5xx *int32           `json:"consecutive5xx,omitempty"`
	EjectFor       *metav1.Duration `json:"ejectFor,omitempty"`
}

// ActiveHealth is the check by the instance's own sidecar.
type ActiveHealth struct {
	TCP   *bool            `json:"tcp,omitempty"` // false turns the check off
	Every *metav1.Duration `json:"every,omitempty"`
}

// AccessPolicy says who may call services of its namespace. Any AccessPolicy on a service makes it deny by default; it can
// narrow who may call, never open a service to a cluster that it is not exported to.
type AccessPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              AccessPolicySpec `json:"spec,omitempty"`
	Status            ConditionStatus  `json:"status,omitempty"`
}

// Modes and actions.
const (
	ModeEnforce = "enforce"
	ModeAudit   = "audit"
	ActionAllow = "allow"
	ActionDeny  = "deny"
)

// AccessPolicySpec is a list of rules for its targets.
type AccessPolicySpec struct {
	TargetRefs []TargetRef  `json:"targetRefs,omitempty"`
	Mode       string       `json:"mode,omitempty"` // enforce (default), audit
	Rules      []AccessRule `json:"rules,omitempty"`
}

// AccessRule matches a call when one of From and one of To match; an empty list matches any call that may arrive at all.
type AccessRule struct {
	Name   string       `json:"name,omitempty"`
	Action string       `json:"action,omitempty"` // allow (default), deny; deny is judged first
	From   []AccessFrom `json:"from,omitempty"`
	To     []AccessTo   `json:"to,omitempty"`
}

// AccessFrom names callers exactly: these service accounts ("<namespace>/<name>") of these clusters. No clusters: the own one.
// No service accounts: any of those clusters. Or these SPIFFE IDs, and nothing else in the same entry.
type AccessFrom struct {
	ServiceAccounts []string `json:"serviceAccounts,omitempty"`
	Clusters        []string `json:"clusters,omitempty"`
	// SPIFFEIDs names identities exactly: the way to name those of a foreign trust domain (Federation.spec.trustDomains).
	SPIFFEIDs []string `json:"spiffeIDs,omitempty"`
}

// AccessTo narrows to ports, methods and paths; an empty list is any.
type AccessTo struct {
	Ports   []string `json:"ports,omitempty"`
	Methods []string `json:"methods,omitempty"`
	Paths   []string `json:"paths,omitempty"` // exact, or a prefix where it ends in "/*"
}

// Workload is one running instance outside Kubernetes: where it listens and who it is. Its health is not here.
type Workload struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              WorkloadSpec    `json:"spec,omitempty"`
	Status            ConditionStatus `json:"status,omitempty"`
}

// WorkloadSpec is configuration; the address at which its sidecar is reached comes from the sidecar's session.
type WorkloadSpec struct {
	Address        string            `json:"address,omitempty"` // host as its sidecar reaches it; default 127.0.0.1
	Ports          map[string]int32  `json:"ports,omitempty"`   // name → number
	ServiceAccount string            `json:"serviceAccount,omitempty"`
	Proxy          string            `json:"proxy,omitempty"` // the sidecar in front of it; default: the workload's own name
	Zone           string            `json:"zone,omitempty"`  // default: its sidecar's
	Health         *WorkloadHealth   `json:"health,omitempty"`
	Identity       *WorkloadIdentity `json:"identity,omitempty"`
	Attestation    *Attestation      `json:"attestation,omitempty"`
	Drain          bool              `json:"drain,omitempty"` // no new calls
}

// Attestation says which processes may take the workload's identity from its sidecar's SPIFFE Workload API. Default: none.
type Attestation struct {
	Unix []UnixSelector `json:"unix,omitempty"`
}

// UnixSelector names processes of the sidecar's host by what the kernel says of them. Every field that is set must match.
type UnixSelector struct {
	UID  *int64 `json:"uid,omitempty"`
	GID  *int64 `json:"gid,omitempty"`
	Path string `json:"path,omitempty"` // of the executable
}

// WorkloadHealth asks for an HTTP check.
type WorkloadHealth struct {
	Path string `json:"path,omitempty"`
}

// WorkloadIdentity says how its sidecar proves itself the first time.
type WorkloadIdentity struct {
	Attestor string `json:"attestor,omitempty"` // join-token
}

// AppLabel is the label that names a workload's application.
const AppLabel = "app"

// DefaultServiceAccount is the service account of a workload that has neither spec.serviceAccount nor the label app.
const DefaultServiceAccount = "default"

// Account returns the workload's service account: spec.serviceAccount, else the label app, else "default".
func (w *Workload) Account() string {
	switch {
	case w.Spec.ServiceAccount != "":
		return w.Spec.ServiceAccount
	case w.Labels[AppLabel] != "":
		return w.Labels[AppLabel]
	}
	return DefaultServiceAccount
}

// ProxyName returns the name of the sidecar in front of the workload, in the workload's namespace.
func (w *Workload) ProxyName() string {
	if w.Spec.Proxy != "" {
		return w.Spec.Proxy
	}
	return w.Name
}

// Host returns the host at which its sidecar reaches the workload.
func (w *Workload) Host() string {
	if w.Spec.Address != "" {
		return w.Spec.Address
	}
	return "127.0.0.1"
}
