// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// offlineTrustCmds are the commands for a root whose key is not where the control plane runs.
func offlineTrustCmds(e *env) []*cobra.Command {
	return []*cobra.Command{newRootCmd(e), newIssuerCmd(e)}
}

type rootOptions struct{ root, trustDomain string }

func newRootCmd(e *env) *cobra.Command {
	var o rootOptions
	c := &cobra.Command{Use: "root export|import|sign|new FILE", Short: "Keep the root's key offline, and sign with it there",
		Args: cobra.ExactArgs(2), ValidArgs: []string{"export", "import", "sign", "new"},
		Long: `The root signs issuers, one a year; identities are signed by the issuer. The root's key can be kept off the machine. FILE - is standard input or output.

export moves it: certificate and key go to FILE (0600), and the key is then removed from the data directory. The control plane must be stopped. It runs
without the key until its issuer ends; strait check asks for the next one 90 days before. While a rotation is under way both roots are written, as far
as their keys are here. What a disk, or a snapshot of it, still remembers of the key is not erased.
import puts it back. The control plane must be stopped.
sign answers the request FILE of strait trust issuer request with the root in --root, and prints the issuer's certificate. It needs no control plane and no
network. Of the request only the key is taken: the issuer may sign identities of the root's trust domain, and nothing else, for a year. A --root file
with several roots gives a certificate by each: that is what a rotation needs.
new makes a root whose key is offline from the start, for a rotation: certificate and key go to FILE, the certificate alone to standard output.`,
		Example: "  strait trust root export /media/vault/us-east.root.pem\n  strait trust root export - | gpg --encrypt -r ops@acme.example > root.pem.gpg\n" +
			"  gpg --decrypt root.pem.gpg | strait trust root import -\n  strait trust root sign --root us-east.root.pem issuer.csr > issuer.pem\n" +
			"  strait trust root new --trust-domain us-east.acme root-2.pem > root-2.cert.pem",
		RunE: func(_ *cobra.Command, args []string) error { return rootRun(e, o, args[0], args[1]) }}
	c.Flags().StringVar(&o.root, "root", "", "for sign: the root, a file that export or new has written")
	c.Flags().StringVar(&o.trustDomain, "trust-domain", "", "for new: trust domain of the cluster; strait trust status shows it")
	return c
}

func rootRun(e *env, o rootOptions, action, file string) error {
	switch {
	case o.root != "" && action != "sign":
		return problem.New(problem.Usage, "--root is for sign")
	case o.trustDomain != "" && action != "new":
		return problem.New(problem.Usage, "--trust-domain is for new")
	}
	switch action {
	case "export":
		return rootExportRun(e, file)
	case "import":
		return rootImportRun(e, file)
	case "sign":
		return rootSignRun(e, o.root, file)
	case "new":
		return rootNewRun(e, o.trustDomain, file)
	}
	return problem.New(problem.Usage, "%q is nothing that can be done with a root", action).WithFix("strait trust root export|import|sign|new FILE")
}

// lockedDir opens the data directory for a command that must be alone in it.
func (e *env) lockedDir() (*datadir.Dir, error) {
	path := e.dataDir
	if path == "" {
		c, err := e.current()
		if err != nil {
			return nil, err
		}
		if path = c.DataDir; path == "" {
			return nil, problem.New(problem.Usage, "the current context is of another machine").WithFix("run it where the control plane's data directory is, with --data-dir DIR")
		}
	}
	return datadir.Open(path, datadir.Options{Lock: true})
}

func rootExportRun(e *env, name string) error {
	dir, err := e.lockedDir()
	if err != nil {
		return err
	}
	defer dir.Close()
	if name == "-" {
		return ca.ExportRoot(dir, e.out, nil)
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return problem.New(problem.Usage, "%v", err).WithWhy("the key never overwrites a file").WithFix("choose another FILE").WithState("the key is still in the data directory.")
	}
	durable := false
	err = ca.ExportRoot(dir, f, func() error {
		if err := f.Sync(); err != nil {
			return err
		}
		d, err := os.Open(filepath.Dir(name))
		if err == nil {
			err = errors.Join(d.Sync(), d.Close())
		}
		durable = err == nil
		return err
	})
	if err = errors.Join(err, f.Close()); err != nil {
		if !durable {
			_ = os.Remove(name)
		}
		return err
	}
	e.progress("%s has the root's key now, and the data directory has not. Keep it safe: without it the issuer cannot be replaced.", name)
	return nil
}

func rootImportRun(e *env, name string) error {
	dir, err := e.lockedDir()
	if err != nil {
		return err
	}
	defer dir.Close()
	r, done, err := e.openKey(name)
	if err != nil {
		return err
	}
	defer done()
	if err := ca.ImportRoot(dir, r); err != nil {
		return err
	}
	e.progress("the root's key is in %s again", dir.Path())
	return nil
}

// openKey opens a file with a key, or standard input.
func (e *env) openKey(name string) (io.Reader, func(), error) {
	if name == "-" {
		return e.in, func() {}, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, nil, problem.New(problem.Usage, "%v", err)
	}
	if err := ca.CheckKeyFile(name); err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return f, func() { _ = f.Close() }, nil
}

// readInput reads a small file, or standard input.
func (e *env) readInput(name string) ([]byte, error) {
	r := e.in
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, problem.New(problem.Usage, "%v", err)
		}
		defer f.Close()
		r = f
	}
	return io.ReadAll(io.LimitReader(r, 2<<20))
}

func rootSignRun(e *env, root, request string) error {
	if root == "" {
		return problem.New(problem.Usage, "--root is missing").WithFix("strait trust root sign --root FILE REQUEST")
	}
	chain, err := rootSign(e, root, request)
	if err != nil {
		return err
	}
	_, err = e.out.Write(chain)
	return err
}

func rootSign(e *env, root, request string) ([]byte, error) {
	r, done, err := e.openKey(root)
	if err != nil {
		return nil, err
	}
	defer done()
	rootPEM, err := io.ReadAll(io.LimitReader(r, 2<<20))
	if err != nil {
		return nil, err
	}
	td, err := ca.RootDomain(rootPEM)
	if err != nil {
		return nil, err
	}
	csr, err := e.readInput(request)
	if err != nil {
		return nil, err
	}
	return ca.SignIssuerRequest(rootPEM, csr, td, e.now())
}

func rootNewRun(e *env, trustDomain, name string) error {
	td, err := spiffeid.ParseTrustDomain(trustDomain)
	if err != nil {
		return problem.New(problem.Usage, "--trust-domain: %v", err)
	}
	rootPEM, certPEM, err := ca.NewRoot(td, e.now())
	if err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return problem.New(problem.Usage, "%v", err).WithWhy("a key never overwrites a file").WithFix("choose another FILE")
	}
	_, err = f.Write(rootPEM)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(name))
	}
	_, err = e.out.Write(certPEM)
	return err
}

func newIssuerCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "issuer request|import [FILE]", Short: "Replace the issuer when the root's key is offline",
		Args: cobra.RangeArgs(1, 2), ValidArgs: []string{"request", "import"},
		Long: `Where the root's key is offline, the control plane can neither replace its issuer before that ends, nor activate a new root.

request prints a certificate request for the next issuer. Its key stays in the data directory of the control plane; until the certificate is imported, asking
again gives a request of the same key. strait trust root sign answers it, where the root's key is.
import takes the answer from FILE (- is standard input). The issuer is used at once; while a rotation is prepared it is kept for strait trust rotate
activate, and a certificate by each root whose key is offline must be in the file.`,
		Example: "  strait trust issuer request > issuer.csr\n  strait trust issuer import issuer.pem\n  cat by-old-root.pem by-new-root.pem | strait trust issuer import -",
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case args[0] == "request" && len(args) == 1:
				return issuerRequestRun(cmd.Context(), e)
			case args[0] == "import" && len(args) == 2:
				return issuerImportRun(cmd.Context(), e, args[1])
			}
			return problem.New(problem.Usage, "want request, or import FILE").WithFix("strait trust issuer request > issuer.csr").WithFix("strait trust issuer import FILE")
		}}
}

func issuerRequestRun(ctx context.Context, e *env) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	r, err := op.IssuerRequest(ctx, &controlpb.IssuerRequestRequest{})
	if err != nil {
		return e.callError(err)
	}
	_, err = e.out.Write(r.CsrPem)
	return err
}

func issuerImportRun(ctx context.Context, e *env, name string) error {
	data, err := e.readInput(name)
	if err != nil {
		return err
	}
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	r, err := op.IssuerImport(ctx, &controlpb.IssuerImportRequest{ChainPem: data})
	if err != nil {
		return e.callError(err)
	}
	for _, a := range r.Authorities {
		if a.Kind == "issuer" && (a.State == "prepared") == (r.Phase == ca.Prepared) {
			fmt.Fprintf(e.out, "issuer %s %s until %s\n", e.shortHash(a.Fingerprint), a.State, day(a.NotAfterUnix))
			break
		}
	}
	return nil
}
