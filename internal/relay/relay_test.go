// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/internal/relay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tcpPair is a connected pair of bare TCP connections.
func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// hidden is a TCP connection that the relay may not splice.
type hidden struct{ relay.Stream }

// kinds are the ways to make a pair: how each end is wrapped.
func kinds() map[string]func(*net.TCPConn) relay.Stream {
	return map[string]func(*net.TCPConn) relay.Stream{
		"spliced":  func(c *net.TCPConn) relay.Stream { return relay.TCP(c) },
		"buffered": func(c *net.TCPConn) relay.Stream { return hidden{relay.TCP(c)} },
	}
}

// start relays between two TCP connections and returns their far ends.
func start(t *testing.T, wrap func(*net.TCPConn) relay.Stream, count *relay.Counters) (left, right *net.TCPConn, result <-chan relay.Result) {
	left, a := tcpPair(t)
	b, right := tcpPair(t)
	ch := make(chan relay.Result, 1)
	go func() { ch <- relay.Pair(wrap(a), wrap(b), count) }()
	return left, right, ch
}

func TestHalfCloseBothOrders(t *testing.T) {
	for name, wrap := range kinds() {
		t.Run(name, func(t *testing.T) {
			var count relay.Counters
			left, right, result := start(t, wrap, &count)
			big := bytes.Repeat([]byte("x"), 3<<20)
			go func() { _, _ = left.Write(big); _ = left.CloseWrite() }()
			got, err := io.ReadAll(right)
			if err != nil || !bytes.Equal(got, big) {
				t.Fatalf("right read %d bytes, %v", len(got), err)
			}
			// The other direction still works after the first has ended.
			if _, err := right.Write([]byte("answer")); err != nil {
				t.Fatal(err)
			}
			_ = right.CloseWrite()
			if got, err := io.ReadAll(left); err != nil || string(got) != "answer" {
				t.Errorf("left read %q, %v", got, err)
			}
			if r := <-result; r.Err != nil || r.AtoB != int64(len(big)) || r.BtoA != 6 || count.BtoA.Load() != 6 {
				t.Errorf("result %+v", r)
			}
		})
	}
}

func TestResetIsPassedOn(t *testing.T) {
	for name, wrap := range kinds() {
		t.Run(name, func(t *testing.T) {
			left, right, result := start(t, wrap, nil)
			_, _ = left.Write([]byte("x"))
			if _, err := io.ReadFull(right, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			_ = left.SetLinger(0)
			left.Close()
			if _, err := right.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("right read %v", err)
			}
			if r := <-result; r.Err == nil {
				t.Error("no error in the result")
			}
		})
	}
}

func TestResetFromOutsideEndsBoth(t *testing.T) {
	for name, wrap := range kinds() {
		t.Run(name, func(t *testing.T) {
			left, a := tcpPair(t)
			b, right := tcpPair(t)
			sa := wrap(a)
			result := make(chan relay.Result, 1)
			go func() { result <- relay.Pair(sa, wrap(b), nil) }()
			_, _ = left.Write([]byte("x"))
			_, _ = io.ReadFull(right, make([]byte, 1))
			sa.Reset()
			sa.Reset()
			if r := <-result; r.Err == nil {
				t.Error("no error in the result")
			}
			for _, c := range []net.Conn{left, right} {
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("read %v", err)
				}
			}
		})
	}
}

// tlsPair is a TLS connection over TCP whose server end is watched for its end.
func tlsPair(t *testing.T) (client, server *tls.Conn, clientTCP *net.TCPConn) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)},
		&x509.Certificate{SerialNumber: big.NewInt(1)}, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, s := tcpPair(t)
	server = tls.Server(relay.WatchEnd(s), &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
	client = tls.Client(c, &tls.Config{InsecureSkipVerify: true})
	done := make(chan error, 1)
	go func() { done <- server.Handshake() }()
	if err := errors.Join(client.Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	return client, server, c
}

func TestTruncatedTLSIsAReset(t *testing.T) {
	for name, end := range map[string]func(*tls.Conn, *net.TCPConn){
		"close_notify": func(c *tls.Conn, _ *net.TCPConn) { _ = c.CloseWrite() },
		"FIN alone":    func(_ *tls.Conn, c *net.TCPConn) { _ = c.CloseWrite() },
	} {
		t.Run(name, func(t *testing.T) {
			client, server, bare := tlsPair(t)
			b, right := tcpPair(t)
			result := make(chan relay.Result, 1)
			go func() { result <- relay.Pair(relay.Wrap(server), relay.Wrap(b), nil) }()
			if _, err := client.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			_, _ = io.ReadFull(right, make([]byte, 1))
			end(client, bare)
			_, err := right.Read(make([]byte, 1))
			if name == "close_notify" {
				if err != io.EOF {
					t.Errorf("right read %v", err)
				}
				right.Close()
			} else if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("right read %v", err)
			}
			if r := <-result; (r.Err == nil) != (name == "close_notify") {
				t.Errorf("result %+v", r)
			}
		})
	}
}

// BenchmarkRelay moves one buffer from one end to the other. Loopback TCP dominates; it says nothing about latency. The
// spliced pair is the baseline that the kernel sets.
func BenchmarkRelay(b *testing.B) {
	for name, wrap := range kinds() {
		b.Run("kind="+name+"/size=64KiB", func(b *testing.B) {
			left, x := tcpPair(b)
			y, right := tcpPair(b)
			done := make(chan relay.Result, 1)
			go func() { done <- relay.Pair(wrap(x), wrap(y), nil) }()
			buf, in := make([]byte, 64<<10), make([]byte, 64<<10)
			b.SetBytes(int64(len(buf)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := left.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(right, in); err != nil {
					b.Fatal(err)
				}
			}
			left.Close()
			right.Close()
			<-done
		})
	}
}
