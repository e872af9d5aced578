// SPDX-License-Identifier: Apache-2.0

package register

import "crypto/sha256"

// ReadMessage is readMessage.
var ReadMessage = readMessage

// WriteMessage is writeMessage.
var WriteMessage = writeMessage

// Proof is what a client proves with.
func Proof(t Token, exporter, csr []byte) []byte {
	return proofOf(deriveKey(t.Secret), exporter, csr)
}

// Redeem does what a server does with a request whose public key is csr.
func (t *Tokens) Redeem(id string, proof, exporter, csr []byte) (Grant, error) {
	if err := t.judge(id, proof, exporter, csr); err != nil {
		return Grant{}, err
	}
	return t.bind(id, sha256.Sum256(csr))
}

// ParseReview reads an API server's answer.
func ParseReview(data []byte, audience string) (ServiceAccount, error) {
	status, err := parseReview(data)
	if err != nil {
		return ServiceAccount{}, err
	}
	return status.account(audience)
}
