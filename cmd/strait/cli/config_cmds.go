// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"

	straitschema "github.com/strait-mesh/strait/controlplane/schema"
	"github.com/strait-mesh/strait/internal/problem"
)

const (
	gvStrait        = "strait.dev/v1alpha1"
	gvServiceExport = "multicluster.x-k8s.io/v1beta1"
	fieldOwner      = "strait-cli"
)

// resourceKind is one kind of the configuration API.
type resourceKind struct {
	kind       string
	plural     string
	gv         schema.GroupVersion
	namespaced bool
}

var resourceKinds = []resourceKind{
	{"Namespace", "namespaces", schema.GroupVersion{Version: "v1"}, false},
	{"Service", "services", schema.GroupVersion{Version: "v1"}, true},
	{"ServiceExport", "serviceexports", schema.GroupVersion{Group: "multicluster.x-k8s.io", Version: "v1beta1"}, true},
	{"Federation", "federations", schema.GroupVersion{Group: "strait.dev", Version: "v1alpha1"}, false},
	{"Peer", "peers", schema.GroupVersion{Group: "strait.dev", Version: "v1alpha1"}, false},
	{"ExportPolicy", "exportpolicies", schema.GroupVersion{Group: "strait.dev", Version: "v1alpha1"}, true},
	{"FailoverPolicy", "failoverpolicies", schema.GroupVersion{Group: "strait.dev", Version: "v1alpha1"}, true},
	{"AccessPolicy", "accesspolicies", schema.GroupVersion{Group: "strait.dev", Version: "v1alpha1"}, true},
	{"Workload", "workloads", schema.GroupVersion{Group: "strait.dev", Version: "v1alpha1"}, true},
}

// kindOf finds a kind by its name, singular or plural, in any case.
func kindOf(name string) (resourceKind, error) {
	for _, k := range resourceKinds {
		if strings.EqualFold(name, k.kind) || strings.EqualFold(name, k.plural) {
			return k, nil
		}
	}
	return resourceKind{}, problem.New(problem.Usage, "%q is no kind", name).WithWhy("the kinds are %s", strings.Join(kindNames(), ", ")).WithFix("strait explain KIND describes one")
}

func (k resourceKind) in(d dynamic.Interface, ns string) dynamic.ResourceInterface {
	r := d.Resource(k.gv.WithResource(k.plural))
	if k.namespaced && ns != "" {
		return r.Namespace(ns)
	}
	return r
}

func configCommands(e *env) []*cobra.Command {
	return []*cobra.Command{newApplyCmd(e), newGetCmd(e), newDeleteCmd(e), newTrustCmd(e), newAccessCmd(e), newBackupCmd(e), newRestoreCmd(e)}
}

func newApplyCmd(e *env) *cobra.Command {
	var files []string
	var dryRun string
	c := &cobra.Command{Use: "apply -f FILE...", Short: "Apply declarative resources from files", Args: cobra.NoArgs,
		Long: `Apply resources from YAML files, directories or standard input (-), by server-side apply. Every file is validated first; nothing is
written when one of them is refused.`,
		Example: "  strait apply -f shop.yaml\n  strait apply -f conf.d/ --dry-run=client",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return applyRun(cmd.Context(), e, files, dryRun)
		}}
	c.Flags().StringSliceVarP(&files, "filename", "f", nil, "files, directories, or - for standard input")
	c.Flags().StringVar(&dryRun, "dry-run", "none", "none, client (validate only) or server (everything but the write)")
	return c
}

func applyRun(ctx context.Context, e *env, files []string, dryRun string) error {
	if len(files) == 0 {
		return problem.New(problem.Usage, "apply needs -f FILE")
	}
	if dryRun != "none" && dryRun != "client" && dryRun != "server" {
		return problem.New(problem.Usage, "--dry-run=%s: want none, client or server", dryRun)
	}
	sources, err := e.readSources(files)
	if err != nil {
		return err
	}
	var objects []*unstructured.Unstructured
	for _, s := range sources {
		list, err := straitschema.Parse(s.name, s.data)
		if err != nil {
			return invalidFile(e, err)
		}
		objects = append(objects, list...)
	}
	if len(objects) == 0 {
		return problem.New(problem.InvalidObject, "no object in %s", strings.Join(files, ", ")).
			WithWhy("nothing to apply is more often a mistake than meant").WithFix("name the file that has the objects")
	}
	for _, o := range objects {
		k, err := kindOf(o.GetKind())
		if err != nil {
			return err
		}
		if k.namespaced && o.GetNamespace() == "" {
			if e.namespace == "" {
				return problem.New(problem.InvalidObject, "%s %s has no namespace", o.GetKind(), o.GetName()).WithFix("set metadata.namespace, or pass -n")
			}
			o.SetNamespace(e.namespace)
		}
	}
	if dryRun != "client" {
		if err := e.applyObjects(ctx, dryRun == "server", objects...); err != nil {
			return err
		}
	}
	suffix := map[string]string{"none": "applied", "client": "valid (dry run)", "server": "accepted (dry run)"}[dryRun]
	for _, o := range objects {
		fmt.Fprintf(e.out, "%s/%s %s\n", strings.ToLower(o.GetKind()), strings.TrimPrefix(o.GetNamespace()+"/"+o.GetName(), "/"), suffix)
	}
	if dryRun != "none" {
		return nil
	}
	return e.await(ctx, objects...)
}

// invalidFile prints every finding of the validator with its caret, and returns the command's error.
func invalidFile(e *env, err error) error {
	var list straitschema.Errors
	if !errors.As(err, &list) {
		return problem.New(problem.InvalidObject, "%v", err).WithState("nothing was written.")
	}
	if e.output == "json" || e.output == "jsonl" || e.output == "yaml" {
		return list.Problem()
	}
	for _, f := range list {
		fmt.Fprintln(e.err, f.Human())
	}
	return exitError(problem.ExitInvalid)
}

type source struct {
	name string
	data []byte
}

// maxConfigFile bounds one configuration file in bytes.
const maxConfigFile = 4 << 20

func (e *env) readSources(files []string) ([]source, error) {
	var out []source
	for _, name := range files {
		if name == "-" {
			data, err := readBounded(e.in, "standard input")
			if err != nil {
				return nil, err
			}
			out = append(out, source{"<stdin>", data})
			continue
		}
		st, err := os.Stat(name)
		if err != nil {
			return nil, problem.New(problem.Usage, "%v", err).WithWhy("-f names no file").WithFix("give a file, a directory, or - for standard input")
		}
		names := []string{name}
		if st.IsDir() {
			names, _ = filepath.Glob(filepath.Join(name, "*.y*ml"))
			sort.Strings(names)
		}
		for _, n := range names {
			f, err := os.Open(n)
			if err != nil {
				return nil, problem.New(problem.Usage, "%v", err)
			}
			data, err := readBounded(f, n)
			_ = f.Close()
			if err != nil {
				return nil, err
			}
			out = append(out, source{n, data})
		}
	}
	return out, nil
}

func readBounded(r io.Reader, name string) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxConfigFile+1))
	if err != nil {
		return nil, problem.New(problem.Usage, "%s: %v", name, err)
	}
	if len(data) > maxConfigFile {
		return nil, problem.New(problem.InvalidObject, "%s is larger than %d bytes", name, maxConfigFile)
	}
	return data, nil
}

// applyObjects writes all objects by server-side apply, after a server-side dry run of all: a batch is refused as a whole.
func (e *env) applyObjects(ctx context.Context, dryRun bool, objects ...*unstructured.Unstructured) error {
	d, err := e.dynamic()
	if err != nil {
		return err
	}
	rounds := [][]string{{metav1.DryRunAll}, nil}
	if dryRun {
		rounds = rounds[:1]
	} else if len(objects) == 1 {
		rounds = rounds[1:]
	}
	for _, round := range rounds {
		for _, o := range objects {
			k, err := kindOf(o.GetKind())
			if err != nil {
				return err
			}
			_, err = k.in(d, o.GetNamespace()).Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: fieldOwner, Force: true, DryRun: round})
			if err != nil {
				return e.apiError(err, o.GetKind(), o.GetNamespace(), o.GetName())
			}
		}
	}
	return nil
}

func newGetCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "get KIND [NAME]", Short: "Get resources", Args: cobra.RangeArgs(1, 2),
		Example: "  strait get workload\n  strait get failoverpolicy shop/checkout -o yaml",
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			return kindNames(), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			name := ""
			if len(args) == 2 {
				name = args[1]
			}
			return getRun(cmd.Context(), e, args[0], name)
		}}
}

func getRun(ctx context.Context, e *env, kind, name string) error {
	k, err := kindOf(kind)
	if err != nil {
		return err
	}
	ns := e.namespace
	if before, after, ok := strings.Cut(name, "/"); ok {
		ns, name = before, after
	}
	d, err := e.dynamic()
	if err != nil {
		return err
	}
	if name != "" {
		if k.namespaced && ns == "" {
			return problem.New(problem.Usage, "name it NAMESPACE/%s, or pass -n", name)
		}
		o, err := k.in(d, ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return e.apiError(err, k.kind, ns, name)
		}
		return e.printObjects(k, o.Object, []unstructured.Unstructured{*o})
	}
	list, err := k.in(d, ns).List(ctx, metav1.ListOptions{})
	if err != nil {
		return e.apiError(err, k.kind, ns, name)
	}
	return e.printObjects(k, list.UnstructuredContent(), list.Items)
}

// printObjects prints objects as they are: their own apiVersion and kind, not the command line's.
func (e *env) printObjects(k resourceKind, doc map[string]any, items []unstructured.Unstructured) error {
	if e.output == "json" || e.output == "yaml" || e.output == "jsonl" || e.jq != "" {
		for _, it := range items {
			it.SetManagedFields(nil)
		}
		if md, ok := doc["metadata"].(map[string]any); ok {
			delete(md, "managedFields")
		}
		api, kind := doc["apiVersion"], doc["kind"]
		return e.printRaw(doc, api, kind)
	}
	t := &table{head: []string{"NAMESPACE", "NAME", "ACCEPTED", "PROGRAMMED", "AGE"}}
	for _, it := range items {
		full := strings.TrimPrefix(it.GetNamespace()+"/"+it.GetName(), "/")
		t.add(strings.ToLower(k.kind)+"/"+full, it.GetNamespace(), it.GetName(), condition(it, "Accepted"), condition(it, "Programmed"),
			shortDuration(e.now().Sub(it.GetCreationTimestamp().Time)))
	}
	return e.print(k.kind+"List", doc, t)
}

func (e *env) printRaw(doc map[string]any, api, kind any) error {
	value, err := plainValue(doc)
	if err != nil {
		return err
	}
	saved := e.output
	defer func() { e.output = saved }()
	if m, ok := value.(map[string]any); ok && api != nil {
		m["apiVersion"], m["kind"] = api, kind
	}
	if e.jq != "" {
		return e.filter(value)
	}
	return e.printPlain(value)
}

func condition(o unstructured.Unstructured, kind string) string {
	list, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	for _, c := range list {
		m, ok := c.(map[string]any)
		if !ok || m["type"] != kind {
			continue
		}
		if msg, _ := m["message"].(string); msg != "" && m["status"] != "True" {
			return fmt.Sprintf("%v: %s", m["status"], msg)
		}
		return fmt.Sprint(m["status"])
	}
	return "-"
}

func newDeleteCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "delete KIND NAME", Short: "Delete a resource", Args: cobra.ExactArgs(2),
		Example: "  strait delete workload shop/checkout-1\n  strait delete failoverpolicy checkout -n shop",
		RunE: func(cmd *cobra.Command, args []string) error {
			k, err := kindOf(args[0])
			if err != nil {
				return err
			}
			ns, name, ok := strings.Cut(args[1], "/")
			if !ok {
				ns, name = e.namespace, args[1]
			}
			if k.namespaced && ns == "" {
				return problem.New(problem.Usage, "name it NAMESPACE/%s, or pass -n", name)
			}
			if err := e.deleteObject(cmd.Context(), k.kind, ns, name); err != nil {
				return err
			}
			fmt.Fprintf(e.out, "%s/%s deleted\n", strings.ToLower(k.kind), strings.TrimPrefix(ns+"/"+name, "/"))
			return nil
		}}
}

func newBackupCmd(e *env) *cobra.Command {
	var out string
	c := &cobra.Command{Use: "backup", Short: "Back up keys, configuration and catalog epoch, together", Args: cobra.NoArgs,
		Long:    "Write one file with keys, configuration, peers and catalog epoch. It contains the cluster's root key: keep it as you would keep that.",
		Example: "  strait backup --out us-east.backup\n  strait backup --out - | age -r … > us-east.backup.age",
		RunE:    func(cmd *cobra.Command, _ []string) error { return backupRun(cmd.Context(), e, out) }}
	c.Flags().StringVar(&out, "out", "", "file to write (0600), or - for standard output")
	return c
}

func newRestoreCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "restore FILE", Short: "Restore a backup into an empty data directory", Args: cobra.ExactArgs(1),
		Example: "  strait restore us-east.backup --data-dir /var/lib/strait\n  strait restore - --data-dir ./us-east < us-east.backup",
		RunE:    func(_ *cobra.Command, args []string) error { return restoreRun(e, args[0]) }}
}

func newAccessCmd(e *env) *cobra.Command {
	c := &cobra.Command{Use: "access", Short: "Operators' client certificates, with a role", Example: "  strait access issue ada --role viewer --out ./ada\n  strait access issue ci --role operator --ttl 24h --out ./ci"}
	var role, out string
	var ttl time.Duration
	issue := &cobra.Command{Use: "issue NAME", Short: "Issue a client certificate for a remote operator", Args: cobra.ExactArgs(1),
		Example: "  strait access issue ada --role viewer --out ./ada\n  strait access issue ci --role operator --ttl 24h --out ./ci",
		RunE: func(cmd *cobra.Command, args []string) error {
			return accessIssueRun(cmd.Context(), e, args[0], role, out, ttl)
		}}
	issue.Flags().StringVar(&role, "role", "viewer", "viewer, operator or admin")
	issue.Flags().StringVar(&out, "out", "", "directory to write the key and the certificates into (default: ./NAME)")
	issue.Flags().DurationVar(&ttl, "ttl", 36*time.Hour, "how long the certificate is valid")
	c.AddCommand(issue)
	return c
}
