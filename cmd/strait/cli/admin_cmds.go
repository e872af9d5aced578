// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/strait-mesh/strait/controlplane"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
)

func accessIssueRun(ctx context.Context, e *env, name, role, out string, ttl time.Duration) error {
	if out == "" {
		out = name
	}
	if err := os.MkdirAll(out, 0o700); err != nil {
		return problem.New(problem.Usage, "%v", err)
	}
	files := map[string]*secretFile{}
	for _, name := range []string{"operator.pem", "bundle.json", "api.pem", "api-ca.pem"} {
		f, err := reserveSecret(filepath.Join(out, name), "--out")
		if err != nil {
			return err
		}
		defer f.discard()
		files[name] = f
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	r, err := op.AccessIssue(ctx, &controlpb.AccessIssueRequest{Name: name, Role: role, CsrDer: csr, TtlSeconds: int64(ttl / time.Second)})
	if err != nil {
		return e.callError(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	var chain []byte
	for _, der := range r.ChainDer {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	for file, data := range map[string][]byte{
		"operator.pem": append(chain, keyPEM...), "bundle.json": r.BundleJwks, "api.pem": append(append([]byte(nil), r.ApiChainPem...), keyPEM...), "api-ca.pem": r.ApiCaPem,
	} {
		if err := files[file].keep(data); err != nil {
			return err
		}
	}
	fmt.Fprintf(e.out, "%s may act as %s until %s; give them the directory %s\n", r.SpiffeId, role, e.now().Add(ttl).UTC().Format(time.RFC3339), out)
	e.progress("there: strait context add %s --server %s --api-server %s --credential %s", name, r.GrpcAddress, r.ApiAddress, out)
	return nil
}

func backupRun(ctx context.Context, e *env, out string) error {
	if out == "" {
		return problem.New(problem.Usage, "--out is missing").WithFix("strait backup --out FILE")
	}
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	stream, err := op.Backup(ctx, &controlpb.BackupRequest{})
	if err != nil {
		return e.callError(err)
	}
	w := e.out
	if out != "-" {
		f, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return problem.New(problem.Usage, "%v", err).WithWhy("a backup never overwrites a file").WithFix("choose another --out")
		}
		defer f.Close()
		w = f
	}
	size := 0
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			if out != "-" {
				_ = os.Remove(out)
			}
			return e.callError(err)
		}
		n, err := w.Write(chunk.Data)
		size += n
		if err != nil {
			return err
		}
	}
	if f, ok := w.(*os.File); ok && out != "-" {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	e.progress("%d bytes written to %s. It contains the cluster's keys.", size, out)
	return nil
}

func restoreRun(e *env, name string) error {
	r := e.in
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return problem.New(problem.Usage, "%v", err).WithWhy("there is no such backup").WithFix("give a file that strait backup wrote, or - for standard input")
		}
		defer f.Close()
		r = f
	}
	dir := e.dataDir
	if dir == "" {
		dir = e.defaultDataDir()
	}
	got, err := controlplane.Restore(r, dir)
	if err != nil {
		return err
	}
	if err := e.addContext(got.Cluster, cliContext{DataDir: got.DataDir}, true); err != nil {
		return err
	}
	fmt.Fprintf(e.out, "cluster %s restored into %s\n", got.Cluster, got.DataDir)
	e.progress("Next: strait controlplane --data-dir %s", got.DataDir)
	return nil
}
