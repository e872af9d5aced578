// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"time"

	"google.golang.org/protobuf/proto"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Input is everything that Compile looks at. Lists may be in any order.
type Input struct {
	Self     Self
	Objects  *api.Objects // sorted (api.Objects.Sort)
	Sessions []Session
	Gateways []Gateway // of this cluster
	Peers    []Peer
	Denied   []Denied
	Foreign  []Foreign // trust domains of no members
	LastGood LastGood  // Output.LastGood of the run before, or as persisted
}

// Self is this cluster.
type Self struct {
	Federation  federation.FederationName
	Cluster     federation.ClusterName
	Locality    federation.Locality
	TrustDomain spiffeid.TrustDomain
	Bundle      []byte // JWKS
	BundleSeq   uint64
	// RenewIssuedBefore is when the CA last recalled identities: those issued before are to be renewed. Zero: never.
	RenewIssuedBefore time.Time
}

// Session is a sidecar that reports or has reported.
type Session struct {
	Namespace, Proxy string
	ID               spiffeid.ID // proven by its certificate
	InboundAddress   string
	Locality         federation.Locality
	Silent           bool // its last verdicts are kept
	Draining         bool
	Instances        []InstanceHealth
	// LastState is the decision state (federation.State as JSON) per service that it last reported, to seed it after a restart.
	LastState map[string][]byte
}

// InstanceHealth is a sidecar's verdict about one port of a workload. An empty Port means all ports.
type InstanceHealth struct {
	Workload string
	Port     string
	Health   controlpb.Health
	Reason   string
}

// Gateway is one gateway of this cluster.
type Gateway struct {
	Name         string
	LocalAddress string
	Advertise    []string
	Zone         string
	Draining     bool
}

// Peer is another member.
type Peer struct {
	TrustDomain spiffeid.TrustDomain
	Cluster     federation.ClusterName
	Federation  federation.FederationName
	Region      string
	Ready       bool     // else joining
	Sameness    []string // namespaces; "*" is all. Where a Peer object of the cluster's name exists, that decides instead.
	Bundle      []byte   // JWKS
	BundleSeq   uint64
	Gateways    []*controlpb.GatewayRecord
	Catalog     *Catalog // nil: none yet
	Tunnel      Tunnel   // the best one
	Denied      []Denied // of its own trust domain; others are not listened to
}

// Catalog is what a peer offers us, verified.
type Catalog struct {
	Epoch, Seq uint64
	Freshness  controlpb.Freshness
	Services   []Offered
}

// Offered is one entry of a peer's catalog.
type Offered struct {
	Version uint64 // sequence at which it last changed; what is reported as the catalog's, so that one change pushes one service
	Service *controlpb.CatalogService
}

// Tunnel is the best path to a peer.
type Tunnel struct {
	Up        bool
	RTT       time.Duration
	Transport string
}

// Denied is a withdrawn identity, of this cluster or as a peer says of its own.
type Denied struct {
	ID           spiffeid.ID
	Reason       string
	IssuedBefore time.Time // zero: withdrawn altogether; else only certificates issued before
}

// Output is what Compile made.
type Output struct {
	// Resources by type URL (controlpb.TypeSelf …) and name. Each type is present, though it may be empty.
	Resources map[string]map[string]proto.Message
	// Catalog is what each ready peer may see, by trust domain and entry key ("svc/<ns>/<name>", "gw/<name>").
	Catalog map[spiffeid.TrustDomain]map[string]proto.Message
	// Exports says where each local service goes, for status and member listings.
	Exports map[federation.ServiceName][]federation.ClusterName
	// Conditions are to be written where they differ from what the objects hold.
	Conditions []ConditionUpdate
	// Problems are things seen that belong to no object of ours, such as a peer's entry that was dropped.
	Problems []string
	LastGood LastGood
}

// ConditionUpdate is the status that one object should have. LastTransitionTime is left to the writer.
type ConditionUpdate struct {
	Ref        api.Ref
	Generation int64
	Conditions []metav1.Condition
}

// LastGood keeps the last versions of policies that were fully understood, by "<namespace>/<name>". It is JSON.
type LastGood struct {
	Access   map[string]*api.AccessPolicy   `json:"access,omitempty"`
	Failover map[string]*api.FailoverPolicy `json:"failover,omitempty"`
}
