// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// Stream is one end of a relayed pair.
type Stream interface {
	io.ReadWriter
	// CloseWrite tells the other end that no more bytes will come; reading goes on.
	CloseWrite() error
	// Reset ends both directions at once; the other end sees an error, not an end of file. Safe to repeat.
	Reset()
	// Close releases the stream after both directions have ended. Safe to repeat.
	Close() error
}

// Counters are the bytes moved so far, written as they move (for a spliced pair: when a direction ends).
type Counters struct {
	AtoB atomic.Int64
	BtoA atomic.Int64
}

// Result says how a pair ended.
type Result struct {
	AtoB, BtoA int64
	// Err is nil when both directions ended cleanly, else what broke first.
	Err error
	// FromA says that the break was seen at a, else at b.
	FromA bool
}

// BufferSize is how much one direction moves at a time.
const BufferSize = 32 << 10

var buffers = sync.Pool{New: func() any { b := make([]byte, BufferSize); return &b }}

// Pair relays between a and b until both directions have ended, then closes both. count may be nil.
func Pair(a, b Stream, count *Counters) Result {
	if count == nil {
		count = &Counters{}
	}
	p := pair{a: a, b: b}
	done := make(chan struct{})
	go p.run(done, b, a, &count.BtoA, false)
	p.copy(a, b, &count.AtoB, true)
	<-done
	a.Close()
	b.Close()
	return Result{AtoB: count.AtoB.Load(), BtoA: count.BtoA.Load(), Err: p.err, FromA: p.fromA}
}

type pair struct {
	a, b  Stream
	once  sync.Once
	err   error
	fromA bool
}

func (p *pair) run(done chan<- struct{}, src, dst Stream, n *atomic.Int64, srcIsA bool) {
	defer close(done)
	p.copy(src, dst, n, srcIsA)
}

func (p *pair) copy(src, dst Stream, n *atomic.Int64, srcIsA bool) {
	rerr, werr := move(dst, src, n)
	switch {
	case rerr != nil:
		p.broken(rerr, srcIsA)
	case werr != nil:
		p.broken(werr, !srcIsA)
	default:
		if err := dst.CloseWrite(); err != nil {
			p.broken(err, !srcIsA)
		}
	}
}

func (p *pair) broken(err error, atA bool) {
	p.once.Do(func() { p.err, p.fromA = err, atA })
	p.a.Reset()
	p.b.Reset()
}

// move copies until end of file (nil, nil) or an error of the reading or of the writing side.
func move(dst, src Stream, n *atomic.Int64) (rerr, werr error) {
	if s, ok := src.(*tcpStream); ok {
		if d, ok := dst.(*tcpStream); ok {
			return s.spliceTo(d, n)
		}
	}
	if s, ok := src.(waiter); ok {
		return moveWaiting(dst, src, s, n)
	}
	return moveBuffered(dst, src, n)
}

// waiter is implemented by streams that can tell that bytes are there without a buffer to put them in.
type waiter interface {
	// ReadPooled waits for bytes and reads them into a buffer that take provides only then; give takes it back unused.
	ReadPooled(take func() []byte, give func()) (n int, err error)
}

func moveWaiting(dst io.Writer, src Stream, w waiter, n *atomic.Int64) (rerr, werr error) {
	var buf *[]byte
	take := func() []byte {
		if buf == nil {
			buf = buffers.Get().(*[]byte)
		}
		return *buf
	}
	give := func() {
		if buf != nil {
			buffers.Put(buf)
			buf = nil
		}
	}
	defer give()
	for {
		m, err := w.ReadPooled(take, give)
		if m > 0 {
			if _, werr := dst.Write((*buf)[:m]); werr != nil {
				return nil, werr
			}
			n.Add(int64(m))
		}
		if err != nil {
			return readEnd(err), nil
		}
		if m < BufferSize/2 {
			give()
		}
	}
}

func moveBuffered(dst io.Writer, src io.Reader, n *atomic.Int64) (rerr, werr error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		m, err := src.Read(*buf)
		if m > 0 {
			if _, werr := dst.Write((*buf)[:m]); werr != nil {
				return nil, werr
			}
			n.Add(int64(m))
		}
		if err != nil {
			return readEnd(err), nil
		}
	}
}

func readEnd(err error) error {
	if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

// IsClosed reports whether err is that of a stream which this process closed or reset itself.
func IsClosed(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrClosedPipe)
}
