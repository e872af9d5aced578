// SPDX-License-Identifier: Apache-2.0

package bundleendpoint

import (
	"errors"
	"fmt"
	"net/url"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const maxURL = 2048

// Endpoint says where the bundle of a foreign trust domain comes from.
type Endpoint struct {
	TrustDomain spiffeid.TrustDomain
	URL         string        // empty: Bundle is all there is
	Profile     string        // of URL
	EndpointID  spiffeid.ID   // of https_spiffe: whom the endpoint must prove to be
	Bundle      *trust.Bundle // to begin with; required for https_spiffe and without a URL
}

// Check says what of an endpoint cannot work or must not be.
func (e Endpoint) Check() error {
	switch {
	case e.TrustDomain.IsZero():
		return errors.New("no trust domain")
	case e.Bundle != nil && e.Bundle.TrustDomain() != e.TrustDomain:
		return fmt.Errorf("a bundle of %s for %s", e.Bundle.TrustDomain(), e.TrustDomain)
	case e.Bundle != nil && len(e.Bundle.Roots()) == 0:
		return errors.New("the bundle has no roots")
	case e.URL == "" && e.Bundle == nil:
		return errors.New("neither an endpoint nor a bundle")
	case e.URL == "":
		return nil
	}
	if err := CheckURL(e.URL); err != nil {
		return err
	}
	switch e.Profile {
	case ProfileWeb:
		if !e.EndpointID.IsZero() {
			return errors.New("a SPIFFE ID of the endpoint for https_web, which proves a host name")
		}
	case ProfileSPIFFE:
		switch {
		case e.EndpointID.IsZero():
			return errors.New("https_spiffe without the endpoint's SPIFFE ID")
		case e.EndpointID.TrustDomain() != e.TrustDomain:
			return fmt.Errorf("the endpoint's SPIFFE ID is of %s: only %s may speak for itself", e.EndpointID.TrustDomain(), e.TrustDomain)
		case e.Bundle == nil:
			return errors.New("https_spiffe without a bundle to begin with")
		}
	default:
		return fmt.Errorf("profile %q is neither %s nor %s", e.Profile, ProfileWeb, ProfileSPIFFE)
	}
	return nil
}

// CheckURL accepts an absolute https URL with a host, without userinfo and fragment.
func CheckURL(text string) error {
	if len(text) > maxURL {
		return fmt.Errorf("a URL of %d bytes; at most %d", len(text), maxURL)
	}
	u, err := url.Parse(text)
	if err != nil {
		return errors.New("malformed URL")
	}
	return checkURL(u)
}

func checkURL(u *url.URL) error {
	switch {
	case u.Scheme != "https" || u.Opaque != "":
		return fmt.Errorf("scheme %.20q; want https", u.Scheme)
	case u.User != nil:
		return errors.New("userinfo in the URL")
	case u.Hostname() == "":
		return errors.New("no host in the URL")
	case u.Fragment != "":
		return errors.New("a fragment in the URL")
	}
	return nil
}
