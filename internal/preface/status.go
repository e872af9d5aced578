// SPDX-License-Identifier: Apache-2.0

package preface

import (
	"errors"
	"fmt"
	"io"
)

const (
	// MaxStatus bounds an encoded status frame.
	MaxStatus = 64
	// MaxReason bounds its reason.
	MaxReason = 32

	statusVersion = 1
	statusFixed   = 11
)

// Code is the outcome of a connection attempt, as a gateway says it.
type Code uint8

// Codes. Each but CodeOK is safe to retry elsewhere: no byte of the connection reached an application.
const (
	CodeOK                Code = 0
	CodeNoHealthyInstance Code = 1 // the far cluster has none to offer
	CodeNotExported       Code = 2 // the owner does not offer this service and port to this cluster
	CodeOverloaded        Code = 3 // a limit on the way
	CodeDraining          Code = 4 // the gateway is going away; use another
	CodeDenied            Code = 5 // an identity on the way was withdrawn or is not acceptable
	CodePeerUnreachable   Code = 6 // no live tunnel leads there
	CodeBadRequest        Code = 7 // the request contradicts itself (SNI, authority, header)
	CodeDeadline          Code = 8 // the deadline passed first
	CodeInternal          Code = 9
)

var codeNames = [...]string{
	"ok", "no_healthy_instance", "not_exported", "overloaded", "draining", "denied", "peer_unreachable", "bad_request",
	"deadline_exceeded", "internal",
}

// String returns the code's word.
func (c Code) String() string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return fmt.Sprintf("code_%d", uint8(c))
}

// Status is the answer to a preface, and to a stream between gateways.
type Status struct {
	Code   Code
	Reason string // one printable word or few, at most MaxReason bytes; longer ones are cut
	Handle Handle // of the instance, when Code is CodeOK or the instance is what failed
}

// ErrStatus says that the bytes are not a status frame.
var ErrStatus = errors.New("malformed status frame")

// AppendStatus appends the encoded frame: version, code, reason length, handle, reason.
func AppendStatus(b []byte, s Status) []byte {
	reason := s.Reason
	if len(reason) > MaxReason {
		reason = reason[:MaxReason]
	}
	b = append(b, statusVersion, byte(s.Code), byte(len(reason)))
	b = append(b, s.Handle[:]...)
	return append(b, reason...)
}

// ReadStatus reads exactly one frame.
func ReadStatus(r io.Reader) (Status, error) {
	var buf [MaxStatus]byte
	if _, err := io.ReadFull(r, buf[:statusFixed]); err != nil {
		return Status{}, err
	}
	n := int(buf[2])
	if buf[0] != statusVersion || n > MaxReason {
		return Status{}, ErrStatus
	}
	reason := buf[statusFixed : statusFixed+n]
	if _, err := io.ReadFull(r, reason); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return Status{}, err
	}
	for _, c := range reason {
		if c < 0x20 || c > 0x7e {
			return Status{}, ErrStatus
		}
	}
	return Status{Code: Code(buf[1]), Reason: string(reason), Handle: Handle(buf[3:11])}, nil
}

// Refused is the error of a connection that a gateway did not let through. Always safe to retry.
type Refused struct {
	Code   Code
	Reason string
	Handle Handle
}

// Error says which gateway answer it was.
func (e *Refused) Error() string {
	if e.Reason == "" {
		return "gateway refused: " + e.Code.String()
	}
	return "gateway refused: " + e.Code.String() + ": " + e.Reason
}
