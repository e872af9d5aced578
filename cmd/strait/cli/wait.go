// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"

	"github.com/strait-mesh/strait/internal/problem"
)

// waited are the kinds that proxies act on; the others are done when they are stored.
var waited = map[string]bool{"FailoverPolicy": true, "AccessPolicy": true, "ExportPolicy": true, "ServiceExport": true, "Workload": true}

// await waits until what was written is accepted and every subscribed proxy has acknowledged it, as --wait asks. Each stage is
// said once.
func (e *env) await(ctx context.Context, objects ...*unstructured.Unstructured) error {
	if e.wait == "none" {
		return nil
	}
	d, err := e.dynamic()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	for _, o := range objects {
		if waited[o.GetKind()] {
			if err := e.awaitOne(ctx, d, o); err != nil {
				return err
			}
		}
	}
	return nil
}

func (e *env) awaitOne(ctx context.Context, d dynamic.Interface, o *unstructured.Unstructured) error {
	k, err := kindOf(o.GetKind())
	if err != nil {
		return err
	}
	name := strings.ToLower(o.GetKind()) + " " + o.GetNamespace() + "/" + o.GetName()
	said := ""
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		now, err := k.in(d, o.GetNamespace()).Get(ctx, o.GetName(), metav1.GetOptions{})
		if err != nil && ctx.Err() == nil {
			return e.apiError(err, o.GetKind(), o.GetNamespace(), o.GetName())
		}
		stage := "not seen by the control plane yet"
		if err == nil {
			accepted, programmed := conditionOf(now, "Accepted"), conditionOf(now, "Programmed")
			switch {
			case accepted.status == "False" && o.GetKind() != "ServiceExport" && o.GetKind() != "ExportPolicy":
				return problem.New(problem.NotAccepted, "%s: %s", name, accepted.message).WithObject(name, "").
					WithState("it is stored and not applied; what was in force before stays.")
			case programmed.status == "True":
				return nil
			case programmed.status != "":
				stage = "waiting for proxies: " + programmed.message
			}
		}
		if stage != said && said != "" {
			e.progress("%s: %s", name, stage)
		}
		said = stage
		select {
		case <-ctx.Done():
			return problem.New(problem.NotProgrammed, "%s: %s after %s", name, stage, e.timeout).WithState("it is stored; proxies take it as soon as they can.")
		case <-tick.C:
		}
	}
}

type conditionView struct{ status, message string }

// conditionOf is a condition of the object's present generation; empty when there is none yet.
func conditionOf(o *unstructured.Unstructured, kind string) conditionView {
	list, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	for _, raw := range list {
		c, ok := raw.(map[string]any)
		if !ok || c["type"] != kind {
			continue
		}
		if generation, ok := c["observedGeneration"].(int64); ok && generation != 0 && generation < o.GetGeneration() {
			continue
		}
		return conditionView{fmt.Sprint(c["status"]), fmt.Sprint(c["message"])}
	}
	return conditionView{}
}
