// SPDX-License-Identifier: Apache-2.0

package configapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// memberURL is how the one member would be reached by others. Nobody dials it while it is alone; a second member begins with
// changing it.
const memberURL = "https://127.0.0.1:7403"

// clusterToken tells our store from others.
const clusterToken = "strait"

// maxSocketPath is the longest path of a unix socket, less the name.
const maxSocketPath = 107 - len("/store.sock")

// store is the embedded etcd.
type store struct {
	etcd   *embed.Etcd
	client *clientv3.Client
	socket string // path
	temp   string // directory to remove, where the path was too long
}

func etcdDir(dir string) string { return filepath.Join(dir, "etcd") }

func startStore(ctx context.Context, c Config) (_ *store, err error) {
	s := &store{}
	defer func() {
		if err != nil {
			s.close()
			err = fmt.Errorf("store: %w", err)
		}
	}()
	sockets := c.SocketDir
	if len(sockets) > maxSocketPath {
		if s.temp, err = os.MkdirTemp("", "strait-"); err != nil {
			return nil, err
		}
		sockets = s.temp
	}
	if err := privateDir(sockets); err != nil {
		return nil, err
	}
	s.socket = filepath.Join(sockets, "store.sock")
	_ = os.Remove(s.socket) // of a process that was killed; the data directory's lock says that it is gone

	e := embed.NewConfig()
	e.Name, e.Dir = c.MemberName, etcdDir(c.Dir)
	client, peer := url.URL{Scheme: "unix", Path: s.socket}, mustURL(memberURL)
	e.ListenClientUrls, e.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	e.ListenPeerUrls, e.AdvertisePeerUrls = nil, []url.URL{peer}
	e.InitialCluster, e.InitialClusterToken = c.MemberName+"="+memberURL, clusterToken
	e.EnableGRPCGateway, e.EnablePprof = false, false
	e.AutoCompactionMode, e.AutoCompactionRetention = "periodic", "0" // the API server compacts
	e.QuotaBackendBytes = c.QuotaBytes
	e.TickMs, e.ElectionMs = 100, 1000
	e.UnsafeNoFsync = false
	// What etcd lets us bound of a connection's beginning. It waits without end for the first bytes; only our user reaches the socket.
	e.GRPCAdditionalServerOptions = []grpc.ServerOption{grpc.ConnectionTimeout(headerTimeout)}
	e.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(&zapToSlog{handler: c.Logger.With("component", "etcd").Handler()}))
	if s.etcd, err = embed.StartEtcd(e); err != nil {
		return nil, err
	}
	if err := os.Chmod(s.socket, 0o600); err != nil {
		return nil, err
	}
	select {
	case <-s.etcd.Server.ReadyNotify():
	case err := <-s.etcd.Err():
		return nil, err
	case <-s.etcd.Server.StopNotify():
		return nil, errors.New("stopped while starting")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	s.client, err = clientv3.New(clientv3.Config{Endpoints: []string{s.endpoint()}, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
	return s, err
}

func mustURL(s string) url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err) // our own constant
	}
	return *u
}

func (s *store) endpoint() string { return "unix://" + s.socket }

func (s *store) close() {
	if s.client != nil {
		_ = s.client.Close()
	}
	if s.etcd != nil {
		s.etcd.Close()
	}
	if s.temp != "" {
		_ = os.RemoveAll(s.temp)
	} else if s.socket != "" {
		_ = os.Remove(s.socket)
	}
}

// Snapshot writes the whole store to w: a file for Restore. It is consistent and costs no pause.
func (s *Server) Snapshot(ctx context.Context, w io.Writer) error {
	r, err := s.store.client.Snapshot(ctx)
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	defer r.Close()
	if _, err := io.Copy(w, r); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	return nil
}

// revisionBump is how far a restored store jumps ahead, so that no client has seen a newer revision: clients that hold one start
// over rather than wait for it. It is more than any store writes between a backup and its loss.
const revisionBump = 1_000_000_000

// Restore makes the store of dir from a file that Snapshot wrote. dir must hold no store.
func Restore(snapshotFile, dir string, log *slog.Logger) error {
	c, err := Config{Dir: dir, Logger: log}.withDefaults()
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	if err := privateDir(c.Dir); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	out := etcdDir(c.Dir)
	if _, err := os.Stat(out); err == nil {
		return fmt.Errorf("restore: %s exists", out)
	}
	temp := out + ".restoring"
	if err := os.RemoveAll(temp); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	lg := zap.New(&zapToSlog{handler: c.Logger.With("component", "etcd").Handler()})
	err = snapshot.NewV3(lg).Restore(snapshot.RestoreConfig{
		SnapshotPath: snapshotFile, Name: c.MemberName, OutputDataDir: temp,
		PeerURLs: []string{memberURL}, InitialCluster: c.MemberName + "=" + memberURL, InitialClusterToken: clusterToken,
		RevisionBump: revisionBump, MarkCompacted: true,
	})
	if err != nil {
		_ = os.RemoveAll(temp)
		return fmt.Errorf("restore: %w", err)
	}
	if err := os.Rename(temp, out); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	return nil
}
