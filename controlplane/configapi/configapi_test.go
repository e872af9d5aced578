// SPDX-License-Identifier: Apache-2.0

package configapi_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	k8sschema "k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/configapi"
	"github.com/strait-mesh/strait/controlplane/schema"
)

// authority is a small CA for the listener.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
	out  atomic.Pointer[string] // name of an operator who was withdrawn
}

// allow judges client certificates.
func (a *authority) allow(c *x509.Certificate) error {
	if out := a.out.Load(); out != nil && c.Subject.CommonName == *out {
		return errors.New("withdrawn")
	}
	return nil
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "api"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, _ = x509.ParseCertificate(der)
	return &authority{cert: c, key: key, pem: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

func (a *authority) issue(t *testing.T, name string, usage x509.ExtKeyUsage, orgs ...string) (certPEM, keyPEM []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name, Organization: orgs}, NotBefore: time.Now().Add(-time.Minute),
		NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
		DNSNames: []string{"strait.test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	k, _ := x509.MarshalPKCS8PrivateKey(key)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k})
}

func (a *authority) client(t *testing.T, addr, role string) *rest.Config {
	c := &rest.Config{Host: "https://" + addr, TLSClientConfig: rest.TLSClientConfig{CAData: a.pem}, QPS: -1, WarningHandler: rest.NoWarnings{}}
	if role != "" {
		c.CertData, c.KeyData = a.issue(t, "ada", x509.ExtKeyUsageClientAuth, role)
	}
	return c
}

func start(t *testing.T, ca *authority, dir string) *configapi.Server {
	t.Helper()
	c := configapi.Config{Dir: dir, Logger: testLogger(t)}
	if ca != nil {
		c.Listen, c.ClientCAPEM, c.Allow = "127.0.0.1:0", ca.pem, ca.allow
		c.ServingCertPEM, c.ServingKeyPEM = ca.issue(t, "server", x509.ExtKeyUsageServerAuth)
	}
	begin := time.Now()
	s, err := configapi.Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("ready in %v", time.Since(begin).Round(time.Millisecond))
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// testLogger shows what an operator would see.
func testLogger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(logWriter{t}, &slog.HandlerOptions{Level: testLevel}))
}

type logWriter struct{ t *testing.T }

func (w logWriter) Write(p []byte) (int, error) {
	if w.t.Context().Err() == nil {
		w.t.Logf("log: %s", bytes.TrimSpace(p))
	}
	return len(p), nil
}

func storeDir(t *testing.T) string { return filepath.Join(t.TempDir(), "store") }

func client(t *testing.T, c *rest.Config) dynamic.Interface {
	t.Helper()
	d, err := dynamic.NewForConfig(c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func in(t *testing.T, d dynamic.Interface, kind, ns string) dynamic.ResourceInterface {
	t.Helper()
	k, ok := api.KindNamed(kind)
	if !ok {
		t.Fatal(kind)
	}
	r := d.Resource(k.Resource())
	if k.Namespaced {
		return r.Namespace(ns)
	}
	return r
}

func object(t *testing.T, yaml string) *unstructured.Unstructured {
	t.Helper()
	list, err := schema.Parse("test", []byte(yaml))
	if err != nil || len(list) != 1 {
		t.Fatalf("%v", err)
	}
	return list[0]
}

var crdResource = k8sschema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

var testLevel = slog.LevelInfo

const workload = "apiVersion: strait.dev/v1alpha1\nkind: Workload\nmetadata: {name: web-1, namespace: shop, labels: {app: web}}\nspec: {address: 10.0.0.1, ports: {http: 8080}}\n"

// TestAPI drives one server through what its users do. Starting one costs a second, so the steps share it.
func TestAPI(t *testing.T) {
	ca := newAuthority(t)
	s := start(t, ca, storeDir(t))
	d := client(t, s.RESTConfig())
	ctx := t.Context()
	t.Run("second server", func(t *testing.T) {
		if _, err := configapi.Start(ctx, configapi.Config{Dir: storeDir(t)}); err == nil {
			t.Fatal("a second server started in one process")
		}
	})
	t.Run("write and read", func(t *testing.T) { testCRUD(t, d) })
	t.Run("watch", func(t *testing.T) { testWatch(t, d) })
	t.Run("namespace", func(t *testing.T) { testNamespaces(t, d) })
	t.Run("apply", func(t *testing.T) { testApply(t, d) })
	t.Run("refusals", func(t *testing.T) { testRefusals(t, s) })
	t.Run("discovery", func(t *testing.T) { testDiscovery(t, s.RESTConfig()) })
	t.Run("roles", func(t *testing.T) { testRoles(t, ca, s) })
	t.Run("strangers", func(t *testing.T) { testStrangers(t, ca, s) })
	t.Run("browsers", func(t *testing.T) { testBrowsers(t, ca, s) })
	t.Run("socket", func(t *testing.T) { testHandler(t, s) })
	t.Run("garbage", func(t *testing.T) { testGarbage(t, ca, s) })
	t.Run("withdrawn", func(t *testing.T) { testWithdrawn(t, ca, s) })
	t.Run("silence", func(t *testing.T) { testSilence(t, ca, s) })
}

func testCRUD(t *testing.T, d dynamic.Interface) {
	ctx := t.Context()
	files, _ := filepath.Glob("../schema/testdata/good/*.yaml")
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		objects, err := schema.Parse(f, data)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objects {
			unstructured.RemoveNestedField(o.Object, "status")
			if o.GetKind() == api.KindWorkload && o.GetNamespace() == "" {
				o.SetNamespace("shop")
			}
			r := in(t, d, o.GetKind(), o.GetNamespace())
			if _, err := r.Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: "test", Force: true}); err != nil {
				t.Errorf("%s %s: %v", o.GetKind(), o.GetName(), err)
				continue
			}
			got, err := r.Get(ctx, o.GetName(), metav1.GetOptions{})
			if err != nil || got.GetUID() == "" {
				t.Errorf("%s %s: %v", o.GetKind(), o.GetName(), err)
			}
		}
	}
	p, err := in(t, d, "failoverpolicy", "shop").Get(ctx, "checkout", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if p.GetGeneration() != 1 {
		t.Errorf("generation %d", p.GetGeneration())
	}
	conditions := []any{map[string]any{"type": "Accepted", "status": "True", "reason": "Valid", "message": "", "lastTransitionTime": "2026-11-22T14:02:11Z"}}
	if err := unstructured.SetNestedSlice(p.Object, conditions, "status", "conditions"); err != nil {
		t.Fatal(err)
	}
	p, err = in(t, d, "failoverpolicy", "shop").UpdateStatus(ctx, p, metav1.UpdateOptions{})
	if err != nil || p.GetGeneration() != 1 {
		t.Fatalf("status: generation %d, %v", p.GetGeneration(), err)
	}
	svc, err := in(t, d, "service", "shop").Get(ctx, "checkout", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if list, _, _ := unstructured.NestedSlice(svc.Object, "spec", "ports"); len(list) != 2 || list[0].(map[string]any)["protocol"] != "TCP" {
		t.Errorf("ports %v", list)
	}
	stale := svc.DeepCopy()
	svc.SetLabels(map[string]string{"tier": "db"})
	if _, err := in(t, d, "service", "shop").Update(ctx, svc, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := in(t, d, "service", "shop").Update(ctx, stale, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("stale update: %v", err)
	}
	if err := in(t, d, "service", "shop").Delete(ctx, "checkout", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := in(t, d, "service", "shop").Get(ctx, "checkout", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("after delete: %v", err)
	}
}

func testWatch(t *testing.T, d dynamic.Interface) {
	ctx := t.Context()
	r := in(t, d, "workload", "watched")
	list, err := r.List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w, err := r.Watch(ctx, metav1.ListOptions{ResourceVersion: list.GetResourceVersion()})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	o := object(t, workload)
	o.SetNamespace("watched")
	if o, err = r.Create(ctx, o, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := unstructured.SetNestedField(o.Object, "zone-b", "spec", "zone"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Update(ctx, o, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := r.Delete(ctx, o.GetName(), metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"ADDED", "MODIFIED", "DELETED"} {
		select {
		case e := <-w.ResultChan():
			if string(e.Type) != want {
				t.Errorf("got %s, want %s", e.Type, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("no %s", want)
		}
	}
}

func testNamespaces(t *testing.T, d dynamic.Interface) {
	ctx := t.Context()
	ns := in(t, d, "namespace", "")
	dry := object(t, workload)
	dry.SetNamespace("never")
	if _, err := in(t, d, "workload", "never").Create(ctx, dry, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
		t.Errorf("dry run: %v", err)
	}
	if _, err := ns.Get(ctx, "never", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("a dry run made its namespace: %v", err)
	}
	o := object(t, workload)
	o.SetNamespace("brief")
	if _, err := in(t, d, "workload", "brief").Create(ctx, o, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	w, err := ns.Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=brief"})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	if err := ns.Delete(ctx, "brief", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for gone := false; !gone; {
		select {
		case e := <-w.ResultChan():
			gone = e.Type == "DELETED"
		case <-time.After(20 * time.Second):
			t.Fatal("the namespace stays")
		}
	}
	if list, err := in(t, d, "workload", "brief").List(ctx, metav1.ListOptions{}); err != nil || len(list.Items) > 0 {
		t.Errorf("content is left: %v, %v", list, err)
	}
}

func testApply(t *testing.T, d dynamic.Interface) {
	ctx := t.Context()
	r := in(t, d, "workload", "applied")
	o := object(t, workload)
	o.SetNamespace("applied")
	if _, err := r.Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: "one"}); err != nil {
		t.Fatal(err)
	}
	if err := unstructured.SetNestedField(o.Object, "10.0.0.2", "spec", "address"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: "two"}); !apierrors.IsConflict(err) {
		t.Fatalf("another owner's field: %v", err)
	}
	got, err := r.Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: "two", Force: true})
	if err != nil {
		t.Fatal(err)
	}
	if a, _, _ := unstructured.NestedString(got.Object, "spec", "address"); a != "10.0.0.2" {
		t.Errorf("address %q", a)
	}
	svc := object(t, "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: applied}\nspec: {selector: {app: web}, ports: [{name: http, port: 80}]}\n")
	s := in(t, d, "service", "applied")
	if _, err := s.Apply(ctx, "web", svc, metav1.ApplyOptions{FieldManager: "one"}); err != nil {
		t.Fatal(err)
	}
	more := object(t, "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: applied}\nspec: {ports: [{name: admin, port: 81}]}\n")
	if got, err = s.Apply(ctx, "web", more, metav1.ApplyOptions{FieldManager: "two"}); err != nil {
		t.Fatal(err)
	}
	if ports, _, _ := unstructured.NestedSlice(got.Object, "spec", "ports"); len(ports) != 2 {
		t.Errorf("two owners' ports: %v", ports)
	}
}

// testRefusals: what the schema and the rules refuse, whatever validation the client asks for. P7.
func testRefusals(t *testing.T, s *configapi.Server) {
	d := client(t, s.RESTConfig())
	head := `{"apiVersion":"strait.dev/v1alpha1","metadata":{"name":"x"},`
	for _, c := range []struct{ name, kind, body, said string }{
		{"flap", "failoverpolicy", head + `"kind":"FailoverPolicy","spec":{"targetRefs":[{"kind":"Service","name":"x"}],"return":{"minHealthyPercent":40}}}`, "40 must be greater than trip.minHealthyPercent (50), or traffic flaps"},
		{"unknown field", "accesspolicy", head + `"kind":"AccessPolicy","spec":{"targetRefs":[{"kind":"Service","name":"x"}],"rules":[{"action":"allow","form":[]}]}}`, `unknown field "spec.rules[0].form"`},
		{"key twice", "accesspolicy", head + `"kind":"AccessPolicy","spec":{"targetRefs":[{"kind":"Service","name":"x"}],"mode":"enforce","mode":"audit"}}`, `duplicate field "spec.mode"`},
		{"when", "accesspolicy", head + `"kind":"AccessPolicy","spec":{"targetRefs":[{"kind":"Service","name":"x"}],"rules":[{"when":["true"]}]}}`, "not supported by this version"},
		{"service field", "service", `{"apiVersion":"v1","kind":"Service","metadata":{"name":"x"},"spec":{"ports":[{"port":80}],"externalName":"example.org"}}`, "unknown field"},
		{"service port", "service", `{"apiVersion":"v1","kind":"Service","metadata":{"name":"x"},"spec":{"ports":[{"port":80},{"port":81}]}}`, "name of its own"},
		{"name", "workload", `{"apiVersion":"strait.dev/v1alpha1","metadata":{"name":"a.b"},"kind":"Workload","spec":{}}`, "one lower-case DNS label"},
		{"depth", "workload", head + `"kind":"Workload","spec":` + strings.Repeat(`{"a":`, 100_000) + "1" + strings.Repeat("}", 100_000) + "}", ""},
		{"size", "workload", head + `"kind":"Workload","spec":{"address":"` + strings.Repeat("a", 1<<20) + `"}}`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			k, _ := api.KindNamed(c.kind)
			path := "/apis/" + k.Group + "/" + k.Version
			if k.Group == "" {
				path = "/api/v1"
			}
			path += "/namespaces/refused/" + k.Plural
			for _, query := range []string{"", "?fieldValidation=Ignore", "?fieldValidation=Warn&dryRun=All"} {
				w := httptest.NewRecorder()
				r := httptest.NewRequest(http.MethodPost, path+query, strings.NewReader(c.body))
				r.Header.Set("Content-Type", "application/json")
				begin := time.Now()
				s.Handler().ServeHTTP(w, r)
				if w.Code < 400 || w.Code >= 500 || !strings.Contains(strings.ReplaceAll(w.Body.String(), `\"`, `"`), c.said) {
					t.Errorf("%s: %d %.300s, want %q", query, w.Code, w.Body, c.said)
				}
				if took := time.Since(begin); took > 2*time.Second {
					t.Errorf("refused after %v", took)
				}
				if w.Body.Len() > 4<<20 {
					t.Errorf("%d bytes of answer", w.Body.Len())
				}
			}
			if _, err := in(t, d, c.kind, "refused").Get(t.Context(), "x", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
				t.Errorf("it was stored: %v", err)
			}
		})
	}
	t.Run("apply", func(t *testing.T) {
		for kind, body := range map[string]string{
			"workload": `{"apiVersion":"strait.dev/v1alpha1","kind":"Workload","metadata":{"name":"x"},"spec":{"adress":"10.0.0.1"}}`,
			"service":  `{"apiVersion":"v1","kind":"Service","metadata":{"name":"x"},"spec":{"ports":[{"port":80,"prot":1}]}}`,
		} {
			_, err := in(t, d, kind, "refused").Patch(t.Context(), "x", types.ApplyPatchType, []byte(body), metav1.PatchOptions{FieldManager: "test"})
			if err == nil || !strings.Contains(err.Error(), "field not declared in schema") { // upstream answers 500 here
				t.Errorf("%s: %v", kind, err)
			}
		}
	})
	t.Run("patch", func(t *testing.T) {
		ctx := t.Context()
		r := in(t, d, "accesspolicy", "patched")
		o := object(t, "apiVersion: strait.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: p, namespace: patched}\nspec: {targetRefs: [{kind: Service, name: x}], rules: [{action: deny}]}\n")
		if _, err := r.Create(ctx, o, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Patch(ctx, "p", types.MergePatchType, []byte(`{"spec":{"rules":[{"action":"allow","whne":["false"]}]}}`), metav1.PatchOptions{}); err == nil {
			t.Error("a patch with an unknown field was accepted")
		}
		got, err := r.Get(ctx, "p", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if rules, _, _ := unstructured.NestedSlice(got.Object, "spec", "rules"); rules[0].(map[string]any)["action"] != "deny" {
			t.Errorf("the previous version did not stay: %v", rules)
		}
	})
}

func testDiscovery(t *testing.T, c *rest.Config) {
	d, err := discovery.NewDiscoveryClientForConfig(c)
	if err != nil {
		t.Fatal(err)
	}
	groups, lists, err := d.ServerGroupsAndResources()
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, l := range lists {
		for _, r := range l.APIResources {
			found[l.GroupVersion+"/"+r.Name] = true
		}
	}
	for _, k := range api.Kinds() {
		if gv := k.GroupVersion().String(); !found[gv+"/"+k.Plural] {
			t.Errorf("discovery lacks %s/%s; groups %d", gv, k.Plural, len(groups))
		}
	}
	v, err := d.ServerVersion()
	if err != nil || !strings.HasPrefix(v.GitVersion, "v1.") {
		t.Errorf("version %v, %v", v, err)
	}
	paths, err := d.OpenAPIV3().Paths()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"api/v1", "apis/strait.dev/v1alpha1", "apis/multicluster.x-k8s.io/v1beta1"} {
		p, ok := paths[want]
		if !ok {
			t.Errorf("OpenAPI lacks %s: %v", want, paths)
			continue
		}
		if data, err := p.Schema("application/json"); err != nil || !bytes.Contains(data, []byte("properties")) {
			t.Errorf("OpenAPI of %s: %v", want, err)
		}
	}
	d.UseLegacyDiscovery = true
	if _, lists, err := d.ServerGroupsAndResources(); err != nil || len(lists) < 3 {
		t.Errorf("classic discovery: %d lists, %v", len(lists), err)
	}
}

// TestRestartAndRestore: what was acknowledged is there after a restart, and after the loss of the store by its snapshot, under a
// revision that no client has seen.
func TestRestartAndRestore(t *testing.T) {
	dir := storeDir(t)
	ctx := t.Context()
	s := start(t, nil, dir)
	o, err := in(t, client(t, s.RESTConfig()), "workload", "shop").Create(ctx, object(t, workload), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	goroutines := runtime.NumGoroutine()

	s = start(t, nil, dir)
	d := client(t, s.RESTConfig())
	got, err := in(t, d, "workload", "shop").Get(ctx, "web-1", metav1.GetOptions{})
	if err != nil || got.GetUID() != o.GetUID() {
		t.Fatalf("after a restart: %v, %v", got, err)
	}
	file := filepath.Join(t.TempDir(), "snapshot")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Snapshot(ctx, f); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	late := object(t, workload)
	late.SetName("late")
	if late, err = in(t, d, "workload", "shop").Create(ctx, late, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	// Connections of the libraries' clients end a moment after Close, for which nothing can be waited on.
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); runtime.NumGoroutine() > goroutines+10; <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines after the second run, %d after the first", runtime.NumGoroutine(), goroutines)
		}
	}
	if err := configapi.Restore(file, dir, nil); err == nil {
		t.Error("restore went over a store")
	}

	fresh := storeDir(t)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(t.TempDir(), "broken")
	data[len(data)/2] ^= 1
	if err := os.WriteFile(broken, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := configapi.Restore(broken, fresh, nil); err == nil {
		t.Fatal("a damaged snapshot was restored")
	}
	if err := configapi.Restore(file, fresh, nil); err != nil {
		t.Fatal(err)
	}
	s = start(t, nil, fresh)
	d = client(t, s.RESTConfig())
	got, err = in(t, d, "workload", "shop").Get(ctx, "web-1", metav1.GetOptions{})
	if err != nil || got.GetUID() != o.GetUID() {
		t.Fatalf("after restore: %v, %v", got, err)
	}
	if _, err := in(t, d, "workload", "shop").Get(ctx, "late", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("written after the snapshot: %v", err)
	}
	var before, after int64
	_, _ = fmt.Sscan(late.GetResourceVersion(), &before)
	list, err := in(t, d, "workload", "shop").List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, _ = fmt.Sscan(list.GetResourceVersion(), &after)
	if after <= before {
		t.Errorf("revision %d after restore, %d before", after, before)
	}
	w, err := in(t, d, "workload", "shop").Watch(ctx, metav1.ListOptions{ResourceVersion: late.GetResourceVersion()})
	if err == nil { // a client that holds a revision of the lost store must start over
		defer w.Stop()
		select {
		case e := <-w.ResultChan():
			if e.Type != "ERROR" || !apierrors.IsGone(apierrors.FromObject(e.Object)) && !apierrors.IsResourceExpired(apierrors.FromObject(e.Object)) {
				t.Errorf("watch from the lost store: %v %v", e.Type, e.Object)
			}
		case <-time.After(10 * time.Second):
			t.Error("watch from the lost store hangs")
		}
	}
}

// TestStartCutShort: a start that is ended at any moment leaves nothing behind, and the next one works.
func TestStartCutShort(t *testing.T) {
	dir := storeDir(t)
	for _, d := range []time.Duration{time.Nanosecond, 100 * time.Millisecond, 400 * time.Millisecond, 600 * time.Millisecond, 800 * time.Millisecond, time.Second} {
		s, err := configapi.Start(t.Context(), configapi.Config{Dir: dir, StartTimeout: d})
		if err == nil {
			_ = s.Close()
		}
		t.Logf("after %v: %v", d, err)
	}
	s := start(t, nil, dir)
	select {
	case <-s.Failed():
		t.Errorf("failed: %v", s.Err())
	default:
	}
}

func TestStartRefuses(t *testing.T) {
	open := filepath.Join(t.TempDir(), "open")
	if err := os.Mkdir(open, 0o755); err != nil {
		t.Fatal(err)
	}
	ca := newAuthority(t)
	for name, c := range map[string]configapi.Config{
		"no directory":             {},
		"directory others enter":   {Dir: open},
		"no client CA":             {Dir: storeDir(t), Listen: "127.0.0.1:0"},
		"no serving certificate":   {Dir: storeDir(t), Listen: "127.0.0.1:0", ClientCAPEM: ca.pem},
		"an address that is taken": {Dir: storeDir(t), Listen: "256.0.0.1:0", ClientCAPEM: ca.pem},
	} {
		if s, err := configapi.Start(t.Context(), c); err == nil {
			_ = s.Close()
			t.Errorf("%s: started", name)
		}
	}
}
