// SPDX-License-Identifier: Apache-2.0

package preface_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"pgregory.net/rapid"

	"github.com/strait-mesh/strait/internal/preface"
)

var key = bytes.Repeat([]byte{7}, preface.KeySize)

const sni = "http.checkout.shop.svc.eu-west.acme"

func full() preface.Preface {
	return preface.Preface{
		Session: preface.SessionID{1, 2, 3}, Counter: 42, Authority: sni, Class: preface.ClassInteractive,
		Traceparent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
		Avoid:       []preface.Handle{{1}, {2}}, Deadline: 1500 * time.Millisecond,
	}
}

// realHello is what crypto/tls sends for name.
func realHello(t testing.TB, name string) []byte {
	t.Helper()
	var b bytes.Buffer
	c := tls.Client(writeOnly{&b}, &tls.Config{ServerName: name, InsecureSkipVerify: true})
	if err := c.Handshake(); err == nil {
		t.Fatal("handshake without a server")
	}
	return b.Bytes()
}

type writeOnly struct{ io.Writer }

func (writeOnly) Read([]byte) (int, error)         { return 0, io.EOF }
func (writeOnly) Close() error                     { return nil }
func (writeOnly) LocalAddr() net.Addr              { return nil }
func (writeOnly) RemoteAddr() net.Addr             { return nil }
func (writeOnly) SetDeadline(time.Time) error      { return nil }
func (writeOnly) SetReadDeadline(time.Time) error  { return nil }
func (writeOnly) SetWriteDeadline(time.Time) error { return nil }

// message strips the record headers of a hello in one record.
func message(hello []byte) []byte { return hello[5:] }

// fragmented splits the message over records of n bytes.
func fragmented(hello []byte, n int) []byte {
	var out []byte
	for m := message(hello); len(m) > 0; {
		k := min(n, len(m))
		out = append(out, 22, 3, 1, byte(k>>8), byte(k))
		out, m = append(out, m[:k]...), m[k:]
	}
	return out
}

func lookup(id preface.SessionID) ([]byte, bool) {
	return key, id == full().Session
}

func encode(t testing.TB, p preface.Preface, hello []byte) []byte {
	t.Helper()
	b, err := preface.Append(nil, p, key, sha256.Sum256(message(hello)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestReadGivesBackWhatWasSent(t *testing.T) {
	hello := realHello(t, sni)
	for name, p := range map[string]preface.Preface{
		"full":    full(),
		"minimal": {Session: full().Session, Authority: sni},
	} {
		wire := append(encode(t, p, hello), hello...)
		for split := range len(wire) { // what was peeked at, at every border
			got, h, err := preface.Read(bytes.NewReader(wire[split:]), wire[:split], lookup)
			if err != nil || !reflect.DeepEqual(*got, p) || !bytes.Equal(h.Raw, hello) || h.ServerName != sni {
				t.Fatalf("%s split at %d: %+v, %v", name, split, got, err)
			}
		}
	}
}

func TestHelloIsReassembledOverRecords(t *testing.T) {
	hello := realHello(t, sni)
	for n := 1; n < len(hello); n += 1 + n/3 {
		b := fragmented(hello, n)
		h, err := preface.ReadHello(iotest.OneByteReader(bytes.NewReader(b)), nil)
		if len(b) > 2*preface.MaxHello {
			continue
		}
		if err != nil || h.ServerName != sni || h.Sum != sha256.Sum256(message(hello)) || !bytes.Equal(h.Raw, b) {
			t.Fatalf("records of %d bytes: %v", n, err)
		}
	}
}

// TestEveryChangedByteIsRefused flips each bit of header and message in turn.
func TestEveryChangedByteIsRefused(t *testing.T) {
	hello := realHello(t, sni)
	wire := append(encode(t, full(), hello), hello...)
	header := len(wire) - len(hello)
	for i := range wire {
		if i >= header && i < header+5 {
			continue // record header: not part of the message, and the inner TLS judges it
		}
		for bit := range 8 {
			b := bytes.Clone(wire)
			b[i] ^= 1 << bit
			if _, _, err := preface.Read(bytes.NewReader(b), nil, lookup); err == nil {
				t.Fatalf("byte %d bit %d changed, and accepted", i, bit)
			}
		}
	}
}

func TestHeadersThatAreRefused(t *testing.T) {
	hello := realHello(t, sni)
	good := encode(t, full(), hello)
	edit := func(f func(b []byte) []byte) []byte { return f(bytes.Clone(good)) }
	cases := map[string][]byte{
		"HTTP":            []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"LOCAL command":   edit(func(b []byte) []byte { b[12] = 0x20; return b }),
		"version 1":       edit(func(b []byte) []byte { b[12] = 0x11; return b }),
		"address family":  edit(func(b []byte) []byte { b[13] = 0x11; return b }),
		"10 MB":           edit(func(b []byte) []byte { b[14], b[15] = 0xff, 0xff; return b }),
		"nothing inside":  edit(func(b []byte) []byte { b[14], b[15] = 0, 0; return b[:16] }),
		"truncated":       good[:len(good)-1],
		"field twice":     edit(func(b []byte) []byte { return again(b, 16, 16+3+len(sni)) }),
		"unknown session": edit(func(b []byte) []byte { b[16+3+len(sni)+3] ^= 1; return b }),
	}
	for name, b := range cases {
		if _, _, err := preface.Read(bytes.NewReader(append(b, hello...)), nil, lookup); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	other := realHello(t, "http.payments.shop.svc.eu-west.acme")
	b, err := preface.Append(nil, full(), key, sha256.Sum256(message(other)))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := preface.Read(bytes.NewReader(append(b, other...)), nil, lookup); !errors.Is(err, preface.ErrHello) {
		t.Errorf("authority and server name differ: %v", err)
	}
}

// again repeats b[from:to] behind itself and corrects the length.
func again(b []byte, from, to int) []byte {
	out := append(bytes.Clone(b[:to]), b[from:]...)
	n := len(out) - 16
	out[14], out[15] = byte(n>>8), byte(n)
	return out
}

// craft builds a ClientHello record with these extensions.
func craft(exts ...[]byte) []byte {
	var e []byte
	for _, x := range exts {
		e = append(e, x...)
	}
	body := append([]byte{3, 3}, make([]byte, 32)...)
	body = append(body, 0, 0, 2, 0x13, 1, 1, 0, byte(len(e)>>8), byte(len(e)))
	body = append(body, e...)
	msg := append([]byte{1, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
	return append([]byte{22, 3, 1, byte(len(msg) >> 8), byte(len(msg))}, msg...)
}

func ext(typ uint16, body ...byte) []byte {
	return append([]byte{byte(typ >> 8), byte(typ), byte(len(body) >> 8), byte(len(body))}, body...)
}

func names(list ...string) []byte {
	var l []byte
	for _, n := range list {
		l = append(append(l, 0, byte(len(n)>>8), byte(len(n))), n...)
	}
	return ext(0, append([]byte{byte(len(l) >> 8), byte(len(l))}, l...)...)
}

func TestHellosThatAreRefused(t *testing.T) {
	if h, err := preface.ReadHello(bytes.NewReader(craft(names(sni))), nil); err != nil || h.ServerName != sni {
		t.Fatalf("crafted hello: %v", err)
	}
	long := craft(names(sni), ext(0x1234, make([]byte, 17<<10)...))
	cases := map[string][]byte{
		"no server name":         craft(ext(43, 2, 3, 4)),
		"no extensions at all":   craft(),
		"two names in one list":  craft(names(sni, "other.acme")),
		"two name extensions":    craft(names(sni), names(sni)),
		"empty name":             craft(names("")),
		"empty list":             craft(ext(0, 0, 0)),
		"another kind of name":   craft(ext(0, 0, 4, 1, 0, 1, 'x')),
		"encrypted_client_hello": craft(names(sni), ext(0xfe0d, 0)),
		"bytes behind":           append(craft(names(sni))[:3], append([]byte{0, byte(len(craft(names(sni))) - 5 + 1)}, append(craft(names(sni))[5:], 0)...)...),
		"server hello":           {22, 3, 3, 0, 4, 2, 0, 0, 0},
		"application data":       {23, 3, 3, 0, 1, 0},
		"alert":                  {21, 3, 3, 0, 2, 2, 40},
		"SSLv2":                  {0x80, 0x2e, 1, 3, 1},
		"empty record":           {22, 3, 1, 0, 0},
		"20 KiB in one record":   append([]byte{22, 3, 1, 0x50, 0}, make([]byte, 20<<10)...),
		"17 KiB over records":    fragmented(append(make([]byte, 5), long[5:]...), 4096),
		"one byte a record":      fragmented(append(make([]byte, 5), craft(names(sni), ext(0x1234, make([]byte, 12<<10)...))[5:]...), 1),
		"message of 16 MiB":      {22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff},
		"half":                   craft(names(sni))[:40],
	}
	for name, b := range cases {
		if h, err := preface.ReadHello(bytes.NewReader(b), nil); err == nil {
			t.Errorf("%s: accepted with name %q", name, h.ServerName)
		}
	}
}

func TestConnAndStatus(t *testing.T) {
	for _, s := range []preface.Status{
		{Code: preface.CodeOK, Handle: preface.Handle{9}},
		{Code: preface.CodeNotExported, Reason: "not_exported"},
		{Code: preface.CodeNoHealthyInstance, Reason: strings.Repeat("x", 80), Handle: preface.Handle{3}},
	} {
		client, server := net.Pipe()
		hello := realHello(t, sni)
		done := make(chan error, 1)
		go func() {
			_, h, err := preface.Read(server, nil, lookup)
			if err == nil && !bytes.Equal(h.Raw, hello) {
				err = errors.New("hello changed on the way")
			}
			frame := preface.AppendStatus(nil, s)
			if len(frame) > preface.MaxStatus {
				err = errors.New("status too long")
			}
			_, _ = server.Write(append(frame, "inner"...))
			done <- err
		}()
		c := preface.NewConn(client, full(), key)
		for _, part := range [][]byte{hello[:3], hello[3:100], hello[100:]} {
			if n, err := c.Write(part); err != nil || n != len(part) {
				t.Fatal(n, err)
			}
		}
		b := make([]byte, 5)
		_, err := io.ReadFull(c, b)
		var refused *preface.Refused
		switch {
		case s.Code == preface.CodeOK && (err != nil || string(b) != "inner" || c.Handle() != s.Handle):
			t.Errorf("ok: read %q, %v, handle %v", b, err, c.Handle())
		case s.Code != preface.CodeOK && (!errors.As(err, &refused) || refused.Code != s.Code || refused.Handle != s.Handle ||
			!strings.HasPrefix(s.Reason, refused.Reason) || len(refused.Reason) > preface.MaxReason):
			t.Errorf("%v: got %v", s.Code, err)
		}
		client.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		server.Close()
	}
}

func TestStatusCutShortIsNoCleanEnd(t *testing.T) {
	client, server := net.Pipe()
	go func() { _, _ = server.Write([]byte{1, 0}); server.Close() }()
	if _, err := preface.NewConn(client, full(), key).Read(make([]byte, 1)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v", err)
	}
	client.Close()
}

func TestWindowAcceptsOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var w preface.Window
		seen := map[uint64]bool{}
		var top uint64
		base := rapid.SampledFrom([]uint64{0, 1 << 40, ^uint64(0) - 30000}).Draw(t, "base")
		for range rapid.IntRange(1, 200).Draw(t, "n") {
			n := base + rapid.SampledFrom([]uint64{rapid.Uint64Range(0, 100).Draw(t, "near"), rapid.Uint64Range(0, 20000).Draw(t, "far")}).Draw(t, "c")
			got := w.Accept(n)
			want := !seen[n] && (n >= top || top-n <= 4096)
			if got != want {
				t.Fatalf("Accept(%d) with top %d = %v", n, top, got)
			}
			if got {
				seen[n], top = true, max(top, n+1)
			}
		}
	})
}

func FuzzRead(f *testing.F) {
	hello := realHello(f, sni)
	f.Add(append(encode(f, full(), hello), hello...), 0)
	f.Add(append(encode(f, full(), hello), fragmented(hello, 100)...), 20)
	f.Add([]byte("GET / HTTP/1.1\r\n"), 3)
	f.Add(preface.Signature[:], 12)
	f.Fuzz(func(t *testing.T, b []byte, split int) {
		split = max(0, min(split, len(b)))
		p, h, err := preface.Read(bytes.NewReader(b[split:]), b[:split], lookup)
		if err != nil {
			return
		}
		// What is accepted was made by someone with the key: it must encode to the same bytes.
		out, err := preface.Append(nil, *p, key, h.Sum)
		if err != nil || !bytes.Equal(append(out, h.Raw...), b) {
			t.Fatalf("accepted bytes are not canonical: %v", err)
		}
	})
}

func FuzzReadHello(f *testing.F) {
	f.Add(realHello(f, sni))
	f.Add(fragmented(realHello(f, sni), 7))
	f.Add(craft(names(sni), ext(0xfe0d, 0)))
	f.Add(craft(names(sni), names("x")))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := preface.ReadHello(bytes.NewReader(b), nil)
		if err == nil && (h.ServerName == "" || len(h.Raw) > len(b)) {
			t.Fatal("accepted without a name")
		}
	})
}

func FuzzReadStatus(f *testing.F) {
	f.Add(preface.AppendStatus(nil, preface.Status{Code: preface.CodeDraining, Reason: "gateway_draining"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := preface.ReadStatus(bytes.NewReader(b))
		if err == nil && !bytes.HasPrefix(b, preface.AppendStatus(nil, s)) {
			t.Fatal("not canonical")
		}
	})
}
