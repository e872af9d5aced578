// SPDX-License-Identifier: Apache-2.0

package bundleendpoint

import (
	"bytes"
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/strait-mesh/strait/trust"
)

// The profiles of SPIFFE Federation, section 5.2.
const (
	ProfileWeb    = "https_web"
	ProfileSPIFFE = "https_spiffe"
)

const (
	// DefaultRefreshHint is what readers are told: how soon a new root is known everywhere.
	DefaultRefreshHint = 5 * time.Minute

	requestTime    = 5 * time.Second
	connectionTime = 10 * time.Second
	maxConnections = 256
	certEvery      = time.Second
)

// ServerConfig says what is published and as whom.
type ServerConfig struct {
	Bundle func() *trust.Bundle // required
	// Source is the identity of profile https_spiffe. Where CertFile and KeyFile are given, the profile is https_web instead.
	Source            *trust.Source
	CertFile, KeyFile string        // PEM
	RefreshHint       time.Duration // DefaultRefreshHint; clamped to 1 min … 24 h
	Now               func() time.Time
	Logger            *slog.Logger
}

// Server is the endpoint. Make it with NewServer.
type Server struct {
	cfg  ServerConfig
	tls  *tls.Config
	http *http.Server

	mu    sync.Mutex
	conns *list.List // of net.Conn, oldest first
}

// NewServer checks the configuration, and reads certificate and key where there are any.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.Bundle == nil {
		return nil, errors.New("bundle endpoint: no bundle")
	}
	if cfg.RefreshHint <= 0 {
		cfg.RefreshHint = DefaultRefreshHint
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, conns: list.New()}
	switch {
	case cfg.CertFile != "" && cfg.KeyFile != "":
		files := &keyPair{cert: cfg.CertFile, key: cfg.KeyFile, now: cfg.Now, log: cfg.Logger}
		if _, err := files.get(); err != nil {
			return nil, err
		}
		s.tls = trust.WebServerTLS(files.get)
	case cfg.CertFile != "" || cfg.KeyFile != "":
		return nil, errors.New("bundle endpoint: a certificate without its key, or a key without its certificate")
	case cfg.Source == nil:
		return nil, errors.New("bundle endpoint: no identity")
	default:
		s.tls = cfg.Source.BundleServerTLS()
	}
	s.http = &http.Server{
		Handler: http.HandlerFunc(s.serve), ReadHeaderTimeout: requestTime, ReadTimeout: requestTime, WriteTimeout: requestTime,
		MaxHeaderBytes: 8 << 10, ErrorLog: slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug),
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){}, // HTTP/1.1 alone
	}
	s.http.SetKeepAlivesEnabled(false)
	return s, nil
}

// Profile is https_web or https_spiffe.
func (s *Server) Profile() string {
	if s.cfg.CertFile != "" {
		return ProfileWeb
	}
	return ProfileSPIFFE
}

// Serve answers on l, which it owns, until Close. It returns nil then.
func (s *Server) Serve(l net.Listener) error {
	err := s.http.Serve(tls.NewListener(&bounded{Listener: l, s: s}, s.tls))
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Close lets answers under way end for half a second, and ends the rest.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		return s.http.Close()
	}
	return nil
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("X-Content-Type-Options", "nosniff")
	switch {
	case r.URL.Path != "/":
		http.NotFound(w, r)
		return
	case r.Method != http.MethodGet:
		h.Set("Allow", http.MethodGet)
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
		return
	}
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	_, _ = w.Write(s.cfg.Bundle().WithRefreshHint(s.cfg.RefreshHint).Marshal())
}

// bounded holds the connections to a number and to a time, whatever they do.
type bounded struct {
	net.Listener
	s *Server
}

func (b *bounded) Accept() (net.Conn, error) {
	raw, err := b.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: raw, s: b.s}
	b.s.mu.Lock()
	c.element = b.s.conns.PushBack(c)
	var oldest *conn
	if b.s.conns.Len() > maxConnections {
		oldest = b.s.conns.Front().Value.(*conn)
	}
	c.end = time.AfterFunc(connectionTime, func() { _ = c.Close() })
	b.s.mu.Unlock()
	if oldest != nil {
		_ = oldest.Close()
	}
	return c, nil
}

type conn struct {
	net.Conn
	s       *Server
	element *list.Element
	end     *time.Timer
}

// Close is idempotent in what it does to the bound.
func (c *conn) Close() error {
	c.s.mu.Lock()
	c.s.conns.Remove(c.element)
	c.end.Stop()
	c.s.mu.Unlock()
	return c.Conn.Close()
}

// keyPair reads a certificate and its key again when one of the files has changed.
type keyPair struct {
	cert, key string
	now       func() time.Time
	log       *slog.Logger

	mu        sync.Mutex
	read      time.Time
	have      *tls.Certificate
	pem, kpem []byte
}

func (k *keyPair) get() (*tls.Certificate, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := k.now()
	if age := now.Sub(k.read); k.have != nil && age >= 0 && age < certEvery {
		return k.have, nil
	}
	k.read = now
	cert, err := readSmall(k.cert)
	var key []byte
	if err == nil {
		key, err = readSmall(k.key)
	}
	if err == nil && k.have != nil && bytes.Equal(cert, k.pem) && bytes.Equal(key, k.kpem) {
		return k.have, nil
	}
	var pair tls.Certificate
	if err == nil {
		pair, err = tls.X509KeyPair(cert, key)
	}
	switch {
	case err == nil:
		if k.have != nil {
			k.log.Info("bundle endpoint: new certificate", "not_after", pair.Leaf.NotAfter)
		}
		k.have, k.pem, k.kpem = &pair, cert, key
	case k.have == nil:
		return nil, errors.New("bundle endpoint: certificate and key: " + err.Error())
	default: // one of the two was written, the other follows
		k.log.Warn("bundle endpoint: certificate and key are not usable; the last ones stay", "err", err)
	}
	return k.have, nil
}

// readSmall reads a file of at most 1 MiB.
func readSmall(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 1<<20))
}
