// SPDX-License-Identifier: Apache-2.0

package preface

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// Conn is the sidecar's end of a connection through a gateway. Hand it to tls.Client: the first Writes are held back
// until the whole ClientHello is there and go out behind the preface in one write; the first Read consumes the gateway's
// status frame and fails with *Refused unless it was CodeOK.
type Conn struct {
	net.Conn
	preface Preface
	key     []byte

	wmu  sync.Mutex
	held []byte
	sent bool
	scan helloScanner

	rmu     sync.Mutex
	readErr error
	status  atomic.Pointer[Status]
}

// NewConn wraps raw, a fresh connection to a gateway's local listener. key is KeyFrom of the local session.
func NewConn(raw net.Conn, p Preface, key []byte) *Conn {
	return &Conn{Conn: raw, preface: p, key: key}
}

// Write implements net.Conn.
func (c *Conn) Write(b []byte) (int, error) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if c.sent {
		return c.Conn.Write(b)
	}
	c.held = append(c.held, b...)
	msg, _, err := c.scan.scan(c.held)
	if err != nil {
		return 0, err
	}
	if msg == nil {
		return len(b), nil
	}
	out, err := Append(make([]byte, 0, MaxHeader+len(c.held)), c.preface, c.key, sha256.Sum256(msg))
	if err != nil {
		return 0, err
	}
	out = append(out, c.held...)
	c.sent, c.held, c.scan = true, nil, helloScanner{}
	if _, err := c.Conn.Write(out); err != nil {
		return 0, err
	}
	return len(b), nil
}

// Read implements net.Conn.
func (c *Conn) Read(b []byte) (int, error) {
	if c.status.Load() == nil {
		if err := c.readStatus(); err != nil {
			return 0, err
		}
	}
	return c.Conn.Read(b)
}

func (c *Conn) readStatus() error {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	if c.status.Load() != nil || c.readErr != nil {
		return c.readErr
	}
	s, err := ReadStatus(c.Conn)
	switch {
	case err != nil:
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		c.readErr = fmt.Errorf("read gateway status: %w", err)
	case s.Code != CodeOK:
		c.readErr = &Refused{Code: s.Code, Reason: s.Reason, Handle: s.Handle}
	default:
		c.status.Store(&s)
	}
	return c.readErr
}

// Handle is the far instance's handle, once the first Read has returned.
func (c *Conn) Handle() Handle {
	if s := c.status.Load(); s != nil {
		return s.Handle
	}
	return Handle{}
}

// Counter is the preface's counter, by which notices of the local session name this connection.
func (c *Conn) Counter() uint64 { return c.preface.Counter }

// CloseWrite half-closes the connection to the gateway.
func (c *Conn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return c.Conn.Close()
}

// NetConn returns the connection beneath.
func (c *Conn) NetConn() net.Conn { return c.Conn }
