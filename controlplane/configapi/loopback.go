// SPDX-License-Identifier: Apache-2.0

package configapi

import (
	"context"
	"net"
	"sync"

	"k8s.io/client-go/rest"
)

// loopback is a listener inside the process: nothing outside can reach it.
type loopback struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newLoopback() *loopback {
	return &loopback{conns: make(chan net.Conn), done: make(chan struct{})}
}

// Accept, Close and Addr are net.Listener.
func (l *loopback) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *loopback) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *loopback) Addr() net.Addr { return loopbackAddr{} }

type loopbackAddr struct{}

func (loopbackAddr) Network() string { return "pipe" }
func (loopbackAddr) String() string  { return "loopback" }

func (l *loopback) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *loopback) restConfig() *rest.Config {
	return &rest.Config{Host: "http://strait", Dial: l.dial, QPS: -1, WarningHandler: rest.NoWarnings{}, UserAgent: "strait"}
}
