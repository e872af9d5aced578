// SPDX-License-Identifier: Apache-2.0

package configapi_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/configapi"
)

// childDir names the environment variable that makes this binary a server which writes until it is killed.
const childDir = "CONFIGAPI_TEST_CHILD_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		if err := writeForever(dir); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

func writeForever(dir string) error {
	ctx := context.Background()
	s, err := configapi.Start(ctx, configapi.Config{Dir: dir})
	if err != nil {
		return err
	}
	d, err := dynamic.NewForConfig(s.RESTConfig())
	if err != nil {
		return err
	}
	k, _ := api.KindNamed(api.KindWorkload)
	for i := 0; ; i++ {
		o := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "strait.dev/v1alpha1", "kind": "Workload",
			"metadata": map[string]any{"generateName": "w-", "namespace": "shop"}, "spec": map[string]any{"zone": fmt.Sprint(i)}}}
		o, err := d.Resource(k.Resource()).Namespace("shop").Create(ctx, o, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		fmt.Println(o.GetName())
	}
}

// TestKill: P12, F1. What was acknowledged before a kill -9 is there afterwards, time after time.
func TestKill(t *testing.T) {
	dir := storeDir(t)
	acked := map[string]bool{}
	for _, writes := range []int{1, 20, 60} {
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = append(os.Environ(), childDir+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for range writes {
			if !lines.Scan() {
				t.Fatal("the child ended by itself")
			}
			acked[lines.Text()] = true
		}
		_ = cmd.Process.Kill()
		for lines.Scan() { // acknowledged before the signal came
			acked[lines.Text()] = true
		}
		_ = cmd.Wait()
	}
	s := start(t, nil, dir)
	list, err := in(t, client(t, s.RESTConfig()), "workload", "shop").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, o := range list.Items {
		found[o.GetName()] = true
	}
	for name := range acked {
		if name == "" || !found[name] {
			t.Errorf("%q was acknowledged and is lost", name)
		}
	}
	t.Logf("%d acknowledged, %d found", len(acked), len(found))
}
