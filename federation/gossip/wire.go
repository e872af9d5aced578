// SPDX-License-Identifier: Apache-2.0

package gossip

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"

	"github.com/hashicorp/go-msgpack/v2/codec"
)

// The messages of memberlist v0.7 and serf v0.11 that gateways exchange, as far as the filter lets them pass. Field names are the
// wire format.

// memberlist's message types.
const (
	pingType byte = iota
	indirectPingType
	ackType
	suspectType
	aliveType
	deadType
	pushPullType
	compoundType
	userType
	compressType
	encryptType
	nackType
	crcType
	errType
)

// serf's message types inside userType.
const (
	leaveIntentType byte = iota
	joinIntentType
	serfPushPullType
	userEventType
)

type ping struct {
	SeqNo      uint32
	Node       string
	SourceAddr []byte `codec:",omitempty"`
	SourcePort uint16 `codec:",omitempty"`
	SourceNode string `codec:",omitempty"`
}

type indirectPing struct {
	SeqNo      uint32
	Target     []byte
	Port       uint16
	Node       string
	Nack       bool
	SourceAddr []byte `codec:",omitempty"`
	SourcePort uint16 `codec:",omitempty"`
	SourceNode string `codec:",omitempty"`
}

type ack struct {
	SeqNo   uint32
	Payload []byte
}

type nack struct{ SeqNo uint32 }

type errorReply struct{ Error string }

// accusation is memberlist's suspect and dead.
type accusation struct {
	Incarnation uint32
	Node        string
	From        string
}

type alive struct {
	Incarnation uint32
	Node        string
	Addr        []byte
	Port        uint16
	Meta        []byte
	Vsn         []uint8
}

type pushPullHeader struct {
	Nodes        int
	UserStateLen int
	Join         bool
}

// A node's states in push/pull.
const (
	stateAlive = iota
	stateSuspect
	stateDead
	stateLeft
)

type nodeState struct {
	Name        string
	Addr        []byte
	Port        uint16
	Meta        []byte
	Incarnation uint32
	State       int
	Vsn         []uint8
}

type joinIntent struct {
	LTime uint64
	Node  string
}

type leaveIntent struct {
	LTime uint64
	Node  string
	Prune bool
}

type userEvent struct {
	LTime   uint64
	Name    string
	Payload []byte
	CC      bool
}

type pastEvent struct {
	Name    string
	Payload []byte
}

type pastEvents struct {
	LTime  uint64
	Events []pastEvent
}

type serfPushPull struct {
	LTime        uint64
	StatusLTimes map[string]uint64
	LeftMembers  []string
	EventLTime   uint64
	Events       []*pastEvents
	QueryLTime   uint64
}

var (
	errTruncated = errors.New("truncated message")
	errRefused   = errors.New("message type is not accepted")
)

// handle bounds what a decoder makes of a peer's bytes.
func handle() *codec.MsgpackHandle {
	h := &codec.MsgpackHandle{}
	h.MaxInitLen = 256
	h.MaxDepth = 8
	h.TimeNotBuiltin = true
	return h
}

func decode(b []byte, out any) error { return codec.NewDecoderBytes(b, handle()).Decode(out) }

// encode appends a message type and a value.
func encode(b []byte, kind byte, v any) ([]byte, error) {
	var buf bytes.Buffer
	buf.WriteByte(kind)
	if err := codec.NewEncoder(&buf, handle()).Encode(v); err != nil {
		return b, err
	}
	return append(b, buf.Bytes()...), nil
}

// splitPacket takes checksum and compounding off a packet.
func splitPacket(b []byte) ([][]byte, error) {
	if len(b) >= 5 && b[0] == crcType {
		if crc32.ChecksumIEEE(b[5:]) != binary.BigEndian.Uint32(b[1:5]) {
			return nil, errors.New("wrong checksum")
		}
		b = b[5:]
	}
	if len(b) == 0 {
		return nil, errTruncated
	}
	if b[0] != compoundType {
		return [][]byte{b}, nil
	}
	if len(b) < 2 || len(b) < 2+2*int(b[1]) {
		return nil, errTruncated
	}
	n := int(b[1])
	sizes, rest := b[2:2+2*n], b[2+2*n:]
	var parts [][]byte
	for i := range n {
		size := int(binary.BigEndian.Uint16(sizes[2*i:]))
		if size == 0 || size > len(rest) {
			return nil, errTruncated
		}
		parts = append(parts, rest[:size])
		rest = rest[size:]
	}
	return parts, nil
}

// joinPacket is the inverse of splitPacket, without checksum.
func joinPacket(parts [][]byte) []byte {
	if len(parts) == 1 {
		return parts[0]
	}
	b := []byte{compoundType, byte(len(parts))}
	for _, p := range parts {
		b = binary.BigEndian.AppendUint16(b, uint16(len(p)))
	}
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

// pushPull is the one message of a push/pull stream, in each direction.
type pushPull struct {
	join  bool
	nodes []nodeState
	user  []byte
}

// Bounds of one push/pull.
const (
	maxPushPull = 256 << 10 // bytes
	maxNodes    = 1024
)

func readPushPull(r io.Reader, dec *codec.Decoder) (*pushPull, error) {
	var h pushPullHeader
	if err := dec.Decode(&h); err != nil {
		return nil, err
	}
	if h.Nodes < 0 || h.Nodes > maxNodes || h.UserStateLen < 0 || h.UserStateLen > maxPushPull {
		return nil, errors.New("push/pull is too large")
	}
	p := &pushPull{join: h.Join}
	for range h.Nodes {
		var n nodeState
		if err := dec.Decode(&n); err != nil {
			return nil, err
		}
		p.nodes = append(p.nodes, n)
	}
	if h.UserStateLen > 0 {
		p.user = make([]byte, h.UserStateLen)
		if _, err := io.ReadFull(r, p.user); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (p *pushPull) marshal() ([]byte, error) {
	var buf bytes.Buffer
	buf.WriteByte(pushPullType)
	enc := codec.NewEncoder(&buf, handle())
	if err := enc.Encode(&pushPullHeader{Nodes: len(p.nodes), UserStateLen: len(p.user), Join: p.join}); err != nil {
		return nil, err
	}
	for i := range p.nodes {
		if err := enc.Encode(&p.nodes[i]); err != nil {
			return nil, err
		}
	}
	buf.Write(p.user)
	return buf.Bytes(), nil
}
