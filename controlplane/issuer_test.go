// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/ca"
)

// said are the texts of a check's items with code.
func said(c *ControlPlane, code problem.Code) (out []string) {
	k := &checks{}
	c.checkIssuer(k)
	for _, it := range k.items {
		if it.Code == string(code) {
			out = append(out, it.State+": "+it.Text)
		}
	}
	return out
}

// TestOfflineIssuer: with the root's key away the control plane starts, check asks for the next issuer in time, and the two RPCs bring it.
func TestOfflineIssuer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d")
	if _, err := Init(InitConfig{DataDir: path, Federation: "acme", Cluster: "us-east", Region: "us-east-1"}); err != nil {
		t.Fatal(err)
	}
	dir, err := datadir.Open(path, datadir.Options{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	var vault bytes.Buffer
	if err := errors.Join(ca.ExportRoot(dir, &vault, nil), dir.Close()); err != nil {
		t.Fatal(err)
	}
	later := time.Duration(0)
	now := func() time.Time { return time.Now().Add(later) }
	open := func() *ControlPlane {
		c, err := New(Config{DataDir: path, Now: now})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.dir.Close() })
		return c
	}
	c := open()
	if got := said(c, problem.IssuerEnding); got != nil {
		t.Errorf("on the first day: %v", got)
	}
	later = 300 * 24 * time.Hour
	if got := said(c, problem.IssuerEnding); len(got) != 1 || !strings.HasPrefix(got[0], "warn: the issuer ends in 6") {
		t.Errorf("65 days before the end: %v", got)
	}
	if err := c.issueOwn(); err != nil {
		t.Errorf("65 days before the end: %v", err)
	}
	op := &operator{c: c}
	r, err := op.IssuerRequest(t.Context(), &controlpb.IssuerRequestRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := op.IssuerImport(t.Context(), &controlpb.IssuerImportRequest{ChainPem: []byte("x")}); !problem.Is(wire.FromStatus(err), problem.IssuerRefused) {
		t.Errorf("garbage: %v", err)
	}
	chain, err := ca.SignIssuerRequest(vault.Bytes(), r.CsrPem, c.self.trustDomain, now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := op.IssuerImport(t.Context(), &controlpb.IssuerImportRequest{ChainPem: chain}); err != nil {
		t.Fatal(err)
	}
	if got := said(c, problem.IssuerEnding); got != nil {
		t.Errorf("after the import: %v", got)
	}
	later += 400 * 24 * time.Hour
	if got := said(c, problem.IssuerEnding); len(got) != 1 || !strings.HasPrefix(got[0], "fail: ") {
		t.Errorf("after the end: %v", got)
	}
	if err := c.issueOwn(); !problem.Is(err, problem.RootKeyOffline) {
		t.Errorf("after the end: %v", err)
	}
}

// companyCA writes what cert-manager would: an intermediate of a root of somebody else.
func companyCA(t *testing.T, dir string) {
	t.Helper()
	var parent *x509.Certificate
	var parentKey *ecdsa.PrivateKey
	out := map[string][]byte{}
	for i, name := range []string{"ca.crt", "tls.crt"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
		if parent == nil {
			parent, parentKey = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, parentKey)
		if err != nil {
			t.Fatal(err)
		}
		if parent, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		parentKey = key
		out[name] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	der, err := x509.MarshalECPrivateKey(parentKey)
	if err != nil {
		t.Fatal(err)
	}
	out["tls.key"] = pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
	for name, data := range out {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestExternalCA: a cluster is made for an external CA, says so in strait.yaml, and makes no root of its own.
func TestExternalCA(t *testing.T) {
	ext, path := t.TempDir(), filepath.Join(t.TempDir(), "d")
	cfg := InitConfig{DataDir: path, Federation: "acme", Cluster: "us-east", Region: "us-east-1", ExternalCA: ext}
	if _, err := Init(cfg); !problem.Is(err, problem.ExternalCARefused) {
		t.Fatalf("an empty directory: %v", err)
	}
	companyCA(t, ext)
	r, err := Init(cfg)
	if err != nil {
		t.Fatalf("again, with its files: %v", err)
	}
	if _, err := Init(cfg); !problem.Is(err, problem.AlreadyInitialized) {
		t.Errorf("a second time: %v", err)
	}
	if data, err := os.ReadFile(r.ConfigFile); err != nil || !strings.Contains(string(data), "external-ca: "+ext) {
		t.Errorf("strait.yaml: %s, %v", data, err)
	}
	if _, err := New(Config{DataDir: path}); !problem.Is(err, problem.ConfigInvalid) {
		t.Errorf("started without it: %v", err)
	}
	c, err := New(Config{DataDir: path, ExternalCA: ext})
	if err != nil {
		t.Fatal(err)
	}
	defer c.dir.Close()
	op := &operator{c: c}
	if _, err := op.IssuerRequest(t.Context(), nil); !problem.Is(wire.FromStatus(err), problem.RotationElsewhere) {
		t.Errorf("a request for an issuer: %v", err)
	}
	if got := said(c, problem.ExternalCARefused); got != nil {
		t.Errorf("all is well, and: %v", got)
	}
	if err := os.Remove(filepath.Join(ext, "tls.key")); err != nil {
		t.Fatal(err)
	}
	if err := c.ca.Refresh(); err == nil || len(said(c, problem.ExternalCARefused)) != 1 {
		t.Errorf("without its key: %v, %v", err, said(c, problem.ExternalCARefused))
	}
	if err := c.issueOwn(); err != nil {
		t.Errorf("the files are gone, and with them the issuer: %v", err)
	}
}

// TestBackupInTheMiddleOfARotation: whatever step a rotation takes while a backup is written, the CA in it opens, and is one that was.
func TestBackupInTheMiddleOfARotation(t *testing.T) {
	c := closed(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	published := map[uint64][32]byte{1: c.ca.Bundle().Hash()}
	wg.Go(func() {
		for {
			for _, step := range []func() error{c.ca.Prepare, c.ca.Activate, c.ca.Retire} {
				select {
				case <-stop:
					return
				default:
				}
				mu.Lock() // a bundle is noted before a backup can have it
				err := step()
				published[c.ca.Bundle().Sequence()] = c.ca.Bundle().Hash()
				mu.Unlock()
				if err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	together := func() (map[string][]byte, error) {
		mu.Lock()
		defer mu.Unlock()
		return c.caFiles()
	}
	for range 8 {
		var b bytes.Buffer
		if err := writeBackup(t.Context(), c.dir, together, func(context.Context, io.Writer) error { return nil }, &b); err != nil {
			t.Fatal(err)
		}
		restored := filepath.Join(t.TempDir(), "r")
		untar(t, &b, restored)
		dir, err := datadir.Open(restored, datadir.Options{})
		if err != nil {
			t.Fatal(err)
		}
		again, err := ca.Open(dir, ca.Config{})
		if err != nil {
			t.Fatalf("the CA of the backup: %v", err)
		}
		mu.Lock()
		if hash, ok := published[again.Bundle().Sequence()]; !ok || hash != again.Bundle().Hash() {
			t.Errorf("the backup has a bundle of sequence %d that never was", again.Bundle().Sequence())
		}
		mu.Unlock()
		if err := ca.Restored(dir); err != nil {
			t.Fatal(err)
		}
		if again, err = ca.Open(dir, ca.Config{}); err != nil || again.Bundle().Sequence() < 65536 {
			t.Errorf("restored: sequence %d, %v", again.Bundle().Sequence(), err)
		}
	}
	close(stop)
	wg.Wait()
}

func untar(t *testing.T, r io.Reader, target string) {
	t.Helper()
	zr, err := gzip.NewReader(r)
	if err != nil {
		t.Fatal(err)
	}
	tr := tar.NewReader(zr)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := writeEntry(filepath.Join(target, h.Name), tr); err != nil {
			t.Fatal(err)
		}
	}
}
