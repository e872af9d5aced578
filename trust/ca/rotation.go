// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Phases of a rotation.
const (
	Steady    = "steady"    // one root, one issuer
	Prepared  = "prepared"  // the next root and JWT key are in the bundle; nothing is issued by them
	Activated = "activated" // the next root signs; whoever knows only the one before still verifies
)

// State says what a CA signs with, and where a rotation stands.
type State struct {
	Phase       string    // Steady, Prepared or Activated
	Since       time.Time // when the phase began; zero when a version before made the data directory
	External    bool      // an external CA is the root; it rotates by itself
	Authorities []Authority
	// RenewIssuedBefore is when identities were last recalled: whoever holds one issued before should renew at once. The zero
	// time: never. Every identity that is issued afterwards counts as issued at or after it.
	RenewIssuedBefore time.Time
	// Trouble is why the external CA's files were not taken, "" when the present ones serve.
	Trouble string
}

// Authority is a root, an issuer or a JWT signing key.
type Authority struct {
	Kind      string            // root, issuer, jwt
	State     string            // active, prepared, retiring
	Cert      *x509.Certificate // nil for jwt
	KeyID     string            // kid of a JWT key; hex of the subject key identifier of a certificate
	Key       string            // here, offline, external
	NotBefore time.Time         // zero for jwt
	NotAfter  time.Time         // zero for jwt
}

// lockForStep refuses what an external CA does by itself.
func (c *CA) lockForStep(step string) error {
	c.mu.Lock()
	if c.cur.ext == nil {
		return nil
	}
	c.mu.Unlock()
	return problem.New(problem.RotationElsewhere, "%s: the root of %s is the external CA's in %s", step, c.td, c.external).WithState("nothing was changed.")
}

func wrongPhase(step string, m *material, why string) error {
	return problem.New(problem.RotationPhase, "%s: the phase is %s", step, m.st.Phase).WithWhy("%s", why).WithState("nothing was changed.")
}

// Prepare makes the next root and JWT key and publishes them in the bundle, with the next sequence number. Nothing is issued
// by them. In phase Prepared it does nothing.
func (c *CA) Prepare() error { return c.prepare(nil) }

// PrepareRoot is Prepare with a root whose key is kept elsewhere: its certificate, PEM. In phase Prepared it does nothing, unless that
// was for another root.
func (c *CA) PrepareRoot(rootPEM []byte) error {
	f, err := parseKeyFile(rootPEM)
	switch {
	case err != nil:
		return problem.New(problem.IssuerRefused, "prepare: the root: %v", err).WithState("nothing was changed.").Wrap(err)
	case f.key != nil:
		return problem.New(problem.IssuerRefused, "prepare: the file holds a private key").WithWhy("a root whose key is to be here is made by prepare without a file").
			WithFix("give the certificate alone: strait trust root new writes both").WithState("nothing was changed, and the key was not kept.")
	case len(f.certs) != 1:
		return problem.New(problem.IssuerRefused, "prepare: %d certificates; want the root's alone", len(f.certs)).WithState("nothing was changed.")
	}
	return c.prepare(f.certs[0])
}

func (c *CA) prepare(given *x509.Certificate) error {
	if err := c.lockForStep("prepare"); err != nil {
		return err
	}
	defer c.mu.Unlock()
	m, now := c.cur, c.now()
	switch {
	case m.st.Phase == Prepared && given != nil && !given.Equal(m.roots[1].cert):
		return wrongPhase("prepare", m, "another root is prepared; abort drops it")
	case m.st.Phase == Prepared:
		return c.tidyLocked()
	case m.st.Phase != Steady:
		return wrongPhase("prepare", m, "a rotation is under way; retire ends it")
	}
	r := &root{file: newName("root"), cert: given}
	if given != nil {
		if err := checkRoot(given, m.roots, c.td, now); err != nil {
			return problem.New(problem.IssuerRefused, "prepare: the root %q: %v", given.Subject.CommonName, err).WithState("nothing was changed.").Wrap(err)
		}
	} else {
		p, err := c.newRoot(now, " "+strings.TrimSuffix(strings.TrimPrefix(r.file, caDir+"/root-"), ".pem"))
		if err != nil {
			return fmt.Errorf("prepare: %w", err)
		}
		r.cert, r.key = p.cert, p.key
	}
	if err := writeKeyFile(c.dir, r.file, &keyFile{[]*x509.Certificate{r.cert}, r.key}); err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	k, err := c.newJWT()
	if err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	next := m.next()
	next.roots, next.jwt = append(next.roots, r), append(next.jwt, k)
	return c.step("prepare", next, Prepared, now)
}

// newRoot makes a root and writes it down.
func (c *CA) newRoot(now time.Time, suffix string) (*pair, error) {
	n, err := c.authorities.serial(now)
	if err != nil {
		return nil, err
	}
	p, err := selfSigned(caTemplate("Strait root of "+c.td.String()+suffix, n, now, RootLifetime, 1, c.td))
	if err != nil {
		return nil, fmt.Errorf("create root: %w", err)
	}
	return p, c.authorities.record(p.cert, "spiffe://"+c.td.String(), "root", "control plane", now)
}

// checkRoot judges a root that is to sign issuers of td.
func checkRoot(r *x509.Certificate, present []*root, td spiffeid.TrustDomain, now time.Time) error {
	id, err := rootDomain(r)
	switch {
	case err != nil:
		return err
	case id != td:
		return fmt.Errorf("is of %s, not of %s", id, td)
	case !r.IsCA || !r.BasicConstraintsValid || r.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("is no CA certificate")
	case r.MaxPathLen == 0 && r.MaxPathLenZero:
		return fmt.Errorf("has path length 0: it may not sign an issuer")
	case len(r.PermittedURIDomains) > 0 && !slices.Contains(r.PermittedURIDomains, td.String()):
		return fmt.Errorf("may not sign names of %s", td)
	case now.Before(r.NotBefore):
		return fmt.Errorf("is valid from %s only", r.NotBefore.UTC().Format(time.RFC3339))
	case r.NotAfter.Before(now.Add(issuerRenewal)):
		return fmt.Errorf("ends at %s; at least %d days are asked for", r.NotAfter.UTC().Format(time.RFC3339), issuerRenewal/(24*time.Hour))
	case r.CheckSignatureFrom(r) != nil:
		return fmt.Errorf("is not signed by itself")
	case len(r.SubjectKeyId) == 0:
		return fmt.Errorf("has no subject key identifier")
	}
	for _, p := range present {
		if samePublic(p.cert.PublicKey, r.PublicKey) || string(p.cert.RawSubject) == string(r.RawSubject) && keyIDOf(p.cert) == keyIDOf(r) {
			return fmt.Errorf("has the key, or name and key identifier, of the present root")
		}
	}
	return nil
}

// step commits a change of phase. Prefix is for errors.
func (c *CA) step(prefix string, next *material, phase string, now time.Time) error {
	next.st.Phase, next.st.Since = phase, now.UTC()
	if err := c.commitLocked(next); err != nil {
		return fmt.Errorf("%s: %w", prefix, err)
	}
	return nil
}

// recallLocked is the RenewIssuedBefore that recalls everything issued until now: the first full second after that.
func (c *CA) recallLocked(now time.Time) time.Time {
	t := now
	for _, before := range []time.Time{c.last, c.cur.st.RenewIssuedBefore} {
		if before.After(t) {
			t = before
		}
	}
	return t.Truncate(time.Second).Add(time.Second).UTC()
}

// Activate makes a new issuer, certified by the next root and by the one before it, and issues by it from now on; identities
// from before are recalled (State.RenewIssuedBefore). In phase Activated it does nothing. When a root's key is not here, an
// issuer that it signed must have been imported (ImportIssuer); without one the error is problem.RootKeyOffline.
func (c *CA) Activate() error {
	if err := c.lockForStep("activate"); err != nil {
		return err
	}
	defer c.mu.Unlock()
	m, now := c.cur, c.now()
	switch m.st.Phase {
	case Activated:
		return c.tidyLocked()
	case Steady:
		return wrongPhase("activate", m, "nothing is prepared")
	}
	roots := []*root{m.roots[1], m.roots[0]}
	next := m.next()
	if next.issuer = m.imported; next.issuer == nil {
		if offline := offlineRoots(roots, now); len(offline) > 0 {
			return problem.New(problem.RootKeyOffline, "activate: no issuer was imported, and the key of %s is offline", strings.Join(offline, " and ")).
				WithWhy("the next issuer must be signed by the new root, and by the one before for those who do not know the new one yet").
				WithFix("strait trust issuer request > issuer.csr").WithFix("where each of these keys is: strait trust root sign --root FILE issuer.csr >> issuer.pem").
				WithFix("strait trust issuer import issuer.pem").WithFix("strait trust rotate activate").
				WithState("the rotation stays prepared; identities are issued as before.")
		}
		i, err := c.newIssuer(newName("issuer"), roots, now, "activate")
		if err != nil {
			return fmt.Errorf("activate: %w", err)
		}
		next.issuer = i
	}
	next.imported, next.st.RenewIssuedBefore = nil, c.recallLocked(now)
	return c.step("activate", next, Activated, now)
}

// Retire takes the root and the JWT key from before the rotation out of the bundle, with the next sequence number, deletes their
// keys, and recalls identities once more. It does not ask whether anybody still needs them: the caller does.
func (c *CA) Retire() error {
	if err := c.lockForStep("retire"); err != nil {
		return err
	}
	defer c.mu.Unlock()
	m, now := c.cur, c.now()
	switch m.st.Phase {
	case Steady:
		return wrongPhase("retire", m, "nothing is activated; an earlier retire may have ended the rotation")
	case Prepared:
		return wrongPhase("retire", m, "the next root does not sign yet; activate comes first, or abort")
	}
	next := m.next()
	next.roots, next.jwt = next.roots[1:], next.jwt[1:]
	next.st.Phase, next.st.RenewIssuedBefore = Steady, c.recallLocked(now)
	if err := next.orderIssuer(); err != nil {
		return fmt.Errorf("retire: %w", err)
	}
	return c.step("retire", next, Steady, now)
}

// Abort takes what Prepare made out of the bundle again, with the next sequence number. After Activate it is refused.
func (c *CA) Abort() error {
	if err := c.lockForStep("abort"); err != nil {
		return err
	}
	defer c.mu.Unlock()
	m := c.cur
	switch m.st.Phase {
	case Steady:
		return wrongPhase("abort", m, "nothing is prepared")
	case Activated:
		return wrongPhase("abort", m, "identities of the new root are in use; retire ends the rotation, and another one may follow")
	}
	next := m.next()
	next.roots, next.jwt, next.imported = next.roots[:1], next.jwt[:1], nil
	return c.step("abort", next, Steady, c.now())
}

// State says what the CA signs with now.
func (c *CA) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.cur
	s := State{Phase: m.st.Phase, Since: m.st.Since, External: m.ext != nil, RenewIssuedBefore: m.st.RenewIssuedBefore, Trouble: c.trouble}
	states := map[string][]string{Steady: {"active"}, Prepared: {"active", "prepared"}, Activated: {"retiring", "active"}}[m.st.Phase]
	if m.ext != nil {
		for _, r := range m.ext.roots {
			s.Authorities = append(s.Authorities, authority("root", "active", r, "external"))
		}
		s.Authorities = append(s.Authorities, authority("issuer", "active", m.ext.certs[0], "external"))
	} else {
		for n, r := range m.roots {
			where := "here"
			if r.key == nil {
				where = "offline"
			}
			s.Authorities = append(s.Authorities, authority("root", states[n], r.cert, where))
		}
		for n, cert := range m.issuer.certs {
			s.Authorities = append(s.Authorities, authority("issuer", []string{"active", "retiring"}[n], cert, "here"))
		}
		if m.imported != nil {
			s.Authorities = append(s.Authorities, authority("issuer", "prepared", m.imported.certs[0], "here"))
		}
	}
	for n, k := range m.jwt {
		s.Authorities = append(s.Authorities, Authority{Kind: "jwt", State: states[n], KeyID: k.id, Key: "here"})
	}
	return s
}

func authority(kind, state string, c *x509.Certificate, key string) Authority {
	return Authority{Kind: kind, State: state, Cert: c, KeyID: hex.EncodeToString(c.SubjectKeyId), Key: key, NotBefore: c.NotBefore, NotAfter: c.NotAfter}
}

// Changed returns a channel that is closed when bundle, issuer or phase change next. Ask for the channel before reading.
func (c *CA) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

// RaiseSequence takes the own bundle past a sequence number under which somebody has seen it: after a restore from a backup the bundle's
// sequence may lie behind what was published, and readers would refuse it. At most 2³² are skipped: seen may be a lie.
func (c *CA) RaiseSequence(seen uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.cur
	switch {
	case seen <= m.st.Sequence:
		return nil
	case seen-m.st.Sequence > 1<<32:
		return fmt.Errorf("raise the sequence of the bundle of %s: %d is too far from %d", c.td, seen, m.st.Sequence)
	}
	next := m.next()
	next.st.Sequence, next.st.Content = seen, ""
	return c.commitLocked(next)
}
