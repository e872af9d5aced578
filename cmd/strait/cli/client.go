// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
)

// operator opens the operator API of the context in force. The caller closes it.
func (e *env) operator() (controlpb.OperatorClient, func(), error) {
	c, err := e.current()
	if err != nil {
		return nil, nil, err
	}
	var conn *grpc.ClientConn
	if c.Server != "" {
		creds, err := operatorTLS(c.Credential)
		if err != nil {
			return nil, nil, err
		}
		conn, err = grpc.NewClient("passthrough:///"+c.Server, grpc.WithTransportCredentials(credentials.NewTLS(creds)))
		if err != nil {
			return nil, nil, err
		}
	} else {
		socket := filepath.Join(c.DataDir, "run", "operator.sock")
		if _, err := os.Stat(socket); err != nil {
			return nil, nil, noControlPlane(c.DataDir, err)
		}
		// The socket is 0600 and the server checks the peer's user: there is no one else to encrypt for.
		conn, err = grpc.NewClient("passthrough:///operator", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", socket)
			}))
		if err != nil {
			return nil, nil, err
		}
	}
	return controlpb.NewOperatorClient(conn), func() { _ = conn.Close() }, nil
}

func noControlPlane(dir string, cause error) error {
	return problem.New(problem.NoControlPlane, "the control plane of %s does not answer", dir).
		WithFix("start it:          strait controlplane --data-dir %s", dir).
		WithFix("or choose another: strait --data-dir DIR … , strait context ls").Wrap(cause)
}

// operatorTLS reads what `strait access issue` wrote.
func operatorTLS(dir string) (*tls.Config, error) {
	identity, err := os.ReadFile(filepath.Join(dir, "operator.pem"))
	if err != nil {
		return nil, problem.New(problem.ConfigInvalid, "operator certificate: %v", err).WithFix("strait access issue NAME --role viewer --out DIR")
	}
	id, err := trust.ParseIdentityPEM(identity)
	if err != nil {
		return nil, problem.New(problem.ConfigInvalid, "%s: %v", dir, err)
	}
	jwks, err := os.ReadFile(filepath.Join(dir, "bundle.json"))
	if err != nil {
		return nil, problem.New(problem.ConfigInvalid, "trust bundle: %v", err)
	}
	bundle, err := trust.ParseBundle(id.ID.TrustDomain(), jwks)
	if err != nil {
		return nil, problem.New(problem.ConfigInvalid, "%s/bundle.json: %v", dir, err)
	}
	bundles, err := trust.NewBundles(bundle)
	if err != nil {
		return nil, err
	}
	src := trust.NewSource(trust.SourceConfig{})
	src.SetBundles(bundles)
	src.SetIdentity(id)
	return src.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeControlPlane(id.ID.TrustDomain()), ALPN: []string{"h2"}}), nil
}

// call turns a gRPC error into what users see.
func (e *env) callError(err error) error {
	if err == nil {
		return nil
	}
	var p *problem.Error
	if errors.As(err, &p) {
		return err
	}
	err = wire.FromStatus(err)
	if errors.As(err, &p) {
		return p
	}
	switch status.Code(err) {
	case codes.Unavailable:
		c, _ := e.current()
		return noControlPlane(c.DataDir+c.Server, err)
	case codes.Canceled:
		return context.Canceled
	case codes.DeadlineExceeded:
		return problem.New(problem.NoControlPlane, "no answer in %s", e.timeout).WithWhy("the control plane is busy, paused or waits for another cluster").Wrap(err)
	}
	return err
}

// restConfig reaches the configuration API of the context in force.
func (e *env) restConfig() (*rest.Config, error) {
	c, err := e.current()
	if err != nil {
		return nil, err
	}
	if c.Server != "" {
		if c.APIServer == "" {
			return nil, problem.New(problem.ConfigInvalid, "the context has no apiServer").WithFix("strait context add NAME --server … --api-server …")
		}
		ca, err := os.ReadFile(filepath.Join(c.Credential, "api-ca.pem"))
		if err != nil {
			return nil, problem.New(problem.ConfigInvalid, "configuration API's CA: %v", err)
		}
		if !x509.NewCertPool().AppendCertsFromPEM(ca) {
			return nil, problem.New(problem.ConfigInvalid, "%s holds no certificate", filepath.Join(c.Credential, "api-ca.pem"))
		}
		return &rest.Config{Host: "https://" + c.APIServer, TLSClientConfig: rest.TLSClientConfig{
			CAData: ca, CertFile: filepath.Join(c.Credential, "api.pem"), KeyFile: filepath.Join(c.Credential, "api.pem"),
		}}, nil
	}
	socket := filepath.Join(c.DataDir, "run", "api.sock")
	if _, err := os.Stat(socket); err != nil {
		return nil, noControlPlane(c.DataDir, err)
	}
	return &rest.Config{Host: "http://strait", Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}, nil
}

func (e *env) dynamic() (dynamic.Interface, error) {
	cfg, err := e.restConfig()
	if err != nil {
		return nil, err
	}
	cfg.QPS, cfg.Burst = 100, 200
	cfg.WarningHandler = rest.NoWarnings{}
	d, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("configuration API client: %w", err)
	}
	return d, nil
}
