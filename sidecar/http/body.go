// SPDX-License-Identifier: Apache-2.0

package http

import (
	"errors"
	"io"
	"sync"
	"time"
)

var errBodyEnded = errors.New("request body no longer read")

// keptBody is a request body that several attempts may read, one after the other. It reads its source only when an
// attempt wants more, in a goroutine of its own: an attempt that is given up must not wait for a client that is silent.
// The first bytes are kept so that a later attempt sees the whole body again.
type keptBody struct {
	src      io.Reader
	limit    int
	length   int64         // declared, or -1
	stall    time.Duration // 0: none
	deadline func(time.Time) error
	atEOF    func() // before any reader learns of the end: trailers are there now

	mu      sync.Mutex
	cond    sync.Cond // any change below
	buf     []byte    // kept, or (once whole is false) the bytes not yet read by the current reader
	base    int64     // offset of buf[0]
	whole   bool      // buf has everything since offset 0
	keep    bool      // a further attempt is possible
	want    bool      // a reader waits for more
	reading bool      // a read of the source is in progress
	err     error     // of the source: final
	stopped bool      // the handler returns
	current *attemptBody
	pump    chan struct{} // closed when the goroutine has ended; nil before it starts
}

func newKeptBody(src io.Reader, length int64, limit int, stall time.Duration, deadline func(time.Time) error, atEOF func()) *keptBody {
	b := &keptBody{src: src, limit: limit, length: length, stall: stall, deadline: deadline, atEOF: atEOF, whole: true, keep: true}
	b.cond.L = &b.mu
	return b
}

// attempt returns a reader from the beginning and detaches the one before. It must not be called unless replayable.
func (b *keptBody) attempt() io.ReadCloser {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.current != nil {
		b.current.closed = true
	}
	b.current = &attemptBody{body: b}
	b.cond.Broadcast()
	return b.current
}

// replayable reports whether a reader from the beginning is possible.
func (b *keptBody) replayable() bool {
	if b == nil {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.whole
}

// release says that no further attempt will come: nothing need be kept.
func (b *keptBody) release() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.keep = false
}

// finished reports whether the source was read to its end.
func (b *keptBody) finished() bool {
	if b == nil {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err == io.EOF || b.length >= 0 && b.base+int64(len(b.buf)) >= b.length
}

// broken returns the error with which the source ended, if it did not end well.
func (b *keptBody) broken() error {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == io.EOF {
		return nil
	}
	return b.err
}

// quiet waits for a read in progress. To be called when the connection has failed: the read then ends at once, and says
// how it failed.
func (b *keptBody) quiet() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.reading {
		b.cond.Wait()
	}
}

// received is the number of bytes read from the source.
func (b *keptBody) received() int64 {
	if b == nil {
		return 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.base + int64(len(b.buf))
}

// stop ends all reading and waits for it; a read in progress is interrupted. The source is of no use afterwards.
func (b *keptBody) stop() {
	if b == nil {
		return
	}
	b.mu.Lock()
	b.stopped = true
	b.cond.Broadcast()
	pump := b.pump
	if b.deadline != nil && b.err == nil {
		at := time.Now().Add(discardTime) // net/http reads on to see the connection's next request
		if pump != nil {
			at = time.Unix(1, 0)
		}
		_ = b.deadline(at) // not supported: the read ends when its connection does
	}
	b.mu.Unlock()
	if pump != nil {
		<-pump
	}
}

// discardTime is how long what is left of an unread body may take to arrive.
const discardTime = time.Second

// run reads the source whenever a reader wants more.
func (b *keptBody) run() {
	defer close(b.pump)
	chunk := make([]byte, 32<<10)
	for {
		b.mu.Lock()
		for !b.want && !b.stopped {
			b.cond.Wait()
		}
		stopped := b.stopped
		b.want, b.reading = false, !stopped
		b.stallLocked(time.Now().Add(b.stall))
		b.mu.Unlock()
		if stopped {
			return
		}
		n, err := b.src.Read(chunk)
		if err == io.EOF {
			b.mu.Lock()
			b.stallLocked(time.Time{}) // what watches the connection for its end must not run into it
			b.mu.Unlock()
			b.atEOF()
		}
		b.add(chunk[:n], err)
		if err != nil {
			return
		}
	}
}

// stallLocked sets the source's deadline. It must not undo the one with which stop interrupts.
func (b *keptBody) stallLocked(at time.Time) {
	if b.stall > 0 && b.deadline != nil && !b.stopped {
		_ = b.deadline(at)
	}
}

func (b *keptBody) add(p []byte, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.keep || len(b.buf)+len(p) > b.limit {
		b.whole = b.whole && len(p) == 0
	}
	b.dropReadLocked()
	b.buf = append(b.buf, p...)
	b.err, b.reading = err, false
	b.cond.Broadcast()
}

// dropReadLocked forgets what the current reader has read, when nobody will ask for it again.
func (b *keptBody) dropReadLocked() {
	if b.whole || b.current == nil {
		return
	}
	if n := b.current.pos - b.base; n > 0 {
		b.base = b.current.pos
		b.buf = b.buf[:copy(b.buf, b.buf[n:])]
	}
}

// attemptBody is one attempt's view of a keptBody.
type attemptBody struct {
	body   *keptBody
	pos    int64 // guarded by body.mu
	closed bool  // guarded by body.mu
}

func (a *attemptBody) Read(p []byte) (int, error) {
	b := a.body
	b.mu.Lock()
	defer b.mu.Unlock()
	for {
		switch {
		case a.closed || b.stopped:
			return 0, errBodyEnded
		case a.pos < b.base+int64(len(b.buf)):
			n := copy(p, b.buf[a.pos-b.base:])
			a.pos += int64(n)
			return n, nil
		case b.err != nil:
			return 0, b.err
		case len(p) == 0:
			return 0, nil
		}
		if b.pump == nil {
			b.pump = make(chan struct{})
			go b.run() // stop waits for it
		}
		b.want = true
		b.cond.Broadcast()
		b.cond.Wait()
	}
}

// Close detaches the reader; the source stays as it is.
func (a *attemptBody) Close() error {
	a.body.mu.Lock()
	defer a.body.mu.Unlock()
	a.closed = true
	a.body.cond.Broadcast()
	return nil
}
