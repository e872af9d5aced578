// SPDX-License-Identifier: Apache-2.0

package discovery

import (
	"context"
	"fmt"
	"strings"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// RoleAuthorize is the policy for Strait's own proxies, as Config.Authorize. A workload sees its own Self, services by name,
// gateways, bundles and withdrawn identities; a gateway sees everything but Self. Nobody else sees anything. selfID says whose
// Self a name is; it may be called often and must not call the Server.
func RoleAuthorize(self spiffeid.TrustDomain, selfID func(name string) (spiffeid.ID, bool),
) func(ctx context.Context, peer spiffeid.ID, node, typeURL, name string) error {
	return func(_ context.Context, peer spiffeid.ID, _, typeURL, name string) error {
		if peer.TrustDomain() != self {
			return fmt.Errorf("%s is not of trust domain %s", peer, self)
		}
		if _, ok := peer.Gateway(); ok {
			switch typeURL {
			case controlpb.TypeService, controlpb.TypeGateway, controlpb.TypeBundle, controlpb.TypePeer, controlpb.TypeGrant, controlpb.TypeDenied:
				return nil
			}
			return fmt.Errorf("a gateway may not see %s", typeURL)
		}
		namespace, _, ok := peer.Workload()
		if !ok {
			return fmt.Errorf("%s is neither workload nor gateway", peer)
		}
		switch typeURL {
		case controlpb.TypeGateway, controlpb.TypeBundle, controlpb.TypeDenied:
			return nil
		case controlpb.TypeService:
			if name == Wildcard {
				return fmt.Errorf("a workload subscribes to the services it calls, not to all")
			}
			return nil
		case controlpb.TypeSelf:
			owner, known := selfID(name)
			if name == Wildcard || !strings.HasPrefix(name, namespace+"/") || !known || owner != peer {
				return fmt.Errorf("%s is not the proxy %s", peer, name)
			}
			return nil
		}
		return fmt.Errorf("a workload may not see %s", typeURL)
	}
}

// RoleVerifyNode is the policy for the node IDs of Strait's own proxies, as Config.VerifyNode: a gateway's is its name, a
// sidecar's the name of a proxy of its namespace that is nobody else's. A proxy that is not known (yet) may be anybody's of
// that namespace: what it sees is Authorize's to judge.
func RoleVerifyNode(selfID func(name string) (spiffeid.ID, bool)) func(context.Context, spiffeid.ID, *controlpb.Node) error {
	return func(_ context.Context, peer spiffeid.ID, node *controlpb.Node) error {
		if name, ok := peer.Gateway(); ok && name == node.GetId() {
			return nil
		}
		if namespace, _, ok := peer.Workload(); ok && strings.HasPrefix(node.GetId(), namespace+"/") {
			if owner, known := selfID(node.GetId()); !known || owner == peer {
				return nil
			}
		}
		return fmt.Errorf("%s is not node %.100q", peer, node.GetId())
	}
}
