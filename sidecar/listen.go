// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"
)

// listener accepts connections, at most a number at a time, and serves each in its own goroutine.
type listener struct {
	net.Listener
	slots chan struct{}
	serve func(net.Conn)
	wg    sync.WaitGroup
}

func listen(address string, most int) (*listener, error) {
	lc := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}}
	l, err := lc.Listen(context.Background(), "tcp", address)
	if err != nil {
		return nil, err
	}
	return &listener{Listener: l, slots: make(chan struct{}, most)}, nil
}

// run accepts until the listener is closed, then waits for what it serves. Running out of descriptors pauses accepting.
func (l *listener) run() {
	defer l.wg.Wait()
	pause := 5 * time.Millisecond
	for {
		l.slots <- struct{}{} // a full listener leaves the rest in the kernel's queue
		c, err := l.Accept()
		if err != nil {
			<-l.slots
			if errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(pause)
			pause = min(2*pause, time.Second)
			continue
		}
		pause = 5 * time.Millisecond
		l.wg.Go(func() {
			defer func() { <-l.slots }()
			l.serve(c)
		})
	}
}
