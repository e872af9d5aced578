// SPDX-License-Identifier: Apache-2.0

// Package gossip feeds membership and catalog hints from Serf into the model.
package gossip
