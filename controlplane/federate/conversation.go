// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"context"
	"errors"
	"io"
	"sync"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation/join"
	"github.com/strait-mesh/strait/internal/problem"
)

// conv is one join conversation over a link. One goroutine receives.
type conv struct {
	link   *link
	key    convKey
	opened *controlpb.JoinOpened

	frames chan *controlpb.JoinFrame
	once   sync.Once
	err    error
	done   chan struct{}
}

// errOpen is the gateway's word that it could not open a conversation.
type errOpen struct{ code, message string }

func (e *errOpen) Error() string { return e.message }

func newConv(l *link, key convKey) *conv {
	return &conv{link: l, key: key, frames: make(chan *controlpb.JoinFrame, 8), done: make(chan struct{})}
}

// finish ends receiving; the first cause stays.
func (c *conv) finish(err error) {
	c.once.Do(func() {
		c.err = err
		close(c.done)
	})
}

// frame hands a frame from the gateway to its conversation; an inbound one may begin with it.
func (l *link) frame(f *controlpb.JoinFrame) {
	key := convKey{f.GetId(), f.GetInbound()}
	l.mu.Lock()
	c := l.convs[key]
	if c == nil && key.inbound && f.GetOpened() != nil && !f.GetClose() {
		if l.inboundLocked() >= maxInbound || l.closed {
			l.mu.Unlock()
			l.start(func() { l.refuse(key, problem.New(problem.GatewayNotReachable, "too many joins at once").Retry()) })
			return
		}
		c = newConv(l, key)
		c.opened = f.GetOpened()
		l.convs[key] = c
		l.mu.Unlock()
		l.start(func() { l.m.accept(c) })
		return
	}
	l.mu.Unlock()
	if c == nil {
		return // ended meanwhile
	}
	c.deliver(f)
}

func (l *link) inboundLocked() int {
	n := 0
	for key := range l.convs {
		if key.inbound {
			n++
		}
	}
	return n
}

func (c *conv) deliver(f *controlpb.JoinFrame) {
	switch {
	case f.GetClose() && f.GetErrorCode() != "":
		c.finish(&errOpen{f.GetErrorCode(), f.GetErrorMessage()})
	case f.GetClose():
		c.finish(io.EOF)
	case f.GetOpened() == nil && len(f.GetBody()) == 0 || len(f.GetBody()) > join.MaxFrame:
		c.finish(errors.New("empty or oversized frame"))
	default:
		select {
		case c.frames <- f:
		default:
			c.finish(errors.New("more frames than the conversation allows"))
		}
	}
}

// next returns the next frame. Frames that came before the end are returned first.
func (c *conv) next(ctx context.Context) (*controlpb.JoinFrame, error) {
	select {
	case f := <-c.frames:
		return f, nil
	default:
	}
	select {
	case f := <-c.frames:
		return f, nil
	case <-c.done:
		select {
		case f := <-c.frames:
			return f, nil
		default:
			return nil, c.err
		}
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// recv returns the next body.
func (c *conv) recv(ctx context.Context) ([]byte, error) {
	f, err := c.next(ctx)
	if err != nil {
		return nil, err
	}
	if len(f.GetBody()) == 0 {
		return nil, errors.New("a frame without body")
	}
	return f.GetBody(), nil
}

func (c *conv) send(ctx context.Context, body []byte) error {
	return c.link.put(ctx, joinMessage(&controlpb.JoinFrame{Id: c.key.id, Inbound: c.key.inbound, Body: body}))
}

// close ends the conversation on both sides.
func (c *conv) close() {
	l := c.link
	l.mu.Lock()
	_, live := l.convs[c.key]
	delete(l.convs, c.key)
	l.mu.Unlock()
	if live {
		_ = l.put(l.ctx, joinMessage(&controlpb.JoinFrame{Id: c.key.id, Inbound: c.key.inbound, Close: true})) // else the link has ended
	}
	c.finish(io.EOF)
}

func (l *link) refuse(key convKey, err error) {
	if b := join.Refusal(err); b != nil {
		_ = l.put(l.ctx, joinMessage(&controlpb.JoinFrame{Id: key.id, Inbound: key.inbound, Body: b}))
	}
	_ = l.put(l.ctx, joinMessage(&controlpb.JoinFrame{Id: key.id, Inbound: key.inbound, Close: true}))
}

func joinMessage(f *controlpb.JoinFrame) *controlpb.ControlMessage {
	return &controlpb.ControlMessage{Message: &controlpb.ControlMessage_Join{Join: f}}
}

// dial opens a conversation through this link's gateway and returns it opened. An *errOpen says why the gateway could not.
func (l *link) dial(ctx context.Context, d *controlpb.JoinDial) (*conv, error) {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil, errLinkEnded
	}
	l.lastID++
	d.Id = l.lastID
	c := newConv(l, convKey{id: d.GetId()})
	l.convs[c.key] = c
	l.mu.Unlock()
	err := l.put(ctx, &controlpb.ControlMessage{Message: &controlpb.ControlMessage_JoinDial{JoinDial: d}})
	var first *controlpb.JoinFrame
	if err == nil {
		first, err = c.next(ctx)
	}
	if err == nil && first.GetOpened() == nil {
		err = errors.New("the gateway sent a frame before it said what it opened")
	}
	if err != nil {
		c.close()
		return nil, err
	}
	c.opened = first.GetOpened()
	return c, nil
}
