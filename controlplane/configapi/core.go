// SPDX-License-Identifier: Apache-2.0

package configapi

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/admission"
	genericapirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/generic"
	genericregistry "k8s.io/apiserver/pkg/registry/generic/registry"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage/names"

	"github.com/strait-mesh/strait/controlplane/api"
	straitschema "github.com/strait-mesh/strait/controlplane/schema"
)

// contentFinalizer keeps a namespace until what is in it is gone.
const contentFinalizer = "strait.dev/content"

var (
	coreVersion = schema.GroupVersion{Version: "v1"}
	coreScheme  = newCoreScheme()
	coreCodecs  = serializer.NewCodecFactory(coreScheme)
)

// newCoreScheme registers the two built-in kinds, each as its own internal version.
func newCoreScheme() *runtime.Scheme {
	s := runtime.NewScheme()
	types := []runtime.Object{&corev1.Namespace{}, &corev1.NamespaceList{}, &corev1.Service{}, &corev1.ServiceList{}}
	s.AddKnownTypes(coreVersion, types...)
	s.AddKnownTypes(schema.GroupVersion{Version: runtime.APIVersionInternal}, types...)
	metav1.AddToGroupVersion(s, coreVersion)
	s.AddTypeDefaultingFunc(&corev1.Service{}, func(o any) { defaultService(o.(*corev1.Service)) })
	s.AddTypeDefaultingFunc(&corev1.ServiceList{}, func(o any) {
		for i := range o.(*corev1.ServiceList).Items {
			defaultService(&o.(*corev1.ServiceList).Items[i])
		}
	})
	if err := s.SetVersionPriority(coreVersion); err != nil {
		panic(err) // our own constants
	}
	return s
}

// defaultService fills what Kubernetes fills.
func defaultService(s *corev1.Service) {
	for i := range s.Spec.Ports {
		p := &s.Spec.Ports[i]
		if p.Protocol == "" {
			p.Protocol = corev1.ProtocolTCP
		}
		if p.TargetPort == (intstr.IntOrString{}) {
			p.TargetPort = intstr.FromInt32(p.Port)
		}
	}
}

// strategy is the life of a built-in kind. Its schema is the one of controlplane/api, judged as for any other kind.
type strategy struct {
	runtime.ObjectTyper
	names.NameGenerator
	kind api.Kind
}

// NamespaceScoped and the rest are rest.RESTCreateStrategy, RESTUpdateStrategy and RESTDeleteStrategy.
func (s strategy) NamespaceScoped() bool { return s.kind.Namespaced }

func (s strategy) PrepareForCreate(_ context.Context, o runtime.Object) {
	switch o := o.(type) {
	case *corev1.Namespace:
		o.Spec, o.Status = corev1.NamespaceSpec{}, corev1.NamespaceStatus{Phase: corev1.NamespaceActive}
		o.Finalizers = []string{contentFinalizer}
	case *corev1.Service:
		o.Status = corev1.ServiceStatus{}
	}
}

func (s strategy) PrepareForUpdate(_ context.Context, o, old runtime.Object) {
	switch o := o.(type) {
	case *corev1.Namespace:
		was := old.(*corev1.Namespace)
		o.Spec, o.Status = was.Spec, was.Status
		if o.DeletionTimestamp != nil {
			o.Status.Phase = corev1.NamespaceTerminating
		}
	case *corev1.Service:
		o.Status = old.(*corev1.Service).Status
	}
}

func (s strategy) Validate(ctx context.Context, o runtime.Object) field.ErrorList {
	return s.judge(ctx, o)
}

func (s strategy) ValidateUpdate(ctx context.Context, o, _ runtime.Object) field.ErrorList {
	return s.judge(ctx, o)
}

func (s strategy) judge(ctx context.Context, o runtime.Object) field.ErrorList {
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(o)
	if err != nil {
		return field.ErrorList{field.InternalError(nil, err)}
	}
	delete(content, "status")
	if m, ok := content["metadata"].(map[string]any); ok {
		delete(m, "managedFields") // the API's own
	}
	u := &unstructured.Unstructured{Object: content}
	u.SetGroupVersionKind(s.kind.GroupVersionKind)
	return straitschema.Validate(ctx, u)
}

func (s strategy) WarningsOnCreate(context.Context, runtime.Object) []string { return nil }
func (s strategy) WarningsOnUpdate(context.Context, runtime.Object, runtime.Object) []string {
	return nil
}
func (s strategy) Canonicalize(runtime.Object)                   {}
func (s strategy) AllowCreateOnUpdate(context.Context) bool      { return false }
func (s strategy) AllowUnconditionalUpdate(context.Context) bool { return true }

// coreREST is one built-in kind under /api/v1.
type coreREST struct {
	*genericregistry.Store
	short []string
}

// ShortNames is rest.ShortNamesProvider.
func (r *coreREST) ShortNames() []string { return r.short }

func newCoreREST(kind string, short string, newFunc, newList func() runtime.Object, getter generic.RESTOptionsGetter) (*coreREST, error) {
	k, ok := api.KindNamed(kind)
	if !ok {
		return nil, fmt.Errorf("no kind %s", kind)
	}
	s := strategy{coreScheme, names.SimpleNameGenerator, k}
	resource := k.Resource().GroupResource()
	st := &genericregistry.Store{
		NewFunc: newFunc, NewListFunc: newList,
		DefaultQualifiedResource: resource, SingularQualifiedResource: schema.GroupResource{Resource: singular(kind)},
		CreateStrategy: s, UpdateStrategy: s, DeleteStrategy: s,
		TableConvertor: rest.NewDefaultTableConvertor(resource),
	}
	if err := st.CompleteWithOptions(&generic.StoreOptions{RESTOptions: getter}); err != nil {
		return nil, fmt.Errorf("storage of %s: %w", kind, err)
	}
	return &coreREST{st, []string{short}}, nil
}

func singular(kind string) string {
	b := []byte(kind)
	b[0] += 'a' - 'A'
	return string(b)
}

// namespaces makes a namespace by the first write into it and guards those that are going away.
type namespaces struct {
	store *genericregistry.Store
}

// ensure returns nil when ns is there and may be written into.
func (n *namespaces) ensure(ctx context.Context, ns string) error {
	ctx = withoutNamespace(ctx)
	o, err := n.store.Get(ctx, ns, &metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		o, err = n.store.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}, rest.ValidateAllObjectFunc, &metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			o, err = n.store.Get(ctx, ns, &metav1.GetOptions{})
		}
	}
	if err != nil {
		return err
	}
	m, err := meta.Accessor(o)
	if err != nil {
		return err
	}
	if m.GetDeletionTimestamp() != nil {
		return fmt.Errorf("namespace %s is being deleted", ns)
	}
	return nil
}

func withoutNamespace(ctx context.Context) context.Context {
	return genericapirequest.WithNamespace(ctx, metav1.NamespaceNone)
}

// check returns nil when ns may be written into, or does not exist.
func (n *namespaces) check(ctx context.Context, ns string) error {
	o, err := n.store.Get(withoutNamespace(ctx), ns, &metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if o.(*corev1.Namespace).DeletionTimestamp != nil {
		return fmt.Errorf("namespace %s is being deleted", ns)
	}
	return nil
}

// Handles and Admit are admission.MutationInterface.
func (n *namespaces) Handles(op admission.Operation) bool { return op == admission.Create }

func (n *namespaces) Admit(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	if a.GetNamespace() == "" || a.GetSubresource() != "" || a.GetKind().Kind == api.KindNamespace {
		return nil
	}
	ensure := n.ensure
	if a.IsDryRun() {
		ensure = n.check
	}
	if err := ensure(ctx, a.GetNamespace()); err != nil {
		return admission.NewForbidden(a, err)
	}
	return nil
}
