// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	caDir      = "ca"
	stateFile  = "ca/state.json"
	rootFile   = "ca/root.pem"
	issuerFile = "ca/issuer.pem"
	bundleFile = "bundles/own.json"

	stateVersion = 1
	// stateMagic and the checksum of what follows are the first line of ca/state.json.
	stateMagic = "strait-ca-state/1 sha256:"
)

// state is ca/state.json: which files count. See DESIGN.md.
type state struct {
	Version           int       `json:"version"`
	Phase             string    `json:"phase"`
	Since             time.Time `json:"since"`
	Sequence          uint64    `json:"sequence"`
	Content           string    `json:"content"` // of the bundle with that sequence
	Roots             []string  `json:"roots"`   // files, oldest first
	JWT               []string  `json:"jwt"`
	Issuer            string    `json:"issuer,omitempty"`
	Imported          string    `json:"imported,omitempty"` // issuer for Activate
	Request           string    `json:"request,omitempty"`  // key of a requested issuer
	RenewIssuedBefore time.Time `json:"renew_issued_before,omitzero"`
	External          string    `json:"external,omitempty"` // digest of the external CA's files; "": own root
}

func readState(dir files) (*state, error) {
	data, err := dir.ReadFile(stateFile)
	if err != nil {
		return nil, err
	}
	damaged := func(why string) error {
		return problem.New(problem.StateCorrupt, "%s %s", dir.Path(stateFile), why)
	}
	head, text, ok := bytes.Cut(data, []byte("\n"))
	if sum := sha256.Sum256(text); !ok || string(head) != stateMagic+hex.EncodeToString(sum[:]) {
		return nil, damaged("does not match its checksum")
	}
	s := &state{}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(s); err != nil || dec.More() {
		return nil, damaged("is damaged")
	}
	if s.Version > stateVersion {
		return nil, problem.New(problem.VersionSkew, "%s has version %d; this program knows %d", dir.Path(stateFile), s.Version, stateVersion)
	}
	roots := 1
	switch s.Phase {
	case Steady:
	case Prepared, Activated:
		roots = 2
	default:
		return nil, damaged("names no phase")
	}
	if len(s.Roots) > roots || len(s.Roots) < roots && (s.External == "" || len(s.Roots) > 0) || len(s.JWT) != roots {
		return nil, damaged(fmt.Sprintf("has %d roots and %d JWT keys in phase %s", len(s.Roots), len(s.JWT), s.Phase))
	}
	return s, nil
}

func writeState(dir files, s *state) error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	data = append(data, '\n')
	sum := sha256.Sum256(data)
	return dir.WriteFile(stateFile, append([]byte(stateMagic+hex.EncodeToString(sum[:])+"\n"), data...))
}

// root is a root of our own; key is nil when it is offline.
type root struct {
	file string
	cert *x509.Certificate
	key  crypto.Signer
}

// issuer is a key with its certificates, by the newest root first.
type issuer struct {
	file  string
	certs []*x509.Certificate
	key   crypto.Signer
}

// jwtKey signs tokens.
type jwtKey struct {
	file string
	id   string
	key  *ecdsa.PrivateKey
}

// material is everything that a CA works with at one moment, immutable.
type material struct {
	st       state
	roots    []*root // oldest first
	jwt      []*jwtKey
	issuer   *issuer // nil with an external CA
	imported *issuer
	request  *ecdsa.PrivateKey
	ext      *external
	bundle   *trust.Bundle
}

// signers are the roots that certify issuers now, newest first.
func (m *material) signers() []*root {
	if m.st.Phase == Activated {
		return []*root{m.roots[1], m.roots[0]}
	}
	return m.roots[:min(1, len(m.roots))]
}

// next is a copy to change, for commit.
func (m *material) next() *material {
	n := *m
	n.roots, n.jwt = slices.Clone(m.roots), slices.Clone(m.jwt)
	return &n
}

// name brings the state up to date with the rest of the material.
func (m *material) name(td spiffeid.TrustDomain) error {
	s := &m.st
	s.Version, s.Roots, s.JWT, s.Issuer, s.Imported = stateVersion, nil, nil, "", ""
	var certs []*x509.Certificate
	for _, r := range m.roots {
		s.Roots = append(s.Roots, r.file)
		certs = append(certs, r.cert)
	}
	var keys []trust.JWTKey
	for _, k := range m.jwt {
		s.JWT = append(s.JWT, k.file)
		keys = append(keys, trust.JWTKey{ID: k.id, Key: &k.key.PublicKey})
	}
	if m.issuer != nil {
		s.Issuer = m.issuer.file
	}
	if m.imported != nil {
		s.Imported = m.imported.file
	}
	if m.ext != nil {
		s.External, certs = m.ext.digest, m.ext.roots
	} else {
		s.External = ""
	}
	b, err := trust.NewBundle(td, certs, s.Sequence)
	if err == nil {
		b, err = b.WithJWTKeys(keys)
	}
	if err != nil {
		return err
	}
	if content := contentOf(b); content != s.Content {
		s.Sequence, s.Content = s.Sequence+1, content
		b = b.WithSequence(s.Sequence)
	}
	m.bundle = b
	return nil
}

// contentOf tells bundles with other authorities apart.
func contentOf(b *trust.Bundle) string {
	h := sha256.New()
	sum := b.Hash()
	h.Write(sum[:])
	for _, k := range b.JWTKeys() {
		h.Write([]byte(k.ID + "\n"))
	}
	return hex.EncodeToString(h.Sum(nil))
}

// commitLocked makes next the present material: durably, then in memory, then for readers of the bundle's file. An error that comes after
// the first of these says that the step has happened.
func (c *CA) commitLocked(next *material) error {
	if err := next.name(c.td); err != nil {
		return err
	}
	if err := writeState(c.dir, &next.st); err != nil {
		return err
	}
	c.cur = next
	close(c.changed)
	c.changed = make(chan struct{})
	return c.tidyLocked()
}

// tidyLocked makes the directory say what the state says: the bundle's file is written, and files that nobody names are deleted.
func (c *CA) tidyLocked() error {
	if have, err := c.dir.ReadFile(bundleFile); err != nil || !bytes.Equal(have, c.cur.bundle.Marshal()) {
		if err := c.dir.WriteFile(bundleFile, c.cur.bundle.Marshal()); err != nil {
			return fmt.Errorf("the step was taken; %s was not written: %w", bundleFile, err)
		}
	}
	s := &c.cur.st
	keep := append(append([]string{s.Issuer, s.Imported, s.Request}, s.Roots...), s.JWT...)
	names, err := c.dir.List(caDir)
	var errs []error
	for _, name := range names {
		if p := path.Join(caDir, name); disposable(name) && !slices.Contains(keep, p) {
			errs = append(errs, c.dir.Remove(p))
		}
	}
	if err := errors.Join(append(errs, err)...); err != nil {
		return fmt.Errorf("the step was taken; keys that are not used any more were not deleted: %w", err)
	}
	return nil
}

func disposable(name string) bool {
	if name == path.Base(rootFile) || name == path.Base(issuerFile) {
		return true
	}
	return strings.HasSuffix(name, ".pem") && slices.ContainsFunc([]string{"root-", "issuer-", "jwt-", "request-"}, func(p string) bool { return strings.HasPrefix(name, p) })
}

// newName is a file's name that was never used.
func newName(kind string) string {
	b := make([]byte, 8)
	_, _ = rand.Read(b)
	return path.Join(caDir, kind+"-"+hex.EncodeToString(b)+".pem")
}

// load reads the files that st names.
func load(dir files, st *state) (*material, error) {
	m := &material{st: *st}
	for _, name := range st.Roots {
		f, err := readKeyFile(dir, name)
		if err != nil {
			return nil, err
		}
		if len(f.certs) != 1 {
			return nil, fmt.Errorf("%s: %d certificates; want one", name, len(f.certs))
		}
		m.roots = append(m.roots, &root{name, f.certs[0], f.key})
	}
	for _, name := range st.JWT {
		k, err := loadJWT(dir, name)
		if err != nil {
			return nil, err
		}
		m.jwt = append(m.jwt, k)
	}
	var err error
	if m.imported, err = loadIssuer(dir, st.Imported); err != nil {
		return nil, err
	}
	if m.issuer, err = loadIssuer(dir, st.Issuer); err != nil {
		return nil, err
	}
	if st.Request != "" {
		f, err := readKeyFile(dir, st.Request)
		if err != nil {
			return nil, err
		}
		key, ok := f.key.(*ecdsa.PrivateKey)
		if !ok {
			return nil, fmt.Errorf("%s: no ECDSA key", st.Request)
		}
		m.request = key
	}
	return m, nil
}

// loadIssuer reads an issuer; without a name there is none.
func loadIssuer(dir files, name string) (*issuer, error) {
	if name == "" {
		return nil, nil
	}
	f, err := readKeyFile(dir, name)
	if err != nil {
		return nil, err
	}
	if f.key == nil || len(f.certs) == 0 {
		return nil, fmt.Errorf("%s: certificate or key is missing", name)
	}
	return &issuer{name, f.certs, f.key}, nil
}

// openState finds the state of a data directory; legacy is true when a version before wrote it.
func openState(dir files, useExternal bool) (st *state, legacy bool, err error) {
	st, err = readState(dir)
	if !errors.Is(err, fs.ErrNotExist) {
		return st, false, err
	}
	st = &state{Version: stateVersion, Phase: Steady}
	if _, err := dir.ReadFile(rootFile); err != nil {
		if useExternal && errors.Is(err, fs.ErrNotExist) {
			return st, true, nil
		}
		return nil, false, err
	}
	st.Roots = []string{rootFile}
	if _, err := dir.ReadFile(issuerFile); !errors.Is(err, fs.ErrNotExist) {
		st.Issuer = issuerFile
	}
	return st, true, nil
}

func newECKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }
