// SPDX-License-Identifier: Apache-2.0

package lookalike

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"
)

// forms are leaves of the peer's own or of the target's name whose SAN or usages are not those of an identity.
func forms(p *Peer, t Target) []spec {
	mine, theirs := "spiffe://"+p.td.String()+t.ID.Path(), t.ID.String()
	var out []spec
	add := func(reason, name string, edit func(*x509.Certificate), uris ...string) {
		tmpl := p.template(uris...)
		if edit != nil {
			edit(tmpl)
		}
		out = append(out, spec{name: name, reason: reason, template: tmpl})
	}
	san := func(reason, name string, names ...[]byte) {
		add(reason, "SAN: "+name, func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{altNames(oidSAN, false, names...)} })
	}
	uri := func(s string) []byte { return name(tagURI, s) }

	add("bad_san", "SAN: none", nil)
	add("bad_san", "SAN: none, the ID as common name", func(c *x509.Certificate) { c.Subject.CommonName = theirs })
	san("bad_san", "two URIs, the peer's first", uri(mine), uri(theirs))
	san("bad_san", "two URIs, the target's first", uri(theirs), uri(mine))
	san("bad_san", "two URIs, the same", uri(mine), uri(mine))
	san("bad_san", "two URIs, the other no SPIFFE ID", uri(mine), uri("https://example.com/"))
	san("bad_san", "two URIs, the other without a path", uri(mine), uri("spiffe://"+p.td.String()))
	san("bad_san", "two URIs with a DNS name between", uri(mine), name(tagDNS, "x"), uri(theirs))
	san("bad_san", "nine URIs", uri(mine), uri(mine+"1"), uri(mine+"2"), uri(mine+"3"), uri(mine+"4"), uri(mine+"5"), uri(mine+"6"), uri(mine+"7"), uri(theirs))
	san("bad_san", "DNS name that is an ID", name(tagDNS, theirs))
	san("bad_san", "DNS name that is a trust domain", name(tagDNS, t.ID.TrustDomain().String()))
	san("bad_san", "email that is an ID", name(tagEmail, theirs))
	san("bad_san", "registered ID", name(tagRID, "\x2a\x03"))
	san("bad_san", "address", name(tagIP, string(net.IP{10, 0, 0, 1}.To4())))
	san("bad_san", "directory name", der(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tagDirectory, IsCompound: true, Bytes: der(pkix.Name{CommonName: theirs}.ToRDNSequence())}))
	san("bad_san", "other name that is an ID", der(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tagOther, IsCompound: true,
		Bytes: append(der(asn1.ObjectIdentifier{1, 2, 3}), der(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: der(theirs)})...)}))
	san("bad_san", "URI as a constructed value", der(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tagURI, IsCompound: true, Bytes: []byte(mine)}))
	san("bad_san", "URI of the universal class", der(mine))
	add("bad_san", "SAN: the ID in the issuer's alternative name", func(c *x509.Certificate) {
		c.ExtraExtensions = []pkix.Extension{altNames(oidIssuerAlt, false, uri(theirs))}
	})
	add(Malformed, "SAN: twice", func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, altNames(oidSAN, false, uri(theirs)))
	}, mine)
	add("bad_san", "SAN: something after it", func(c *x509.Certificate) { c.ExtraExtensions[0].Value = append(c.ExtraExtensions[0].Value, 5, 0) }, mine)
	add(Malformed, "SAN: cut short", func(c *x509.Certificate) {
		v := c.ExtraExtensions[0].Value
		c.ExtraExtensions[0].Value = v[:len(v)-1]
	}, mine)
	add(Malformed, "SAN: no sequence", func(c *x509.Certificate) { c.ExtraExtensions[0].Value = der(mine) }, mine)

	usage := func(name string, u x509.KeyUsage) {
		add("bad_usage", "usage: "+name, func(c *x509.Certificate) { c.KeyUsage = u }, mine)
	}
	usage("keyCertSign", x509.KeyUsageDigitalSignature|x509.KeyUsageCertSign)
	usage("keyCertSign alone", x509.KeyUsageCertSign)
	usage("cRLSign", x509.KeyUsageDigitalSignature|x509.KeyUsageCRLSign)
	usage("no digitalSignature", x509.KeyUsageKeyAgreement|x509.KeyUsageKeyEncipherment)
	usage("none", 0)
	add("bad_usage", "usage: not critical", func(c *x509.Certificate) {
		c.KeyUsage = 0
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oidKeyUsage, Value: der(asn1.BitString{Bytes: []byte{0x80}, BitLength: 1})})
	}, mine)
	add("bad_usage", "a CA with the peer's own ID", func(c *x509.Certificate) { c.IsCA = true }, mine)
	add("bad_usage", "a CA that may sign, with the peer's own ID", func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage = true, x509.KeyUsageDigitalSignature|x509.KeyUsageCertSign
	}, mine)
	add("bad_usage", "a CA with the target's ID", func(c *x509.Certificate) { c.IsCA = true }, theirs)
	extended := func(name string, unknown []asn1.ObjectIdentifier, u ...x509.ExtKeyUsage) {
		add("bad_usage", "extended usage: "+name, func(c *x509.Certificate) { c.ExtKeyUsage, c.UnknownExtKeyUsage = u, unknown }, mine)
	}
	extended("serverAuth alone", nil, x509.ExtKeyUsageServerAuth)
	extended("clientAuth alone", nil, x509.ExtKeyUsageClientAuth)
	extended("any", nil, x509.ExtKeyUsageAny)
	extended("codeSigning", nil, x509.ExtKeyUsageCodeSigning)
	extended("one that nobody knows", []asn1.ObjectIdentifier{{1, 2, 3}})
	add("bad_usage", "neither subject nor critical SAN", func(c *x509.Certificate) { c.Subject = pkix.Name{} }, mine)
	return out
}

// times are the peer's own leaves at the wrong time.
func times(p *Peer) []spec {
	mine := "spiffe://" + p.td.String() + "/ns/shop/sa/web"
	at := func(name, reason string, from, to time.Duration) spec {
		t := p.template(mine)
		t.NotBefore, t.NotAfter = p.now.Add(from), p.now.Add(to)
		return spec{name: "time: " + name, reason: reason, template: t}
	}
	return []spec{
		at("expired a second ago", "expired", -time.Hour, -time.Second),
		at("valid in an hour", "not_yet_valid", time.Hour, 2*time.Hour),
		at("ends before it begins", "expired", -time.Hour, -2*time.Hour),
	}
}

// chains are leaves whose names are in order, under something else than an issuer of theirs.
func (p *Peer) chains(t Target) ([]Leaf, error) {
	mine, theirs := "spiffe://"+p.td.String()+t.ID.Path(), t.ID.String()
	var out []Leaf
	var failed error
	below := func(id string, by pair, edit func(*x509.Certificate)) []byte {
		tmpl := p.template(id)
		if edit != nil {
			edit(tmpl)
		}
		raw, err := p.sign(tmpl, by)
		if err != nil && failed == nil {
			failed = err
		}
		return raw
	}
	ca := func(parent *pair, edit func(*x509.Certificate)) pair {
		a, err := p.authority(parent, "Strait issuer of "+p.td.String(), edit)
		if err != nil && failed == nil {
			failed = err
		}
		return a
	}
	add := func(reason, name string, leaf []byte, above ...*x509.Certificate) {
		out = append(out, p.leafOf("chain: "+name, reason, leaf, above...))
	}
	genuine := t.Chain[0]
	borrowed := func(c *x509.Certificate) { c.RawSubject, c.SubjectKeyId = genuine.RawSubject, genuine.SubjectKeyId }
	named := func(id string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.URIs = []*url.URL{must(url.Parse(id))} }
	}
	anonymous := p.anonymous
	twin := ca(&p.root, func(c *x509.Certificate) { borrowed(c); c.URIs = nil })
	add("bad_san", "the target's leaf under an issuer that names the peer", below(theirs, p.issuer, nil), p.issuer.cert, genuine)
	add("untrusted", "the target's leaf under an issuer without a name", below(theirs, anonymous, nil), anonymous.cert)
	add("untrusted", "the target's leaf by the root itself", below(theirs, p.root, nil))
	add("untrusted", "the target's leaf under an issuer of the target's name and key identifier", below(theirs, twin, nil), twin.cert)
	add("untrusted", "the target's leaf, then the target's real issuers", below(theirs, twin, nil), t.Chain...)
	add("untrusted", "the target's leaf, the issuer of its name, then the real ones", below(theirs, twin, nil), append([]*x509.Certificate{twin.cert}, t.Chain...)...)
	pathed := ca(&p.root, named(mine))
	add("bad_san", "an issuer whose ID has a path", below(mine, pathed, nil), pathed.cert)
	claimed := ca(&p.root, named("spiffe://"+t.ID.TrustDomain().String()))
	add("untrusted", "the target's leaf under an issuer that names the target", below(theirs, claimed, nil), claimed.cert)
	add("bad_san", "the peer's leaf under an issuer that names the target", below(mine, claimed, nil), claimed.cert)
	self := ca(nil, borrowed)
	add("untrusted", "a root of the target's name", below(theirs, pair{self.cert, self.key}, nil))
	third := "spiffe://" + t.Third.String() + t.ID.Path()
	add("untrusted", "a third's leaf under an issuer without a name", below(third, anonymous, nil), anonymous.cert)

	deep := ca(&p.issuer, nil)
	add("untrusted", "an issuer below one that may have none", below(mine, deep, nil), deep.cert, p.issuer.cert)
	noCA := ca(&p.root, func(c *x509.Certificate) { c.IsCA, c.MaxPathLen, c.KeyUsage = false, 0, x509.KeyUsageDigitalSignature })
	add("bad_usage", "an issuer that is no CA", below(mine, noCA, nil), noCA.cert)
	noSign := ca(&p.root, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })
	add("bad_usage", "an issuer that may not sign certificates", below(mine, noSign, nil), noSign.cert)
	ended := ca(&p.root, func(c *x509.Certificate) { c.NotBefore, c.NotAfter = p.now.Add(-2*time.Hour), p.now.Add(-time.Second) })
	add("expired", "an issuer that expired a second ago", below(mine, ended, nil), ended.cert)
	for name, domains := range map[string][]string{"another": {t.Third.String()}, "the parent": {parentOf(p.td.String())}, "another case": {strings.ToUpper(p.td.String())}} {
		narrow := ca(&p.root, func(c *x509.Certificate) { c.PermittedURIDomains, c.PermittedDNSDomainsCritical = domains, true })
		add("untrusted", "an issuer constrained to the name: "+name, below(mine, narrow, nil), narrow.cert)
	}
	barred := ca(&p.root, func(c *x509.Certificate) {
		c.ExcludedURIDomains, c.PermittedDNSDomainsCritical = []string{p.td.String()}, true
	})
	add("untrusted", "an issuer from which the name is excluded", below(mine, barred, nil), barred.cert)
	add("untrusted", "no issuer", below(mine, p.issuer, nil))
	add("untrusted", "another issuer of the same name", below(mine, ca(&p.root, nil), nil), p.issuer.cert)
	add("untrusted", "out of order", below(mine, p.issuer, nil), anonymous.cert, p.issuer.cert)
	self = ca(nil, func(c *x509.Certificate) {
		c.RawSubject, c.SubjectKeyId = p.root.cert.RawSubject, p.root.cert.SubjectKeyId
	})
	add("untrusted", "another root of the peer's name and key identifier", below(mine, self, nil))
	many := below(mine, p.issuer, nil)
	add("too_large", "nine certificates", many, p.issuer.cert, p.issuer.cert, p.issuer.cert, p.issuer.cert, p.issuer.cert, p.issuer.cert, p.issuer.cert, p.issuer.cert)
	if failed != nil {
		return nil, fmt.Errorf("lookalike: %w", failed)
	}
	return out, nil
}

func parentOf(td string) string {
	_, parent, ok := strings.Cut(td, ".")
	if !ok {
		return "example"
	}
	return parent
}

func must[T any](v T, err error) T {
	if err != nil {
		panic("lookalike: " + err.Error()) // texts of ours
	}
	return v
}
