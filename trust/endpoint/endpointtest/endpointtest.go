// SPDX-License-Identifier: Apache-2.0

// Package endpointtest is a SPIFFE Workload API server for tests: a CA that has nothing in common with Strait's (its chain is
// longer, its root an RSA key, its certificates name nobody), and a server that offers what a test says, the way SPIRE's agent
// does. All methods may be called concurrently.
package endpointtest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Options of New.
type Options struct {
	TrustDomain spiffeid.TrustDomain
	TTL         time.Duration // of SVIDs, 1 h; a stream gets new ones at half of it
	Now         func() time.Time
}

type pair struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// Authority is a CA with roots in rotation: RSA root → P-384 upstream → P-256 intermediate → leaf.
type Authority struct {
	o Options

	mu        sync.Mutex
	roots     []*x509.Certificate
	next      *pair // prepared
	active    *pair
	upstream  *pair
	issuer    *pair
	jwt       *ecdsa.PrivateKey
	serial    int64
	changed   chan struct{}
	issuances int
}

// New makes an Authority with one root.
func New(o Options) (*Authority, error) {
	if o.TTL <= 0 {
		o.TTL = time.Hour
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	a := &Authority{o: o, changed: make(chan struct{})}
	var err error
	if a.jwt, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	return a, errors.Join(a.Prepare(), a.Activate(), a.Retire())
}

func (a *Authority) notifyLocked() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// Prepare makes a new root and publishes it beside the present ones.
func (a *Authority) Prepare() error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	root, err := a.signLocked(a.template("Elsewhere Root", 2), nil, key, key)
	if err != nil {
		return err
	}
	a.next = root
	a.roots = append([]*x509.Certificate{root.cert}, a.roots...) // the newest first: an order that is not ours
	a.notifyLocked()
	return nil
}

// Activate issues by the root prepared from now on, and anew to everybody.
func (a *Authority) Activate() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.next == nil {
		return errors.New("nothing is prepared")
	}
	a.active, a.next = a.next, nil
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return err
	}
	if a.upstream, err = a.signLocked(a.template("Elsewhere Upstream", 1), a.active, key, key); err != nil {
		return err
	}
	issuer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if a.issuer, err = a.signLocked(a.template("Elsewhere Issuer", 0), a.upstream, issuer, issuer); err != nil {
		return err
	}
	a.notifyLocked()
	return nil
}

// Retire publishes the active root alone.
func (a *Authority) Retire() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.roots = []*x509.Certificate{a.active.cert}
	a.notifyLocked()
	return nil
}

// Reissue gives every stream new SVIDs now.
func (a *Authority) Reissue() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.notifyLocked()
}

func (a *Authority) template(name string, maxPath int) *x509.Certificate {
	now := a.o.Now()
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: name, Country: []string{"ZZ"}}, NotBefore: now.Add(-10 * time.Second), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: maxPath, MaxPathLenZero: maxPath == 0, KeyUsage: x509.KeyUsageCertSign,
	}
}

// signLocked signs t by parent, or by itself.
func (a *Authority) signLocked(t *x509.Certificate, parent *pair, signer, key crypto.Signer) (*pair, error) {
	a.serial++
	t.SerialNumber = big.NewInt(a.serial)
	issuer := t
	if parent != nil {
		issuer, signer = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, t, issuer, key.Public(), signer)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &pair{cert, key}, err
}

// Bundle is the roots, one DER after the other.
func (a *Authority) Bundle() []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.bundleLocked()
}

func (a *Authority) bundleLocked() (out []byte) {
	for _, r := range a.roots {
		out = append(out, r.Raw...)
	}
	return out
}

// SVID issues id, as the API sends it.
func (a *Authority) SVID(id spiffeid.ID) (*workload.X509SVID, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := a.o.Now()
	leaf, err := a.signLocked(&x509.Certificate{
		Subject: pkix.Name{Country: []string{"ZZ"}}, URIs: []*url.URL{id.URL()}, NotBefore: now.Add(-10 * time.Second), NotAfter: now.Add(a.o.TTL),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyAgreement,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.issuer, nil, key)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	a.issuances++
	chain := append(append(append([]byte(nil), leaf.cert.Raw...), a.issuer.cert.Raw...), a.upstream.cert.Raw...)
	return &workload.X509SVID{SpiffeId: id.String(), X509Svid: chain, X509SvidKey: pkcs8, Bundle: a.bundleLocked()}, nil
}

// Issued counts SVIDs.
func (a *Authority) Issued() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.issuances
}

// JWKS is the JWT keys the way SPIRE's agent sends them: without a use.
func (a *Authority) JWKS() []byte {
	raw, err := a.jwt.PublicKey.Bytes()
	if err != nil {
		panic("endpointtest: " + err.Error()) // P-256
	}
	b64 := base64.RawURLEncoding.EncodeToString
	doc, err := json.Marshal(map[string]any{"keys": []map[string]string{{"kty": "EC", "kid": "elsewhere-1", "crv": "P-256", "x": b64(raw[1:33]), "y": b64(raw[33:])}}})
	if err != nil {
		panic("endpointtest: " + err.Error()) // strings
	}
	return doc
}

// Server is a Workload API for one kind of process: who may connect gets what is offered.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	a *Authority
	g *grpc.Server
	// Edit changes an answer before it is sent; nil: nothing.
	Edit func(*workload.X509SVIDResponse)
	// NoJWT leaves the JWT profile out.
	NoJWT bool

	mu      sync.Mutex
	ids     []spiffeid.ID
	silent  bool
	changed chan struct{}
}

// Server makes a server that offers ids, the first one as the default.
func (a *Authority) Server(ids ...spiffeid.ID) *Server {
	s := &Server{a: a, g: grpc.NewServer(), ids: ids, changed: make(chan struct{})}
	workload.RegisterSpiffeWorkloadAPIServer(s.g, s)
	return s
}

// Offer changes what is offered; nothing: callers are refused.
func (s *Server) Offer(ids ...spiffeid.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ids = ids
	close(s.changed)
	s.changed = make(chan struct{})
}

// Silence keeps streams open and sends nothing on those that have had their first answer: an agent that hangs.
func (s *Server) Silence(silent bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.silent = silent
}

// Serve serves on l until Stop.
func (s *Server) Serve(l net.Listener) error { return s.g.Serve(l) }

// Listen serves on a unix socket below dir until Stop, and returns its address for SPIFFE_ENDPOINT_SOCKET.
func (s *Server) Listen(dir, name string) (string, error) {
	p := filepath.Join(dir, name)
	_ = os.Remove(p)
	l, err := net.Listen("unix", p)
	if err != nil {
		return "", err
	}
	go func() { _ = s.g.Serve(l) }() // Stop waits for it
	return "unix://" + p, nil
}

// Stop ends all streams and waits.
func (s *Server) Stop() { s.g.Stop() }

func checkHeader(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get("workload.spiffe.io"); len(v) != 1 || v[0] != "true" {
		return status.Error(codes.InvalidArgument, "security header missing from request")
	}
	return nil
}

// FetchX509SVID implements the API.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if err := checkHeader(stream.Context()); err != nil {
		return err
	}
	for first := true; ; first = false {
		s.a.mu.Lock()
		authority := s.a.changed
		s.a.mu.Unlock()
		s.mu.Lock()
		ids, changed, silent := s.ids, s.changed, s.silent
		s.mu.Unlock()
		if len(ids) == 0 {
			return status.Error(codes.PermissionDenied, "no identity issued")
		}
		if first || !silent {
			if err := s.send(stream, ids); err != nil {
				return err
			}
		}
		half := time.NewTimer(s.a.o.TTL / 2)
		select {
		case <-stream.Context().Done():
			half.Stop()
			return stream.Context().Err()
		case <-authority:
		case <-changed:
		case <-half.C:
		}
		half.Stop()
	}
}

func (s *Server) send(stream grpc.ServerStreamingServer[workload.X509SVIDResponse], ids []spiffeid.ID) error {
	m := &workload.X509SVIDResponse{}
	for _, id := range ids {
		v, err := s.a.SVID(id)
		if err != nil {
			return status.Error(codes.Internal, fmt.Sprint(err))
		}
		m.Svids = append(m.Svids, v)
	}
	if s.Edit != nil {
		s.Edit(m)
	}
	return stream.Send(m)
}

// FetchJWTBundles implements the API.
func (s *Server) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	if err := checkHeader(stream.Context()); err != nil {
		return err
	}
	if s.NoJWT {
		return status.Error(codes.Unimplemented, "no JWT profile")
	}
	if err := stream.Send(&workload.JWTBundlesResponse{Bundles: map[string][]byte{"spiffe://" + s.a.o.TrustDomain.String(): s.a.JWKS()}}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return stream.Context().Err()
}
