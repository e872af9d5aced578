// SPDX-License-Identifier: Apache-2.0

package schema_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/schema"
	"github.com/strait-mesh/strait/internal/problem"
)

func TestGoodFiles(t *testing.T) {
	files, _ := filepath.Glob("testdata/good/*.yaml")
	if len(files) == 0 {
		t.Fatal("no files")
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		objects, err := schema.Parse(filepath.Base(f), data)
		if err != nil {
			t.Errorf("%s:\n%v", f, err)
		}
		if want := strings.Count(string(data), "\nkind: "); len(objects) != want {
			t.Errorf("%s: %d objects, want %d", f, len(objects), want)
		}
	}
}

// TestSample is the sample of the file error that users are promised.
func TestSample(t *testing.T) {
	text := `apiVersion: strait.dev/v1alpha1
kind: FailoverPolicy
metadata: {name: checkout, namespace: shop}
spec:
  targetRefs: [{group: multicluster.x-k8s.io, kind: ServiceImport, name: checkout}]
  return: {minHealthyPercent: 40, after: 2m}
`
	_, err := schema.Parse("shop.yaml", []byte(text))
	var list schema.Errors
	if !errors.As(err, &list) || len(list) != 1 {
		t.Fatalf("got %v, want one error", err)
	}
	want := `shop.yaml:6:31  FailoverPolicy shop/checkout  spec.return.minHealthyPercent                         [STR-1204]
  6 |   return: {minHealthyPercent: 40, after: 2m}
                                    ^ 40 must be greater than trip.minHealthyPercent (50), or traffic flaps`
	if got := list[0].Human(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if p := list.Problem(); p.Code != problem.ReturnNotAboveTrip || p.Exit() != problem.ExitInvalid {
		t.Errorf("problem %v, exit %d", p.Code, p.Exit())
	}
}

func TestRefusals(t *testing.T) {
	const head = "apiVersion: strait.dev/v1alpha1\n"
	failover := head + "kind: FailoverPolicy\nmetadata: {name: x, namespace: shop}\nspec:\n  targetRefs: [{kind: Service, name: x}]\n"
	access := head + "kind: AccessPolicy\nmetadata: {name: x, namespace: shop}\nspec:\n  targetRefs: [{kind: Service, name: x}]\n"
	export := head + "kind: ExportPolicy\nmetadata: {name: x, namespace: shop}\nspec:\n"
	service := "apiVersion: v1\nkind: Service\nmetadata: {name: x, namespace: shop}\nspec:\n"
	workload := head + "kind: Workload\nmetadata: {name: x, namespace: shop}\nspec:\n"
	for _, c := range []struct {
		name, text  string
		line, col   int
		field, said string
		code        problem.Code
	}{
		{"unknown field", failover + "  retrun: {after: 1s}\n", 6, 3, "spec.retrun", "unknown field", problem.InvalidObject},
		{"unknown field deep", failover + "  trip: {minHealthPercent: 3}\n", 6, 10, "spec.trip.minHealthPercent", "unknown field", problem.InvalidObject},
		{"unknown field in a list", access + "  rules:\n  - action: allow\n    form: []\n", 8, 5, "spec.rules[0].form", "unknown field", problem.InvalidObject},
		{"unknown metadata", head + "kind: Peer\nmetadata:\n  name: x\n  nmespace: y\nspec: {}\n", 5, 3, "metadata.nmespace", "unknown field", problem.InvalidObject},
		{"required", head + "kind: FailoverPolicy\nmetadata: {name: x, namespace: shop}\nspec: {}\n", 4, 1, "spec.targetRefs", "is required", problem.InvalidObject},
		{"no spec", head + "kind: ExportPolicy\nmetadata: {name: x}\n", 1, 1, "spec", "is required", problem.InvalidObject},
		{"type", failover + "  trip: {minHealthyPercent: many}\n", 6, 29, "spec.trip.minHealthyPercent", "must be of type integer", problem.InvalidObject},
		{"range", failover + "  trip: {minHealthyPercent: 0}\n", 6, 29, "spec.trip.minHealthyPercent", "greater than or equal to 1", problem.InvalidObject},
		{"flap by trip", failover + "  trip: {minHealthyPercent: 90, spillBelowHealthyPercent: 95}\n", 4, 1, "spec.return.minHealthyPercent", "75 must be greater than trip.minHealthyPercent (90), or traffic flaps", problem.ReturnNotAboveTrip},
		{"spill below trip", failover + "  trip: {spillBelowHealthyPercent: 30}\n", 6, 36, "spec.trip.spillBelowHealthyPercent", "must not be below", problem.InvalidObject},
		{"duration", failover + "  return: {after: soon}\n", 6, 19, "spec.return.after", "should match", problem.InvalidObject},
		{"weights", failover + "  priorities: [{clusters: [a], weights: {b: 2}}]\n", 6, 50 - 9, "spec.priorities[0].weights", "only clusters of the same tier", problem.InvalidObject},
		{"two tiers", failover + "  priorities: [{clusters: [a]}, {clusters: [a]}]\n", 6, 15, "spec.priorities", "one tier only", problem.InvalidObject},
		{"weight zero", failover + "  priorities: [{clusters: [a], weights: {a: 0}}]\n", 6, 45, "spec.priorities[0].weights.a", "greater than or equal to 1", problem.InvalidObject},
		{"foreign target", access + "  rules: []\n---\n" + head + "kind: AccessPolicy\nmetadata: {name: y}\nspec:\n  targetRefs: [{kind: Service, name: x, namespace: other}]\n", 12, 41, "spec.targetRefs[0].namespace", "unknown field", problem.InvalidObject},
		{"import without its group", access[:strings.Index(access, "  targetRefs")] + "  targetRefs: [{kind: ServiceImport, name: x}]\n", 5, 16, "spec.targetRefs[0]", "of group multicluster.x-k8s.io", problem.InvalidObject},
		{"when", access + "  rules: [{when: [\"true\"]}]\n", 6, 18, "spec.rules[0].when", "not supported by this version", problem.InvalidObject},
		{"pattern in an account", access + "  rules: [{from: [{serviceAccounts: [\"shop/*\"]}]}]\n", 6, 38, "spec.rules[0].from[0].serviceAccounts[0]", "should match", problem.InvalidObject},
		{"nobody", access + "  rules: [{from: [{}]}]\n", 6, 19, "spec.rules[0].from[0]", "at least 1 properties", problem.InvalidObject},
		{"dot segment", access + "  rules: [{to: [{paths: [/a/../b]}]}]\n", 6, 26, "spec.rules[0].to[0].paths[0]", "should match", problem.InvalidObject},
		{"escape in a path", access + "  rules: [{to: [{paths: [/a%2fb]}]}]\n", 6, 26, "spec.rules[0].to[0].paths[0]", "should match", problem.InvalidObject},
		{"method", access + "  rules: [{to: [{methods: [post]}]}]\n", 6, 28, "spec.rules[0].to[0].methods[0]", "should match", problem.InvalidObject},
		{"routes", export + "  rules: [{services: {names: [a]}, to: {clusters: [b]}, routes: [{pathPrefix: /v1}]}]\n", 5, 65, "spec.rules[0].routes", "not supported by this version", problem.InvalidObject},
		{"names and labels", export + "  rules: [{services: {names: [a], matchLabels: {a: b}}, to: {clusters: [b]}}]\n", 5, 22, "spec.rules[0].services", "either names or matchLabels", problem.InvalidObject},
		{"cluster twice", export + "  rules: [{services: {names: [a]}, to: {clusters: [b, b]}}]\n", 5, 55, "spec.rules[0].to.clusters[1]", "Duplicate", problem.InvalidObject},
		{"key twice", export + "  rules: []\n  rules: []\n", 6, 3, "spec.rules", "stands twice", problem.InvalidObject},
		{"name", head + "kind: Workload\nmetadata: {name: a.b, namespace: shop}\nspec: {}\n", 1, 1, "", "must be one lower-case DNS label", problem.InvalidObject},
		{"namespace on a peer", head + "kind: Peer\nmetadata: {name: a, namespace: shop}\nspec: {}\n", 3, 32, "metadata.namespace", "not allowed", problem.InvalidObject},
		{"foreign trust domain of nothing", head + "kind: Federation\nmetadata: {name: a}\nspec:\n  trustDomains: [{name: partner.example}]\n", 5, 18, "spec.trustDomains[0]", "neither an endpoint nor a bundle", problem.InvalidObject},
		{"own trust domain as a foreign one", head + "kind: Federation\nmetadata: {name: a}\nspec:\n  trustDomain: x.a\n  trustDomains: [{name: x.a, bundle: '{}'}]\n", 6, 17, "spec.trustDomains", "is not a foreign one", problem.InvalidObject},
		{"endpoint by http", head + "kind: Federation\nmetadata: {name: a}\nspec:\n  trustDomains: [{name: p, endpoint: {url: 'http://p/', profile: https_web}}]\n", 5, 44, "spec.trustDomains[0].endpoint.url", "should match", problem.InvalidObject},
		{"endpoint with userinfo", head + "kind: Federation\nmetadata: {name: a}\nspec:\n  trustDomains: [{name: p, endpoint: {url: 'https://u@p/', profile: https_web}}]\n", 5, 44, "spec.trustDomains[0].endpoint.url", "should match", problem.InvalidObject},
		{"endpoint profile", head + "kind: Federation\nmetadata: {name: a}\nspec:\n  trustDomains: [{name: p, endpoint: {url: 'https://p/', profile: web}}]\n", 5, 67, "spec.trustDomains[0].endpoint.profile", "supported values", problem.InvalidObject},
		{"endpoint of another trust domain", head + "kind: Federation\nmetadata: {name: a}\nspec:\n  trustDomains: [{name: p, bundle: '{}', endpoint: {url: 'https://p/', profile: https_spiffe, spiffeID: 'spiffe://p.evil/x'}}]\n", 5, 52, "spec.trustDomains[0].endpoint", "of the same trust domain", problem.InvalidObject},
		{"endpoint without a beginning", head + "kind: Federation\nmetadata: {name: a}\nspec:\n  trustDomains: [{name: p, endpoint: {url: 'https://p/', profile: https_spiffe, spiffeID: 'spiffe://p/x'}}]\n", 5, 38, "spec.trustDomains[0].endpoint", "a bundle to begin with", problem.InvalidObject},
		{"foreign trust domain twice", head + "kind: Federation\nmetadata: {name: a}\nspec:\n  trustDomains: [{name: p, bundle: '{}'}, {name: p, bundle: '{}'}]\n", 5, 43, "spec.trustDomains[1]", "Duplicate", problem.InvalidObject},
		{"identities beside clusters", access + "  rules: [{from: [{clusters: [b], spiffeIDs: ['spiffe://p/x']}]}]\n", 6, 46, "spec.rules[0].from[0].spiffeIDs", "stands alone", problem.InvalidObject},
		{"identity with a pattern", access + "  rules: [{from: [{spiffeIDs: ['spiffe://p/*']}]}]\n", 6, 32, "spec.rules[0].from[0].spiffeIDs[0]", "should match", problem.InvalidObject},
		{"no such kind", head + "kind: Route\nmetadata: {name: a}\n", 2, 7, "kind", "supported values", problem.InvalidObject},
		{"other version", "apiVersion: strait.dev/v1\nkind: Peer\nmetadata: {name: a}\n", 1, 13, "apiVersion", "strait.dev/v1alpha1", problem.InvalidObject},
		{"no kind", head + "metadata: {name: a}\n", 1, 1, "kind", "is required", problem.InvalidObject},
		{"no metadata", head + "kind: Peer\nspec: {}\n", 1, 1, "metadata.name", "is required", problem.InvalidObject},
		{"service port", service + "  ports: [{port: 70000}]\n", 5, 18, "spec.ports[0].port", "less than or equal to 65535", problem.InvalidObject},
		{"service ports without names", service + "  ports: [{port: 80}, {port: 81, name: b}]\n", 5, 10, "spec.ports", "name of its own", problem.InvalidObject},
		{"service field", service + "  ports: [{port: 80}]\n  externalName: example.org\n", 6, 3, "spec.externalName", "unknown field", problem.InvalidObject},
		{"service udp", service + "  ports: [{port: 53, protocol: UDP}]\n", 5, 32, "spec.ports[0].protocol", "supported values", problem.InvalidObject},
		{"workload port", workload + "  ports: {HTTP: 80}\n", 5, 10, "spec.ports", "DNS labels", problem.InvalidObject},
		{"selector without a field", workload + "  attestation: {unix: [{}]}\n", 5, 24, "spec.attestation.unix[0]", "would match every process", problem.InvalidObject},
		{"selector of uid -1", workload + "  attestation: {unix: [{uid: -1}]}\n", 5, 30, "spec.attestation.unix[0].uid", "greater than or equal to 0", problem.InvalidObject},
		{"selector of no uid", workload + "  attestation: {unix: [{uid: 4294967295}]}\n", 5, 30, "spec.attestation.unix[0].uid", "less than or equal to", problem.InvalidObject},
		{"selector with a name", workload + "  attestation: {unix: [{uid: www-data}]}\n", 5, 30, "spec.attestation.unix[0].uid", "must be of type integer", problem.InvalidObject},
		{"selector with a relative path", workload + "  attestation: {unix: [{path: web}]}\n", 5, 31, "spec.attestation.unix[0].path", "should match", problem.InvalidObject},
		{"selector with a dot segment", workload + "  attestation: {unix: [{path: /usr/bin/../web}]}\n", 5, 31, "spec.attestation.unix[0].path", "one spelling", problem.InvalidObject},
		{"selector with a user", workload + "  attestation: {unix: [{user: web}]}\n", 5, 25, "spec.attestation.unix[0].user", "unknown field", problem.InvalidObject},
		{"not YAML", "a: [1\n", 1, 1, "", "not YAML", problem.InvalidObject},
		{"no object", "- a\n", 1, 1, "", "is a mapping", problem.InvalidObject},
		{"twice in a file", workload + "  zone: a\n---\n" + workload + "  zone: b\n", 9, 18, "metadata.name", "Duplicate", problem.InvalidObject},
	} {
		t.Run(c.name, func(t *testing.T) {
			objects, err := schema.Parse("f.yaml", []byte(c.text))
			var list schema.Errors
			if !errors.As(err, &list) || len(list) == 0 {
				t.Fatalf("accepted: %v", objects)
			}
			e := list[0]
			if e.Line != c.line || e.Column != c.col || e.Field != c.field || e.Code != c.code || !strings.Contains(e.Message, c.said) {
				t.Errorf("got %d:%d %q %s %q, want %d:%d %q %s with %q\n%s", e.Line, e.Column, e.Field, e.Code, e.Message, c.line, c.col, c.field, c.code, c.said, e.Human())
			}
			if objects != nil {
				t.Error("objects beside errors")
			}
		})
	}
}

// TestBounds: T25. Each is refused, soon.
func TestBounds(t *testing.T) {
	head := "apiVersion: strait.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: x, namespace: shop}\nspec:\n  targetRefs: [{kind: Service, name: x}]\n"
	big := strings.Repeat("a", 1<<20)
	bomb := "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
	for i := 1; i < 12; i++ {
		p := string(rune('a'+i)) + "0"
		q := string(rune('a'+i-1)) + "0"
		bomb += p + ": &" + p + " [" + strings.TrimSuffix(strings.Repeat("*"+q+",", 9), ",") + "]\n"
	}
	deepBlock := strings.Builder{}
	for i := range 3000 {
		deepBlock.WriteString(strings.Repeat(" ", i) + "a:\n")
	}
	for name, text := range map[string]string{
		"alias bomb":        bomb,
		"alias of itself":   "a: &a [*a]\n",
		"merge of itself":   "a: &a {<<: *a}\n",
		"flow depth":        strings.Repeat("[", 100_000),
		"flow depth closed": "a: " + strings.Repeat("[", 9_000) + strings.Repeat("]", 9_000),
		"json depth":        strings.Repeat(`{"a":`, 100_000) + "1" + strings.Repeat("}", 100_000),
		"block depth":       deepBlock.String(),
		"dashes":            strings.Repeat("- ", 100_000),
		"long path":         head + "  rules: [{to: [{paths: [/" + big + "]}]}]\n",
		"long pattern":      head + "  rules: [{to: [{paths: [\"/" + strings.Repeat("(a*)*", 1<<18) + "\"]}]}]\n",
		"long account":      head + "  rules: [{from: [{serviceAccounts: [" + big + "/a]}]}]\n",
		"long name":         "apiVersion: strait.dev/v1alpha1\nkind: Peer\nmetadata: {name: " + big + "}\nspec: {}\n",
		"long kind":         "apiVersion: strait.dev/v1alpha1\nkind: " + big + "\nmetadata: {name: a}\n",
		"long key":          "apiVersion: strait.dev/v1alpha1\nkind: Peer\nmetadata: {name: a}\nspec: {" + big + ": 1}\n",
		"many unknown":      "apiVersion: strait.dev/v1alpha1\nkind: Peer\nmetadata: {name: a}\nspec: {" + manyKeys(20_000) + "}\n",
		"many rules":        head + "  rules: [" + strings.TrimSuffix(strings.Repeat("{action: allow},", 20_000), ",") + "]\n",
		"too large":         strings.Repeat("#\n", schema.MaxBytes),
		"many documents":    strings.Repeat("---\na: 1\n", 20_000),
		"NUL":               "a: \x00\n",
		"not UTF-8":         "a: \xff\xfe\n",
		"many anchors":      manyAnchors(20_000),
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			objects, err := schema.Parse("f.yaml", []byte(text))
			var list schema.Errors
			if !errors.As(err, &list) || len(list) == 0 {
				t.Fatalf("accepted %d objects, %v", len(objects), err)
			}
			took := time.Since(start)
			size := 0
			for _, e := range list {
				size += len(e.Human())
			}
			if size > 200_000 {
				t.Errorf("%d bytes of messages", size)
			}
			t.Logf("%v, %d errors: %s", took, len(list), list[0].Message)
			if took > 2*time.Second { // a guard against the exponential; the figure is in the log
				t.Errorf("took %v", took)
			}
		})
	}
}

func manyKeys(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString("k" + strings.Repeat("x", i%7) + itoa(i) + ": 1, ")
	}
	return strings.TrimSuffix(b.String(), ", ")
}

func manyAnchors(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString("k" + itoa(i) + ": &a" + itoa(i) + " 1\n")
	}
	return b.String()
}

func itoa(i int) string {
	if i < 10 {
		return string(rune('0' + i))
	}
	return itoa(i/10) + string(rune('0'+i%10))
}

func TestDefaultsAreFilledForTheAPIOnly(t *testing.T) {
	text := "apiVersion: strait.dev/v1alpha1\nkind: FailoverPolicy\nmetadata: {name: x}\nspec: {targetRefs: [{kind: Service, name: x}]}\n"
	objects, err := schema.Parse("f", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok, _ := unstructured.NestedMap(objects[0].Object, "spec", "trip"); ok {
		t.Error("Parse returned defaults: applying them would own them")
	}
	if errs := schema.Validate(context.Background(), objects[0]); len(errs) > 0 {
		t.Fatal(errs)
	}
	if v, _, _ := unstructured.NestedInt64(objects[0].Object, "spec", "return", "minHealthyPercent"); v != 75 {
		t.Errorf("return.minHealthyPercent is %d after defaults", v)
	}
}

func TestKindsAreComplete(t *testing.T) {
	for _, k := range api.Kinds() {
		if len(k.Schema()) == 0 {
			t.Errorf("%s has no schema", k.Kind)
		}
	}
}

func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/good/*.yaml")
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("a: &a [*a]\n<<: {}\n? [x]\n: y\n--- !!binary aGk=\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		objects, err := schema.Parse("f.yaml", data)
		var list schema.Errors
		if err != nil && (!errors.As(err, &list) || len(list) == 0 || objects != nil) {
			t.Fatalf("%d objects beside %v", len(objects), err)
		}
		for _, e := range list {
			if e.Human() == "" || !strings.HasPrefix(e.Error(), "f.yaml") {
				t.Fatalf("bad error %#v", e)
			}
		}
		for _, o := range objects {
			if _, err := o.MarshalJSON(); err != nil {
				t.Fatalf("accepted object does not marshal: %v", err)
			}
		}
	})
}

// TestMutations throws damaged files at Parse: it answers each, without a panic, and never with objects beside errors. FuzzParse
// does the same with coverage.
func TestMutations(t *testing.T) {
	var seeds [][]byte
	files, _ := filepath.Glob("testdata/good/*.yaml")
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		seeds = append(seeds, data)
	}
	pieces := []string{"&a ", "*a", "<<: ", "[", "]", "{", "}", ":", "- ", "\n", "|", ">", "!!int ", "!!binary ", "\"", "'", "%", "?", "\t", "\x00", "\xff", "null", "~", "0x", "1e999", ".nan", "---\n", "...", "#", "  "}
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 1500 {
		data := slices.Clone(seeds[r.IntN(len(seeds))])
		for range 1 + r.IntN(4) {
			at := r.IntN(len(data))
			switch r.IntN(4) {
			case 0:
				data = slices.Delete(data, at, min(len(data), at+1+r.IntN(20)))
			case 1:
				data[at] ^= 1 << r.IntN(8)
			default:
				data = slices.Insert(data, at, []byte(pieces[r.IntN(len(pieces))])...)
			}
		}
		objects, err := schema.Parse("f.yaml", data)
		var list schema.Errors
		if err != nil && (!errors.As(err, &list) || len(list) == 0 || objects != nil) {
			t.Fatalf("case %d: %d objects beside %v\n%s", i, len(objects), err, data)
		}
		for _, e := range list {
			if e.Human() == "" {
				t.Fatalf("case %d: %#v", i, e)
			}
		}
	}
}
