// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
)

// files is what a CA needs of its data directory; tests let it fail.
type files interface {
	Path(elem ...string) string
	ReadFile(rel string) ([]byte, error)
	WriteFile(rel string, data []byte) error
	Remove(rel string) error
	List(rel string) ([]string, error)
	// append makes a file that must not exist yet, for Append.
	append(rel string) (appender, error)
}

// appender writes whole lines durably.
type appender interface {
	Append(lines []byte) error
	Close() error
}

// stored is a data directory.
type stored struct{ *datadir.Dir }

func (s stored) append(rel string) (appender, error) {
	sub, err := s.Sub(issuedDir)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(s.Path(rel), os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	d, err := os.Open(sub.Path())
	if err == nil {
		err = errors.Join(d.Sync(), d.Close())
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return lineFile{f}, nil
}

type lineFile struct{ *os.File }

func (f lineFile) Append(lines []byte) error {
	if _, err := f.Write(lines); err != nil {
		return err
	}
	return f.Sync()
}

// keyFile is a PEM file: certificates, and a key that belongs to the first, or none.
type keyFile struct {
	certs []*x509.Certificate
	key   crypto.Signer
}

// checkOwner refuses a file with a key that somebody else could have read or written. allow are permission bits that are harmless.
func checkOwner(path string, allow os.FileMode) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	what := ""
	switch sys, ok := st.Sys().(*syscall.Stat_t); {
	case st.Mode().Perm()&0o077&^allow != 0:
		what = fmt.Sprintf("mode %04o", st.Mode().Perm())
	case ok && int(sys.Uid) != os.Geteuid() && (allow == 0 || sys.Uid != 0):
		what = fmt.Sprintf("owner %d, and this process runs as %d", sys.Uid, os.Geteuid())
	default:
		return nil
	}
	e := problem.New(problem.KeyFileExposed, "%s has %s", path, what).WithState("the key was not read.")
	if allow == 0 {
		e = e.WithFix("chown %d %s && chmod 600 %s", os.Geteuid(), path, path)
	}
	return e.WithFix("find out who may have read it; if in doubt rotate: strait trust rotate prepare")
}

// CheckKeyFile refuses a file with a key (problem.KeyFileExposed) unless it belongs to this process's user, and nobody else may read or write it.
func CheckKeyFile(path string) error { return checkOwner(path, 0) }

// readKeyFile reads a file of the data directory; an absent one is fs.ErrNotExist.
func readKeyFile(dir files, name string) (*keyFile, error) {
	data, err := dir.ReadFile(name)
	if err != nil {
		return nil, err
	}
	f, err := parseKeyFile(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if f.key != nil {
		if err := checkOwner(dir.Path(name), 0); err != nil {
			return nil, err
		}
	}
	return f, nil
}

const maxKeyFile = 1 << 20

// parseKeyFile reads certificates and at most one key. Its errors never contain key material.
func parseKeyFile(data []byte) (*keyFile, error) {
	f := &keyFile{}
	if len(data) > maxKeyFile {
		return nil, fmt.Errorf("%d bytes; at most %d", len(data), maxKeyFile)
	}
	for len(bytes.TrimSpace(data)) > 0 {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, errors.New("damaged, or not PEM")
		}
		data = rest
		switch block.Type {
		case "CERTIFICATE":
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, errors.New("malformed certificate")
			}
			f.certs = append(f.certs, c)
		case "PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY":
			key, err := parseKey(block)
			if err != nil || f.key != nil {
				return nil, errors.New("malformed private key, or more than one")
			}
			f.key = key
		}
	}
	if len(f.certs) == 0 && f.key == nil {
		return nil, errors.New("neither certificate nor key")
	}
	if len(f.certs) > 0 && f.key != nil && !samePublic(f.certs[0].PublicKey, f.key.Public()) {
		return nil, errors.New("certificate and key do not belong together")
	}
	return f, nil
}

func parseKey(block *pem.Block) (crypto.Signer, error) {
	switch block.Type {
	case "EC PRIVATE KEY":
		return x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		return x509.ParsePKCS1PrivateKey(block.Bytes)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, errors.New("no signing key")
	}
	return s, nil
}

func samePublic(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// encode renders certificates, then the key if there is one.
func (f *keyFile) encode() ([]byte, error) {
	var b bytes.Buffer
	for _, c := range f.certs {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	if f.key != nil {
		der, err := x509.MarshalPKCS8PrivateKey(f.key)
		if err != nil {
			return nil, err
		}
		_ = pem.Encode(&b, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	}
	return b.Bytes(), nil
}

func writeKeyFile(dir files, name string, f *keyFile) error {
	data, err := f.encode()
	if err != nil {
		return fmt.Errorf("save %s: %w", name, err)
	}
	return dir.WriteFile(name, data)
}

// pair is a certificate with its key, made here.
type pair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func savePair(dir files, name string, p *pair) error {
	return writeKeyFile(dir, name, &keyFile{[]*x509.Certificate{p.cert}, p.key})
}

func loadPair(dir files, name string) (*pair, error) {
	f, err := readKeyFile(dir, name)
	if err != nil {
		return nil, err
	}
	key, ok := f.key.(*ecdsa.PrivateKey)
	if !ok || len(f.certs) == 0 {
		return nil, fmt.Errorf("%s: certificate or key is missing", name)
	}
	return &pair{f.certs[0], key}, nil
}

// keyIDOf is how an authority's certificate is named to people: its subject key identifier.
func keyIDOf(c *x509.Certificate) string { return hex.EncodeToString(c.SubjectKeyId) }
