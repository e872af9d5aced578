// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Stream runs one command line and calls line with each line of standard error as it is printed, from the calling goroutine.
func (c *Cluster) Stream(line func(string), args ...string) Result {
	t := c.fed.T
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, Bin(t, "strait"), append([]string{"--data-dir", c.Dir}, args...)...)
	cmd.Env = c.fed.env()
	var out, errw strings.Builder
	cmd.Stdout = &out
	pipe, err := cmd.StderrPipe()
	fail(t, err, "standard error")
	fail(t, cmd.Start(), "strait "+args[0])
	sc := bufio.NewScanner(io.TeeReader(pipe, &errw))
	for sc.Scan() {
		line(sc.Text())
	}
	_ = cmd.Wait() // the exit code says it
	return Result{Out: out.String(), Err: errw.String(), Code: cmd.ProcessState.ExitCode()}
}

// JSON runs one command line with -o json, which must succeed but for unreachable clusters, and decodes its standard output.
func (c *Cluster) JSON(into any, args ...string) {
	c.fed.T.Helper()
	r := c.Try(append(args, "-o", "json")...)
	if r.Code != 0 && r.Code != 10 {
		c.fed.T.Fatalf("%s: strait %s: exit %d\n%s%s", c.Name, strings.Join(args, " "), r.Code, r.Out, r.Err)
	}
	if err := json.Unmarshal([]byte(r.Out), into); err != nil {
		c.fed.T.Fatalf("%s: strait %s: %v in\n%s", c.Name, strings.Join(args, " "), err, r.Out)
	}
}

// Member is what `strait member list` says of one member.
type Member struct {
	Cluster, State, Reason, TrustDomain, BundleSha256, CatalogEpoch, CatalogSeq, Freshness string
	Stages                                                                                 []string
	Tunnels                                                                                []struct{ State, Transport string }
}

// Members lists the members by name as the cluster's control plane knows them, without itself.
func (c *Cluster) Members() map[string]Member {
	c.fed.T.Helper()
	var r struct{ Members []Member }
	c.JSON(&r, "member", "list")
	out := map[string]Member{}
	for _, m := range r.Members {
		if m.State != "self" {
			out[m.Cluster] = m
		}
	}
	return out
}

// RestartControlPlane starts the control plane again where it listened.
func (c *Cluster) RestartControlPlane() {
	c.fed.T.Helper()
	c.ControlPlane.Start()
	c.ControlPlane.Addrs()
}

// Reset makes the cluster a new one, with its data below dir. What ran before must have ended.
func (c *Cluster) Reset(dir string) {
	c.Dir, c.Gateways, c.ControlPlane, c.Sidecars = filepath.Join(dir, "cp"), nil, nil, map[string]*Sidecar{}
	fail(c.fed.T, os.RemoveAll(filepath.Join(c.fed.Dir, c.Name)), "reset "+c.Name) // of its gateways and sidecars
}

// InitAs makes the data directory of a cluster that calls itself otherwise than the test does.
func (c *Cluster) InitAs(federation, cluster string, extra ...string) {
	c.fed.T.Helper()
	c.CLI(append([]string{"init", federation, "--cluster", cluster, "--region", cluster + "-1"}, extra...)...)
}

// File is the name of a new file of the federation's directory.
func (f *Federation) File(name string) string { return filepath.Join(f.Dir, name) }
