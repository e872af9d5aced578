// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto/x509"
	"errors"
	"time"
)

// Phases of a rotation.
const (
	Steady    = "steady"    // one root, one issuer
	Prepared  = "prepared"  // the next root and JWT key are in the bundle; nothing is issued by them
	Activated = "activated" // the next root signs; whoever knows only the one before still verifies
)

// State says what a CA signs with, and where a rotation stands.
type State struct {
	Phase       string    // Steady, Prepared or Activated
	Since       time.Time // when the phase began
	External    bool      // an external CA is the root; it rotates by itself
	Authorities []Authority
	// RenewIssuedBefore is when identities were last recalled: whoever holds one issued before should renew at once. The zero
	// time: never. Every identity that is issued afterwards counts as issued at or after it.
	RenewIssuedBefore time.Time
	// Trouble is why the external CA's files were not taken, "" when the present ones serve.
	Trouble string
}

// Authority is a root, an issuer or a JWT signing key.
type Authority struct {
	Kind      string            // root, issuer, jwt
	State     string            // active, prepared, retiring
	Cert      *x509.Certificate // nil for jwt
	KeyID     string            // kid of a JWT key; hex of the subject key identifier of a certificate
	Key       string            // here, offline, external
	NotBefore time.Time         // zero for jwt
	NotAfter  time.Time         // zero for jwt
}

var errNotYet = errors.New("not possible yet")

// Prepare makes the next root and JWT key and publishes them in the bundle, with the next sequence number. Nothing is issued
// by them. In phase Prepared it does nothing.
func (c *CA) Prepare() error { return errNotYet }

// PrepareRoot is Prepare with a root whose key is kept elsewhere: its certificate, PEM.
func (c *CA) PrepareRoot(rootPEM []byte) error { return errNotYet }

// Activate makes a new issuer, certified by the next root and by the one before it, and issues by it from now on; identities
// from before are recalled (State.RenewIssuedBefore). In phase Activated it does nothing. When a root's key is not here, an
// issuer that it signed must have been imported (ImportIssuer).
func (c *CA) Activate() error { return errNotYet }

// Retire takes the root and the JWT key from before the rotation out of the bundle, with the next sequence number, deletes their
// keys, and recalls identities once more. It does not ask whether anybody still needs them: the caller does.
func (c *CA) Retire() error { return errNotYet }

// Abort takes what Prepare made out of the bundle again, with the next sequence number. After Activate it is refused.
func (c *CA) Abort() error { return errNotYet }

// State says what the CA signs with now.
func (c *CA) State() State { return State{Phase: Steady} }

// Changed returns a channel that is closed when bundle, issuer or phase change next. Ask for the channel before reading.
func (c *CA) Changed() <-chan struct{} { return nil }
