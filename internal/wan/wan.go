// SPDX-License-Identifier: Apache-2.0

package wan

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Site is one end of links.
type Site struct {
	Name    string
	Inside  string // host:port of the gateway; set later by Attach when empty
	Outside string // host:port that the WAN owns, UDP and TCP; port 0 picks one
}

// Link is one direction between two sites.
type Link struct {
	Delay    time.Duration // one way
	Jitter   time.Duration // added uniformly from 0; never reorders
	Loss     float64       // of datagrams, 0..1
	Dark     bool          // drops everything silently
	BlockUDP bool          // drops datagrams only
}

// maxQueue bounds what is under way in one direction, in datagrams or stream chunks; more datagrams are dropped, and
// streams are not read on.
const maxQueue = 8192

type pair struct{ from, to string }

// WAN is the network. Make it with New, then Run it.
type WAN struct {
	log   *slog.Logger
	sites []*site

	mu      sync.Mutex
	links   map[pair]Link
	changed chan struct{} // closed and replaced at each SetLink
	rnd     *rand.Rand

	forwarded, dropped atomic.Int64
}

type site struct {
	Site
	udp    *net.UDPConn
	tcp    *net.TCPListener
	inside atomic.Pointer[netip.AddrPort]
}

// New opens the outside addresses of all sites. Links have no delay until SetLink.
func New(sites []Site, seed uint64, log *slog.Logger) (*WAN, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	w := &WAN{log: log, links: map[pair]Link{}, changed: make(chan struct{}), rnd: rand.New(rand.NewPCG(seed, 1))}
	for _, s := range sites {
		st, err := open(s)
		if err != nil {
			w.close()
			return nil, fmt.Errorf("wan site %s: %w", s.Name, err)
		}
		w.sites = append(w.sites, st)
		if s.Inside != "" {
			if err := w.Attach(s.Name, s.Inside); err != nil {
				w.close()
				return nil, err
			}
		}
	}
	return w, nil
}

// open binds UDP and TCP to the same port.
func open(s Site) (*site, error) {
	var last error
	for range 20 {
		l, err := net.Listen("tcp", s.Outside)
		if err != nil {
			return nil, err
		}
		addr := l.Addr().(*net.TCPAddr)
		u, err := net.ListenUDP("udp", &net.UDPAddr{IP: addr.IP, Port: addr.Port})
		if err == nil {
			_ = u.SetReadBuffer(4 << 20)
			_ = u.SetWriteBuffer(4 << 20)
			return &site{Site: s, udp: u, tcp: l.(*net.TCPListener)}, nil
		}
		last = errors.Join(err, l.Close())
	}
	return nil, last
}

// Outside is the bound outside address of a site.
func (w *WAN) Outside(name string) string {
	if s := w.site(name); s != nil {
		return s.tcp.Addr().String()
	}
	return ""
}

// Attach says where a site's gateway listens; a restarted gateway may move.
func (w *WAN) Attach(name, inside string) error {
	a, err := netip.ParseAddrPort(inside)
	s := w.site(name)
	if err != nil || s == nil {
		return fmt.Errorf("wan: attach %s at %q: %w", name, inside, errors.Join(err, errIf(s == nil, "no such site")))
	}
	s.inside.Store(&a)
	return nil
}

func errIf(bad bool, text string) error {
	if bad {
		return errors.New(text)
	}
	return nil
}

func (w *WAN) site(name string) *site {
	for _, s := range w.sites {
		if s.Name == name {
			return s
		}
	}
	return nil
}

// SetLink changes one direction; what is under way keeps its delay.
func (w *WAN) SetLink(from, to string, l Link) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.links[pair{from, to}] = l
	close(w.changed)
	w.changed = make(chan struct{})
}

// SetBoth changes both directions between two sites.
func (w *WAN) SetBoth(a, b string, l Link) {
	w.SetLink(a, b, l)
	w.SetLink(b, a, l)
}

// Link is the present state of one direction.
func (w *WAN) Link(from, to string) Link {
	l, _ := w.link(from, to)
	return l
}

func (w *WAN) link(from, to string) (Link, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.links[pair{from, to}], w.changed
}

// Counts returns how many datagrams were forwarded and how many were dropped.
func (w *WAN) Counts() (forwarded, dropped int64) { return w.forwarded.Load(), w.dropped.Load() }

// Run forwards until ctx ends, and returns after all its goroutines have.
func (w *WAN) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, s := range w.sites {
		queues := map[string]chan datagram{}
		for _, from := range w.sites {
			if from == s {
				continue
			}
			q := make(chan datagram, maxQueue)
			queues[from.Name] = q
			wg.Go(func() { w.deliver(ctx, from, s, q) })
		}
		wg.Go(func() { w.receive(s, queues) })
		wg.Go(func() { w.accept(ctx, s) })
	}
	<-ctx.Done()
	w.close()
	wg.Wait()
	return nil
}

func (w *WAN) close() {
	for _, s := range w.sites {
		_ = s.udp.Close()
		_ = s.tcp.Close()
	}
}

type datagram struct {
	due  time.Time
	data []byte
}

// receive reads what arrives at the outside of s and queues it by source.
func (w *WAN) receive(s *site, queues map[string]chan datagram) {
	defer func() {
		for _, q := range queues {
			close(q)
		}
	}()
	buf := make([]byte, 64<<10)
	for {
		n, from, err := s.udp.ReadFromUDPAddrPort(buf)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue // an ICMP error of an earlier write
		}
		src := w.byInside(from)
		if src == nil || src == s {
			w.dropped.Add(1)
			continue
		}
		l, _ := w.link(src.Name, s.Name)
		if l.Dark || l.BlockUDP || l.Loss > 0 && w.chance() < l.Loss {
			w.dropped.Add(1)
			continue
		}
		d := datagram{time.Now().Add(l.Delay + w.jitter(l)), append([]byte(nil), buf[:n]...)}
		select {
		case queues[src.Name] <- d:
		default:
			w.dropped.Add(1)
		}
	}
}

func (w *WAN) chance() float64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rnd.Float64()
}

func (w *WAN) jitter(l Link) time.Duration {
	if l.Jitter <= 0 {
		return 0
	}
	return time.Duration(w.chance() * float64(l.Jitter))
}

func (w *WAN) byInside(a netip.AddrPort) *site {
	a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	for _, s := range w.sites {
		if in := s.inside.Load(); in != nil && *in == a {
			return s
		}
	}
	return nil
}

// deliver sends from's datagrams to s when they are due, from from's outside address.
func (w *WAN) deliver(ctx context.Context, from, s *site, q <-chan datagram) {
	for d := range q {
		if !sleepUntil(ctx, d.due) {
			return
		}
		in := s.inside.Load()
		if in == nil {
			w.dropped.Add(1)
			continue
		}
		if l, _ := w.link(from.Name, s.Name); l.Dark || l.BlockUDP {
			w.dropped.Add(1)
			continue
		}
		if _, err := from.udp.WriteToUDPAddrPort(d.data, *in); err != nil {
			w.dropped.Add(1)
			continue
		}
		w.forwarded.Add(1)
	}
}

func sleepUntil(ctx context.Context, due time.Time) bool {
	wait := time.Until(due)
	if wait <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
