// SPDX-License-Identifier: Apache-2.0

package span

import (
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
)

// Kind is the role of a span in its call.
type Kind int32

// Kinds.
const (
	Internal Kind = Kind(tracepb.Span_SPAN_KIND_INTERNAL)
	Server   Kind = Kind(tracepb.Span_SPAN_KIND_SERVER)
	Client   Kind = Kind(tracepb.Span_SPAN_KIND_CLIENT)
)

const (
	maxAttributes = 64
	maxEvents     = 32
	maxText       = 1024
)

// Attr is one attribute.
type Attr struct {
	key   string
	value *commonpb.AnyValue
}

// String returns a text attribute; the text is cut at 1 KiB.
func String(key, v string) Attr {
	return Attr{key, &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: clean(v)}}}
}

// Int returns a number attribute.
func Int(key string, v int) Attr {
	return Attr{key, &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: int64(v)}}}
}

// Float returns a number attribute.
func Float(key string, v float64) Attr {
	return Attr{key, &commonpb.AnyValue{Value: &commonpb.AnyValue_DoubleValue{DoubleValue: v}}}
}

// Bool returns a truth attribute.
func Bool(key string, v bool) Attr {
	return Attr{key, &commonpb.AnyValue{Value: &commonpb.AnyValue_BoolValue{BoolValue: v}}}
}

// Millis returns a duration as a number of milliseconds.
func Millis(key string, d time.Duration) Attr {
	return Float(key, float64(d.Microseconds())/1000)
}

// Strings returns a list attribute.
func Strings(key string, v []string) Attr {
	list := &commonpb.ArrayValue{}
	for i, s := range v {
		if i == maxAttributes {
			break
		}
		list.Values = append(list.Values, String("", s).value)
	}
	return Attr{key, &commonpb.AnyValue{Value: &commonpb.AnyValue_ArrayValue{ArrayValue: list}}}
}

// Active is a span that has started. It always carries a valid Context; it records only when sampled. A nil Active is
// valid and records nothing.
type Active struct {
	recorder *Recorder // nil: not recorded
	context  Context
	span     *tracepb.Span
}

// Context is what children have as their parent.
func (a *Active) Context() Context {
	if a == nil {
		return Context{}
	}
	return a.context
}

// SetHop sets the hop index and cluster that travel on with the context.
func (a *Active) SetHop(hop int, cluster string) {
	if a != nil {
		a.context = a.context.WithHop(hop, cluster)
	}
}

// SetRetries sets the retries left that travel on with the context.
func (a *Active) SetRetries(n int) {
	if a != nil {
		a.context = a.context.WithRetries(n)
	}
}

// Recording reports whether what is set is kept.
func (a *Active) Recording() bool { return a != nil && a.recorder != nil && a.span != nil }

// SetName replaces the span's name.
func (a *Active) SetName(name string) {
	if a.Recording() {
		a.span.Name = clean(name)
	}
}

// Set adds attributes, replacing those of the same key. Empty texts are left out.
func (a *Active) Set(attrs ...Attr) {
	if !a.Recording() {
		return
	}
	for _, at := range attrs {
		a.span.Attributes = set(a.span.Attributes, at)
	}
}

func set(list []*commonpb.KeyValue, at Attr) []*commonpb.KeyValue {
	if s, ok := at.value.GetValue().(*commonpb.AnyValue_StringValue); ok && s.StringValue == "" {
		return list
	}
	for _, kv := range list {
		if kv.Key == at.key {
			kv.Value = at.value
			return list
		}
	}
	if len(list) >= maxAttributes {
		return list
	}
	return append(list, &commonpb.KeyValue{Key: at.key, Value: at.value})
}

// Event adds an event at the present time.
func (a *Active) Event(name string, attrs ...Attr) {
	if !a.Recording() {
		return
	}
	if len(a.span.Events) >= maxEvents {
		a.span.DroppedEventsCount++
		return
	}
	e := &tracepb.Span_Event{Name: name, TimeUnixNano: uint64(a.recorder.now().UnixNano())}
	for _, at := range attrs {
		e.Attributes = set(e.Attributes, at)
	}
	a.span.Events = append(a.span.Events, e)
}

// Fail marks the span as an error.
func (a *Active) Fail(errorType, message string) {
	if !a.Recording() {
		return
	}
	a.Set(String(ErrorType, errorType))
	a.span.Status = &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR, Message: clean(message)}
}

// End ends the span now and hands it to the recorder. Later calls do nothing.
func (a *Active) End() {
	if a.Recording() {
		a.EndAt(a.recorder.now())
	}
}

// EndAt ends the span at t.
func (a *Active) EndAt(t time.Time) {
	if !a.Recording() {
		return
	}
	a.span.EndTimeUnixNano = max(uint64(t.UnixNano()), a.span.StartTimeUnixNano)
	a.recorder.add(a.span)
	a.span = nil
}
