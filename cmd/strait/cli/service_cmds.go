// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
)

func serviceCommands(e *env) []*cobra.Command {
	return []*cobra.Command{newExportCmd(e), newUnexportCmd(e), newServiceCmd(e), newWorkloadCmd(e), newFailoverCmd(e)}
}

func newExportCmd(e *env) *cobra.Command {
	var to, ports []string
	c := &cobra.Command{Use: "export SERVICE", Short: "Offer a service to other clusters (ServiceExport + ExportPolicy)", Args: cobra.ExactArgs(1),
		Example: "  strait export checkout --to us-east\n  strait export shop/checkout --to '*' --ports http,grpc",
		RunE: func(cmd *cobra.Command, args []string) error {
			return exportRun(cmd.Context(), e, args[0], to, ports)
		}}
	c.Flags().StringSliceVar(&to, "to", nil, `clusters that may call it, or "*" for every member`)
	c.Flags().StringSliceVar(&ports, "ports", nil, "names of the ports offered (default: all)")
	return c
}

func exportRun(ctx context.Context, e *env, service string, to, ports []string) error {
	if len(to) == 0 {
		return problem.New(problem.Usage, "--to is missing").WithWhy("nothing is offered to anybody by default").WithFix("strait export %s --to CLUSTER", service)
	}
	ns, name, err := e.resolveService(ctx, service)
	if err != nil {
		return err
	}
	rule := map[string]any{"services": map[string]any{"names": []any{name}}, "to": map[string]any{"clusters": anys(to)}}
	if len(ports) > 0 {
		rule["ports"] = anys(ports)
	}
	objects := []*unstructured.Unstructured{
		object(gvServiceExport, "ServiceExport", ns, name, nil),
		object(gvStrait, "ExportPolicy", ns, "export-"+name, map[string]any{"rules": []any{rule}}),
	}
	if err := e.applyObjects(ctx, false, objects...); err != nil {
		return err
	}
	if err := e.await(ctx, objects...); err != nil {
		return err
	}
	fmt.Fprintf(e.out, "%s/%s is exported to %s\n", ns, name, strings.ReplaceAll(strings.Join(to, ", "), "*", "every member"))
	return nil
}

func anys(list []string) []any {
	out := make([]any, len(list))
	for i, s := range list {
		out[i] = s
	}
	return out
}

func newUnexportCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "unexport SERVICE", Short: "Withdraw a service from the other clusters within 5 seconds", Args: cobra.ExactArgs(1),
		Example: "  strait unexport checkout\n  strait unexport shop/checkout",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			ns, name, err := e.resolveService(ctx, args[0])
			if err != nil {
				return err
			}
			found := false
			for _, k := range []struct{ kind, name string }{{"ServiceExport", name}, {"ExportPolicy", "export-" + name}} {
				err := e.deleteObject(ctx, k.kind, ns, k.name)
				if err != nil && !problem.Is(err, problem.NotFound) {
					return err
				}
				found = found || err == nil
			}
			if !found {
				return problem.New(problem.NotFound, "%s/%s is not exported", ns, name).WithFix("strait service describe %s/%s", ns, name)
			}
			fmt.Fprintf(e.out, "%s/%s is no longer exported\n", ns, name)
			return nil
		}}
}

func newServiceCmd(e *env) *cobra.Command {
	c := &cobra.Command{Use: "service", Short: "Federated services with providers, consumers, health per cluster",
		Example: "  strait service list\n  strait service describe shop/checkout"}
	c.AddCommand(
		&cobra.Command{Use: "list", Short: "List services and who provides them", Args: cobra.NoArgs,
			Example: "  strait service list\n  strait service list -o name",
			RunE:    func(cmd *cobra.Command, _ []string) error { return serviceListRun(cmd.Context(), e) }},
		&cobra.Command{Use: "describe SERVICE", Short: "Show one service: ports, providers, instances, exports", Args: cobra.ExactArgs(1),
			Example: "  strait service describe checkout\n  strait service describe shop/checkout -o json",
			RunE:    func(cmd *cobra.Command, args []string) error { return serviceDescribeRun(cmd.Context(), e, args[0]) }},
	)
	return c
}

func serviceListRun(ctx context.Context, e *env) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	r, err := op.ServiceList(ctx, &controlpb.ServiceListRequest{})
	if err != nil {
		return e.callError(err)
	}
	t := &table{head: []string{"SERVICE", "PORTS", "HEALTHY", "EXPORTED TO", "TRAFFIC GOES TO", "REASON"}}
	for _, s := range r.Services {
		exported := strings.Join(s.ExportedTo, ",")
		if exported == "" {
			exported = "-"
		}
		t.add(refText(s.Service), refText(s.Service), portsText(s.Ports), healthText(s), exported, s.Active, s.Reason)
	}
	return e.print("ServiceList", r, t)
}

func portsText(ports []*controlpb.ServicePort) string {
	var parts []string
	for _, p := range ports {
		parts = append(parts, fmt.Sprintf("%s:%d", p.Name, p.Number))
	}
	return strings.Join(parts, ",")
}

func serviceDescribeRun(ctx context.Context, e *env, service string) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	name, err := e.serviceName(ctx, op, service)
	if err != nil {
		return err
	}
	r, err := op.ServiceList(ctx, &controlpb.ServiceListRequest{Name: name})
	if err != nil {
		return e.callError(err)
	}
	if len(r.Services) == 0 {
		return problem.New(problem.UnknownService, "no service is called %s", name)
	}
	s := r.Services[0]
	if e.output != "table" && e.output != "wide" || e.jq != "" {
		return e.print("Service", s, &table{names: []string{name}})
	}
	fmt.Fprintf(e.out, "%s  ports %s\n", refText(s.Service), portsText(s.Ports))
	fmt.Fprintf(e.out, "exported to      %s\n", orNobody(s.ExportedTo))
	fmt.Fprintf(e.out, "callers here     %s\n", orNobody(s.Callers))
	if s.Active != "" {
		fmt.Fprintf(e.out, "traffic goes to  %s (%s)\n", s.Active, s.Reason)
	}
	fmt.Fprintln(e.out)
	rows := [][]string{{"CLUSTER", "HEALTHY", "UNHEALTHY", "UNKNOWN", "SAME", "STATE", "REASON"}}
	for _, p := range s.Providers {
		same := "yes"
		if !p.Same && !p.Local {
			same = "no"
		}
		rows = append(rows, []string{p.Cluster, fmt.Sprint(p.Health.GetHealthy()), fmt.Sprint(p.Health.GetUnhealthy()), fmt.Sprint(p.Health.GetUnknown()), same, p.State, p.Reason})
		for _, ep := range p.Endpoints {
			for _, in := range ep.Instances {
				state := strings.ToLower(strings.TrimPrefix(in.Health.String(), "HEALTH_"))
				rows = append(rows, []string{"  " + in.Workload, "", "", "", "", state, strings.TrimSpace(in.Reason + " via " + ep.Proxy + " " + ep.InboundAddress)})
			}
		}
	}
	writeColumns(e.out, rows, "")
	return nil
}

func orNobody(list []string) string {
	if len(list) == 0 {
		return "nobody"
	}
	return strings.ReplaceAll(strings.Join(list, ", "), "*", "every member")
}

type workloadOptions struct {
	address, serviceAccount, proxy, zone, service, healthPath, tokenOut string
	ports                                                               []string
	unixUID                                                             []uint
	tokenTTL                                                            time.Duration

	given func(flag string) bool // whether a flag was given: what was not keeps its present value
}

func newWorkloadCmd(e *env) *cobra.Command {
	c := &cobra.Command{Use: "workload", Short: "VM workloads behind services",
		Example: "  strait workload register shop/checkout-1 --address 10.4.0.17 --port http=8080 --token-out checkout.token\n  strait workload list"}
	var o workloadOptions
	reg := &cobra.Command{Use: "register NAMESPACE/NAME", Short: "Register a workload, its service, and a token for its sidecar", Args: cobra.ExactArgs(1),
		Long: `Register a running instance: a Workload object, the Service that selects it (made when it does not exist), and a one-time token with which
its sidecar obtains its identity. What is registered already keeps what no flag changes. Several workloads may share one sidecar (--proxy).
Processes of the users that --unix-uid names may take the identity from the sidecar's SPIFFE Workload API (strait sidecar --workload-api
PATH); without it nobody may.`,
		Example: "  strait workload register shop/checkout-1 --service checkout --address 10.4.0.17 --port http=8080 --token-out checkout.token\n" +
			"  strait workload register shop/web --token-out web.token        # a client only: nothing listens\n" +
			"  strait workload register shop/web --unix-uid 1000              # processes of uid 1000 may take its identity",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.given = cmd.Flags().Changed
			return workloadRegisterRun(cmd.Context(), e, args[0], o)
		}}
	f := reg.Flags()
	f.StringVar(&o.address, "address", "127.0.0.1", "where the application listens")
	f.StringSliceVar(&o.ports, "port", nil, "NAME=NUMBER[/PROTOCOL] of the application, repeatable; protocol http, http2, grpc or tcp")
	f.StringVar(&o.serviceAccount, "service-account", "", "service account in the SPIFFE ID (default: the service's name)")
	f.StringVar(&o.service, "service", "", "service that it is an instance of (default: its name, when it has ports)")
	f.StringVar(&o.proxy, "proxy", "", "name of the sidecar in front of it (default: its own name)")
	f.StringVar(&o.zone, "zone", "", "availability zone")
	f.StringVar(&o.healthPath, "health-path", "", "HTTP path of the health check (default: a TCP connect)")
	f.UintSliceVar(&o.unixUID, "unix-uid", nil, "uid of processes that may take the identity from the sidecar's Workload API, repeatable")
	f.StringVar(&o.tokenOut, "token-out", "", "file for the sidecar's registration token (none: no token is made)")
	f.DurationVar(&o.tokenTTL, "token-ttl", 15*time.Minute, "how long the token can be redeemed")
	list := &cobra.Command{Use: "list", Short: "List workloads", Args: cobra.NoArgs, Example: "  strait workload list\n  strait workload list -o yaml",
		RunE: func(cmd *cobra.Command, _ []string) error { return getRun(cmd.Context(), e, "Workload", "") }}
	c.AddCommand(reg, list)
	c.AddCommand(withdrawWorkloadCmds(e)...)
	return c
}

func workloadRegisterRun(ctx context.Context, e *env, name string, o workloadOptions) error {
	ns, name, ok := strings.Cut(name, "/")
	if !ok {
		ns, name = e.namespace, ns
	}
	if ns == "" {
		return problem.New(problem.Usage, "a workload is named NAMESPACE/NAME, or NAME with -n")
	}
	present, err := e.getObject(ctx, "Workload", ns, name)
	if err != nil && !problem.Is(err, problem.NotFound) {
		return err
	}
	spec := o.present(present)
	if o.service == "" {
		o.service = name
	}
	if o.serviceAccount == "" {
		o.serviceAccount = o.service
	}
	if o.proxy == "" {
		o.proxy = name
	}
	ports, servicePorts, err := parsePorts(o.ports)
	if err != nil {
		return err
	}
	spec["address"], spec["serviceAccount"], spec["proxy"] = o.address, o.serviceAccount, o.proxy
	if len(ports) > 0 {
		spec["ports"] = ports
	}
	if o.zone != "" {
		spec["zone"] = o.zone
	}
	if o.healthPath != "" {
		spec["health"] = map[string]any{"path": o.healthPath}
	}
	if len(o.unixUID) > 0 {
		selectors := make([]any, 0, len(o.unixUID))
		for _, uid := range o.unixUID {
			selectors = append(selectors, map[string]any{"uid": int64(uid)})
		}
		spec["attestation"] = map[string]any{"unix": selectors}
	}
	w := object(gvStrait, "Workload", ns, name, spec)
	labels := map[string]string{}
	if present != nil {
		maps.Copy(labels, present.GetLabels())
	}
	labels["app"] = o.service
	w.SetLabels(labels)
	objects := []*unstructured.Unstructured{w}
	if len(ports) > 0 {
		_, err := e.getObject(ctx, "Service", ns, o.service)
		switch {
		case problem.Is(err, problem.NotFound):
			s := object("v1", "Service", ns, o.service, map[string]any{"selector": map[string]any{"app": o.service}, "ports": servicePorts})
			s.SetLabels(map[string]string{"app": o.service})
			objects = append(objects, s)
		case err != nil:
			return err
		}
	}
	var secret *secretFile
	if o.tokenOut != "" {
		if secret, err = reserveSecret(o.tokenOut, "--token-out"); err != nil {
			return err
		}
		defer secret.discard()
	}
	if err := e.applyObjects(ctx, false, objects...); err != nil {
		return err
	}
	if secret != nil {
		if err := workloadToken(ctx, e, ns, o, secret); err != nil {
			return err
		}
	}
	fmt.Fprintf(e.out, "workload %s/%s registered (service account %s, sidecar %s/%s)\n", ns, name, o.serviceAccount, ns, o.proxy)
	return nil
}

// present fills in what a workload that is registered already has, where no flag says otherwise, and returns its specification.
func (o *workloadOptions) present(w *unstructured.Unstructured) map[string]any {
	if w == nil {
		return map[string]any{}
	}
	spec, _, _ := unstructured.NestedMap(w.Object, "spec")
	if spec == nil {
		spec = map[string]any{}
	}
	keep := func(flag string, to *string, value string) {
		if value != "" && (o.given == nil || !o.given(flag)) {
			*to = value
		}
	}
	text := func(field string) string { v, _ := spec[field].(string); return v }
	keep("address", &o.address, text("address"))
	keep("service-account", &o.serviceAccount, text("serviceAccount"))
	keep("proxy", &o.proxy, text("proxy"))
	keep("service", &o.service, w.GetLabels()["app"])
	return spec
}

func workloadToken(ctx context.Context, e *env, ns string, o workloadOptions, secret *secretFile) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	r, err := op.WorkloadToken(ctx, &controlpb.WorkloadTokenRequest{
		Namespace: ns, Proxy: o.proxy, ServiceAccount: o.serviceAccount, TtlSeconds: int64(o.tokenTTL / time.Second),
	})
	if err != nil {
		return e.callError(err)
	}
	if err := secret.keep([]byte(strings.TrimRight(r.Token, "\n") + "\n")); err != nil {
		return err
	}
	e.progress("token for the sidecar in %s; start it: strait sidecar --token-file %s --control-plane HOST:7400", o.tokenOut, o.tokenOut)
	return nil
}

// parsePorts reads NAME=NUMBER[/PROTOCOL].
func parsePorts(list []string) (map[string]any, []any, error) {
	ports := map[string]any{}
	var service []any
	for _, p := range list {
		name, rest, ok := strings.Cut(p, "=")
		number, protocol, _ := strings.Cut(rest, "/")
		n, err := strconv.ParseUint(number, 10, 16)
		if !ok || err != nil || n == 0 || name == "" {
			return nil, nil, problem.New(problem.Usage, "--port %s: want NAME=NUMBER[/PROTOCOL], like http=8080 or db=5432/tcp", p)
		}
		if _, twice := ports[name]; twice {
			return nil, nil, problem.New(problem.Usage, "--port %s: the name stands twice", p)
		}
		if protocol == "" {
			protocol = guessProtocol(name)
		}
		switch protocol {
		case "http", "http2", "grpc", "tcp":
		default:
			return nil, nil, problem.New(problem.Usage, "--port %s: protocol %q is none of http, http2, grpc, tcp", p, protocol)
		}
		ports[name] = int64(n)
		service = append(service, map[string]any{"name": name, "port": int64(n), "protocol": "TCP", "appProtocol": protocol, "targetPort": name})
	}
	return ports, service, nil
}

func guessProtocol(port string) string {
	for _, p := range []string{"http2", "http", "grpc"} {
		if port == p || strings.HasPrefix(port, p+"-") {
			return p
		}
	}
	return "tcp"
}

func newFailoverCmd(e *env) *cobra.Command {
	c := &cobra.Command{Use: "failover", Short: "Set priorities; active tier per service", Example: "  strait failover set checkout --order local,eu-west,any\n  strait failover status"}
	var order []string
	var after, ramp time.Duration
	var returnAt, trip int
	set := &cobra.Command{Use: "set SERVICE --order A,B[,any]", Short: "Set priorities (writes FailoverPolicy)", Args: cobra.ExactArgs(1),
		Long: `Set the order in which clusters serve the callers of this cluster. Each element is a tier: a cluster, "local" for the caller's own, "any" for
every other member, or several clusters with weights that share one tier: eu-west=80+us-west=20.`,
		Example: "  strait failover set checkout --order local,eu-west,any\n  strait failover set checkout --order eu-west=80+ap-south=20,any --return-after 30s",
		RunE: func(cmd *cobra.Command, args []string) error {
			spec, err := failoverSpec(order)
			if err != nil {
				return err
			}
			ret, tr := map[string]any{}, map[string]any{}
			if cmd.Flags().Changed("return-after") {
				ret["after"] = after.String()
			}
			if cmd.Flags().Changed("ramp") {
				ret["ramp"] = ramp.String()
			}
			if cmd.Flags().Changed("return-at") {
				ret["minHealthyPercent"] = int64(returnAt)
			}
			if cmd.Flags().Changed("trip-at") {
				tr["minHealthyPercent"] = int64(trip)
			}
			if len(ret) > 0 {
				spec["return"] = ret
			}
			if len(tr) > 0 {
				spec["trip"] = tr
			}
			return failoverSetRun(cmd.Context(), e, args[0], spec, order)
		}}
	set.Flags().StringSliceVar(&order, "order", nil, "tiers, first choice first")
	set.Flags().DurationVar(&after, "return-after", 2*time.Minute, "how long a better tier must be healthy before traffic returns")
	set.Flags().DurationVar(&ramp, "ramp", time.Minute, "time of the return in steps of 10, 25, 50, 100 %")
	set.Flags().IntVar(&returnAt, "return-at", 75, "healthy percentage at which traffic may return")
	set.Flags().IntVar(&trip, "trip-at", 50, "healthy percentage below which a tier is left")
	status := &cobra.Command{Use: "status [SERVICE]", Short: "Show the active tier of each service, and why", Args: cobra.MaximumNArgs(1),
		Example: "  strait failover status\n  strait failover status checkout",
		RunE: func(cmd *cobra.Command, args []string) error {
			name := ""
			if len(args) == 1 {
				name = args[0]
			}
			return failoverStatusRun(cmd.Context(), e, name)
		}}
	c.AddCommand(set, status)
	return c
}

func failoverSpec(order []string) (map[string]any, error) {
	if len(order) == 0 {
		return nil, problem.New(problem.Usage, "--order is missing").WithFix("--order local,eu-west,any")
	}
	var tiers []any
	for _, tier := range order {
		if tier == "any" {
			tiers = append(tiers, map[string]any{"anyOf": map[string]any{}})
			continue
		}
		var clusters []any
		weights := map[string]any{}
		for _, m := range strings.Split(tier, "+") {
			name, w, weighted := strings.Cut(m, "=")
			clusters = append(clusters, name)
			if weighted {
				n, err := strconv.ParseUint(w, 10, 16)
				if err != nil {
					return nil, problem.New(problem.Usage, "--order: weight of %q is no number", m)
				}
				weights[name] = int64(n)
			}
		}
		t := map[string]any{"clusters": clusters}
		if len(weights) > 0 {
			t["weights"] = weights
		}
		tiers = append(tiers, t)
	}
	return map[string]any{"priorities": tiers}, nil
}

func failoverSetRun(ctx context.Context, e *env, service string, spec map[string]any, order []string) error {
	ns, name, err := e.resolveService(ctx, service)
	if err != nil {
		return err
	}
	spec["targetRefs"] = []any{map[string]any{"group": "multicluster.x-k8s.io", "kind": "ServiceImport", "name": name}}
	policy := object(gvStrait, "FailoverPolicy", ns, name, spec)
	if err := e.applyObjects(ctx, false, policy); err != nil {
		return err
	}
	if err := e.await(ctx, policy); err != nil {
		return err
	}
	fmt.Fprintf(e.out, "%s/%s fails over in the order %s\n", ns, name, strings.Join(order, ", "))
	return nil
}

func failoverStatusRun(ctx context.Context, e *env, name string) error {
	op, done, err := e.operator()
	if err != nil {
		return err
	}
	defer done()
	if name != "" {
		if name, err = e.serviceName(ctx, op, name); err != nil {
			return err
		}
	}
	r, err := op.ServiceList(ctx, &controlpb.ServiceListRequest{Name: name})
	if err != nil {
		return e.callError(err)
	}
	t := &table{head: []string{"SERVICE", "POLICY", "TRAFFIC GOES TO", "REASON", "HEALTHY"}}
	for _, s := range r.Services {
		policy := s.Policy
		if policy == "" {
			policy = "default"
		}
		t.add(refText(s.Service), refText(s.Service), policy, s.Active, s.Reason, healthText(s))
	}
	return e.print("FailoverStatus", r, t)
}

// resolveService is the namespace and name of a service that may be given bare.
func (e *env) resolveService(ctx context.Context, service string) (ns, name string, err error) {
	full := service
	if !strings.Contains(service, "/") {
		op, done, err := e.operator()
		if err != nil {
			return "", "", err
		}
		defer done()
		if full, err = e.serviceName(ctx, op, service); err != nil {
			return "", "", err
		}
	}
	ns, name, _ = strings.Cut(full, "/")
	return ns, name, nil
}

func object(apiVersion, kind, ns, name string, spec map[string]any) *unstructured.Unstructured {
	o := map[string]any{"apiVersion": apiVersion, "kind": kind, "metadata": map[string]any{"name": name}}
	if ns != "" {
		o["metadata"].(map[string]any)["namespace"] = ns
	}
	if spec != nil {
		o["spec"] = spec
	}
	return &unstructured.Unstructured{Object: o}
}

func (e *env) getObject(ctx context.Context, kind, ns, name string) (*unstructured.Unstructured, error) {
	k, err := kindOf(kind)
	if err != nil {
		return nil, err
	}
	d, err := e.dynamic()
	if err != nil {
		return nil, err
	}
	o, err := k.in(d, ns).Get(ctx, name, metav1.GetOptions{})
	return o, e.apiError(err, kind, ns, name)
}

func (e *env) deleteObject(ctx context.Context, kind, ns, name string) error {
	k, err := kindOf(kind)
	if err != nil {
		return err
	}
	d, err := e.dynamic()
	if err != nil {
		return err
	}
	return e.apiError(k.in(d, ns).Delete(ctx, name, metav1.DeleteOptions{}), kind, ns, name)
}

// apiError turns an error of the configuration API into what users see.
func (e *env) apiError(err error, kind, ns, name string) error {
	if err == nil {
		return nil
	}
	objectName := strings.TrimPrefix(ns+"/"+name, "/")
	switch {
	case apierrors.IsNotFound(err):
		return problem.New(problem.NotFound, "%s %s", strings.ToLower(kind), objectName).Wrap(err)
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		p := problem.New(problem.InvalidObject, "%s", err.Error())
		if strings.Contains(err.Error(), "or traffic flaps") {
			p = problem.New(problem.ReturnNotAboveTrip, "%s", err.Error())
		}
		return p.WithObject(kind+" "+objectName, "").Wrap(err)
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return problem.New(problem.AccessDenied, "%s", err.Error()).Wrap(err)
	}
	if apierrors.ReasonForError(err) == metav1.StatusReasonUnknown {
		c, _ := e.current()
		return noControlPlane(c.DataDir+c.Server, err)
	}
	return err
}
