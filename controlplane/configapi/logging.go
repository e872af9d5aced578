// SPDX-License-Identifier: Apache-2.0

package configapi

import (
	"context"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap/zapcore"
	"k8s.io/klog/v2"
)

// zapToSlog passes etcd's log on. What etcd calls information is for debugging here, and so are its warnings, which are mostly
// about settings that we chose, but for those about a slow disk; errors stay errors.
type zapToSlog struct {
	handler slog.Handler
}

func zapLevel(l zapcore.Level) slog.Level {
	switch {
	case l >= zapcore.ErrorLevel:
		if ending.Load() {
			return slog.LevelDebug // listeners that were closed
		}
		return slog.LevelError
	}
	return slog.LevelDebug
}

// slow are parts of the warnings that an operator acts on.
var slow = []string{"took too long", "slow fdatasync", "too slow", "overloaded"}

// Enabled, With, Check, Write and Sync are zapcore.Core.
func (z *zapToSlog) Enabled(l zapcore.Level) bool {
	return l >= zapcore.WarnLevel || z.handler.Enabled(context.Background(), zapLevel(l))
}

func (z *zapToSlog) With(fields []zapcore.Field) zapcore.Core {
	return &zapToSlog{z.handler.WithAttrs(attrs(fields))}
}

func (z *zapToSlog) Check(e zapcore.Entry, c *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if z.handler.Enabled(context.Background(), entryLevel(e)) {
		return c.AddCore(e, z)
	}
	return c
}

func (z *zapToSlog) Write(e zapcore.Entry, fields []zapcore.Field) error {
	r := slog.NewRecord(e.Time, entryLevel(e), e.Message, 0)
	r.AddAttrs(attrs(fields)...)
	return z.handler.Handle(context.Background(), r)
}

func entryLevel(e zapcore.Entry) slog.Level {
	if e.Level == zapcore.WarnLevel && slices.ContainsFunc(slow, func(s string) bool { return strings.Contains(e.Message, s) }) {
		return slog.LevelInfo
	}
	return zapLevel(e.Level)
}

func (z *zapToSlog) Sync() error { return nil }

func attrs(fields []zapcore.Field) []slog.Attr {
	enc := zapcore.NewMapObjectEncoder()
	out := make([]slog.Attr, 0, len(fields))
	for _, f := range fields {
		f.AddTo(enc)
		out = append(out, slog.Any(f.Key, enc.Fields[f.Key]))
	}
	return out
}

// routeKlog sends the libraries' log to l: what they call information is for debugging here. klog is global. What they call fatal
// ends the goroutine that says so and fails the server, but never the process from below: a start that is cut short calls itself
// fatal too.
func routeKlog(l *slog.Logger, fatal func()) {
	klog.SetSlogLogger(slog.New(&quieter{l.With("component", "apiserver").Handler()}))
	klog.OsExit = func(int) {
		if !ending.Load() {
			fatal()
		}
		runtime.Goexit()
	}
}

// quieter lowers every level: errors are information, the rest is for debugging.
type quieter struct{ slog.Handler }

func lower(l slog.Level) slog.Level {
	if l >= slog.LevelError {
		if ending.Load() {
			return slog.LevelDebug // requests that were cut off
		}
		return slog.LevelInfo // most are about what a caller did
	}
	return min(l, slog.LevelDebug)
}

func (q *quieter) Enabled(ctx context.Context, l slog.Level) bool {
	return q.Handler.Enabled(ctx, lower(l))
}

func (q *quieter) Handle(ctx context.Context, r slog.Record) error {
	n := slog.NewRecord(r.Time, lower(r.Level), r.Message, r.PC)
	if n.Time.IsZero() {
		n.Time = time.Now()
	}
	r.Attrs(func(a slog.Attr) bool { n.AddAttrs(a); return true })
	return q.Handler.Handle(ctx, n)
}

func (q *quieter) WithAttrs(a []slog.Attr) slog.Handler { return &quieter{q.Handler.WithAttrs(a)} }
func (q *quieter) WithGroup(n string) slog.Handler      { return &quieter{q.Handler.WithGroup(n)} }
