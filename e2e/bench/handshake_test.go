// SPDX-License-Identifier: Apache-2.0

package bench_test

import (
	"regexp"
	"strconv"
	"testing"
)

var handshakeLine = regexp.MustCompile(`BenchmarkHandshake/kx=(\S+?)-\d+\s.*?([\d.]+) cpu-µs/op\s+([\d.]+) spiffe-cpu-µs/op`)

// handshakes are the rows of trust's own benchmark: a mutual handshake, both ends, beside crypto/tls with go-spiffe's configuration.
func handshakes(t *testing.T) []row {
	t.Helper()
	out := run(t, "go", "test", "-run", "^$", "-bench", "^BenchmarkHandshake$", "-benchtime", "2000x", "../../trust")
	var rows []row
	for _, m := range handshakeLine.FindAllStringSubmatch(out, -1) {
		ours, errOurs := strconv.ParseFloat(m[2], 64)
		base, errBase := strconv.ParseFloat(m[3], 64)
		if errOurs != nil || errBase != nil {
			t.Fatalf("%q", m[0])
		}
		rows = append(rows, ratioRow("mutual TLS handshake, "+m[1]+", both ends: CPU", ours, base, "µs", "crypto/tls with go-spiffe"))
	}
	if len(rows) != 2 {
		t.Fatalf("%d figures of handshakes in:\n%s", len(rows), out)
	}
	return rows
}
