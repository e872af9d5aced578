// SPDX-License-Identifier: Apache-2.0

package join

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
)

// MaxFrame bounds one body, in bytes.
const MaxFrame = 256 << 10

// Versions and features of the conversation. A feature is used when both sides name it; there is none yet.
const (
	messageVersion = 1
	WireVersion    = 1
	minWireVersion = 1
	features       = 0
)

const (
	nonceSize = 16
	maxText   = 256 // region, version and the like
	maxBundle = 64 << 10
)

// errFrame says that the other side sent what the conversation does not allow at this point.
var errFrame = errors.New("unexpected or malformed join message")

func encode(m *controlpb.JoinMessage) ([]byte, error) {
	m.Version = messageVersion
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("join message: %w", err)
	}
	if len(b) > MaxFrame {
		return nil, fmt.Errorf("join message of %d bytes; at most %d", len(b), MaxFrame)
	}
	return b, nil
}

// decode reads one message; a refusal by the other side comes back as the *problem.Error it sent.
func decode(b []byte) (*controlpb.JoinMessage, error) {
	if len(b) == 0 || len(b) > MaxFrame {
		return nil, fmt.Errorf("frame of %d bytes: %w", len(b), errFrame)
	}
	var m controlpb.JoinMessage
	if err := proto.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("%w: %w", errFrame, err)
	}
	if m.GetVersion() != messageVersion {
		return nil, problem.New(problem.VersionSkew, "the other side speaks version %d of strait-join; this one speaks %d", m.GetVersion(), messageVersion)
	}
	if r := m.GetRefused(); r != nil {
		return nil, refusalFromProto(r)
	}
	return &m, nil
}

// Refusal is the frame that tells the other side why the conversation ends. Errors without a code become STR-9001 without details.
func Refusal(err error) []byte {
	var p *problem.Error
	if !errors.As(err, &p) {
		p = problem.New(problem.Internal, "the other control plane could not go on; its log says why")
	}
	b, err := encode(&controlpb.JoinMessage{Message: &controlpb.JoinMessage_Refused{Refused: &controlpb.JoinRefused{
		Code: string(p.Code), What: clip(p.What), Why: clip(p.Why), Fix: clipAll(p.Fix), State: clip(p.State),
	}}})
	if err != nil {
		return nil // cannot be: everything was clipped
	}
	return b
}

func refusalFromProto(r *controlpb.JoinRefused) error {
	code := problem.Code(clip(r.GetCode()))
	if _, known := problem.Lookup(code); !known {
		code = problem.Internal
	}
	return &problem.Error{Code: code, What: clip(r.GetWhat()), Why: clip(r.GetWhy()), Fix: clipAll(r.GetFix()), State: clip(r.GetState())}
}

// clip bounds text and drops control characters: it ends up on a terminal.
func clip(s string) string {
	out := make([]rune, 0, min(len(s), 512))
	for _, r := range s {
		if len(out) == 512 {
			break
		}
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			r = ' '
		}
		out = append(out, r)
	}
	return string(out)
}

func clipAll(ss []string) []string {
	var out []string
	for i, s := range ss {
		if i == 4 {
			break
		}
		out = append(out, clip(s))
	}
	return out
}

// checkWire judges the versions that the other side names.
func checkWire(wire uint32) error {
	if wire < minWireVersion {
		return problem.New(problem.VersionSkew, "the other side speaks wire version %d; this one needs %d or newer", wire, minWireVersion)
	}
	return nil
}
