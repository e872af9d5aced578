// SPDX-License-Identifier: Apache-2.0

// Package memnet connects two ends in memory, for tests on virtual time: its goroutines wait on channels and pipes alone, so that a bubble
// of testing/synctest can idle while bytes are under way. Unlike net.Pipe an end takes writes at once, as a network does.
package memnet

import (
	"bytes"
	"net"
	"sync"
	"time"
)

// Pipe returns the two ends of a connection. What was written before Close arrives within a second or is lost.
func Pipe() (a, b net.Conn) {
	x, y := net.Pipe()
	return newBuffered(x), newBuffered(y)
}

// buffered is an end of a pipe that takes writes at once: two ends that both write must not wait for each other.
type buffered struct {
	net.Conn
	out  chan []byte
	done chan struct{}
	once sync.Once
}

func newBuffered(c net.Conn) *buffered {
	b := &buffered{Conn: c, out: make(chan []byte, 256), done: make(chan struct{})}
	go b.run()
	return b
}

func (b *buffered) run() {
	defer b.Conn.Close()
	for {
		select {
		case data := <-b.out:
			if _, err := b.Conn.Write(data); err != nil {
				return
			}
			continue
		default:
		}
		select {
		case data := <-b.out:
			if _, err := b.Conn.Write(data); err != nil {
				return
			}
		case <-b.done:
			if len(b.out) == 0 {
				return
			}
		}
	}
}

func (b *buffered) Write(p []byte) (int, error) {
	select {
	case b.out <- bytes.Clone(p):
		return len(p), nil
	case <-b.done:
		return 0, net.ErrClosed
	}
}

func (b *buffered) Close() error {
	b.once.Do(func() {
		_ = b.Conn.SetDeadline(time.Now().Add(time.Second))
		close(b.done)
	})
	return nil
}
func (b *buffered) SetWriteDeadline(time.Time) error { return nil }
func (b *buffered) SetDeadline(t time.Time) error    { return b.SetReadDeadline(t) }
