// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// capture looks at every packet of this network namespace for secrets, and remembers between which addresses it saw them.
type capture struct {
	fd      int
	secrets [][]byte
	stop    chan struct{}
	done    chan struct{}

	mu      sync.Mutex
	packets int
	seen    map[string]int // "protocol from to" → packets that hold a secret
}

// startCapture returns nil without the right to capture.
func startCapture(t *testing.T, secrets ...[]byte) *capture {
	t.Helper()
	if os.Geteuid() != 0 {
		return nil
	}
	all := int(uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8) // in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all)
	if err != nil {
		t.Fatalf("packet socket: %v", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256<<20); err != nil {
		t.Fatalf("packet socket: %v", err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
		t.Fatalf("packet socket: %v", err)
	}
	c := &capture{fd: fd, secrets: secrets, stop: make(chan struct{}), done: make(chan struct{}), seen: map[string]int{}}
	go c.run()
	t.Cleanup(func() { c.close(t) })
	return c
}

func (c *capture) run() {
	defer close(c.done)
	b := make([]byte, 128<<10)
	for {
		n, _, err := unix.Recvfrom(c.fd, b, 0)
		if err == nil && n > 0 {
			c.judge(b[:n])
			continue // what is queued still counts after the stop
		}
		select {
		case <-c.stop:
			return
		default:
		}
	}
}

func (c *capture) judge(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.packets++
	if slices.ContainsFunc(c.secrets, func(s []byte) bool { return bytes.Contains(p, s) }) {
		c.seen[ends(p)]++
	}
}

// ends names protocol, source and destination of an IP packet.
func ends(p []byte) string {
	var proto byte
	var from, to netip.Addr
	var rest []byte
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		proto, from, to = p[9], netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
		rest = p[min(len(p), int(p[0]&15)*4):]
	case len(p) >= 40 && p[0]>>4 == 6:
		proto, from, to, rest = p[6], netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])), p[40:]
	default:
		return fmt.Sprintf("unknown %x", p[:min(len(p), 16)])
	}
	name := map[byte]string{6: "tcp", 17: "udp"}[proto]
	if name == "" || len(rest) < 4 {
		return fmt.Sprintf("ip-%d %s %s", proto, from, to)
	}
	return fmt.Sprintf("%s %s %s", name, netip.AddrPortFrom(from, binary.BigEndian.Uint16(rest)), netip.AddrPortFrom(to, binary.BigEndian.Uint16(rest[2:])))
}

// close ends the capture after everything queued was judged; a lost packet would make a clean result worthless.
func (c *capture) close(t *testing.T) {
	t.Helper()
	select {
	case <-c.stop:
		return
	default:
	}
	close(c.stop)
	<-c.done
	st, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	_ = unix.Close(c.fd)
	if err != nil || st.Drops != 0 {
		t.Errorf("the capture lost packets: %+v, %v", st, err)
	}
}

// memoryHolds reports which of the secrets are in the memory of a process.
func memoryHolds(t *testing.T, pid int, secrets ...[]byte) (held []bool, scanned int64) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	held = make([]bool, len(secrets))
	const step, overlap = 1 << 20, 4 << 10
	b := make([]byte, step+overlap)
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var mode string
		if n, _ := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); n != 3 || mode[0] != 'r' || strings.Contains(line, "[v") {
			continue
		}
		for at := from; at < to; at += step {
			n, _ := mem.ReadAt(b[:min(int64(len(b)), to-at)], at)
			scanned += int64(min(n, step))
			for i, s := range secrets {
				held[i] = held[i] || bytes.Contains(b[:n], s)
			}
		}
	}
	return held, scanned
}
