// SPDX-License-Identifier: Apache-2.0

// Package gossip runs Serf among the gateways of a federation, over the sessions they already have, and makes two hints of it:
// who is there (whom one might dial), and that somebody's catalogs changed. Nothing else may be computed from it: no route, health,
// trust or membership. Gossip that is dead, late or poisoned costs time and nothing else.
//
// Gateways call Serf's packets and streams through Link, which has authenticated the session's other end. Before Serf sees a
// message it is taken apart, judged by who sent it, and put together again (filter.go): a member can say nothing about another
// cluster's members but that they are alive, and no clock moves far. DESIGN.md has the rules.
//
// A Gossip may be used concurrently. Run owns every goroutine, including those that Serf and memberlist leave running after their
// shutdown, and waits for all of them.
package gossip
