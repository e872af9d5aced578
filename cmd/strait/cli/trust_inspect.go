// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/strait-mesh/strait/federation/join"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/register"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func newTrustInspectCmd(e *env) *cobra.Command {
	return &cobra.Command{Use: "inspect FILE|-|HOST:PORT", Short: "Say what a file or a TLS server presents, and whether it verifies here", Args: cobra.ExactArgs(1),
		Long: `Say what a file holds or a TLS server presents: certificates (PEM or DER), a trust bundle (JWKS), a join or registration token; its SPIFFE ID,
its ends, and whether the bundles that can be read here verify it. Secrets are never shown. A server is sent a hello and nothing else.

Exit 4 says that an identity does not verify; without any bundle at hand nothing is judged.`,
		Example: "  strait trust inspect ./us-east.token\n  strait trust inspect 127.0.0.1:7400\n  strait trust inspect svid.pem -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			i, err := e.inspect(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return e.renderInspection(i)
		}}
}

// inspection is what was found. Fields that do not apply are left out.
type inspection struct {
	Target       string                 `json:"target"`
	Found        string                 `json:"found"` // server, certificates, bundle, join-token, registration-token
	SPIFFEID     string                 `json:"spiffeID,omitempty"`
	TrustDomain  string                 `json:"trustDomain,omitempty"`
	Cluster      string                 `json:"cluster,omitempty"`
	Sequence     *uint64                `json:"sequence,omitempty"`
	ID           string                 `json:"id,omitempty"` // of a token
	For          string                 `json:"for,omitempty"`
	Addresses    []string               `json:"addresses,omitempty"`
	BundleSHA256 string                 `json:"bundleSHA256,omitempty"` // of a bundle, or pinned by a token
	Expires      *time.Time             `json:"expires,omitempty"`
	Certificates []inspectedCertificate `json:"certificates,omitempty"`
	JWTKeys      []string               `json:"jwtKeys,omitempty"`
	PrivateKeys  int                    `json:"privateKeys,omitempty"`
	Verdict      string                 `json:"verdict"` // verified, refused, not judged
	Reason       string                 `json:"reason,omitempty"`
}

type inspectedCertificate struct {
	Subject   string    `json:"subject"`
	Issuer    string    `json:"issuer"`
	URIs      []string  `json:"uris,omitempty"`
	CA        bool      `json:"ca"`
	NotBefore time.Time `json:"notBefore"`
	NotAfter  time.Time `json:"notAfter"`
	SHA256    string    `json:"sha256"`
}

// maxInspected bounds a file in bytes.
const maxInspected = 1 << 20

func (e *env) inspect(ctx context.Context, target string) (*inspection, error) {
	i := &inspection{Target: target, Verdict: "not judged"}
	data, err := e.readInspected(target)
	if errors.Is(err, fs.ErrNotExist) {
		if _, _, bad := net.SplitHostPort(target); bad == nil {
			chain, err := e.presented(ctx, target)
			if err != nil {
				return nil, err
			}
			i.Found = "server"
			return i, e.judge(i, chain)
		}
		return nil, problem.New(problem.NothingPresented, "%s is neither a file nor HOST:PORT", target)
	}
	if err != nil {
		return nil, err
	}
	return i, e.inspectData(i, data)
}

func (e *env) readInspected(target string) ([]byte, error) {
	in := e.in
	if target != "-" {
		st, err := os.Stat(target)
		if err != nil {
			return nil, err
		}
		if !st.Mode().IsRegular() {
			return nil, problem.New(problem.NothingPresented, "%s is no file", target)
		}
		f, err := os.Open(target)
		if err != nil {
			return nil, problem.New(problem.NothingPresented, "%v", err)
		}
		defer f.Close()
		in = f
	}
	data, err := io.ReadAll(io.LimitReader(in, maxInspected+1))
	if err == nil && len(data) > maxInspected {
		err = fmt.Errorf("more than %d bytes", maxInspected)
	}
	if err != nil {
		return nil, problem.New(problem.NothingPresented, "%s: %v", target, err)
	}
	return data, nil
}

// protocols are those of all ports of Strait: a server that knows none of them would refuse the hello.
var protocols = []string{"h2", "http/1.1", trust.ALPNJoin, "strait-tcp/1", "strait-local/1"}

func (e *env) presented(ctx context.Context, addr string) ([]*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, trust.HandshakeTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, problem.New(problem.NothingPresented, "%v", err).WithWhy("nothing answers at the address over TCP")
	}
	chain, err := trust.InspectTLS(ctx, conn, protocols...)
	if err != nil {
		return nil, problem.New(problem.NothingPresented, "%s: %v", addr, err).WithWhy("what answers there presents no certificate over TLS 1.3")
	}
	return chain, nil
}

func (e *env) inspectData(i *inspection, data []byte) error {
	text := strings.TrimSpace(string(data))
	switch {
	case strings.HasPrefix(text, join.TokenPrefix):
		return i.joinToken(text)
	case strings.HasPrefix(text, "strait-register-"):
		return i.registrationToken(text)
	case strings.HasPrefix(text, "{"):
		return i.bundle(data)
	}
	i.Found = "certificates"
	var chain []*x509.Certificate
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if strings.HasSuffix(block.Type, "PRIVATE KEY") {
			i.PrivateKeys++
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return problem.New(problem.NothingPresented, "%s: certificate %d: %v", i.Target, len(chain)+1, err)
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 && !bytes.Contains(data, []byte("-----BEGIN")) {
		chain, _ = x509.ParseCertificates(data) // what cannot be read is nothing
	}
	if len(chain) == 0 {
		return problem.New(problem.NothingPresented, "%s holds no certificate, bundle or token", i.Target)
	}
	return e.judge(i, chain)
}

func (i *inspection) joinToken(text string) error {
	t, err := join.ParseToken(text)
	if err != nil {
		return err
	}
	i.Found, i.ID, i.TrustDomain, i.Cluster = "join-token", t.ID, t.TrustDomain.String(), t.Cluster.String()
	i.For, i.Addresses, i.BundleSHA256 = orAny(t.AllowedCluster.String()), t.Addresses(), hex.EncodeToString(t.BundleHash[:])
	i.Expires = &t.Expires
	return nil
}

func (i *inspection) registrationToken(text string) error {
	t, err := register.ParseToken(text)
	if err != nil {
		return err
	}
	i.Found, i.ID, i.TrustDomain = "registration-token", t.ID, t.TrustDomain.String()
	i.For, i.Addresses, i.BundleSHA256 = t.Kind+" "+t.Name, t.Addresses, hex.EncodeToString(t.BundleSHA256)
	i.Expires = &t.Expires
	return nil
}

// bundle reads a bundle document. It does not say whose it is: its roots do.
func (i *inspection) bundle(data []byte) error {
	var doc struct {
		Keys []struct {
			X5c []string `json:"x5c"`
		} `json:"keys"`
	}
	bad := func(err error) error { return problem.New(problem.NothingPresented, "%s: %v", i.Target, err) }
	if err := json.Unmarshal(data, &doc); err != nil {
		return bad(err)
	}
	td, err := spiffeid.ParseTrustDomain("unnamed.invalid") // of roots that name none
	if err != nil {
		return err
	}
	for _, k := range doc.Keys {
		if len(k.X5c) == 0 {
			continue
		}
		der, _ := base64.StdEncoding.DecodeString(k.X5c[0])
		if c, err := x509.ParseCertificate(der); err == nil && len(c.URIs) == 1 {
			if named, err := spiffeid.ParseTrustDomain(c.URIs[0].Host); err == nil {
				td, i.TrustDomain = named, named.String()
				break
			}
		}
	}
	b, err := trust.ParseBundle(td, data)
	if err != nil {
		return bad(err)
	}
	sum, sequence := b.Hash(), b.Sequence()
	i.Found, i.BundleSHA256, i.Sequence = "bundle", hex.EncodeToString(sum[:]), &sequence
	i.describe(b.Roots())
	for _, k := range b.JWTKeys() {
		i.JWTKeys = append(i.JWTKeys, k.ID)
	}
	return nil
}

func (i *inspection) describe(chain []*x509.Certificate) {
	for _, c := range chain {
		sum := sha256.Sum256(c.Raw)
		one := inspectedCertificate{Subject: c.Subject.String(), Issuer: c.Issuer.String(), CA: c.IsCA, NotBefore: c.NotBefore.UTC(), NotAfter: c.NotAfter.UTC(), SHA256: hex.EncodeToString(sum[:])}
		for _, u := range c.URIs {
			one.URIs = append(one.URIs, u.String())
		}
		i.Certificates = append(i.Certificates, one)
	}
}

// judge describes a chain and, where bundles can be read, verifies it.
func (e *env) judge(i *inspection, chain []*x509.Certificate) error {
	i.describe(chain)
	if !chain[0].IsCA && len(chain[0].URIs) == 1 {
		if id, err := spiffeid.Parse(chain[0].URIs[0].String()); err == nil {
			i.SPIFFEID, i.TrustDomain = id.String(), id.TrustDomain().String()
		}
	}
	bundles, err := e.trustedBundles()
	switch {
	case i.SPIFFEID == "":
		i.Reason = "no SPIFFE identity"
		return nil
	case err != nil:
		i.Reason = "no bundle can be read here"
		return nil
	}
	p, err := trust.Verify(chain, bundles, e.now())
	if err != nil {
		var v *trust.VerifyError
		i.Verdict, i.Reason = "refused", err.Error()
		if errors.As(err, &v) {
			i.Reason = v.Reason
			if v.Err != nil {
				i.Reason += ": " + v.Err.Error()
			}
		}
		return nil
	}
	sequence := bundles.Get(p.ID.TrustDomain()).Sequence()
	i.Verdict, i.Sequence = "verified", &sequence
	return nil
}

func (e *env) renderInspection(i *inspection) error {
	if e.output != "table" && e.output != "wide" || e.jq != "" {
		if err := e.print("Inspection", i, &table{names: []string{i.SPIFFEID}}); err != nil {
			return err
		}
		return i.exit()
	}
	t := &table{}
	add := func(label, format string, args ...any) { t.add("", label, fmt.Sprintf(format, args...)) }
	add("found", "%s in %s", i.Found, i.Target)
	for _, line := range [][2]string{{"spiffe id", i.SPIFFEID}, {"trust domain", i.TrustDomain}, {"cluster", i.Cluster}, {"token", i.ID}, {"for", i.For},
		{"addresses", strings.Join(i.Addresses, ", ")}, {"bundle", i.BundleSHA256}, {"jwt keys", strings.Join(i.JWTKeys, ", ")}} {
		if line[1] != "" {
			add(line[0], "%s", line[1])
		}
	}
	if i.Found == "bundle" {
		add("sequence", "%d", *i.Sequence)
	}
	if i.PrivateKeys > 0 {
		add("private keys", "%d, not shown", i.PrivateKeys)
	}
	if i.Expires != nil {
		add("expires", "%s (%s)", i.Expires.UTC().Format(time.RFC3339), e.left(*i.Expires))
	}
	for n, c := range i.Certificates {
		kind := "leaf"
		if c.CA {
			kind = "CA"
		}
		add(fmt.Sprintf("%d %s", n, kind), "%s", c.Subject)
		for _, u := range c.URIs {
			add("", "names   %s", u)
		}
		add("", "valid   %s to %s (%s)", c.NotBefore.Format(time.RFC3339), c.NotAfter.Format(time.RFC3339), e.left(c.NotAfter))
		add("", "sha256  %s", c.SHA256)
	}
	switch i.Verdict {
	case "verified":
		add("verdict", "%s ok  verified by the bundle of %s (sequence %d)", e.glyph("ok"), i.TrustDomain, *i.Sequence)
	case "refused":
		add("verdict", "%s fail  %s", e.glyph("fail"), i.Reason)
	default:
		if i.Reason != "" {
			add("verdict", "%s skip  not judged: %s", e.glyph("skip"), i.Reason)
		}
	}
	writeColumns(e.out, t.rows, "")
	return i.exit()
}

func (i *inspection) exit() error {
	if i.Verdict == "refused" {
		return exitError(problem.ExitAuth)
	}
	return nil
}

// left says how far an end is away.
func (e *env) left(end time.Time) string {
	d := end.Sub(e.now())
	switch {
	case d <= 0:
		return "ended " + shortDuration(-d) + " ago"
	case d >= 48*time.Hour:
		return fmt.Sprintf("%dd left", int(d.Hours()/24))
	}
	return shortDuration(d) + " left"
}
