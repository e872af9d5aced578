// SPDX-License-Identifier: Apache-2.0

// Code generated from codes.yaml by gen; DO NOT EDIT.

package problem

// The codes.
const (
	Usage                 Code = "STR-1001" // usage error
	ConfigInvalid         Code = "STR-1002" // component configuration is not valid
	AmbiguousName         Code = "STR-1003" // a bare name matches more than one object
	NotFound              Code = "STR-1004" // object not found
	ConfirmationNeeded    Code = "STR-1005" // confirmation needed
	NoControlPlane        Code = "STR-1101" // no control plane answers
	AlreadyInitialized    Code = "STR-1102" // the data directory already holds a cluster
	DataDirBusy           Code = "STR-1103" // the data directory is in use
	StateCorrupt          Code = "STR-1104" // a state file is damaged
	InvalidObject         Code = "STR-1201" // validation refused the object
	ReturnNotAboveTrip    Code = "STR-1204" // return threshold must be above trip
	NotAccepted           Code = "STR-1205" // the control plane does not accept the object
	NotProgrammed         Code = "STR-1206" // accepted, but not every proxy has it yet
	ClusterUnreachable    Code = "STR-2101" // a cluster is unreachable
	GatewayNotReachable   Code = "STR-2104" // gateway not reachable
	NoGateway             Code = "STR-2105" // no gateway of this cluster is running
	ProbeFailed           Code = "STR-2106" // the probe did not cross the tunnel
	AwaitingApproval      Code = "STR-2107" // awaiting approval
	TokenMalformed        Code = "STR-2201" // not a join token
	TokenExpired          Code = "STR-2202" // the join token has expired
	TokenRevoked          Code = "STR-2203" // the join token was revoked
	TokenBound            Code = "STR-2204" // the join token belongs to another joiner
	TokenUnknown          Code = "STR-2205" // the issuer does not know this token
	TokenWrongFederation  Code = "STR-2206" // the token is for another federation
	TokenScope            Code = "STR-2207" // the token is not for this cluster
	ClockSkew             Code = "STR-2208" // clocks differ too much
	NameTaken             Code = "STR-2209" // the cluster name is taken
	IdentityMismatch      Code = "STR-2210" // the other side did not prove the identity in the token
	ProofRefused          Code = "STR-2211" // the proof of the token was refused
	AddressRefused        Code = "STR-2212" // a gateway's address is not acceptable
	VersionSkew           Code = "STR-2301" // versions do not work together
	NotExported           Code = "STR-3101" // the service is not exported to this cluster
	CatalogRefused        Code = "STR-3201" // a peer's catalog was refused
	CatalogFork           Code = "STR-3202" // a peer signed two catalogs with the same number
	CatalogStale          Code = "STR-3203" // a peer's catalog is stale
	NoEndpoints           Code = "STR-4102" // no healthy endpoint in any cluster
	UnknownService        Code = "STR-4103" // no such service
	UpstreamReset         Code = "STR-4104" // the connection to the callee broke
	DeadlineExceeded      Code = "STR-4105" // the callee did not answer in time
	FailoverOverload      Code = "STR-4107" // the next tier may not have the capacity
	FailoverActive        Code = "STR-4108" // a service is failing over
	RootExpiring          Code = "STR-5101" // a root expires soon
	CertificateExpiring   Code = "STR-5102" // a certificate expires soon
	RotationPhase         Code = "STR-5121" // the rotation is in another phase
	RotationWaits         Code = "STR-5122" // not everybody has what the step needs
	RotationUnfinished    Code = "STR-5123" // the next step of the rotation is not possible yet
	RotationElsewhere     Code = "STR-5124" // the root is rotated elsewhere
	RootKeyOffline        Code = "STR-5131" // the root's key is not here
	IssuerRefused         Code = "STR-5132" // the certificate of the root or issuer is not acceptable
	KeyFileExposed        Code = "STR-5133" // others may have read a key
	ExternalCARefused     Code = "STR-5134" // the external CA's files cannot be used
	IssuerEnding          Code = "STR-5135" // the issuer ends, and the root's key is not here to replace it
	TrustRefused          Code = "STR-5201" // identity refused
	CertNotYetValid       Code = "STR-5203" // peer certificate not yet valid
	IdentityExpired       Code = "STR-5204" // the own identity has expired
	BundleNotFollowed     Code = "STR-5205" // the bundle of a foreign trust domain is not refreshed
	NothingPresented      Code = "STR-5206" // no certificate to inspect
	RegistrationRefused   Code = "STR-5301" // registration refused
	AccessDenied          Code = "STR-5302" // operator access denied
	RegistrationBusy      Code = "STR-5303" // registration is not possible now
	IdentityWithdrawn     Code = "STR-5311" // the identity was withdrawn
	WithdrawalUnconfirmed Code = "STR-5312" // not everybody has confirmed the withdrawal yet
	IdentityNotOffered    Code = "STR-5321" // the Workload API offers no fitting identity
	IdentitiesElsewhere   Code = "STR-5322" // identities come from the Workload API
	IdentityShortLived    Code = "STR-5323" // identities live for less than 36 hours
	PolicyDenied          Code = "STR-6101" // denied by an access policy
	RequestRefused        Code = "STR-6102" // the request was refused
	DemoRunning           Code = "STR-7101" // a demo is already running
	DemoNotRunning        Code = "STR-7102" // no demo is running
	TraceNotFound         Code = "STR-8101" // no such trace
	Internal              Code = "STR-9001" // internal error
)
