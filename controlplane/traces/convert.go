// SPDX-License-Identifier: Apache-2.0

package traces

import (
	"encoding/hex"
	"strconv"
	"strings"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/span"
)

// Bounds of one span; what is longer is cut, what is more is left out.
const (
	maxAttributes = 96
	maxEvents     = 32
	maxKey        = 128
	maxValue      = 1024
	maxSpanName   = 256
)

// fromResource are the attributes of a resource that a span keeps.
var fromResource = []string{span.Role, span.ServiceNamespace, span.ServiceInstance, span.CloudRegion, span.CloudZone, span.TrustDomain, Reporter}

var kindNames = map[tracepb.Span_SpanKind]string{
	tracepb.Span_SPAN_KIND_SERVER: "server", tracepb.Span_SPAN_KIND_CLIENT: "client", tracepb.Span_SPAN_KIND_INTERNAL: "internal",
	tracepb.Span_SPAN_KIND_PRODUCER: "producer", tracepb.Span_SPAN_KIND_CONSUMER: "consumer",
}

var statusNames = map[tracepb.Status_StatusCode]string{
	tracepb.Status_STATUS_CODE_UNSET: "unset", tracepb.Status_STATUS_CODE_OK: "ok", tracepb.Status_STATUS_CODE_ERROR: "error",
}

// convert returns one span as it is kept; resource are the attributes of where it comes from.
func convert(resource map[string]string, s *tracepb.Span) *controlpb.Span {
	out := &controlpb.Span{
		SpanId: hex.EncodeToString(s.GetSpanId()), Name: cut(s.GetName(), maxSpanName), Kind: kindNames[s.GetKind()],
		Cluster: resource[span.Cluster], Service: resource[span.ServiceName],
		StartUnixNano: int64(s.GetStartTimeUnixNano()), EndUnixNano: int64(s.GetEndTimeUnixNano()),
		Attributes: texts(s.GetAttributes()), Status: statusNames[s.GetStatus().GetCode()], StatusMessage: cut(s.GetStatus().GetMessage(), maxValue),
	}
	if len(s.GetParentSpanId()) == 8 {
		out.ParentId = hex.EncodeToString(s.GetParentSpanId())
	}
	for _, key := range fromResource {
		if v := resource[key]; v != "" {
			out.Attributes[key] = v
		}
	}
	for _, e := range s.GetEvents()[:min(len(s.GetEvents()), maxEvents)] {
		out.Events = append(out.Events, &controlpb.SpanEvent{
			Name: cut(e.GetName(), maxSpanName), UnixNano: int64(e.GetTimeUnixNano()), Attributes: texts(e.GetAttributes()),
		})
	}
	return out
}

func texts(list []*commonpb.KeyValue) map[string]string {
	all := make(map[string]string, min(len(list), maxAttributes))
	for _, kv := range list {
		if len(all) >= maxAttributes {
			break
		}
		if k := kv.GetKey(); k != "" && len(k) <= maxKey {
			all[cut(k, maxKey)] = cut(text(kv.GetValue(), 0), maxValue)
		}
	}
	return all
}

// text renders a value; nesting is shallow in what proxies send and cut off beyond that.
func text(v *commonpb.AnyValue, depth int) string {
	switch x := v.GetValue().(type) {
	case *commonpb.AnyValue_StringValue:
		return x.StringValue
	case *commonpb.AnyValue_BoolValue:
		return strconv.FormatBool(x.BoolValue)
	case *commonpb.AnyValue_IntValue:
		return strconv.FormatInt(x.IntValue, 10)
	case *commonpb.AnyValue_DoubleValue:
		return strconv.FormatFloat(x.DoubleValue, 'g', -1, 64)
	case *commonpb.AnyValue_BytesValue:
		return hex.EncodeToString(x.BytesValue[:min(len(x.BytesValue), maxValue/2)])
	case *commonpb.AnyValue_ArrayValue:
		if depth > 1 {
			return "…"
		}
		var parts []string
		size := 0
		for _, e := range x.ArrayValue.GetValues() {
			p := text(e, depth+1)
			if size += len(p); size > maxValue {
				break
			}
			parts = append(parts, p)
		}
		return strings.Join(parts, ", ")
	}
	return ""
}

// cut returns at most n bytes of valid UTF-8.
func cut(s string, n int) string { return strings.ToValidUTF8(s[:min(len(s), n)], "") }
