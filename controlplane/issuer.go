// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// externalEvery is how often the external CA's files are read: a renewed intermediate is in use that much later at most.
const externalEvery = 10 * time.Second

// issuerWarning is how long before the issuer's end check asks for the next one, when nobody here can make it. The issuer is replaced 90 days
// before its end where the root's key is.
const issuerWarning = 90 * 24 * time.Hour

// needOwnCA refuses what concerns our CA's keys where there is none.
func (o *operator) needOwnCA(what string) error {
	if o.c.ca == nil {
		return identitiesElsewhere(what)
	}
	return nil
}

// IssuerRequest implements controlpb.OperatorServer.
func (o *operator) IssuerRequest(context.Context, *controlpb.IssuerRequestRequest) (*controlpb.IssuerRequestResponse, error) {
	if err := o.needOwnCA("there is no issuer here"); err != nil {
		return nil, wire.ToStatus(err)
	}
	csr, err := o.c.ca.IssuerRequest()
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	o.c.log.Info("an issuer was requested")
	return &controlpb.IssuerRequestResponse{CsrPem: csr}, nil
}

// IssuerImport implements controlpb.OperatorServer.
func (o *operator) IssuerImport(_ context.Context, req *controlpb.IssuerImportRequest) (*controlpb.TrustStatusResponse, error) {
	if err := o.needOwnCA("there is no issuer here"); err != nil {
		return nil, wire.ToStatus(err)
	}
	if err := o.c.ca.ImportIssuer(req.ChainPem); err != nil {
		return nil, wire.ToStatus(err)
	}
	o.c.log.Info("an issuer was imported", "not_after", o.c.ca.IssuerNotAfter())
	return o.c.trustStatus(), nil
}

// issueFor is IssueCSR with a word for the CA's ledger about who has asked.
func (c *ControlPlane) issueFor(by string, csr []byte, id spiffeid.ID, ttl time.Duration) ([][]byte, error) {
	if c.ca == nil {
		return c.issuer.IssueCSR(csr, id, ttl)
	}
	return c.ca.IssueCSRFor(by, csr, id, ttl)
}

// externalLoop follows the external CA's files. Whatever is wrong with them is said once, and again when it changes.
func (c *ControlPlane) externalLoop(ctx context.Context) error {
	if c.ca == nil || c.cfg.ExternalCA == "" {
		return nil
	}
	t := time.NewTicker(externalEvery)
	defer t.Stop()
	said := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		before := c.ca.Bundle().Sequence()
		text := ""
		if err := c.ca.Refresh(); err != nil {
			text = err.Error()
		}
		switch after := c.ca.Bundle().Sequence(); {
		case text != "" && text != said:
			c.log.Error("the external CA's files are not taken; those before stay", "dir", c.cfg.ExternalCA, "err", text)
		case text == "" && (said != "" || after != before):
			c.log.Info("the external CA's files are taken", "dir", c.cfg.ExternalCA, "sequence", after)
		}
		said = text
	}
}

// checkIssuer says what only the holder of a root's key, or of the external CA, can do.
func (c *ControlPlane) checkIssuer(k *checks) {
	if c.ca == nil {
		return
	}
	s := c.ca.State()
	if s.Trouble != "" {
		k.bad("trust", "warn", problem.ExternalCARefused, s.Trouble, "correct the files; they are read again within seconds", "the files in %s are not taken; those before stay", c.cfg.ExternalCA)
	}
	offline := false
	for _, a := range s.Authorities {
		offline = offline || a.Kind == "root" && a.State != "prepared" && a.Key == "offline"
	}
	if !offline && !s.External {
		return
	}
	left := c.ca.IssuerNotAfter().Sub(c.now())
	switch {
	case s.External && left < c.leafMargin():
		k.bad("trust", "warn", problem.IssuerEnding, "identities cannot outlive it", "see why the external CA does not renew "+c.cfg.ExternalCA+"/tls.crt",
			"the external CA's intermediate ends in %s", shortTime(left))
	case offline && left < issuerWarning:
		state := "warn"
		if left <= 0 {
			state = "fail"
		}
		k.bad("trust", state, problem.IssuerEnding, fmt.Sprintf("everything goes on until %s, and nothing is issued afterwards", c.ca.IssuerNotAfter().UTC().Format(time.DateOnly)),
			"strait trust issuer request > issuer.csr; strait trust root sign --root FILE issuer.csr > issuer.pem where the key is; strait trust issuer import issuer.pem",
			"the issuer ends in %s, and the root's key is offline", shortTime(left))
	}
}

// caFiles are the CA's files at one moment, for a backup; none where identities come from elsewhere.
func (c *ControlPlane) caFiles() (map[string][]byte, error) {
	if c.ca == nil {
		return nil, nil
	}
	return c.ca.Files()
}

// raiseSequence takes our bundle past a sequence that a member has seen of it.
func (c *ControlPlane) raiseSequence(seen uint64) error {
	if c.elsewhere != nil {
		return errors.New("identities come from a Workload API, and so does the bundle")
	}
	return c.ca.RaiseSequence(seen)
}
