// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// ownTLS are the places outside this package that say how a connection is protected, each with its reason.
var ownTLS = map[string]string{
	"../trust/source.go: InsecureSkipVerify": "the one place: host names are not what is compared, and VerifyConnection takes their place",
	"../controlplane/configapi/config.go: tls.Config": "the configuration API is for kubectl and browsers: a serving certificate with DNS names, " +
		"client certificates of the API's own CA",
	"../sidecar/inbound.go: tls.Config":                      "the frame that chooses by server name; every config it can choose is a port's own, made here",
	"../cmd/strait/cli/client.go: insecure.NewCredentials":   "the operator's socket: its file mode and SO_PEERCRED say who calls",
	"../trust/endpoint/endpoint.go: insecure.NewCredentials": "the socket of a Workload API: the specification leaves it without TLS, and it is local",
}

// TestOneUnverifiedConfig: class T8. What dials or listens with TLS gets its configuration from this package: bare tls.Config values,
// functions that make one of their own, and connections without any stand nowhere else. The standard library's verification is turned
// off in one place of the whole program, where ours takes its place.
func TestOneUnverifiedConfig(t *testing.T) {
	found := map[string]int{}
	err := filepath.WalkDir("..", func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && p != ".." && (strings.HasPrefix(d.Name(), ".") || strings.HasPrefix(d.Name(), "zz_") || d.Name() == "testdata"):
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(p, ".go") || strings.HasSuffix(p, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), p, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, what := range bareTLS(file) {
			if name := filepath.ToSlash(p); filepath.Dir(name) != "../trust" || what == "InsecureSkipVerify" {
				found[fmt.Sprintf("%s: %s", name, what)]++
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for where, n := range found {
		if ownTLS[where] == "" || n > 1 {
			t.Errorf("%s (%d times): take the configuration from package trust", where, n)
		}
	}
	for where := range ownTLS {
		if found[where] == 0 {
			t.Errorf("%s is allowed and no longer there", where)
		}
	}
}

// bare are the names of packages that make or replace a *tls.Config.
var bare = map[string][]string{
	"crypto/tls":                         {"Config", "Dial", "DialWithDialer", "Dialer", "Listen", "NewLRUClientSessionCache", "LoadX509KeyPair"},
	"net/http":                           {"ListenAndServeTLS", "ServeTLS"},
	"google.golang.org/grpc/credentials": {"NewClientTLSFromCert", "NewClientTLSFromFile", "NewServerTLSFromCert", "NewServerTLSFromFile"},
	"google.golang.org/grpc/credentials/insecure":               {"NewCredentials"},
	"github.com/spiffe/go-spiffe/v2/spiffetls":                  {"Dial", "Listen", "DialWithMode", "ListenWithMode"},
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig":        {"MTLSClientConfig", "MTLSServerConfig", "TLSClientConfig", "TLSServerConfig"},
	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials": {"MTLSClientCredentials", "MTLSServerCredentials", "TLSClientCredentials", "TLSServerCredentials"},
}

// bareTLS lists what a file uses of those, and every mention of InsecureSkipVerify or early data. A type in a signature is no use: only values are.
func bareTLS(file *ast.File) []string {
	local := map[string]string{}
	for _, imp := range file.Imports {
		target, _ := strconv.Unquote(imp.Path.Value)
		name := target[strings.LastIndex(target, "/")+1:]
		if imp.Name != nil {
			name = imp.Name.Name
		}
		local[name] = target
	}
	var out []string
	names := func(e ast.Expr) {
		s, ok := e.(*ast.SelectorExpr)
		if !ok {
			return
		}
		pkg, ok := s.X.(*ast.Ident)
		if ok && slices.Contains(bare[local[pkg.Name]], s.Sel.Name) {
			out = append(out, pkg.Name+"."+s.Sel.Name)
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CompositeLit:
			names(n.Type)
		case *ast.ValueSpec:
			names(n.Type)
		case *ast.CallExpr:
			names(n.Fun)
			if f, ok := n.Fun.(*ast.Ident); ok && f.Name == "new" && len(n.Args) == 1 {
				names(n.Args[0])
			}
		case *ast.Ident:
			switch n.Name {
			case "InsecureSkipVerify", "Allow0RTT", "DialEarly", "DialAddrEarly", "ListenEarly":
				out = append(out, n.Name)
			}
		}
		return true
	})
	return out
}

// TestBareTLS: the search finds what it is for.
func TestBareTLS(t *testing.T) {
	src := `package x
import ("crypto/tls"; c "crypto/tls"; "net/http"; "google.golang.org/grpc/credentials/insecure")
var a tls.Config
func f(p *tls.Config) { _ = &tls.Config{}; _ = new(c.Config); tls.Dial("", "", p); http.ListenAndServeTLS("", "", "", nil); insecure.NewCredentials(); p.InsecureSkipVerify = true }`
	file, err := parser.ParseFile(token.NewFileSet(), "x.go", src, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"tls.Config", "tls.Config", "c.Config", "tls.Dial", "http.ListenAndServeTLS", "insecure.NewCredentials", "InsecureSkipVerify"}
	if got := bareTLS(file); !slices.Equal(got, want) {
		t.Errorf("found %v, want %v", got, want)
	}
}
