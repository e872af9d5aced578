// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/problem"
)

// TestEveryOperatorMethodHasARole: an RPC that somebody adds without saying who may call it fails here, and is refused (T9).
func TestEveryOperatorMethodHasARole(t *testing.T) {
	known := map[string]bool{}
	for _, m := range controlpb.Operator_ServiceDesc.Methods {
		known[m.MethodName] = true
	}
	for _, s := range controlpb.Operator_ServiceDesc.Streams {
		known[s.StreamName] = true
	}
	for name := range known {
		if operatorMethods[name] == roleNone {
			t.Errorf("%s has no role", name)
		}
	}
	for name := range operatorMethods {
		if !known[name] {
			t.Errorf("%s is in the table and not in the proto", name)
		}
	}
}

func TestInit(t *testing.T) {
	good := InitConfig{Federation: "acme", Cluster: "us-east", Region: "us-east-1"}
	dir := filepath.Join(t.TempDir(), "cp")
	with := func(f func(*InitConfig)) InitConfig {
		c := good
		c.DataDir = dir
		f(&c)
		return c
	}
	for name, tc := range map[string]struct {
		cfg  InitConfig
		code problem.Code
	}{
		"cluster name":    {with(func(c *InitConfig) { c.Cluster = "US_East" }), problem.Usage},
		"no cluster":      {with(func(c *InitConfig) { c.Cluster = "" }), problem.Usage},
		"no region":       {with(func(c *InitConfig) { c.Region = "" }), problem.Usage},
		"trust domain":    {with(func(c *InitConfig) { c.TrustDomain = "Us-East.acme" }), problem.Usage},
		"federation name": {with(func(c *InitConfig) { c.Federation = "a.b" }), problem.Usage},
		"gateway address": {with(func(c *InitConfig) { c.GatewayAddresses = []string{"203.0.113.7"} }), problem.Usage},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Init(tc.cfg); !problem.Is(err, tc.code) {
				t.Errorf("err = %v", err)
			}
			if _, err := os.Stat(dir); err == nil {
				t.Error("a refused init wrote something")
			}
		})
	}
	r, err := Init(with(func(*InitConfig) {}))
	if err != nil || r.TrustDomain != "us-east.acme" {
		t.Fatalf("init: %v %+v", err, r)
	}
	if _, err := Init(with(func(*InitConfig) {})); !problem.Is(err, problem.AlreadyInitialized) {
		t.Errorf("second init: %v", err)
	}
	err = filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s is open to others: %v", p, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestUnpackRefuses: a backup is a file that somebody hands us; nothing in it may leave the directory or exhaust it.
func TestUnpackRefuses(t *testing.T) {
	type entry struct {
		name string
		kind byte
	}
	archive := func(entries ...entry) []byte {
		var b bytes.Buffer
		zw := gzip.NewWriter(&b)
		tw := tar.NewWriter(zw)
		for _, e := range entries {
			if err := tw.WriteHeader(&tar.Header{Name: e.name, Typeflag: e.kind, Mode: 0o600, Linkname: "/etc/passwd"}); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(tw.Close(), zw.Close()); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	marker, snapshot := entry{backupMarker, tar.TypeReg}, entry{storeSnapshot, tar.TypeReg}
	whole := archive(marker, entry{"ca/root.pem", tar.TypeReg}, snapshot)
	for name, data := range map[string][]byte{
		"nothing":        nil,
		"noise":          []byte("not a backup at all"),
		"no marker":      archive(entry{"ca/root.pem", tar.TypeReg}, snapshot),
		"no snapshot":    archive(marker),
		"climbing out":   archive(marker, entry{"../../etc/cron.d/x", tar.TypeReg}, snapshot),
		"absolute":       archive(marker, entry{"/etc/cron.d/x", tar.TypeReg}, snapshot),
		"a link":         archive(marker, entry{"ca/root.pem", tar.TypeSymlink}, snapshot),
		"twice the same": archive(marker, entry{"ca/root.pem", tar.TypeReg}, entry{"ca/root.pem", tar.TypeReg}, snapshot),
		"cut short":      whole[:len(whole)-6],
	} {
		t.Run(name, func(t *testing.T) {
			target := filepath.Join(t.TempDir(), "new")
			if _, err := Restore(bytes.NewReader(data), target); !problem.Is(err, problem.StateCorrupt) {
				t.Errorf("err = %v", err)
			}
			if left, _ := filepath.Glob(filepath.Join(filepath.Dir(target), "*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			if left, _ := filepath.Glob(filepath.Join(filepath.Dir(target), ".strait-restore-*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
	if err := unpack(bytes.NewReader(whole), t.TempDir()); err != nil {
		t.Errorf("a whole one: %v", err)
	}
}

// TestControlPlane starts the real thing from nothing, asks it over its socket, and stops it.
func TestControlPlane(t *testing.T) {
	base, err := os.MkdirTemp("", "cp-") // short: unix sockets live below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	dir := filepath.Join(base, "d")
	if _, err := Init(InitConfig{DataDir: dir, Federation: "acme", Cluster: "us-east", Region: "us-east-1"}); err != nil {
		t.Fatal(err)
	}
	cp, err := New(Config{DataDir: dir, Listen: "127.0.0.1:0", APIListen: "127.0.0.1:0", MetricsListen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{DataDir: dir}); !problem.Is(err, problem.DataDirBusy) {
		t.Errorf("a second control plane on the same directory: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- cp.Run(ctx) }()
	waitFor(t, filepath.Join(dir, "run", "addrs.json"), done)

	conn, err := grpc.NewClient("passthrough:///s", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(
		func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(dir, "run", "operator.sock"))
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	op := controlpb.NewOperatorClient(conn)
	st, err := op.Status(ctx, &controlpb.StatusRequest{}, grpc.WaitForReady(true))
	if err != nil || st.Cluster != "us-east" || len(st.Members) != 1 || st.Members[0].State != "self" {
		t.Errorf("status: %v %v", err, st)
	}
	var addrs Addrs
	data, err := os.ReadFile(filepath.Join(dir, "run", "addrs.json"))
	if err != nil || json.Unmarshal(data, &addrs) != nil || addrs.Listen == "" || addrs.API == "" || addrs.Metrics == "" {
		t.Errorf("addresses: %v %s", err, data)
	}
	stream, err := op.Backup(ctx, &controlpb.BackupRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var backup bytes.Buffer
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		backup.Write(chunk.Data)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("run: %v", err)
	}
	again := filepath.Join(base, "again")
	r, err := Restore(&backup, again)
	if err != nil || r.Cluster != "us-east" {
		t.Fatalf("restore: %v %+v", err, r)
	}
	for _, name := range []string{"ca/root.pem", "strait.yaml"} {
		a, _ := os.ReadFile(filepath.Join(dir, name))
		b, err := os.ReadFile(filepath.Join(again, name))
		if err != nil || !bytes.Equal(a, b) {
			t.Errorf("%s differs after the restore: %v", name, err)
		}
	}
}

func waitFor(t *testing.T, file string, done <-chan error) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	late := time.NewTimer(time.Minute)
	defer late.Stop()
	for {
		if data, err := os.ReadFile(file); err == nil && strings.HasSuffix(string(data), "\n") {
			return
		}
		select {
		case err := <-done:
			t.Fatalf("the control plane ended: %v", err)
		case <-late.C:
			t.Fatal("the control plane is not ready after a minute")
		case <-tick.C:
		}
	}
}
