// SPDX-License-Identifier: Apache-2.0

package metric

import (
	"net/http"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Overflow is the label value under which series beyond the cap are folded.
const Overflow = "_overflow"

const maxLabel = 128

// Config configures a Registry.
type Config struct {
	Series  int               // per metric; default 2000
	Version string            // for strait_build_info; empty leaves it out
	Role    string            // gateway, sidecar, controlplane
	Const   map[string]string // labels of every metric
	Process bool              // also the Go runtime's and the process's own metrics
}

// Registry holds the metrics of one process.
type Registry struct {
	series  int
	wrapped prometheus.Registerer
	all     *prometheus.Registry
	dropped *prometheus.CounterVec
}

// New returns an empty registry.
func New(cfg Config) *Registry {
	if cfg.Series <= 0 {
		cfg.Series = 2000
	}
	r := &Registry{series: cfg.Series, all: prometheus.NewRegistry()}
	r.wrapped = prometheus.WrapRegistererWith(cfg.Const, r.all)
	r.dropped = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "strait_series_dropped_total", Help: "Observations folded into _overflow because their metric holds its most series.",
	}, []string{"metric"})
	r.wrapped.MustRegister(r.dropped)
	if cfg.Process {
		r.wrapped.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	}
	if cfg.Version != "" {
		r.Gauge("strait_build_info", "Version of this process; always 1.", "version", "role").With(cfg.Version, cfg.Role).Set(1)
	}
	return r
}

// Handler serves the registry as text, OpenMetrics where asked for (exemplars need it).
func (r *Registry) Handler() http.Handler {
	return promhttp.HandlerFor(r.all, promhttp.HandlerOpts{EnableOpenMetrics: true, ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: 4})
}

// Gather returns what Handler would serve, for tests and for OTLP export.
func (r *Registry) Gather() prometheus.Gatherer { return r.all }

// family is the capped children of one metric: T is what a label tuple resolves to.
type family[T any] struct {
	name     string
	labels   int
	series   int
	make     func(values ...string) T
	dropped  prometheus.Counter
	mu       sync.RWMutex
	children map[string]T
	overflow *T
}

func newFamily[T any](r *Registry, name string, labels int, series int, build func(...string) T) *family[T] {
	return &family[T]{name: name, labels: labels, series: series, make: build, dropped: r.dropped.WithLabelValues(name), children: map[string]T{}}
}

func (f *family[T]) with(values []string) T {
	if len(values) != f.labels {
		panic("metric: " + f.name + ": wrong number of label values") // our own call
	}
	key := strings.Join(values, "\xff") // no byte of UTF-8: tuples cannot collide once cleaned, and unclean ones only alias
	f.mu.RLock()
	child, ok := f.children[key]
	f.mu.RUnlock()
	if ok {
		return child
	}
	clean := make([]string, len(values))
	for i, v := range values {
		clean[i] = cleanLabel(v)
	}
	key = strings.Join(clean, "\xff")
	f.mu.Lock()
	defer f.mu.Unlock()
	if child, ok := f.children[key]; ok {
		return child
	}
	if len(f.children) < f.series-1 || f.labels == 0 {
		child = f.make(clean...)
		f.children[key] = child
		return child
	}
	f.dropped.Inc()
	if f.overflow == nil {
		for i := range clean {
			clean[i] = Overflow
		}
		child = f.make(clean...)
		f.overflow = &child
	}
	return *f.overflow
}

func cleanLabel(v string) string {
	if len(v) > maxLabel {
		v = v[:maxLabel]
	}
	if utf8.ValidString(v) {
		return v
	}
	return strings.ToValidUTF8(v, "�")
}

// Counter is a family of counters.
type Counter struct{ f *family[prometheus.Counter] }

// CounterValue is one series of a Counter.
type CounterValue struct{ c prometheus.Counter }

// Counter registers a counter. A name that is taken is an error of the programmer and panics.
func (r *Registry) Counter(name, help string, labels ...string) *Counter {
	if r == nil {
		return nil
	}
	vec := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	r.wrapped.MustRegister(vec)
	return &Counter{newFamily(r, name, len(labels), r.series, func(v ...string) prometheus.Counter { return vec.WithLabelValues(v...) })}
}

// With returns the series of these label values.
func (c *Counter) With(values ...string) CounterValue {
	if c == nil {
		return CounterValue{}
	}
	return CounterValue{c.f.with(values)}
}

// Inc adds one.
func (v CounterValue) Inc() { v.Add(1) }

// Add adds n, which must not be negative.
func (v CounterValue) Add(n float64) {
	if v.c != nil {
		v.c.Add(n)
	}
}

// Gauge is a family of gauges.
type Gauge struct {
	f   *family[prometheus.Gauge]
	vec *prometheus.GaugeVec
}

// GaugeValue is one series of a Gauge.
type GaugeValue struct{ g prometheus.Gauge }

// Gauge registers a gauge.
func (r *Registry) Gauge(name, help string, labels ...string) *Gauge {
	if r == nil {
		return nil
	}
	vec := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	r.wrapped.MustRegister(vec)
	return &Gauge{newFamily(r, name, len(labels), r.series, func(v ...string) prometheus.Gauge { return vec.WithLabelValues(v...) }), vec}
}

// GaugeFunc registers a gauge without labels whose value is asked for at each scrape.
func (r *Registry) GaugeFunc(name, help string, value func() float64) {
	if r != nil {
		r.wrapped.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
}

// CounterFunc registers a counter without labels whose value is asked for at each scrape.
func (r *Registry) CounterFunc(name, help string, value func() float64) {
	if r != nil {
		r.wrapped.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, value))
	}
}

// With returns the series of these label values.
func (g *Gauge) With(values ...string) GaugeValue {
	if g == nil {
		return GaugeValue{}
	}
	return GaugeValue{g.f.with(values)}
}

// Forget removes a series, for things that have gone; it makes room under the cap.
func (g *Gauge) Forget(values ...string) {
	if g == nil || len(values) != g.f.labels {
		return
	}
	clean := make([]string, len(values))
	for i, v := range values {
		clean[i] = cleanLabel(v)
	}
	g.f.mu.Lock()
	defer g.f.mu.Unlock()
	key := strings.Join(clean, "\xff")
	if _, ok := g.f.children[key]; ok {
		delete(g.f.children, key)
		g.vec.DeleteLabelValues(clean...)
	}
}

// Set sets the value.
func (v GaugeValue) Set(n float64) {
	if v.g != nil {
		v.g.Set(n)
	}
}

// Add adds n, which may be negative.
func (v GaugeValue) Add(n float64) {
	if v.g != nil {
		v.g.Add(n)
	}
}

// Inc adds one.
func (v GaugeValue) Inc() { v.Add(1) }

// Dec takes one away.
func (v GaugeValue) Dec() { v.Add(-1) }

// Histogram is a family of histograms.
type Histogram struct{ f *family[prometheus.Observer] }

// HistogramValue is one series of a Histogram.
type HistogramValue struct{ o prometheus.Observer }

// Latency is the bucket layout for durations in seconds: 0.5 ms to a minute.
var Latency = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}

// Histogram registers a histogram with classic buckets and a native one. Its cap is lower, because each series of it is
// as large as a score of counters.
func (r *Registry) Histogram(name, help string, buckets []float64, labels ...string) *Histogram {
	if r == nil {
		return nil
	}
	vec := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: name, Help: help, Buckets: buckets, NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
	}, labels)
	r.wrapped.MustRegister(vec)
	series := max(r.series/4, min(16, r.series))
	return &Histogram{newFamily(r, name, len(labels), series, func(v ...string) prometheus.Observer { return vec.WithLabelValues(v...) })}
}

// With returns the series of these label values.
func (h *Histogram) With(values ...string) HistogramValue {
	if h == nil {
		return HistogramValue{}
	}
	return HistogramValue{h.f.with(values)}
}

// Observe counts one value.
func (v HistogramValue) Observe(x float64) {
	if v.o != nil {
		v.o.Observe(x)
	}
}

// ObserveTrace counts one value with the trace that shows it; an empty id is left out.
func (v HistogramValue) ObserveTrace(x float64, trace string) {
	if e, ok := v.o.(prometheus.ExemplarObserver); ok && trace != "" {
		e.ObserveWithExemplar(x, prometheus.Labels{"trace_id": trace})
		return
	}
	v.Observe(x)
}
