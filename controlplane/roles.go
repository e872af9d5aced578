// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/identity"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// role of an operator; each may do what the lower ones may.
type role int

const (
	roleNone role = iota
	roleViewer
	roleOperator
	roleAdmin
)

var roleNames = map[string]role{"viewer": roleViewer, "operator": roleOperator, "admin": roleAdmin}

// operatorMethods says which role each RPC of the Operator service asks for. A method without a row is refused, and a test
// compares the table with the proto.
var operatorMethods = map[string]role{
	"Status": roleViewer, "TokenList": roleViewer, "MemberList": roleViewer, "ServiceList": roleViewer, "Why": roleViewer,
	"Trace": roleViewer, "Ping": roleViewer, "Check": roleViewer,
	"WorkloadToken": roleOperator, "WorkloadEvict": roleOperator, "WorkloadReadmit": roleOperator,
	"TrustStatus": roleViewer, "Withdrawals": roleViewer, "TrustRotate": roleAdmin, "TrustRevoke": roleAdmin,
	"IssuerRequest": roleAdmin, "IssuerImport": roleAdmin,
	"TokenIssue": roleAdmin, "TokenRevoke": roleAdmin, "Join": roleAdmin, "Leave": roleAdmin, "MemberApprove": roleAdmin,
	"MemberEvict": roleAdmin, "AccessIssue": roleAdmin, "GatewayToken": roleAdmin, "Backup": roleAdmin,
}

// operatorRoles remembers which role was issued to which operator; a certificate alone says only who it is.
type operatorRoles struct {
	dir *datadir.Dir

	mu    sync.Mutex
	roles map[string]grantedRole
}

type grantedRole struct {
	Role    string    `json:"role"`
	Expires time.Time `json:"expires"`
}

const rolesFile = "identity/operators.json"

func (r *operatorRoles) open(dir *datadir.Dir) error {
	r.dir, r.roles = dir, map[string]grantedRole{}
	data, err := dir.ReadState(rolesFile)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, datadir.ErrCorrupt) {
		return nil // nobody has a role then
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(data, &r.roles)
}

func (r *operatorRoles) grant(name, role string, expires time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := map[string]grantedRole{name: {role, expires}}
	for n, g := range r.roles {
		if n != name {
			next[n] = g
		}
	}
	data, err := json.Marshal(next)
	if err != nil {
		return err
	}
	if err := r.dir.WriteState(rolesFile, data); err != nil {
		return err
	}
	r.roles = next
	return nil
}

func (r *operatorRoles) of(name string, now time.Time) role {
	r.mu.Lock()
	defer r.mu.Unlock()
	g, ok := r.roles[name]
	if !ok || !now.Before(g.Expires) {
		return roleNone
	}
	return roleNames[g.Role]
}

// allowAPIClient judges a client certificate of the configuration API by what 7400 would say of its operator: a certificate alone
// keeps the role that it was issued with, also after that was lowered or its holder withdrawn.
func (c *ControlPlane) allowAPIClient(leaf *x509.Certificate) error {
	name := leaf.Subject.CommonName
	id, err := spiffeid.Operator(c.self.trustDomain, name)
	if err != nil {
		return err
	}
	if reason, denied := c.denied.Denied(id, trust.Issued(leaf)); denied {
		return fmt.Errorf("%s was withdrawn: %s", id, reason)
	}
	for _, g := range leaf.Subject.Organization {
		if roleNames[g] > c.roles.of(name, c.now()) {
			return fmt.Errorf("%s does not have the role %s any more", id, g)
		}
	}
	return nil
}

// authorizeOperator judges a call of the Operator service that came over mTLS. Calls of other services pass: identity's table
// of roles has judged them.
func (c *ControlPlane) authorizeOperator(ctx context.Context, fullMethod string) error {
	method, ok := strings.CutPrefix(fullMethod, "/"+controlpb.Operator_ServiceDesc.ServiceName+"/")
	if !ok {
		return nil
	}
	id, err := identity.IDFromContext(ctx)
	if err != nil {
		return err
	}
	name, isOperator := id.Operator()
	need, known := operatorMethods[method]
	if !isOperator || !known || c.roles.of(name, c.now()) < need {
		return wire.ToStatus(problem.New(problem.AccessDenied, "%s may not call %s", id, method))
	}
	return nil
}

func (c *ControlPlane) operatorUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := c.authorizeOperator(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (c *ControlPlane) operatorStream(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := c.authorizeOperator(s.Context(), info.FullMethod); err != nil {
		return err
	}
	return next(srv, s)
}
