// SPDX-License-Identifier: Apache-2.0

// Package controlpb is the wire contract between a cluster's processes: protobuf messages and gRPC stubs, and the ADS
// service under Envoy's path. It holds no logic; package wire converts to and from values of federation.
//
// Every message may gain fields; none may change meaning. gen.sh regenerates it.
package controlpb

//go:generate ./gen.sh
