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
	root := &cobra.Command{Use: "root", Short: "Keep the root's key offline, and sign with it there",
		Long: `The root signs issuers, one a year; identities are signed by the issuer. Its key can be kept off the machine: export it, and sign the
issuer's requests where it is.`,
		Example: "  strait trust root export root.key.pem\n  strait trust root sign --root root.key.pem issuer.csr > issuer.pem"}
	root.AddCommand(newRootExportCmd(e), newRootImportCmd(e), newRootSignCmd(e), newRootNewCmd(e))
	issuer := &cobra.Command{Use: "issuer", Short: "Replace the issuer when the root's key is offline",
		Long: `Where the root's key is offline, the control plane cannot replace its issuer before that ends, nor activate a new root: it makes a request,
strait trust root sign answers it where the key is, and the answer is imported.`,
		Example: "  strait trust issuer request > issuer.csr\n  strait trust issuer import issuer.pem"}
	issuer.AddCommand(newIssuerRequestCmd(e), newIssuerImportCmd(e))
	return []*cobra.Command{root, issuer}
}

func newRootExportCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "export FILE", Short: "Move the root's key out of the data directory into a file", Args: cobra.ExactArgs(1),
		Long: `Write the root, certificate and key, to FILE (0600; - is standard output), and then remove the key from the data directory. The control plane must be
stopped. It runs without the key until its issuer ends: strait check asks for the next one 90 days before. While a rotation is under
way both roots are written, as far as their keys are here. What a disk or a snapshot of it still remembers of the key is not erased.`,
		Example: "  strait trust root export /media/vault/us-east.root.pem\n  strait trust root export - | gpg --encrypt -r ops@acme.example > root.pem.gpg",
		RunE:    func(_ *cobra.Command, args []string) error { return rootExportRun(e, args[0]) }}
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

func newRootImportCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "import FILE", Short: "Put the root's key back into the data directory", Args: cobra.ExactArgs(1),
		Long: `Put back what strait trust root export took out (- is standard input). The control plane must be stopped; afterwards it replaces its issuer by itself
again. The file stays where it is.`,
		Example: "  strait trust root import /media/vault/us-east.root.pem\n  gpg --decrypt root.pem.gpg | strait trust root import -",
		RunE: func(_ *cobra.Command, args []string) error {
			dir, err := e.lockedDir()
			if err != nil {
				return err
			}
			defer dir.Close()
			r, done, err := e.openKey(args[0])
			if err != nil {
				return err
			}
			defer done()
			if err := ca.ImportRoot(dir, r); err != nil {
				return err
			}
			e.progress("the root's key is in %s again", dir.Path())
			return nil
		}}
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

func newRootSignCmd(e *env) *cobra.Command {
	var root string
	c := &cobra.Command{Use: "sign --root FILE REQUEST", Short: "Sign an issuer's request with a root's key, offline", Args: cobra.ExactArgs(1),
		Long: `Sign the request that strait trust issuer request has written, with the root in FILE (certificate and key), and print the issuer's certificate for
strait trust issuer import. It needs no control plane and no network. Of the request only the key is taken: the issuer may sign identities of the root's
trust domain and nothing else, for a year. A FILE with several roots gives a certificate by each: that is what a rotation needs.`,
		Example: "  strait trust root sign --root us-east.root.pem issuer.csr > issuer.pem\n  ssh us-east strait trust issuer request | strait trust root sign --root us-east.root.pem - | ssh us-east strait trust issuer import -",
		RunE: func(_ *cobra.Command, args []string) error {
			if root == "" {
				return problem.New(problem.Usage, "--root is missing").WithFix("strait trust root sign --root FILE REQUEST")
			}
			chain, err := rootSign(e, root, args[0])
			if err != nil {
				return err
			}
			_, err = e.out.Write(chain)
			return err
		}}
	c.Flags().StringVar(&root, "root", "", "the root: a file that strait trust root export or strait trust root new has written")
	return c
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

func newRootNewCmd(e *env) *cobra.Command {
	var td string
	c := &cobra.Command{Use: "new --trust-domain TD FILE", Short: "Make a root whose key is kept offline from the start", Args: cobra.ExactArgs(1),
		Long: `Make a root for a rotation, where its key is to be kept: certificate and key go to FILE (0600), the certificate alone to standard output, for
strait trust rotate prepare --root. It needs no control plane and no network.`,
		Example: "  strait trust root new --trust-domain us-east.acme us-east.root-2.pem > root-2.cert.pem\n  strait trust rotate prepare --root-cert root-2.cert.pem",
		RunE:    func(_ *cobra.Command, args []string) error { return rootNewRun(e, td, args[0]) }}
	c.Flags().StringVar(&td, "trust-domain", "", "trust domain of the cluster; strait trust status shows it")
	return c
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

func newIssuerRequestCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "request", Short: "Print a request for the next issuer", Args: cobra.NoArgs,
		Long: `Print a certificate request for the cluster's next issuer. Its key stays in the control plane's data directory. Until the certificate is imported,
asking again gives a request of the same key.`,
		Example: "  strait trust issuer request > issuer.csr\n  strait --context us-east trust issuer request > us-east.csr",
		RunE: func(cmd *cobra.Command, _ []string) error {
			op, done, err := e.operator()
			if err != nil {
				return err
			}
			defer done()
			r, err := op.IssuerRequest(cmd.Context(), &controlpb.IssuerRequestRequest{})
			if err != nil {
				return e.callError(err)
			}
			_, err = e.out.Write(r.CsrPem)
			return err
		}}
}

func newIssuerImportCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "import FILE", Short: "Take the certificate of a requested issuer", Args: cobra.ExactArgs(1),
		Long: `Import what strait trust root sign has made of the request (- is standard input). The issuer is used at once; while a rotation is prepared it is kept for
strait trust rotate activate, and a certificate by each root whose key is offline must be in the file.`,
		Example: "  strait trust issuer import issuer.pem\n  cat by-old-root.pem by-new-root.pem | strait trust issuer import -",
		RunE:    func(cmd *cobra.Command, args []string) error { return issuerImportRun(cmd.Context(), e, args[0]) }}
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
