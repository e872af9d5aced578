// SPDX-License-Identifier: Apache-2.0

package register

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TokenReviewer says whose a projected service-account token is. KubernetesReviewer asks an API server.
type TokenReviewer interface {
	// ReviewToken accepts a token that is valid now and was made for audience. Refusals are *problem.Error of STR-5301; whatever kept
	// the reviewer from judging is STR-5303.
	ReviewToken(ctx context.Context, token, audience string) (ServiceAccount, error)
}

// ServiceAccount is the holder of a projected token.
type ServiceAccount struct {
	Namespace string
	Name      string
	Pod       string // empty: the token is not bound to a pod
}

// Grant is what the service account registers as in td: a sidecar with the identity /ns/<namespace>/sa/<name>, called after its pod.
func (a ServiceAccount) Grant(td spiffeid.TrustDomain) (Grant, error) {
	if !validName(a.Namespace) || !validName(a.Name) || a.Pod != "" && !validName(a.Pod) {
		return Grant{}, refused("the service account's name is malformed")
	}
	id, err := spiffeid.Workload(td, a.Namespace, a.Name)
	if err != nil {
		return Grant{}, refused("the service account's name is malformed")
	}
	proxy := a.Pod
	if proxy == "" {
		proxy = a.Name
	}
	return Grant{Kind: KindSidecar, Name: a.Namespace + "/" + proxy, SPIFFEID: id}, nil
}

// validName accepts a DNS subdomain as Kubernetes names its objects (RFC 1123): lower case, digits, dots and hyphens.
func validName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for _, label := range strings.Split(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return false
		}
	}
	return true
}

// Bounds of a review.
const (
	// ReviewTimeout is how long the API server may take for one.
	ReviewTimeout  = 3 * time.Second
	maxReviewToken = 16 << 10
	maxReview      = 64 << 10
	maxReviewFile  = 256 << 10
)

// KubernetesReviewer asks an API server (authentication.k8s.io/v1 TokenReview). The files are read at each review: Kubernetes renews
// them. Its user needs the role system:auth-delegator, or the verb create on tokenreviews. It may be used by any number of goroutines.
type KubernetesReviewer struct {
	Server    string           // "https://10.96.0.1:443"
	CAFile    string           // certificates, PEM, that verify the API server
	TokenFile string           // of the reviewer itself
	Now       func() time.Time // for the API server's certificate; nil: time.Now
}

type tokenReview struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Spec       tokenReviewSpec   `json:"spec"`
	Status     tokenReviewStatus `json:"status,omitzero"`
}

type tokenReviewSpec struct {
	Token     string   `json:"token"`
	Audiences []string `json:"audiences"`
}

type tokenReviewStatus struct {
	Authenticated bool     `json:"authenticated"`
	Audiences     []string `json:"audiences"`
	Error         string   `json:"error"`
	User          struct {
		Username string              `json:"username"`
		Groups   []string            `json:"groups"`
		Extra    map[string][]string `json:"extra"`
	} `json:"user"`
}

const (
	reviewPath    = "/apis/authentication.k8s.io/v1/tokenreviews"
	reviewVersion = "authentication.k8s.io/v1"
	accountPrefix = "system:serviceaccount:"
	accountsGroup = "system:serviceaccounts"
	podExtra      = "authentication.kubernetes.io/pod-name"
)

// ReviewToken implements TokenReviewer. No error contains a token.
func (k KubernetesReviewer) ReviewToken(ctx context.Context, token, audience string) (ServiceAccount, error) {
	if audience == "" {
		return ServiceAccount{}, errors.New("review token: no audience")
	}
	if token == "" || len(token) > maxReviewToken || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return ServiceAccount{}, refused("the service-account token is malformed")
	}
	status, err := k.ask(ctx, token, audience)
	if err != nil {
		return ServiceAccount{}, problem.New(problem.RegistrationBusy, "the service-account token could not be reviewed").WithWhy("%v", err).Wrap(err)
	}
	return status.account(audience)
}

func (k KubernetesReviewer) ask(ctx context.Context, token, audience string) (*tokenReviewStatus, error) {
	base, err := url.Parse(k.Server)
	if err != nil || base.Scheme != "https" || base.Host == "" || base.User != nil || base.RawQuery != "" || base.Fragment != "" {
		return nil, errors.New("the API server's address is not https://HOST:PORT")
	}
	roots, err := readBounded(k.CAFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(roots) {
		return nil, fmt.Errorf("%s holds no certificate", k.CAFile)
	}
	bearer, err := readBounded(k.TokenFile)
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(tokenReview{APIVersion: reviewVersion, Kind: "TokenReview", Spec: tokenReviewSpec{token, []string{audience}}})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, ReviewTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base.JoinPath(reviewPath).String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+string(bytes.TrimSpace(bearer)))
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	client := &http.Client{
		// A connection of its own for each review: the files may have changed, and reviews are rare. No proxy of the environment.
		Transport:     &http.Transport{TLSClientConfig: trust.WebClientTLS(pool, k.Now), DisableKeepAlives: true, MaxResponseHeaderBytes: maxReview},
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("the API server redirects") },
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, withoutURL(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the API server answers %d", resp.StatusCode)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxReview+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxReview {
		return nil, fmt.Errorf("the API server's answer has more than %d bytes", maxReview)
	}
	return parseReview(data)
}

func parseReview(data []byte) (*tokenReviewStatus, error) {
	var review tokenReview
	if err := json.Unmarshal(data, &review); err != nil || review.APIVersion != reviewVersion || review.Kind != "TokenReview" {
		return nil, errors.New("the API server's answer is no TokenReview")
	}
	return &review.Status, nil
}

// withoutURL keeps the cause of a failed request.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

func readBounded(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxReviewFile+1))
	if err == nil && len(data) > maxReviewFile {
		err = fmt.Errorf("%s has more than %d bytes", name, maxReviewFile)
	}
	return data, err
}

// account judges what the API server said. A server that does not know audiences leaves them out; its word counts for nothing here.
func (s *tokenReviewStatus) account(audience string) (ServiceAccount, error) {
	if !s.Authenticated || s.Error != "" {
		return ServiceAccount{}, refused("the service-account token is not valid, or not for this control plane")
	}
	if !slices.Contains(s.Audiences, audience) {
		return ServiceAccount{}, refused("the service-account token is not for this control plane")
	}
	name, ok := strings.CutPrefix(s.User.Username, accountPrefix)
	parts := strings.Split(name, ":")
	if !ok || len(parts) != 2 || !validName(parts[0]) || !validName(parts[1]) ||
		!slices.Contains(s.User.Groups, accountsGroup) || !slices.Contains(s.User.Groups, accountsGroup+":"+parts[0]) {
		return ServiceAccount{}, refused("the token is not a service account's")
	}
	a := ServiceAccount{Namespace: parts[0], Name: parts[1]}
	if pods := s.User.Extra[podExtra]; len(pods) == 1 {
		a.Pod = pods[0]
	} else if len(pods) > 1 {
		return ServiceAccount{}, refused("the token is not of one pod")
	}
	if a.Pod != "" && !validName(a.Pod) {
		return ServiceAccount{}, refused("the name of the token's pod is malformed")
	}
	return a, nil
}
