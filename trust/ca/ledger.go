// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	issuedDir    = "ca/issued"
	ledgerSize   = 8 << 20
	ledgerAge    = 24 * time.Hour
	ledgerGrace  = 30 * 24 * time.Hour // how long a file is kept after everything in it has ended
	ledgerSuffix = ".jsonl"
)

// Entry is one line of the ledger of issued certificates.
type Entry struct {
	Serial   string    `json:"serial"`
	ID       string    `json:"id"`     // SPIFFE ID; of the configuration API: the subject's common name
	Kind     string    `json:"kind"`   // root, issuer, svid, serving, client
	Issuer   string    `json:"issuer"` // key identifier
	NotAfter time.Time `json:"not_after"`
	At       time.Time `json:"at"`
	By       string    `json:"by"` // who asked for it
}

// ledger gives out serial numbers and writes down what was issued. See DESIGN.md.
type ledger struct {
	dir  files
	kind string // of the files: svid, authority or api; each has one ledger

	mu      sync.Mutex
	file    appender
	block   uint32
	count   uint32
	size    int
	opened  time.Time
	ends    map[string]fileEnd
	waiting *batch
	writing bool
}

// batch is the lines of callers that wait for one fsync.
type batch struct {
	lines []byte
	done  chan struct{}
	err   error
}

func newLedger(dir files, kind string) *ledger {
	return &ledger{dir: dir, kind: kind, ends: map[string]fileEnd{}}
}

// serial is a number that this data directory has never given out.
func (l *ledger) serial(now time.Time) (*big.Int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil || l.size >= ledgerSize || now.Sub(l.opened) >= ledgerAge || now.Before(l.opened.Add(-ledgerAge)) || l.count == 1<<32-1 {
		if !l.writing { // else the next one does it
			if err := l.openLocked(now); err != nil {
				return nil, fmt.Errorf("ledger of issued certificates: %w", err)
			}
		}
	}
	if l.file == nil {
		return nil, errors.New("ledger of issued certificates: the last write failed")
	}
	l.count++
	b := make([]byte, 16)
	_, _ = rand.Read(b[:8])
	b[0] = b[0]&0x3f | 0x40 // positive, 127 bits
	binary.BigEndian.PutUint32(b[8:], l.block)
	binary.BigEndian.PutUint32(b[12:], l.count)
	return new(big.Int).SetBytes(b), nil
}

// openLocked begins the next block and drops files that have served.
func (l *ledger) openLocked(now time.Time) error {
	names, err := l.dir.List(issuedDir)
	if err != nil {
		return err
	}
	next := l.block
	for _, name := range names {
		if n, ok := blockOf(name); ok {
			next = max(next, n)
		}
	}
	for {
		if next++; next == 0 {
			return errors.New("no block numbers are left")
		}
		f, err := l.dir.append(path.Join(issuedDir, fmt.Sprintf("%08x-%s%s", next, l.kind, ledgerSuffix)))
		if errors.Is(err, fs.ErrExist) { // another ledger of this directory was faster
			continue
		}
		if err != nil {
			return err
		}
		if l.file != nil {
			_ = l.file.Close() // every line in it is on disk
		}
		l.file, l.block, l.count, l.size, l.opened = f, next, 0, 0, now
		break
	}
	return l.dropLocked(names, now)
}

func blockOf(name string) (uint32, bool) {
	head, _, ok := strings.Cut(name, "-")
	n, err := strconv.ParseUint(head, 16, 32)
	return uint32(n), ok && err == nil && strings.HasSuffix(name, ledgerSuffix)
}

// dropLocked deletes the files of this kind in which everything ended 30 days ago. The newest stays, by the caller: it is not in names.
func (l *ledger) dropLocked(names []string, now time.Time) error {
	var errs []error
	for _, name := range names {
		if _, ok := blockOf(name); !ok || !strings.HasSuffix(name, "-"+l.kind+ledgerSuffix) {
			continue
		}
		file := path.Join(issuedDir, name)
		e, ok := l.ends[name]
		if !ok || !e.exact && now.After(e.at.Add(ledgerGrace)) {
			data, err := l.dir.ReadFile(file)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			e = lastEnd(data, now)
			l.ends[name] = e
		}
		if e.exact && now.After(e.at.Add(ledgerGrace)) {
			errs = append(errs, l.dir.Remove(file))
			delete(l.ends, name)
		}
	}
	return errors.Join(errs...)
}

// fileEnd is when the last certificate in a file ends, or, when that is not known yet, a time before that.
type fileEnd struct {
	at    time.Time
	exact bool
}

// lastEnd reads a file up to its first line when that says that it is too young to be dropped. An empty one stays: somebody may be about
// to write to it.
func lastEnd(data []byte, now time.Time) fileEnd {
	end := fileEnd{exact: true}
	if len(data) == 0 {
		return fileEnd{at: now}
	}
	for e := range entries(data) {
		if end.at.IsZero() && now.Before(e.At.Add(ledgerGrace)) {
			return fileEnd{at: e.At}
		}
		if e.NotAfter.After(end.at) {
			end.at = e.NotAfter
		}
	}
	return end
}

// entries reads lines; one that was cut short by a crash is left out: its certificate never left.
func entries(data []byte) func(func(Entry) bool) {
	return func(yield func(Entry) bool) {
		s := bufio.NewScanner(bytes.NewReader(data))
		s.Buffer(nil, 64<<10)
		for s.Scan() {
			var e Entry
			if json.Unmarshal(s.Bytes(), &e) == nil && e.Serial != "" && !yield(e) {
				return
			}
		}
	}
}

// record writes a certificate down; only then may it leave.
func (l *ledger) record(c *x509.Certificate, id, kind, by string, now time.Time) error {
	line, err := json.Marshal(Entry{
		Serial: fmt.Sprintf("%032x", c.SerialNumber), ID: id, Kind: kind, Issuer: fmt.Sprintf("%x", c.AuthorityKeyId),
		NotAfter: c.NotAfter.UTC(), At: now.UTC(), By: by,
	})
	if err != nil {
		return err
	}
	l.mu.Lock()
	if l.waiting == nil {
		l.waiting = &batch{done: make(chan struct{})}
	}
	b := l.waiting
	b.lines = append(append(b.lines, line...), '\n')
	if l.writing {
		l.mu.Unlock()
		<-b.done // whoever writes now takes it
	} else {
		l.writing = true
		for l.waiting != nil {
			l.writeLocked()
		}
		l.writing = false
		l.mu.Unlock()
	}
	if b.err != nil {
		return fmt.Errorf("ledger of issued certificates: %w", b.err)
	}
	return nil
}

// writeLocked writes what is waiting; it lets go of the lock while the disk works.
func (l *ledger) writeLocked() {
	b, f := l.waiting, l.file
	l.waiting = nil
	l.mu.Unlock()
	if f == nil {
		b.err = errors.New("the last write failed")
	} else {
		b.err = f.Append(b.lines)
	}
	l.mu.Lock()
	l.size += len(b.lines)
	if b.err != nil && l.file != nil { // what of it is on disk is not known: the next goes elsewhere
		_ = l.file.Close()
		l.file = nil
	}
	close(b.done)
}

func (l *ledger) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	l.file = nil
	return err
}
