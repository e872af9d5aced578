// SPDX-License-Identifier: Apache-2.0

package join

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TokenPrefix begins the text of every join token of this version.
const TokenPrefix = "strait-join-1."

// Bounds of a token.
const (
	MaxTokenText      = 16 << 10 // bytes
	maxTokenGateways  = 16
	maxTokenAddresses = 8 // per gateway
	checksumSize      = 8
	idSize            = 8
	secretSize        = 16
)

// Approve says whether a joiner that proved its token is let in at once.
type Approve string

// The kinds of approval.
const (
	ApproveAuto   Approve = "auto"
	ApproveManual Approve = "manual"
)

// Secret is a token's secret. It prints as "[secret]" everywhere.
type Secret [secretSize]byte

// String hides the secret.
func (Secret) String() string { return "[secret]" }

// GoString hides the secret.
func (Secret) GoString() string { return "[secret]" }

// LogValue hides the secret.
func (Secret) LogValue() slog.Value { return slog.StringValue("[secret]") }

// TokenGateway is a gateway that the issuer can be reached through.
type TokenGateway struct {
	ID        spiffeid.ID
	Addresses []string // host:port, UDP and TCP alike
}

// Token is a join token as its bearer holds it.
type Token struct {
	ID             string // 16 hex digits
	Secret         Secret
	Federation     federation.FederationName
	Cluster        federation.ClusterName // the issuer's
	TrustDomain    spiffeid.TrustDomain   // the issuer's
	Gateways       []TokenGateway
	BundleHash     [32]byte // of the issuer's bundle
	Issued         time.Time
	Expires        time.Time
	AllowedCluster federation.ClusterName // who may use it
	Approve        Approve                // for display; the issuer's record decides
}

// Key is what both sides derive from the secret; the issuer keeps nothing else.
func (t *Token) Key() Key { return deriveKey(t.Secret, t.ID) }

// Addresses lists the addresses of all gateways.
func (t *Token) Addresses() []string {
	var out []string
	for _, g := range t.Gateways {
		out = append(out, g.Addresses...)
	}
	return out
}

// Text is the text of the token file: one line.
func (t *Token) Text() (string, error) {
	id, err := hex.DecodeString(t.ID)
	if err != nil || len(id) != idSize {
		return "", errors.New("join token: bad id")
	}
	msg := &controlpb.JoinToken{
		Id: id, Secret: t.Secret[:], Federation: t.Federation.String(), Cluster: t.Cluster.String(),
		TrustDomain: t.TrustDomain.String(), Gateways: gatewaysToProto(t.Gateways), BundleSha256: t.BundleHash[:],
		IssuedUnix: t.Issued.Unix(), ExpiresUnix: t.Expires.Unix(),
		AllowedCluster: t.AllowedCluster.String(), Approve: string(t.Approve),
	}
	payload, err := proto.MarshalOptions{Deterministic: true}.Marshal(msg)
	if err != nil {
		return "", fmt.Errorf("join token: %w", err)
	}
	sum := checksum(payload)
	text := TokenPrefix + base64.RawURLEncoding.EncodeToString(append(payload, sum[:]...))
	if len(text) > MaxTokenText {
		return "", fmt.Errorf("join token: %d bytes; at most %d", len(text), MaxTokenText)
	}
	return text + "\n", nil
}

// ParseToken reads the text of a token file. Every failure is STR-2201 and repeats nothing of the text.
func ParseToken(text string) (*Token, error) {
	text = strings.TrimSpace(text)
	malformed := func(why string) error {
		return problem.New(problem.TokenMalformed, "the text is not a whole join token: %s", why).
			WithState("nothing was changed on either side")
	}
	body, ok := strings.CutPrefix(text, TokenPrefix)
	switch {
	case text == "":
		return nil, malformed("it is empty")
	case len(text) > MaxTokenText:
		return nil, malformed("it is too long")
	case !ok && strings.HasPrefix(text, "strait-register-"):
		return nil, malformed("it is a registration token, for gateways and workloads of the same cluster")
	case !ok:
		return nil, malformed(fmt.Sprintf("it does not begin with %q", TokenPrefix))
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(body)
	if err != nil {
		return nil, malformed("it has a character that no token has, or its end is missing")
	}
	if len(raw) <= checksumSize {
		return nil, malformed("its end is missing")
	}
	payload, got := raw[:len(raw)-checksumSize], raw[len(raw)-checksumSize:]
	if want := checksum(payload); subtle.ConstantTimeCompare(want[:], got) != 1 {
		return nil, malformed("its checksum does not match; a part is missing or changed")
	}
	var msg controlpb.JoinToken
	if err := proto.Unmarshal(payload, &msg); err != nil {
		return nil, malformed("its content is not readable")
	}
	t, err := tokenFromProto(&msg)
	if err != nil {
		return nil, malformed(err.Error())
	}
	return t, nil
}

func checksum(payload []byte) [checksumSize]byte {
	h := sha256.New()
	h.Write([]byte(TokenPrefix))
	h.Write(payload)
	return [checksumSize]byte(h.Sum(nil)[:checksumSize])
}

func tokenFromProto(m *controlpb.JoinToken) (*Token, error) {
	if len(m.GetId()) != idSize || len(m.GetSecret()) != secretSize || len(m.GetBundleSha256()) != sha256.Size {
		return nil, errors.New("a field has the wrong length")
	}
	t := &Token{
		ID: hex.EncodeToString(m.GetId()), Secret: Secret(m.GetSecret()), BundleHash: [32]byte(m.GetBundleSha256()),
		Issued: time.Unix(m.GetIssuedUnix(), 0), Expires: time.Unix(m.GetExpiresUnix(), 0), Approve: Approve(m.GetApprove()),
	}
	if t.Approve != ApproveAuto && t.Approve != ApproveManual {
		return nil, errors.New("its kind of approval is unknown")
	}
	var err error
	if t.Federation, err = federation.ParseFederationName(m.GetFederation()); err != nil {
		return nil, err
	}
	if t.Cluster, err = federation.ParseClusterName(m.GetCluster()); err != nil {
		return nil, err
	}
	if t.AllowedCluster, err = federation.ParseClusterName(m.GetAllowedCluster()); err != nil {
		return nil, err
	}
	if t.TrustDomain, err = spiffeid.ParseTrustDomain(m.GetTrustDomain()); err != nil {
		return nil, err
	}
	if t.Gateways, err = gatewaysFromProto(m.GetGateways(), t.TrustDomain); err != nil {
		return nil, err
	}
	if len(t.Gateways) == 0 {
		return nil, errors.New("it names no gateway")
	}
	return t, nil
}

func gatewaysToProto(gs []TokenGateway) []*controlpb.JoinTokenGateway {
	var out []*controlpb.JoinTokenGateway
	for _, g := range gs {
		out = append(out, &controlpb.JoinTokenGateway{SpiffeId: g.ID.String(), Addresses: g.Addresses})
	}
	return out
}

func gatewaysFromProto(ms []*controlpb.JoinTokenGateway, td spiffeid.TrustDomain) ([]TokenGateway, error) {
	if len(ms) > maxTokenGateways {
		return nil, fmt.Errorf("%d gateways; at most %d", len(ms), maxTokenGateways)
	}
	var out []TokenGateway
	for _, g := range ms {
		id, err := spiffeid.Parse(g.GetSpiffeId())
		if err != nil {
			return nil, err
		}
		if _, ok := id.Gateway(); !ok || id.TrustDomain() != td {
			return nil, errors.New("a gateway's identity is not of the trust domain it should be of")
		}
		if len(g.GetAddresses()) > maxTokenAddresses {
			return nil, fmt.Errorf("%d addresses of one gateway; at most %d", len(g.GetAddresses()), maxTokenAddresses)
		}
		for _, a := range g.GetAddresses() {
			if err := checkAddress(a, true); err != nil {
				return nil, err
			}
		}
		out = append(out, TokenGateway{ID: id, Addresses: g.GetAddresses()})
	}
	return out, nil
}

// newTokenID and newSecret read the system's randomness, which does not fail.
func newTokenID() string {
	var id [idSize]byte
	_, _ = rand.Read(id[:])
	return hex.EncodeToString(id[:])
}

func newSecret() Secret {
	var s Secret
	_, _ = rand.Read(s[:])
	return s
}

// validTokenID reports whether s has the form of a token id.
func validTokenID(s string) bool {
	raw, err := hex.DecodeString(s)
	return err == nil && len(raw) == idSize && hex.EncodeToString(raw) == s
}

// Fingerprint abbreviates a bundle's hash for people: "4F:9A..:21".
func Fingerprint(hash [32]byte) string {
	h := bytes.ToUpper([]byte(hex.EncodeToString(hash[:])))
	return fmt.Sprintf("%s:%s..:%s", h[0:2], h[2:4], h[62:64])
}
