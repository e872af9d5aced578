// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// plan is what the demo builds.
var plan = []regionPlan{
	{cluster: "us-east", region: "us-east-1", prefix: "127.10.0", gateways: 2, services: []servicePlan{
		{name: "web", instances: 1, calls: []string{"catalog", "checkout"}},
		{name: "catalog", instances: 2}, {name: "checkout", instances: 4, calls: []string{"payments"}}, {name: "payments", instances: 1},
	}},
	{cluster: "eu-west", region: "eu-west-1", prefix: "127.20.0", gateways: 2, services: []servicePlan{
		{name: "catalog", instances: 2}, {name: "checkout", instances: 6, calls: []string{"payments"}}, {name: "payments", instances: 1},
	}},
	{cluster: "ap-south", region: "ap-south-1", prefix: "127.30.0", gateways: 1, services: []servicePlan{
		{name: "checkout", instances: 2, calls: []string{"payments"}},
	}},
}

// rtts are the round-trip times of the simulated network, in milliseconds.
var rtts = map[[2]string]int{{"us-east", "eu-west"}: 80, {"eu-west", "ap-south"}: 130, {"us-east", "ap-south"}: 198}

const namespace = "shop"

type regionPlan struct {
	cluster, region, prefix string
	gateways                int
	services                []servicePlan
}

type servicePlan struct {
	name      string
	instances int
	calls     []string
}

// region is one running cluster.
type region struct {
	regionPlan
	dir          string // of its control plane
	controlPlane *process
	gateways     []*process
	sidecars     map[string]*process
	instances    map[string][]*instance
	upstreams    map[string]map[string]string // service → called service → address of the sidecar's listener
	grpc         string                       // address of 7400
	api          string
}

func (r *region) processes() []*process {
	var out []*process
	for _, s := range r.services {
		if p := r.sidecars[s.name]; p != nil {
			out = append(out, p)
		}
	}
	out = append(out, r.gateways...)
	if r.controlPlane != nil {
		out = append(out, r.controlPlane)
	}
	return out
}

// freePort picks a port of ip that is free now. Only listeners whose address must be known before their process starts need
// it: the sidecars' upstreams.
func freePort(ip string) (string, error) {
	l, err := net.Listen("tcp", ip+":0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// startControlPlane initialises the cluster and starts its control plane.
func (d *Demo) startControlPlane(ctx context.Context, r *region) error {
	if _, err := d.strait(ctx, r, "init", "acme", "--cluster", r.cluster, "--region", r.region); err != nil {
		return err
	}
	ip := r.prefix + ".1"
	r.controlPlane = &process{name: r.cluster + "/controlplane", dir: r.dir, log: filepath.Join(d.dir, "log", r.cluster+"-controlplane.log"),
		args: []string{"controlplane", "--allow-loopback", "--data-dir", r.dir, "--listen", ip + ":0", "--api-listen", ip + ":0", "--metrics-listen", ip + ":0"}}
	if err := d.spawn.start(r.controlPlane); err != nil {
		return err
	}
	addrs, err := r.controlPlane.wait(ctx)
	if err != nil {
		return err
	}
	r.controlPlane.pin(addrs)
	r.grpc, _ = addrs["Listen"].(string)
	r.api, _ = addrs["API"].(string)
	return nil
}

// startGateway starts gateway number n (from 1) behind its address on the simulated network.
func (d *Demo) startGateway(ctx context.Context, r *region, n int) error {
	name := fmt.Sprintf("gateway-%d", n)
	site := r.cluster + "/" + name
	token := filepath.Join(r.dir, "tokens", "gateway-1.token")
	if n > 1 {
		token = filepath.Join(d.dir, "tokens", r.cluster+"-"+name+".token")
		if _, err := d.strait(ctx, r, "token", "gateway", name, "--out", token); err != nil {
			return err
		}
	}
	ip := fmt.Sprintf("%s.%d", r.prefix, 10+n)
	p := &process{name: site, dir: filepath.Join(d.dir, r.cluster, name), log: filepath.Join(d.dir, "log", r.cluster+"-"+name+".log")}
	p.args = []string{"gateway", "--data-dir", p.dir, "--token-file", token, "--control-plane", r.grpc, "--listen", ip + ":0",
		"--advertise", d.wan.Outside(site), "--local-listen", ip + ":0", "--metrics-listen", ip + ":0"}
	r.gateways = append(r.gateways, p)
	return d.restart(ctx, r, p)
}

// startService registers a service's instances, starts them, and starts their sidecar.
func (d *Demo) startService(ctx context.Context, r *region, at int, s servicePlan) error {
	ip := fmt.Sprintf("%s.%d", r.prefix, 20+at)
	r.upstreams[s.name] = map[string]string{}
	p := &process{name: r.cluster + "/" + s.name, dir: filepath.Join(d.dir, r.cluster, s.name), log: filepath.Join(d.dir, "log", r.cluster+"-"+s.name+".log")}
	token := filepath.Join(d.dir, "tokens", r.cluster+"-"+s.name+".token")
	p.args = []string{"sidecar", "--data-dir", p.dir, "--token-file", token, "--control-plane", r.grpc,
		"--inbound-listen", ip + ":0", "--metrics-listen", ip + ":0"}
	var urls []string
	for _, callee := range s.calls {
		addr, err := freePort(ip)
		if err != nil {
			return err
		}
		r.upstreams[s.name][callee] = addr
		p.args = append(p.args, "--upstream", namespace+"/"+callee+":http="+addr)
		urls = append(urls, "http://"+addr+"/"+callee)
	}
	for n := range s.instances {
		i := &instance{service: s.name, cluster: r.cluster, name: fmt.Sprintf("%s-%d", s.name, n+1), calls: urls, addr: ip + ":0"}
		if err := i.start(); err != nil {
			return err
		}
		r.instances[s.name] = append(r.instances[s.name], i)
		host, port, _ := net.SplitHostPort(i.addr)
		args := []string{"workload", "register", namespace + "/" + i.name, "--service", s.name, "--proxy", s.name, "--address", host, "--port", "http=" + port}
		if n == 0 {
			args = append(args, "--token-out", token)
		}
		if _, err := d.strait(ctx, r, args...); err != nil {
			return err
		}
	}
	r.sidecars[s.name] = p
	return d.restart(ctx, r, p)
}

// restart starts a process and, for a gateway, tells the simulated network where it listens now.
func (d *Demo) restart(ctx context.Context, r *region, p *process) error {
	if err := os.MkdirAll(filepath.Dir(p.dir), 0o700); err != nil {
		return err
	}
	if err := d.spawn.start(p); err != nil {
		return err
	}
	addrs, err := p.wait(ctx)
	if err != nil {
		return err
	}
	p.pin(addrs)
	if strings.HasPrefix(p.name, r.cluster+"/gateway-") {
		listen, _ := addrs["Listen"].(string)
		return d.wan.Attach(p.name, listen)
	}
	return nil
}
