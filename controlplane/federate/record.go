// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	peersDir     = "peers"
	recordFormat = 1
)

// role says how a peer came to be known.
type role string

const (
	roleJoiner     role = "joiner"     // we joined it with its token
	roleIssuer     role = "issuer"     // it joined us with ours
	roleIntroduced role = "introduced" // a third member introduced it
)

// record is the state file of one peer.
type record struct {
	Format      int                       `json:"format"`
	TrustDomain spiffeid.TrustDomain      `json:"trustDomain"`
	Cluster     federation.ClusterName    `json:"cluster"`
	Federation  federation.FederationName `json:"federation"`
	Region      string                    `json:"region,omitempty"`
	Version     string                    `json:"version,omitempty"`
	SkewMillis  int64                     `json:"skewMillis,omitempty"`

	Role       role            `json:"role"`
	State      State           `json:"state"`
	Bundle     json.RawMessage `json:"bundle,omitempty"` // JWKS; none until exchanged
	BundleHash string          `json:"bundleHash"`

	BundleSource string      `json:"bundleSource,omitempty"` // join, catalog
	BundleAt     time.Time   `json:"bundleAt,omitzero"`      // when it came
	Seen         *storedSeen `json:"seen,omitempty"`         // which bundle of it all our proxies have acknowledged

	Gateways []gatewayRecord `json:"gateways,omitempty"`
	Sameness []string        `json:"sameness,omitempty"`

	TokenID      string                 `json:"tokenId,omitempty"`
	IntroducedBy federation.ClusterName `json:"introducedBy,omitempty"`
	Introduction []byte                 `json:"introduction,omitempty"` // as signed
	Told         []spiffeid.TrustDomain `json:"told,omitempty"`         // whom we introduced to it
	// Waiting are those of Told who had not proven themselves to it when we did, with the bundle's hash that we named
	Waiting map[spiffeid.TrustDomain]string `json:"waiting,omitempty"`

	ProbeOut bool      `json:"probeOut,omitempty"` // our probe was answered
	ProbeIn  bool      `json:"probeIn,omitempty"`  // its probe came
	Stages   []string  `json:"stages,omitempty"`
	Since    time.Time `json:"since"`
	Joined   time.Time `json:"joined,omitzero"`
	Expires  time.Time `json:"expires,omitzero"`
}

type storedSeen struct {
	Sequence uint64 `json:"sequence"`
	Hash     string `json:"hash"`
}

type gatewayRecord struct {
	Name      string   `json:"name"`
	Addresses []string `json:"addresses,omitempty"`
	Zone      string   `json:"zone,omitempty"`
}

func gatewaysIn(records []*controlpb.GatewayRecord) []gatewayRecord {
	out := make([]gatewayRecord, 0, len(records))
	for _, g := range records {
		out = append(out, gatewayRecord{Name: g.GetName(), Addresses: slices.Clone(g.GetAddresses()), Zone: g.GetZone()})
	}
	slices.SortFunc(out, func(a, b gatewayRecord) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func gatewaysOut(records []gatewayRecord) []*controlpb.GatewayRecord {
	out := make([]*controlpb.GatewayRecord, 0, len(records))
	for _, g := range records {
		out = append(out, &controlpb.GatewayRecord{Name: g.Name, Addresses: g.Addresses, Zone: g.Zone})
	}
	return out
}

func (r *record) clone() *record {
	c := *r
	c.Bundle, c.Introduction = slices.Clone(r.Bundle), slices.Clone(r.Introduction)
	c.Waiting = maps.Clone(r.Waiting)
	c.Gateways, c.Sameness, c.Told, c.Stages = slices.Clone(r.Gateways), slices.Clone(r.Sameness), slices.Clone(r.Told), slices.Clone(r.Stages)
	return &c
}

// outdated reports whether we introduced subject to r with a bundle that it has not any more, and r still waits for it.
func (r *record) outdated(td spiffeid.TrustDomain, subject *record) bool {
	told, ok := r.Waiting[td]
	return ok && told != subject.BundleHash
}

func (r *record) hash() [32]byte { return hashOf(r.BundleHash) }

func hashOf(text string) (h [32]byte) {
	b, _ := hex.DecodeString(text)
	copy(h[:], b)
	return h
}

func (r *record) trusted() bool { return r.State == StateJoining || r.State == StateReady }

func (r *record) setState(s State, now time.Time) {
	if r.State != s {
		r.State, r.Since = s, now
	}
}

func (r *record) stage(name string) {
	if !slices.Contains(r.Stages, name) {
		r.Stages = append(r.Stages, name)
	}
}

func hexHash(h [32]byte) string { return hex.EncodeToString(h[:]) }

func peerFile(td spiffeid.TrustDomain) string { return peersDir + "/" + td.String() + ".json" }

func writeRecord(dir *datadir.Dir, r *record) error {
	r.Format = recordFormat
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("peer %s: %w", r.TrustDomain, err)
	}
	if err := dir.WriteState(peerFile(r.TrustDomain), data); err != nil {
		return fmt.Errorf("peer %s: %w", r.TrustDomain, err)
	}
	return nil
}

// readRecords reads all peers. A damaged record was moved aside; its peer is unknown until it joins again.
func readRecords(dir *datadir.Dir, damaged func(name string, err error)) (map[spiffeid.TrustDomain]*peer, error) {
	out := map[spiffeid.TrustDomain]*peer{}
	names, err := dir.List(peersDir)
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return nil, fmt.Errorf("peers: %w", err)
	}
	for _, name := range names {
		base, ok := strings.CutSuffix(name, ".json")
		if !ok {
			continue
		}
		p, err := readRecord(dir, base)
		if err != nil {
			damaged(name, err)
			continue
		}
		out[p.rec.TrustDomain] = p
	}
	return out, nil
}

func readRecord(dir *datadir.Dir, name string) (*peer, error) {
	td, err := spiffeid.ParseTrustDomain(name)
	if err != nil {
		return nil, err
	}
	data, err := dir.ReadState(peerFile(td))
	if err != nil {
		return nil, err
	}
	r := &record{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, err
	}
	if r.Format != recordFormat || r.TrustDomain != td || r.Cluster.IsZero() {
		return nil, fmt.Errorf("format %d of %s", r.Format, r.TrustDomain)
	}
	return newPeer(r)
}

// peer is a record with what follows from it and what is only in memory. Guarded by Manager.mu; rec is replaced, never changed.
type peer struct {
	rec    *record
	bundle *trust.Bundle // nil while not exchanged

	headAsked bool   // it has told us which head of ours it holds, in this term
	refused   string // why its last catalog update was refused
	bundleErr string // why the bundle in its catalog was not taken
	aheadOfUs uint64 // the sequence of ours that it holds and we do not have, once alarmed
	lastUp    time.Time
	busy      bool // a probe, a meeting or a head-of is under way
	next      time.Time
	delay     time.Duration
}

func newPeer(r *record) (*peer, error) {
	p := &peer{rec: r}
	if len(r.Bundle) > 0 {
		b, err := trust.ParseBundle(r.TrustDomain, r.Bundle)
		if err != nil {
			return nil, err
		}
		p.bundle = b
	}
	return p, nil
}
