// SPDX-License-Identifier: Apache-2.0

package configapi

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	apiextensionsclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset/typed/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"

	"github.com/strait-mesh/strait/controlplane/api"
)

const (
	fieldOwner = "strait"
	// schemaHash on a CustomResourceDefinition says which file it was made from, so that a start with the same files writes nothing.
	schemaHash = "strait.dev/schema-hash"
	startPoll  = 20 * time.Millisecond
)

// applySchemas brings every CustomResourceDefinition to the state of its file and waits until all are served.
func (s *Server) applySchemas(ctx context.Context) error {
	client, err := clientset.NewForConfig(s.loop.restConfig())
	if err != nil {
		return err
	}
	crds := client.ApiextensionsV1().CustomResourceDefinitions()
	var names []string
	for _, k := range api.Kinds() {
		if k.BuiltIn {
			continue
		}
		name := k.Plural + "." + k.Group
		names = append(names, name)
		sum := sha256.Sum256(k.Schema())
		hash := hex.EncodeToString(sum[:8])
		if have, err := crds.Get(ctx, name, metav1.GetOptions{}); err == nil && have.Annotations[schemaHash] == hash {
			continue
		}
		body, err := schemaPatch(k, hash)
		if err != nil {
			return err
		}
		force := true
		err = retry(ctx, func(ctx context.Context) error {
			_, err := crds.Patch(ctx, name, types.ApplyPatchType, body, metav1.PatchOptions{FieldManager: fieldOwner, Force: &force})
			return err
		})
		if err != nil {
			return fmt.Errorf("schema of %s: %w", k.Kind, err)
		}
	}
	for _, name := range names {
		if err := established(ctx, crds, name); err != nil {
			return fmt.Errorf("schema %s: not established: %w", name, err)
		}
	}
	return nil
}

// nudgeAfter is how long a schema whose names are accepted may stay unestablished before it is written again. The libraries
// establish only on an update that they see: a process that ended between the two leaves one that no later start would look at.
const nudgeAfter = time.Second

// established waits until a kind is served.
func established(ctx context.Context, crds apiextensionsclient.CustomResourceDefinitionInterface, name string) error {
	nudged := time.Now()
	return wait.PollUntilContextCancel(ctx, startPoll, true, func(ctx context.Context) (bool, error) {
		crd, err := crds.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return false, nil
		}
		for _, c := range crd.Status.Conditions {
			if c.Type == apiextensionsv1.NamesAccepted && c.Status == apiextensionsv1.ConditionFalse {
				return false, fmt.Errorf("%s: %s", c.Reason, c.Message)
			}
			if c.Type == apiextensionsv1.Established && c.Status == apiextensionsv1.ConditionTrue {
				return true, nil
			}
		}
		if time.Since(nudged) > nudgeAfter {
			nudged = time.Now()
			patch := fmt.Appendf(nil, `{"metadata":{"annotations":{"strait.dev/nudged":%q}}}`, nudged.UTC().Format(time.RFC3339Nano))
			_, _ = crds.Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldOwner}) // again in a second
		}
		return false, nil
	})
}

func schemaPatch(k api.Kind, hash string) ([]byte, error) {
	var crd map[string]any
	if err := yaml.Unmarshal(k.Schema(), &crd); err != nil {
		return nil, fmt.Errorf("schema of %s: %w", k.Kind, err)
	}
	m, _ := crd["metadata"].(map[string]any)
	if m == nil {
		return nil, fmt.Errorf("schema of %s: no metadata", k.Kind)
	}
	notes, _ := m["annotations"].(map[string]any)
	if notes == nil {
		notes = map[string]any{}
	}
	notes[schemaHash] = hash
	m["annotations"] = notes
	return json.Marshal(crd)
}

// retry repeats f while the server says that it is not ready yet.
func retry(ctx context.Context, f func(context.Context) error) error {
	var last error
	err := wait.PollUntilContextCancel(ctx, startPoll, true, func(ctx context.Context) (bool, error) {
		last = f(ctx)
		switch {
		case last == nil:
			return true, nil
		case starting(last):
			return false, nil
		}
		return false, last
	})
	if last != nil && err != nil {
		return last
	}
	return err
}

// starting says that err is how a server answers before it is ready for a kind.
func starting(err error) bool {
	if apierrors.IsTooManyRequests(err) || apierrors.IsServiceUnavailable(err) || apierrors.IsNotFound(err) || apierrors.IsServerTimeout(err) {
		return true
	}
	status, ok := err.(apierrors.APIStatus)
	return ok && status.Status().Code == http.StatusServiceUnavailable
}

// touch reads every kind once: the first request for one is refused while its cache fills.
func (s *Server) touch(ctx context.Context) error {
	client, err := dynamic.NewForConfig(s.loop.restConfig())
	if err != nil {
		return err
	}
	for _, k := range api.Kinds() {
		err := retry(ctx, func(ctx context.Context) error {
			_, err := client.Resource(k.Resource()).List(ctx, metav1.ListOptions{Limit: 1})
			return err
		})
		if err != nil {
			return fmt.Errorf("kind %s: not served: %w", k.Kind, err)
		}
	}
	return nil
}
