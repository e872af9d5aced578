// SPDX-License-Identifier: Apache-2.0

package lookalike

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"strings"
)

// spec is a leaf under an issuer of the peer's that names no trust domain: nothing but the leaf is wrong.
type spec struct {
	name     string
	reason   string
	uris     []string
	template *x509.Certificate // nil: a proper one with uris
}

// names are the IDs of others, and what resembles them, in otherwise proper leaves (trust domain confusion).
func names(own string, t Target) []spec {
	td, path, third := t.ID.TrustDomain().String(), t.ID.Path(), t.Third.String()
	first, parent, dotted := strings.Cut(td, ".")
	if !dotted {
		parent = "example"
	}
	const (
		foreign   = "untrusted"            // a trust domain that is known, and not the peer's
		unknown   = "unknown_trust_domain" // a name of its own, to nobody known
		malformed = "bad_id"
	)
	var out []spec
	host := func(reason, name, host string) {
		switch host {
		case own: // "the target's parent" may be the peer
			return
		case td, third:
			reason = foreign
		}
		out = append(out, spec{name: "host: " + name, reason: reason, uris: []string{"spiffe://" + host + path}})
	}
	host(foreign, "the target", td)
	host(foreign, "a third", third)
	host(unknown, "the target's parent", parent)
	host(unknown, "the target's first label", first)
	host(unknown, "below the target", "x."+td)
	host(unknown, "below the peer", td+"."+own)
	host(unknown, "the peer below the target", own+"."+td)
	host(unknown, "a letter before", "x"+td)
	host(unknown, "a letter after", td+"x")
	host(unknown, "dots became hyphens", strings.ReplaceAll(td, ".", "-"))
	host(unknown, "dots became underscores", strings.ReplaceAll(td, ".", "_"))
	host(unknown, "punycode's prefix", "xn--"+td)
	host(unknown, "punycode of a letter like it", "xn--"+first+"-xka."+parent)
	host(unknown, "an underscore before", "_"+td)
	host(unknown, "both names joined by a hyphen", own+"-"+td)
	host(malformed, "upper case", strings.ToUpper(td))
	host(malformed, "one letter in upper case", strings.ToUpper(td[:1])+td[1:])
	host(malformed, "a port", td+":443")
	host(malformed, "an empty port", td+":")
	host(malformed, "the target as user", td+"@"+own)
	host(malformed, "the peer as user", own+"@"+td)
	host(Malformed, "an escaped dot", strings.Replace(td, ".", "%2e", 1)+"%2e")
	host(Malformed, "an escaped letter", "%"+hex(td[0])+td[1:])
	host(Malformed, "an escaped NUL after it", td+"%00")
	host(Malformed, "an escaped NUL and the peer", td+"%00."+own)
	host(Malformed, "brackets", "["+td+"]")
	host(malformed, "an address in brackets", "[::1]")
	host(malformed, "an asterisk", "*")
	host(malformed, "an asterisk below the parent", "*."+parent)
	host(malformed, "empty", "")
	host(malformed, "a comma", td+","+own)
	host(malformed, "a semicolon", td+";"+own)
	host(malformed, "a plus", td+"+"+own)
	host(malformed, "a tilde", td+"~")
	host(Malformed, "a NUL after it", td+"\x00")
	host(Malformed, "a NUL and the peer", td+"\x00."+own)
	host(Malformed, "the peer, a NUL and it", own+"\x00."+td)
	host(Malformed, "a newline", td+"\n")
	host(Malformed, "a tab", own+"\t")
	host(Malformed, "a space before", " "+td)
	host(Malformed, "a space after", td+" ")
	host(Malformed, "a backslash", td+`\`+own)
	host(Malformed, "a letter of another script", "\u0435"+td[1:])
	host(Malformed, "a combining mark", td[:1]+"\u0301"+td[1:])
	host(Malformed, "a full-width dot", strings.Replace(td, ".", "\uff0e", 1)+"\uff0e")
	host(Malformed, "a space without width", td[:1]+"\u200b"+td[1:])
	host(Malformed, "a byte that is no text", td+"\xff")

	uri := func(reason, name, text string) {
		out = append(out, spec{name: "URI: " + name, reason: reason, uris: []string{text}})
	}
	uri(malformed, "the scheme in upper case", "SPIFFE://"+td+path)
	uri(malformed, "one letter of the scheme in upper case", "Spiffe://"+td+path)
	uri(malformed, "https", "https://"+td+path)
	uri(malformed, "another scheme that ends like it", "x-spiffe://"+td+path)
	uri(malformed, "one slash", "spiffe:/"+td+path)
	uri(malformed, "no slash", "spiffe:"+td+path)
	uri(malformed, "three slashes", "spiffe:///"+td+path)
	uri(malformed, "no scheme", "//"+td+path)
	uri(malformed, "the target's ID in the path", "spiffe://"+own+"/spiffe://"+td+path)
	uri(malformed, "the target's ID in the query", "spiffe://"+own+"/x?spiffe://"+td+path)
	uri(malformed, "the target's ID in the fragment", "spiffe://"+own+"/x#spiffe://"+td+path)
	uri(malformed, "up and over", "spiffe://"+own+"/../../"+td+path)
	uri(foreign, "upper case in the target's path", "spiffe://"+td+strings.ToUpper(path))
	for _, p := range []struct{ reason, name, path string }{
		{malformed, "none", ""}, {malformed, "a slash", "/"}, {malformed, "a slash after it", path + "/"}, {malformed, "two slashes", "/" + path},
		{malformed, "a dot segment", "/." + path}, {malformed, "two dots", path + "/.."}, {malformed, "an escaped letter", path + "/%78"},
		{malformed, "an escaped slash", path + "%2fx"}, {malformed, "an escaped NUL", path + "%00"}, {malformed, "an empty query", path + "?"},
		{malformed, "a query", path + "?x"}, {malformed, "an empty fragment", path + "#"}, {malformed, "a fragment", path + "#x"},
		{malformed, "a tilde", "/~x"}, {malformed, "a space", path + " "}, {malformed, "an asterisk", "/ns/*/sa/*"}, {malformed, "a parameter", path + ";x"},
		{malformed, "a backslash", path + `\x`}, {malformed, "2,049 bytes", "/" + strings.Repeat("x", 2049-len("spiffe:///")-len(own))},
		{Malformed, "a NUL", path + "\x00"}, {Malformed, "a NUL and more", path + "\x00x"}, {Malformed, "a letter of another script", "/\u0435"},
	} {
		uri(p.reason, "the peer's own with the path: "+p.name, "spiffe://"+own+p.path)
	}
	return out
}

func hex(b byte) string { return string("0123456789abcdef"[b>>4]) + string("0123456789abcdef"[b&15]) }

// Tags of GeneralName (RFC 5280, section 4.2.1.6).
const (
	tagOther     = 0
	tagEmail     = 1
	tagDNS       = 2
	tagDirectory = 4
	tagURI       = 6
	tagIP        = 7
	tagRID       = 8
)

var (
	oidSAN       = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidIssuerAlt = asn1.ObjectIdentifier{2, 5, 29, 18}
	oidKeyUsage  = asn1.ObjectIdentifier{2, 5, 29, 15}
)

func name(tag int, text string) []byte {
	return der(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, Bytes: []byte(text)})
}

func der(v any) []byte {
	out, err := asn1.Marshal(v)
	if err != nil {
		panic("lookalike: " + err.Error()) // texts of ours
	}
	return out
}

func altNames(oid asn1.ObjectIdentifier, critical bool, names ...[]byte) pkix.Extension {
	var body []byte
	for _, n := range names {
		body = append(body, n...)
	}
	return pkix.Extension{Id: oid, Critical: critical, Value: der(asn1.RawValue{Class: asn1.ClassUniversal, Tag: asn1.TagSequence, IsCompound: true, Bytes: body})}
}
