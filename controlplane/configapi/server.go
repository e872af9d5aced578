// SPDX-License-Identifier: Apache-2.0

package configapi

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/netutil"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apiserver"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	apimachineryversion "k8s.io/apimachinery/pkg/version"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/discovery/aggregated"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	"k8s.io/apiserver/pkg/registry/generic"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/options"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	"k8s.io/apiserver/pkg/util/openapi"
	clientrest "k8s.io/client-go/rest"
	basecompatibility "k8s.io/component-base/compatibility"
	baseversion "k8s.io/component-base/version"
	"k8s.io/kube-openapi/pkg/validation/spec"

	"github.com/strait-mesh/strait/controlplane/api"
)

// etcdPrefix is where objects lie in the store.
const etcdPrefix = "/registry"

// running guards the libraries' global state: one server per process at a time.
var running atomic.Bool

// ending says that a server is being closed.
var ending atomic.Bool

// errRunning is returned by Start while another server runs in this process.
var errRunning = errors.New("configuration API: one server per process")

// Server is a running configuration API.
type Server struct {
	config   Config
	store    *store
	loop     *loopback
	handler  http.Handler // authenticated by its caller
	listener net.Listener
	conns    *connections // of listener
	servers  []*http.Server
	generic  *genericapiserver.GenericAPIServer

	cancel  context.CancelFunc
	wg      sync.WaitGroup
	once    sync.Once
	failing sync.Once
	failed  chan struct{}
	cause   error
}

// Start returns when the API answers for every kind. Close ends it; a failure of the store closes Failed.
func Start(ctx context.Context, c Config) (_ *Server, err error) {
	c, err = c.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("configuration API: %w", err)
	}
	if !running.CompareAndSwap(false, true) {
		return nil, errRunning
	}
	s := &Server{config: c, loop: newLoopback(), failed: make(chan struct{}), conns: newConnections(c.Allow, time.Now)}
	runCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s.cancel = cancel
	defer func() {
		if err != nil {
			s.Close()
			err = fmt.Errorf("configuration API: %w", err)
		}
	}()
	ctx, done := context.WithTimeout(ctx, c.StartTimeout)
	defer done()
	routeKlog(c.Logger, func() { s.fail(errors.New("the API server's library has given up; its log says why")) })
	if err := privateDir(c.Dir); err != nil {
		return nil, err
	}
	if err := s.listen(ctx); err != nil {
		return nil, err
	}
	if s.store, err = startStore(ctx, c); err != nil {
		return nil, err
	}
	s.wg.Go(func() { s.watchStore(runCtx) })
	if err := s.build(); err != nil {
		return nil, err
	}
	prepared := s.generic.PrepareRun()
	if s.generic.StaticOpenAPISpec == nil {
		s.generic.StaticOpenAPISpec = &spec.Swagger{} // without version 2 the definitions' version 3 would stay away as well
	}
	s.serve(runCtx, s.loop, nil, as(&user.DefaultInfo{Name: "strait", Groups: []string{RoleAdmin}}, strict(s.generic.Handler)))
	if _, _, err := prepared.NonBlockingRunWithContext(runCtx, closeGrace); err != nil {
		return nil, err
	}
	if err := s.applySchemas(ctx); err != nil {
		return nil, err
	}
	if err := s.touch(ctx); err != nil {
		return nil, err
	}
	if err := s.startNamespaces(runCtx); err != nil {
		return nil, err
	}
	s.handler = as(&user.DefaultInfo{Name: "socket", Groups: []string{RoleAdmin}}, strict(s.generic.Handler))
	if s.listener != nil {
		s.wg.Go(func() { s.conns.run(runCtx) })
		s.serve(runCtx, s.listener, s.conns.state, sameSite(s.servingLeaf, strict(s.generic.Handler)))
	}
	return s, nil
}

// Addr is the bound address; nil without a listener.
func (s *Server) Addr() net.Addr {
	if s.listener == nil {
		return nil
	}
	return s.listener.Addr()
}

// RESTConfig reaches the API from inside the process, as admin. The copy is the caller's.
func (s *Server) RESTConfig() *clientrest.Config { return s.loop.restConfig() }

// Handler serves the API as admin to whoever reaches it: its user has checked the caller (a unix socket's peer credentials).
func (s *Server) Handler() http.Handler { return s.handler }

// Judge asks Allow again about every client certificate, and ends the connections of those that it refuses: their watches, too.
func (s *Server) Judge() {
	if n := s.conns.judge(); n > 0 {
		s.config.Logger.Info("connections to the configuration API withdrawn", "connections", n)
	}
}

// Failed is closed when the store has stopped by itself; Err says why. The process should end: what was not written durably must
// not be served.
func (s *Server) Failed() <-chan struct{} { return s.failed }

// Err is why the store stopped. Valid after Failed.
func (s *Server) Err() error { return s.cause }

// Close ends the server and waits for it. It may be called more than once.
func (s *Server) Close() error {
	s.once.Do(s.close)
	return nil
}

func (s *Server) close() {
	ending.Store(true)
	if s.listener != nil {
		_ = s.listener.Close()
	}
	if s.generic != nil {
		s.drain()
	}
	for _, srv := range s.servers {
		_ = srv.Close() // watches never end by themselves
	}
	s.cancel()
	_ = s.loop.Close()
	if s.generic != nil {
		s.generic.Destroy()
	}
	s.wg.Wait()
	if s.store != nil {
		s.store.close()
	}
	ending.Store(false)
	running.Store(false)
}

// drain refuses new requests and waits for those that are no watches.
func (s *Server) drain() {
	done := make(chan struct{})
	go s.waitRequests(done)
	select {
	case <-done:
	case <-time.After(closeGrace):
	}
}

// waitRequests ends at the latest when the requests' own deadlines have passed.
func (s *Server) waitRequests(done chan<- struct{}) {
	defer close(done)
	s.generic.NonLongRunningRequestWaitGroup.Wait()
}

// watchStore notices that etcd has ended by itself.
func (s *Server) watchStore(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case err := <-s.store.etcd.Err():
		s.fail(fmt.Errorf("store: %w", err))
	case <-s.store.etcd.Server.StopNotify():
		s.fail(errors.New("store: stopped"))
	}
}

// fail says once that the server cannot go on.
func (s *Server) fail(cause error) {
	if ending.Load() {
		return
	}
	s.failing.Do(func() {
		s.cause = cause
		s.config.Logger.Error("the configuration API has failed", "error", cause)
		close(s.failed)
	})
}

func (s *Server) listen(ctx context.Context) error {
	if s.config.Listen == "" {
		return nil
	}
	t, err := s.config.tlsConfig()
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", s.config.Listen)
	if err != nil {
		return err
	}
	s.listener = tls.NewListener(netutil.LimitListener(l, maxConnections), t)
	return nil
}

// servingLeaf is the certificate that callers see.
func (s *Server) servingLeaf() *x509.Certificate {
	var pair *tls.Certificate
	if s.config.GetCertificate != nil {
		pair, _ = s.config.GetCertificate(&tls.ClientHelloInfo{})
	} else if p, err := tls.X509KeyPair(s.config.ServingCertPEM, s.config.ServingKeyPEM); err == nil {
		pair = &p
	}
	if pair == nil || len(pair.Certificate) == 0 {
		return nil
	}
	if pair.Leaf != nil {
		return pair.Leaf
	}
	leaf, _ := x509.ParseCertificate(pair.Certificate[0])
	return leaf
}

func (s *Server) serve(ctx context.Context, l net.Listener, state func(net.Conn, http.ConnState), h http.Handler) {
	srv := &http.Server{
		Handler: h, ConnState: state, ReadHeaderTimeout: headerTimeout, // bounds the handshake as well
		IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes,
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) }, // Close ends them
		ErrorLog:    log.New(&debugWriter{s.config.Logger}, "", 0),
	}
	s.servers = append(s.servers, srv)
	s.wg.Go(func() {
		if err := srv.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			s.config.Logger.Error("serve configuration API", "error", err)
		}
	})
}

// debugWriter takes net/http's complaints about callers.
type debugWriter struct{ log *slog.Logger }

func (w *debugWriter) Write(p []byte) (int, error) {
	w.log.Debug("configuration API connection", "error", string(p))
	return len(p), nil
}

// restOptions is the storage for objects that codec writes.
func (s *Server) restOptions(codec runtime.Codec, tracker *genericapiserver.Config) generic.RESTOptionsGetter {
	sc := storagebackend.NewDefaultConfig(etcdPrefix, codec)
	sc.Transport.ServerList = []string{s.store.endpoint()}
	sc.StorageObjectCountTracker = tracker.StorageObjectCountTracker
	o := options.NewEtcdOptions(sc)
	o.EnableGarbageCollection = false // owner references are stored and not followed
	return o.CreateRESTOptionsGetter(&options.SimpleStorageFactory{StorageConfig: o.StorageConfig}, nil)
}

// build makes the one generic API server.
func (s *Server) build() error {
	g := genericapiserver.NewRecommendedConfig(apiserver.Codecs)
	g.ExternalAddress = "strait:7401"
	if a := s.Addr(); a != nil {
		g.ExternalAddress = a.String()
	}
	g.EffectiveVersion = servedVersion{basecompatibility.NewEffectiveVersionFromString(baseversion.DefaultKubeBinaryVersion, "", "")}
	g.LoopbackClientConfig = s.loop.restConfig()
	g.Authentication.Authenticator = authenticate(s.config.Allow, time.Now)
	g.Authorization.Authorizer = authorizer.AuthorizerFunc(authorize)
	g.EnableProfiling, g.EnableMetrics, g.EnableIndex = false, false, false
	g.MinRequestTimeout = 300
	g.MergedResourceConfig = apiserver.DefaultAPIResourceConfigSource()
	g.AggregatedDiscoveryGroupManager = aggregated.NewResourceManager("apis")
	g.OpenAPIV3Config = genericapiserver.DefaultOpenAPIV3Config(openapi.GetOpenAPIDefinitionsWithoutDisabledFeatures(definitions),
		openapinamer.NewDefinitionNamer(apiserver.Scheme, coreScheme))
	g.OpenAPIV3Config.Info.Title = "Strait"
	g.RESTOptionsGetter = s.restOptions(apiserver.Codecs.LegacyCodec(apiextensionsv1.SchemeGroupVersion), &g.Config)

	core := s.restOptions(coreCodecs.LegacyCodec(coreVersion), &g.Config)
	nsREST, err := newCoreREST(api.KindNamespace, "ns", func() runtime.Object { return &corev1.Namespace{} }, func() runtime.Object { return &corev1.NamespaceList{} }, core)
	if err != nil {
		return err
	}
	svcREST, err := newCoreREST(api.KindService, "svc", func() runtime.Object { return &corev1.Service{} }, func() runtime.Object { return &corev1.ServiceList{} }, core)
	if err != nil {
		return err
	}
	g.AdmissionControl = &namespaces{nsREST.Store}

	c := &apiserver.Config{GenericConfig: g, ExtraConfig: apiserver.ExtraConfig{
		CRDRESTOptionsGetter: s.restOptions(unstructured.UnstructuredJSONScheme, &g.Config),
		MasterCount:          1,
	}}
	server, err := c.Complete().New(genericapiserver.NewEmptyDelegate())
	if err != nil {
		return err
	}
	s.generic = server.GenericAPIServer
	group := genericapiserver.NewDefaultAPIGroupInfo("", coreScheme, metav1.ParameterCodec, coreCodecs)
	group.VersionedResourcesStorageMap["v1"] = map[string]rest.Storage{"namespaces": nsREST, "services": svcREST}
	if err := s.generic.InstallLegacyAPIGroup(genericapiserver.DefaultLegacyAPIPrefix, &group); err != nil {
		return err
	}
	s.installDiscovery()
	return nil
}

// installDiscovery serves /apis, which an aggregator does elsewhere, in its aggregated and in its classic form.
func (s *Server) installDiscovery() {
	groups := map[string]metav1.APIGroup{}
	for _, k := range api.Kinds() {
		if k.BuiltIn {
			continue
		}
		v := metav1.GroupVersionForDiscovery{GroupVersion: k.GroupVersion().String(), Version: k.Version}
		groups[k.Group] = metav1.APIGroup{Name: k.Group, Versions: []metav1.GroupVersionForDiscovery{v}, PreferredVersion: v}
	}
	for _, name := range []string{api.Group, api.GroupMCS} {
		s.generic.DiscoveryGroupManager.AddGroup(groups[name])
	}
	wrapped := aggregated.WrapAggregatedDiscoveryToHandler(s.generic.DiscoveryGroupManager, s.generic.AggregatedDiscoveryGroupManager, nil)
	s.generic.Handler.GoRestfulContainer.Add(wrapped.GenerateWebService("/apis", metav1.APIGroupList{}))
}

// servedVersion gives kubectl a version that it can parse.
type servedVersion struct {
	basecompatibility.EffectiveVersion
}

// Info is basecompatibility.EffectiveVersion's.
func (v servedVersion) Info() *apimachineryversion.Info {
	info := v.EffectiveVersion.Info()
	info.GitVersion = "v" + info.Major + "." + info.Minor + ".0+strait"
	info.GitCommit, info.GitTreeState = "", ""
	return info
}
