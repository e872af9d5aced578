// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Bounds.
const (
	MaxSites = 200
	// deviceMTU is that of each site's way out; paths are narrowed by Shape.MTU.
	deviceMTU = 1500
	// maxUnderway bounds the packets on their way in one direction: beyond them the path drops.
	maxUnderway = 1 << 16
)

// Net is a network of sites. Make it with New; Close ends it.
type Net struct {
	sites map[string]*Site
	order []string

	mu    sync.Mutex
	paths map[[2]string]*path

	late atomic.Int64 // the longest that a packet was delivered after its time, ns
	stop context.CancelFunc
	wg   sync.WaitGroup
}

// Site is one network namespace.
type Site struct {
	Name string
	net  *Net
	n    int
	ns   *namespace
	tun  *os.File
}

// path is one direction between two sites. Its goroutine delivers what is due.
type path struct {
	to *Site

	mu       sync.Mutex
	dir      direction
	underway deliveries
	wake     chan struct{}
}

// New makes the sites and joins them by paths of the zero Shape. seed makes chance repeatable.
func New(seed uint64, sites ...string) (*Net, error) {
	if len(sites) == 0 || len(sites) > MaxSites {
		return nil, fmt.Errorf("lab: %d sites; 1 to %d", len(sites), MaxSites)
	}
	ctx, cancel := context.WithCancel(context.Background())
	n := &Net{sites: map[string]*Site{}, paths: map[[2]string]*path{}, stop: cancel}
	for i, name := range sites {
		s, err := n.open(name, i+1)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lab: site %s: %w", name, err), n.Close())
		}
		n.sites[name] = s
		n.order = append(n.order, name)
	}
	for i, from := range sites {
		for j, to := range sites {
			if from == to {
				continue
			}
			p := &path{to: n.sites[to], wake: make(chan struct{}, 1)}
			p.dir.rng = rand.New(rand.NewPCG(seed, uint64(i)<<32|uint64(j)))
			n.paths[[2]string{from, to}] = p
			n.wg.Go(func() { n.deliver(ctx, p) })
		}
	}
	for _, s := range n.sites {
		n.wg.Go(func() { n.read(s) })
	}
	return n, nil
}

func (n *Net) open(name string, i int) (*Site, error) {
	if n.sites[name] != nil {
		return nil, errors.New("stands twice")
	}
	ns, err := newNamespace()
	if err != nil {
		return nil, err
	}
	s := &Site{Name: name, net: n, n: i, ns: ns}
	err = ns.do(func() error {
		if s.tun, err = openTUN("wan0"); err != nil {
			return err
		}
		// The way out has the first address and the route to the whole range.
		if err := setAddress("wan0", netip.PrefixFrom(s.IP(1), 15)); err != nil {
			return err
		}
		return setUp("wan0", deviceMTU)
	})
	if err == nil { // every address of a prefix on loopback is local: processes may bind any
		err = ns.do(func() error { return setAddress("lo:1", netip.PrefixFrom(s.IP(2), 24)) })
	}
	if err != nil {
		if s.tun != nil {
			_ = s.tun.Close()
		}
		ns.close()
		return nil, err
	}
	return s, nil
}

// Site returns a site by name; nil when there is none.
func (n *Net) Site(name string) *Site { return n.sites[name] }

// IP is the site's address number host, from 1 to 254.
func (s *Site) IP(host int) netip.Addr {
	return netip.AddrFrom4([4]byte{198, 18, byte(s.n), byte(host)})
}

// Do runs f on a thread inside the site: sockets that f opens belong to it. f must not start goroutines that open others.
func (s *Site) Do(f func() error) error { return s.ns.do(f) }

// Listen opens a TCP listener inside the site.
func (s *Site) Listen(addr string) (l net.Listener, err error) {
	err = s.Do(func() error { l, err = net.Listen("tcp4", addr); return err })
	return l, err
}

// ListenPacket opens a UDP socket inside the site.
func (s *Site) ListenPacket(addr string) (c net.PacketConn, err error) {
	err = s.Do(func() error { c, err = net.ListenPacket("udp4", addr); return err })
	return c, err
}

// DialContext opens a connection from inside the site, over "tcp4" or "udp4" to a literal address.
func (s *Site) DialContext(ctx context.Context, network, addr string) (c net.Conn, err error) {
	// The dialler of package net may use other threads for names and for happy eyeballs; a literal address needs neither.
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, fmt.Errorf("dial %s: want a literal address: %w", addr, err)
	}
	var fd int
	kind := syscall.SOCK_STREAM
	if network == "udp" || network == "udp4" {
		kind = syscall.SOCK_DGRAM
	}
	err = s.Do(func() (err error) {
		fd, err = syscall.Socket(syscall.AF_INET, kind|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	return connect(ctx, fd, to)
}

// connect finishes a dial outside the site's thread: a socket keeps its namespace.
func connect(ctx context.Context, fd int, to netip.AddrPort) (net.Conn, error) {
	err := syscall.Connect(fd, &syscall.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
	if err != nil && err != syscall.EINPROGRESS {
		return nil, errors.Join(&net.OpError{Op: "dial", Net: "tcp4", Addr: net.TCPAddrFromAddrPort(to), Err: err}, syscall.Close(fd))
	}
	f := os.NewFile(uintptr(fd), "lab")
	defer f.Close()
	if err == syscall.EINPROGRESS {
		if err := waitConnected(ctx, f); err != nil {
			return nil, &net.OpError{Op: "dial", Net: "tcp4", Addr: net.TCPAddrFromAddrPort(to), Err: err}
		}
	}
	return net.FileConn(f)
}

// waitConnected waits until the socket may be written, and returns its error.
func waitConnected(ctx context.Context, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) })()
	var result error
	first := true
	err = raw.Write(func(fd uintptr) bool {
		if first { // the poller reports readiness only after it was asked to wait once
			first = false
			return false
		}
		var code int
		if code, result = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR); result == nil && code != 0 {
			result = syscall.Errno(code)
		}
		return true
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(err, result)
}

// Start starts a command inside the site. It ends with this process, however that ends.
func (s *Site) Start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	// The parent that dies is the site's thread, which lives as long as the lab.
	cmd.SysProcAttr.Setpgid, cmd.SysProcAttr.Pdeathsig = true, syscall.SIGKILL
	return s.Do(cmd.Start)
}

// Set changes the shape of one direction; packets on their way keep theirs.
func (n *Net) Set(from, to string, shape Shape) {
	p := n.path(from, to)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dir.shape = shape
}

// Shape is the present one.
func (n *Net) Shape(from, to string) Shape {
	p := n.path(from, to)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dir.shape
}

// Update changes the shapes of every direction for which change returns another one.
func (n *Net) Update(change func(from, to string, s Shape) Shape) {
	for _, from := range n.order {
		for _, to := range n.order {
			if from != to {
				n.Set(from, to, change(from, to, n.Shape(from, to)))
			}
		}
	}
}

// Counters are those of one direction.
func (n *Net) Counters(from, to string) Counters {
	p := n.path(from, to)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dir.count
}

// Late is how long, at worst, a packet was delivered after its time since the last call: what the host and this process added.
func (n *Net) Late() time.Duration { return time.Duration(n.late.Swap(0)) }

func (n *Net) path(from, to string) *path {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := n.paths[[2]string{from, to}]
	if p == nil {
		panic("lab: no path from " + from + " to " + to)
	}
	return p
}

// Close ends every path and site, and waits. Processes inside the sites are killed by it.
func (n *Net) Close() error {
	n.stop()
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(n.sites)) {
		s := n.sites[name]
		errs = append(errs, s.tun.Close())
	}
	n.wg.Wait()
	for _, s := range n.sites {
		s.ns.close()
	}
	return errors.Join(errs...)
}

// read takes what leaves a site until its device is closed.
func (n *Net) read(s *Site) {
	buf := make([]byte, deviceMTU+64)
	for {
		size, err := s.tun.Read(buf)
		if err != nil {
			return
		}
		pkt := buf[:size]
		if size < 20 || pkt[0]>>4 != 4 || ipHeader(pkt) > size {
			continue // IPv6 neighbour discovery and the like
		}
		to := n.owner(pkt)
		if to == nil || to == s {
			continue
		}
		p := n.path(s.Name, to.Name)
		if answer := p.enter(time.Now(), slices.Clone(pkt)); answer != nil {
			_, _ = s.tun.Write(answer)
		}
	}
}

// owner is the site that a packet is for.
func (n *Net) owner(pkt []byte) *Site {
	if pkt[16] != 198 || pkt[17] != 18 || pkt[18] == 0 || int(pkt[18]) > len(n.order) {
		return nil
	}
	return n.sites[n.order[pkt[18]-1]]
}

func (p *path) enter(now time.Time, pkt []byte) (answer []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.underway.list) >= maxUnderway {
		p.dir.count.QueueFull++
		return nil
	}
	out, answer := p.dir.enter(now, pkt)
	newest := p.underway.seq
	for _, d := range out {
		p.underway.push(d)
	}
	if len(out) > 0 && p.underway.list[0].seq > newest { // due before all that waited
		select {
		case p.wake <- struct{}{}:
		default:
		}
	}
	return answer
}

// deliver writes packets into the receiving site when they are due.
func (n *Net) deliver(ctx context.Context, p *path) {
	t := time.NewTimer(time.Hour)
	defer t.Stop()
	for {
		wait := n.flush(p)
		t.Reset(wait)
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		case <-t.C:
		}
	}
}

// flush delivers what is due and returns the time until the next.
func (n *Net) flush(p *path) time.Duration {
	for {
		p.mu.Lock()
		if len(p.underway.list) == 0 {
			p.mu.Unlock()
			return time.Hour
		}
		now := time.Now()
		d := p.underway.list[0]
		if wait := d.at.Sub(now); wait > 0 {
			p.mu.Unlock()
			return wait
		}
		heap.Pop(&p.underway)
		p.mu.Unlock()
		if late := int64(now.Sub(d.at)); late > n.late.Load() {
			n.late.Store(late)
		}
		_, _ = p.to.tun.Write(d.pkt) // a full device drops, as networks do
	}
}

// deliveries is a heap by time, and by arrival for packets of one time.
type deliveries struct {
	list []queued
	seq  uint64
}

type queued struct {
	delivery
	seq uint64
}

func (h *deliveries) push(d delivery) {
	h.seq++
	heap.Push(h, queued{d, h.seq})
}

func (h *deliveries) Len() int { return len(h.list) }
func (h *deliveries) Less(i, j int) bool {
	a, b := h.list[i], h.list[j]
	if a.at.Equal(b.at) {
		return a.seq < b.seq
	}
	return a.at.Before(b.at)
}
func (h *deliveries) Swap(i, j int) { h.list[i], h.list[j] = h.list[j], h.list[i] }
func (h *deliveries) Push(x any)    { h.list = append(h.list, x.(queued)) }
func (h *deliveries) Pop() any {
	last := h.list[len(h.list)-1]
	h.list[len(h.list)-1] = queued{}
	h.list = h.list[:len(h.list)-1]
	return last
}
