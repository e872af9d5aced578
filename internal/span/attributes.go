// SPDX-License-Identifier: Apache-2.0

package span

// Attribute keys. Those without the strait prefix are OpenTelemetry's semantic conventions.
const (
	ServiceName      = "service.name" // resource
	ServiceNamespace = "service.namespace"
	ServiceInstance  = "service.instance.id"
	ServiceVersion   = "service.version"
	CloudRegion      = "cloud.region"
	CloudZone        = "cloud.availability_zone"
	HostName         = "host.name"
	Federation       = "strait.federation"
	Cluster          = "strait.cluster"
	Role             = "strait.role"
	TrustDomain      = "strait.trust_domain"

	HTTPMethod      = "http.request.method" // every hop
	HTTPRoute       = "http.route"
	HTTPStatus      = "http.response.status_code"
	HTTPResendCount = "http.request.resend_count"
	URLScheme       = "url.scheme"
	ServerAddress   = "server.address"
	ServerPort      = "server.port"
	ClientAddress   = "client.address"
	NetworkPeer     = "network.peer.address"
	NetworkProtocol = "network.protocol.name"
	NetworkVersion  = "network.protocol.version"
	ErrorType       = "error.type"
	RPCSystem       = "rpc.system.name"
	RPCMethod       = "rpc.method"
	RPCStatus       = "rpc.status_code"
	ServicePeerName = "service.peer.name"

	HopKind    = "strait.hop.kind"
	HopIndex   = "strait.hop.index"
	SrcService = "strait.src.service"
	SrcCluster = "strait.src.cluster"
	SrcRegion  = "strait.src.region"
	SrcZone    = "strait.src.zone"
	DstService = "strait.dst.service"
	DstCluster = "strait.dst.cluster"
	DstRegion  = "strait.dst.region"
	DstZone    = "strait.dst.zone"
	MTLSPeerID = "strait.mtls.peer_id"

	DecisionReason     = "strait.decision.reason" // attempt
	DecisionTier       = "strait.decision.tier"
	DecisionPolicy     = "strait.decision.policy"
	DecisionRevision   = "strait.decision.revision"
	DecisionCandidates = "strait.decision.candidates"
	RetryBudgetLeft    = "strait.retry.budget_left"
	QueueDuration      = "strait.queue.duration_ms"
	DeadlineLeft       = "strait.deadline.left_ms"
	LBAlgorithm        = "strait.lb.algorithm"
	Instance           = "strait.instance"
	ProxyError         = "strait.error.code" // STR-… of a generated response

	TunnelID            = "strait.tunnel.id" // tunnel
	TunnelTransport     = "strait.tunnel.transport"
	TunnelLane          = "strait.tunnel.lane"
	TunnelRTT           = "strait.tunnel.rtt_ms"
	TunnelLoss          = "strait.tunnel.loss"
	TunnelStreams       = "strait.tunnel.streams"
	TunnelWindow        = "strait.tunnel.congestion_window"
	TunnelWait          = "strait.tunnel.wait_ms"
	TunnelBytes         = "strait.tunnel.bytes"
	TunnelGatewayLocal  = "strait.tunnel.gateway_local"
	TunnelGatewayRemote = "strait.tunnel.gateway_remote"
)

// Values of HopKind.
const (
	SidecarOut = "sidecar_out"
	GatewayOut = "gateway_out"
	GatewayIn  = "gateway_in"
	SidecarIn  = "sidecar_in"
)

// Names of events.
const (
	EventFailover        = "failover" // from, to, reason
	EventRetry           = "retry"    // cause
	EventEject           = "eject"
	EventCircuitOpen     = "circuit_open"
	EventTunnelReconnect = "tunnel_reconnect"
	EventConfigChanged   = "config_revision_changed"
)
