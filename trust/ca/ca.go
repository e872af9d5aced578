// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Lifetimes.
const (
	RootLifetime   = 10 * 365 * 24 * time.Hour
	IssuerLifetime = 365 * 24 * time.Hour
	DefaultTTL     = 36 * time.Hour
	Backdate       = 10 * time.Minute // NotBefore lies this far back, for clocks that differ
	issuerRenewal  = 90 * 24 * time.Hour

	maxRequest = 16 << 10
)

// Config of a CA.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Now         func() time.Time // nil: time.Now
	// External is a directory with tls.crt (an intermediate CA, then its chain), tls.key and ca.crt (the roots), as cert-manager
	// writes them: it takes the place of the CA's own root and issuer. Refresh rereads it. "": the CA has its own root.
	External string

	wrap func(files) files // of tests
}

// CA issues identities of one trust domain. Make it with Create or Open.
type CA struct {
	*API
	td          spiffeid.TrustDomain
	now         func() time.Time
	dir         files
	external    string
	svids       *ledger
	authorities *ledger

	mu      sync.Mutex
	cur     *material
	changed chan struct{}
	last    time.Time // the latest time that an identity counts as issued at
	trouble string
}

func newCA(dir *datadir.Dir, cfg Config) *CA {
	c := &CA{td: cfg.TrustDomain, now: cfg.Now, dir: cfg.files(dir), external: cfg.External, changed: make(chan struct{})}
	if c.now == nil {
		c.now = time.Now
	}
	c.svids, c.authorities = newLedger(c.dir, "svid"), newLedger(c.dir, "authority")
	return c
}

// files is the data directory, or what a test has put before it.
func (cfg Config) files(dir *datadir.Dir) files {
	if cfg.wrap != nil {
		return cfg.wrap(stored{dir})
	}
	return stored{dir}
}

// Exists reports whether the data directory at path holds a CA, which Create would refuse to overwrite.
func Exists(path string) bool {
	if _, err := os.Stat(filepath.Join(path, rootFile)); err == nil {
		return true
	}
	dir, err := datadir.Open(path, datadir.Options{})
	if err != nil {
		return false
	}
	return created(stored{dir})
}

// created reports whether a Create has come to its end: the root's file, or with an external CA the state, is its last. A rotation moves the
// root to another file.
func created(dir files) bool {
	if _, err := dir.ReadFile(rootFile); !errors.Is(err, fs.ErrNotExist) {
		return true
	}
	st, err := readState(dir)
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	return !slices.Contains(st.Roots, rootFile)
}

// Create makes a new root, issuer, JWT key and API CA below dir; with an external CA no root and no issuer. It refuses to overwrite.
func Create(dir *datadir.Dir, cfg Config) (*CA, error) {
	if cfg.TrustDomain.IsZero() {
		return nil, errors.New("create CA: no trust domain")
	}
	c := newCA(dir, cfg)
	if created(c.dir) {
		return nil, fmt.Errorf("create CA: %s holds one", dir.Path(caDir))
	}
	var err error
	if c.API, err = CreateAPI(dir, cfg); err != nil {
		return nil, err
	}
	if err := c.create(); err != nil {
		return nil, fmt.Errorf("create CA: %w", err)
	}
	return c, nil
}

func (c *CA) create() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	m := &material{st: state{Phase: Steady, Since: now.UTC()}}
	k, err := c.newJWT()
	if err != nil {
		return err
	}
	m.jwt = []*jwtKey{k}
	if c.external != "" {
		if m.ext, err = readExternal(c.external, c.td, now); err != nil {
			return err
		}
		if err := c.authorities.recordExternal(m.ext, c.td, now); err != nil {
			return err
		}
		return c.commitLocked(m)
	}
	p, err := c.newRoot(now, "")
	if err != nil {
		return err
	}
	m.roots = []*root{{rootFile, p.cert, p.key}}
	if m.issuer, err = c.newIssuer(issuerFile, m.roots, now, "init"); err != nil {
		return err
	}
	if err := c.commitLocked(m); err != nil {
		return err
	}
	return savePair(c.dir, rootFile, p) // last: it marks the CA as complete
}

// Open reads the CA below dir. An issuer within 90 days of its end is replaced.
func Open(dir *datadir.Dir, cfg Config) (*CA, error) {
	c := newCA(dir, cfg)
	var err error
	if c.API, err = OpenAPI(dir, cfg); err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	if err := c.open(); err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	return c, nil
}

func (c *CA) open() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	st, legacy, err := openState(c.dir, c.external != "")
	if err != nil {
		return err
	}
	m, err := load(c.dir, st)
	if err != nil {
		return err
	}
	if err := c.checkDomain(m); err != nil {
		return err
	}
	own, err := c.readOwn(legacy && len(m.roots) == 0)
	if err != nil {
		return err
	}
	if legacy && own != nil {
		m.st.Sequence, m.st.Content = own.Sequence(), contentOf(own)
	}
	if err := c.openSource(m); err != nil {
		return err
	}
	dirty, err := c.complete(m)
	if err != nil {
		return err
	}
	was := m.st
	if err := m.name(c.td); err != nil {
		return err
	}
	sameSource := (was.External == "") == (m.ext == nil)
	if sameSource && m.ext == nil && !legacy && was.Content != "" && was.Content != m.st.Content && !dirty {
		return problem.New(problem.StateCorrupt, "the roots and JWT keys below %s are not those that %s names", c.dir.Path(caDir), stateFile)
	}
	if own != nil && m.ext == nil && sameSource && !slices.ContainsFunc(m.bundle.Roots(), func(r *x509.Certificate) bool { return slices.ContainsFunc(own.Roots(), r.Equal) }) {
		return fmt.Errorf("%s lacks the root", bundleFile)
	}
	if own != nil && own.CheckUpdate(m.bundle) != nil { // files of different moments: go on after the newer
		m.st.Sequence, m.st.Content, dirty = own.Sequence(), "", true
	}
	c.cur = m
	if dirty || legacy || was.Sequence != m.st.Sequence || was.Content != m.st.Content || was.External != m.st.External {
		err = c.commitLocked(m)
	} else {
		err = c.tidyLocked()
	}
	if err == nil {
		err = c.renewLocked(c.now())
	}
	return err
}

// checkDomain takes the trust domain from the root when the caller did not say it, and compares it otherwise.
func (c *CA) checkDomain(m *material) error {
	if len(m.roots) == 0 {
		if c.td.IsZero() {
			return errors.New("no trust domain")
		}
		return nil
	}
	td, err := rootDomain(m.roots[0].cert)
	if err != nil {
		return err
	}
	if !c.td.IsZero() && c.td != td {
		return fmt.Errorf("the root is of %s, not of %s", td, c.td)
	}
	c.td = td
	return nil
}

// readOwn reads the bundle's file. Without a state to make it from it must be there.
func (c *CA) readOwn(fresh bool) (*trust.Bundle, error) {
	data, err := c.dir.ReadFile(bundleFile)
	if errors.Is(err, fs.ErrNotExist) {
		if _, stErr := c.dir.ReadFile(stateFile); fresh || stErr == nil {
			return nil, nil
		}
	}
	if err != nil {
		return nil, err
	}
	return trust.ParseBundle(c.td, data)
}

// openSource reads what signs: the external CA's files, or the issuer.
func (c *CA) openSource(m *material) (err error) {
	if c.external == "" {
		if len(m.roots) == 0 {
			return problem.New(problem.ConfigInvalid, "%s holds no root: it was made for an external CA", c.dir.Path(caDir)).
				WithFix("strait controlplane --external-ca DIR").WithState("nothing was changed.")
		}
		return m.orderIssuer()
	}
	if m.st.Phase != Steady {
		return problem.New(problem.RotationPhase, "an external CA cannot take over while the rotation of the own root is %s", m.st.Phase).
			WithFix("start without --external-ca and end it: strait trust rotate retire, or abort").WithState("nothing was changed.")
	}
	m.issuer, m.imported = nil, nil
	m.ext, err = readExternal(c.external, c.td, c.now())
	return err
}

// complete makes what a version before, or one with another source, did not have.
func (c *CA) complete(m *material) (dirty bool, err error) {
	now := c.now()
	if len(m.jwt) == 0 {
		k, err := c.newJWT()
		if err != nil {
			return false, err
		}
		m.jwt, dirty = append(m.jwt, k), true
	}
	if m.ext == nil && m.issuer == nil {
		if offline := offlineRoots(m.roots[:1], now); len(offline) > 0 {
			return false, problem.New(problem.RootKeyOffline, "there is no issuer, and the key of %s is offline", offline[0]).WithFix("strait trust root import FILE")
		}
		if m.issuer, err = c.newIssuer(newName("issuer"), m.signers(), now, "open"); err != nil {
			return false, err
		}
		dirty = true
	}
	if changed := m.ext != nil && m.ext.digest != m.st.External || m.ext == nil && m.st.External != ""; changed {
		m.st.RenewIssuedBefore, dirty = latest(now, m.st.RenewIssuedBefore).Truncate(time.Second).Add(time.Second).UTC(), true
		if m.ext != nil {
			err = c.authorities.recordExternal(m.ext, c.td, now)
		}
	}
	return dirty, err
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// Close lets go of the ledgers' files. The CA can be used afterwards all the same.
func (c *CA) Close() error {
	return errors.Join(c.svids.close(), c.authorities.close(), c.API.log.close())
}

// Files are the CA's files below the data directory as they are at one moment, for a backup; without the ledger of what was issued.
func (c *CA) Files() (map[string][]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	names, err := c.dir.List(caDir)
	if err != nil {
		return nil, err
	}
	out := map[string][]byte{}
	for _, name := range append(names, path.Join("..", bundleFile)) {
		name = path.Join(caDir, name)
		if out[name], err = c.dir.ReadFile(name); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func rootDomain(c *x509.Certificate) (spiffeid.TrustDomain, error) {
	if len(c.URIs) != 1 || c.URIs[0].Scheme != "spiffe" || c.URIs[0].Path != "" {
		return spiffeid.TrustDomain{}, errors.New("the root names no trust domain")
	}
	return spiffeid.ParseTrustDomain(c.URIs[0].Host)
}

// TrustDomain is whose identities this CA issues.
func (c *CA) TrustDomain() spiffeid.TrustDomain { return c.td }

// Bundle is the trust bundle of the CA's trust domain.
func (c *CA) Bundle() *trust.Bundle {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cur.bundle
}

// IssueCSR signs an identity for the request's public key; everything else in the request is ignored. ttl 0 is 36 h; no
// identity outlives the issuer. The ledger says that the identity itself has asked for it.
func (c *CA) IssueCSR(csrDER []byte, id spiffeid.ID, ttl time.Duration) ([][]byte, error) {
	return c.IssueCSRFor("itself", csrDER, id, ttl)
}

// IssueCSRFor is IssueCSR with a word for the ledger about who has asked.
func (c *CA) IssueCSRFor(by string, csrDER []byte, id spiffeid.ID, ttl time.Duration) ([][]byte, error) {
	pub, err := requestKey(csrDER)
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", id, err)
	}
	return c.issue(pub, id, ttl, by)
}

// IssueKey makes a key and signs an identity for it: for the control plane's own roles.
func (c *CA) IssueKey(id spiffeid.ID, ttl time.Duration) (*trust.Identity, error) {
	key, err := newECKey()
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", id, err)
	}
	chain, err := c.issue(&key.PublicKey, id, ttl, "control plane")
	if err != nil {
		return nil, err
	}
	return trust.NewIdentity(chain, key)
}

func checkKey(pub crypto.PublicKey) error {
	if k, ok := pub.(*ecdsa.PublicKey); !ok || k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
		return errors.New("want an ECDSA key on P-256 or P-384")
	}
	return nil
}

// requestKey reads a certificate request, proves that its sender holds the key, and forgets everything else in it.
func requestKey(csrDER []byte) (crypto.PublicKey, error) {
	if len(csrDER) > maxRequest {
		return nil, fmt.Errorf("a certificate request of %d bytes; at most %d", len(csrDER), maxRequest)
	}
	csr, err := x509.ParseCertificateRequest(csrDER)
	if err != nil {
		return nil, err
	}
	if err := checkKey(csr.PublicKey); err != nil { // before its signature costs anything
		return nil, err
	}
	return csr.PublicKey, csr.CheckSignature()
}

// leafSubject is the subject of every identity: what it says is in its URI.
var leafSubject = pkix.Name{Organization: []string{"Strait"}}

func (c *CA) issue(pub crypto.PublicKey, id spiffeid.ID, ttl time.Duration, by string) ([][]byte, error) {
	fail := func(err error) ([][]byte, error) { return nil, fmt.Errorf("issue %s: %w", id, err) }
	if id.IsZero() || id.TrustDomain() != c.td {
		return fail(fmt.Errorf("not of trust domain %s", c.td))
	}
	if err := checkKey(pub); err != nil {
		return fail(err)
	}
	if ttl <= 0 {
		ttl = DefaultTTL
	}
	now := c.now()
	m, at, err := c.issuingAt(now)
	if err != nil {
		return fail(err)
	}
	key, certs := m.issuing(now)
	end := now.Add(ttl)
	if last := m.issuerEnd(); end.After(last) {
		end = last
	}
	if !now.Before(end) {
		return fail(errors.New("the issuer has expired"))
	}
	serial, err := c.svids.serial(now)
	if err != nil {
		return fail(err)
	}
	leaf, err := sign(leafTemplate(id, serial, now, at, end), certs[0], pub, key)
	if err != nil {
		return fail(err)
	}
	if err := c.svids.record(leaf, id.String(), "svid", by, now); err != nil {
		return fail(err)
	}
	chain := [][]byte{leaf.Raw}
	for _, cert := range certs {
		chain = append(chain, cert.Raw)
	}
	return chain, nil
}

// issuingAt is what signs now, and the time as which the certificate counts as issued: never before the last recall.
func (c *CA) issuingAt(now time.Time) (*material, time.Time, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.renewLocked(now); err != nil {
		return nil, now, err
	}
	at := latest(now, c.cur.st.RenewIssuedBefore)
	c.last = latest(at, c.last)
	return c.cur, at, nil
}
