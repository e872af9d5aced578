// SPDX-License-Identifier: Apache-2.0

// Package metric is where the metrics of a process live: a registry over the Prometheus client whose every metric has a
// bounded number of series, and the handles of the metrics that more than one room writes.
//
// A metric holds at most 2,000 series (Config.Series). What would make one more is counted under the label value
// "_overflow" and in strait_series_dropped_total, so that no peer and no request can fill memory by inventing label
// values. Label values must come from configuration or from verified certificates; they are cut at 128 bytes and made valid
// UTF-8 anyway.
//
// All types are safe for concurrent use, and nil handles are valid and do nothing. The names of metrics are API.
package metric
