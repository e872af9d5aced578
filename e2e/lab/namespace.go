// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// namespace is a network namespace and the one thread that lives in it. It ends with the thread.
type namespace struct {
	work chan func()
	done chan struct{}
	stop sync.Once
}

// newNamespace makes a namespace with loopback up.
func newNamespace() (*namespace, error) {
	n := &namespace{work: make(chan func()), done: make(chan struct{})}
	ready := make(chan error)
	go n.run(ready)
	if err := <-ready; err != nil {
		<-n.done
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	return n, nil
}

// run never unlocks its thread, so that the runtime ends it with the goroutine.
func (n *namespace) run(ready chan<- error) {
	defer close(n.done)
	runtime.LockOSThread()
	err := unix.Unshare(unix.CLONE_NEWNET)
	if err == nil {
		err = setUp("lo", 0)
	}
	ready <- err
	if err != nil {
		return
	}
	for f := range n.work {
		f()
	}
}

// do runs f on the namespace's thread: sockets that it opens and processes that it starts belong to the namespace.
func (n *namespace) do(f func() error) error {
	result := make(chan error, 1)
	select {
	case n.work <- func() { result <- f() }:
		return <-result
	case <-n.done:
		return errors.New("the site was closed")
	}
}

func (n *namespace) close() {
	n.stop.Do(func() { close(n.work) })
	<-n.done
}

// ifreq is struct ifreq of netdevice(7).
type ifreq struct {
	name [unix.IFNAMSIZ]byte
	data [24]byte
}

func request(name string) *ifreq {
	r := &ifreq{}
	copy(r.name[:], name)
	return r
}

func control(fd int, op uintptr, r *ifreq) error {
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), op, uintptr(unsafe.Pointer(r))); e != 0 {
		return e
	}
	return nil
}

// withSocket gives f a socket to talk to the kernel about devices.
func withSocket(f func(fd int) error) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return f(fd)
}

// setUp brings a device up; mtu 0 leaves it.
func setUp(name string, mtu int) error {
	return withSocket(func(fd int) error {
		if mtu > 0 {
			r := request(name)
			*(*int32)(unsafe.Pointer(&r.data)) = int32(mtu)
			if err := control(fd, unix.SIOCSIFMTU, r); err != nil {
				return fmt.Errorf("mtu of %s: %w", name, err)
			}
		}
		r := request(name)
		*(*uint16)(unsafe.Pointer(&r.data)) = unix.IFF_UP | unix.IFF_RUNNING
		if err := control(fd, unix.SIOCSIFFLAGS, r); err != nil {
			return fmt.Errorf("bring up %s: %w", name, err)
		}
		return nil
	})
}

func sockaddr(ip netip.Addr) (data [24]byte) {
	*(*uint16)(unsafe.Pointer(&data)) = unix.AF_INET
	b := ip.As4()
	copy(data[4:], b[:])
	return data
}

// setAddress gives a device an address; the netmask makes the kernel route the whole prefix to it.
func setAddress(name string, p netip.Prefix) error {
	mask := netip.AddrFrom4([4]byte(net.CIDRMask(p.Bits(), 32)))
	return withSocket(func(fd int) error {
		for _, step := range []struct {
			op   uintptr
			addr netip.Addr
		}{{unix.SIOCSIFADDR, p.Addr()}, {unix.SIOCSIFNETMASK, mask}} {
			r := request(name)
			r.data = sockaddr(step.addr)
			if err := control(fd, step.op, r); err != nil {
				return fmt.Errorf("address %s of %s: %w", p, name, err)
			}
		}
		return nil
	})
}

// openTUN makes a TUN device in the namespace of the calling thread.
func openTUN(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/net/tun: %w", err)
	}
	r := request(name)
	*(*uint16)(unsafe.Pointer(&r.data)) = unix.IFF_TUN | unix.IFF_NO_PI
	if err := control(fd, unix.TUNSETIFF, r); err != nil {
		return nil, errors.Join(fmt.Errorf("tun device %s: %w", name, err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil
}
