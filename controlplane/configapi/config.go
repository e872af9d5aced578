// SPDX-License-Identifier: Apache-2.0

package configapi

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"
)

// Roles are the groups of callers. A client certificate carries its role as organization; any other organization counts for
// nothing.
const (
	RoleViewer   = "viewer"   // reads everything
	RoleOperator = "operator" // writes everything but peers, federations and the schemas
	RoleAdmin    = "admin"    // everything
)

// Config is what Start needs.
type Config struct {
	// Dir holds the store; only its owner may enter it. It is made when it is missing.
	Dir string
	// SocketDir holds etcd's unix sockets while the server runs; default Dir. Where the path is too long for a socket, a fresh
	// directory in the system's temporary directory is used.
	SocketDir string
	// Listen is the TCP address, "127.0.0.1:7401"; port 0 takes any. Empty: no listener, only Handler and RESTConfig.
	Listen string
	// ServingCertPEM (leaf first) and ServingKeyPEM are what clients see; needed with Listen.
	ServingCertPEM, ServingKeyPEM []byte
	// GetCertificate, where set, goes before ServingCertPEM, so that a renewed certificate is served.
	GetCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// ClientCAPEM is the API CA: the only one whose client certificates are believed.
	ClientCAPEM []byte
	// Allow is asked on each request about the client's certificate; an error refuses. nil allows.
	Allow func(*x509.Certificate) error
	// StartTimeout bounds Start; default 60 s. It takes 1-2 s on an idle machine.
	StartTimeout time.Duration
	// QuotaBytes bounds the store; default 2 GiB. A full store is read-only.
	QuotaBytes int64
	// MemberName and the rest of a membership are seams for more than one member; default "strait-0".
	MemberName string
	Logger     *slog.Logger
}

// headerTimeout, of the handshake and then of each head, and the limits below bound what an unauthenticated caller may hold.
const (
	headerTimeout  = 5 * time.Second
	idleTimeout    = 3 * time.Minute
	closeGrace     = 3 * time.Second
	maxHeaderBytes = 64 << 10
	maxConnections = 512
)

func (c Config) withDefaults() (Config, error) {
	if c.Dir == "" {
		return c, errors.New("config: no directory")
	}
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return c, fmt.Errorf("config: %w", err)
	}
	c.Dir = dir
	if c.SocketDir == "" {
		c.SocketDir = c.Dir
	}
	if c.SocketDir, err = filepath.Abs(c.SocketDir); err != nil {
		return c, fmt.Errorf("config: %w", err)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.StartTimeout <= 0 {
		c.StartTimeout = time.Minute
	}
	if c.QuotaBytes <= 0 {
		c.QuotaBytes = 2 << 30
	}
	if c.MemberName == "" {
		c.MemberName = "strait-0"
	}
	return c, nil
}

// privateDir makes dir, or refuses one that others may enter.
func privateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return fmt.Errorf("%s is no directory", dir)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s may be entered by others (%v); want 0700", dir, st.Mode().Perm())
	}
	return nil
}

// tlsConfig is for the listener: TLS 1.3, a client certificate of the API CA always, no resumption.
func (c Config) tlsConfig() (*tls.Config, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(c.ClientCAPEM) {
		return nil, errors.New("config: ClientCAPEM holds no certificate")
	}
	t := &tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
		NextProtos: []string{"h2", "http/1.1"}, SessionTicketsDisabled: true, GetCertificate: c.GetCertificate,
	}
	if c.GetCertificate == nil {
		pair, err := tls.X509KeyPair(c.ServingCertPEM, c.ServingKeyPEM)
		if err != nil {
			return nil, fmt.Errorf("config: serving certificate: %w", err)
		}
		t.Certificates = []tls.Certificate{pair}
	}
	return t, nil
}
