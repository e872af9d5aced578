// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"syscall"

	"github.com/strait-mesh/strait/internal/wan"
)

// breakIt injects one fault and remembers how to heal it.
//
//	SERVICE@CLUSTER   its instances: all but one stop, or answer 500 to a share of requests
//	CLUSTER           cut (default), paused, killed
//	tunnel:A-B        everything between two clusters is dropped
func (d *Demo) breakIt(ctx context.Context, req Request) (string, error) {
	d.mu.Lock()
	_, broken := d.faults[req.Target]
	d.mu.Unlock()
	if broken {
		return "", fmt.Errorf("%s is broken already; strait demo heal %s", req.Target, req.Target)
	}
	var text string
	var heal func(context.Context) error
	var err error
	switch {
	case strings.HasPrefix(req.Target, "tunnel:"):
		text, heal, err = d.breakTunnel(strings.TrimPrefix(req.Target, "tunnel:"))
	case strings.Contains(req.Target, "@"):
		text, heal, err = d.breakInstances(req)
	default:
		text, heal, err = d.breakCluster(req)
	}
	if err != nil {
		return "", err
	}
	d.mu.Lock()
	d.faults[req.Target] = heal
	d.mu.Unlock()
	return text, nil
}

// heal undoes one fault, or all of them when target is empty.
func (d *Demo) heal(ctx context.Context, target string) (string, error) {
	d.mu.Lock()
	todo := map[string]func(context.Context) error{}
	for t, f := range d.faults {
		if target == "" || target == t {
			todo[t] = f
			delete(d.faults, t)
		}
	}
	d.mu.Unlock()
	if len(todo) == 0 {
		if target == "" {
			return "nothing was broken", nil
		}
		return "", fmt.Errorf("%s is not broken", target)
	}
	var healed []string
	for t, f := range todo {
		if err := f(ctx); err != nil {
			return "", fmt.Errorf("heal %s: %w", t, err)
		}
		healed = append(healed, t)
	}
	return "healed " + strings.Join(healed, ", "), nil
}

func (d *Demo) region(cluster string) (*region, error) {
	var names []string
	for _, r := range d.regions {
		if r.cluster == cluster {
			return r, nil
		}
		names = append(names, r.cluster)
	}
	return nil, fmt.Errorf("no cluster %q; there are %s", cluster, strings.Join(names, ", "))
}

func (d *Demo) breakTunnel(pair string) (string, func(context.Context) error, error) {
	var a, b *region
	for _, x := range d.regions {
		for _, y := range d.regions {
			if x != y && pair == x.cluster+"-"+y.cluster {
				a, b = x, y
			}
		}
	}
	if a == nil {
		return "", nil, fmt.Errorf("no tunnel %q; want tunnel:us-east-eu-west", pair)
	}
	dark := func(on bool) {
		d.links(a.cluster, b.cluster, func(l wan.Link) wan.Link { l.Dark = on; return l })
	}
	dark(true)
	return fmt.Sprintf("everything between %s and %s is dropped", a.cluster, b.cluster), func(context.Context) error { dark(false); return nil }, nil
}

func (d *Demo) breakInstances(req Request) (string, func(context.Context) error, error) {
	service, cluster, _ := strings.Cut(req.Target, "@")
	r, err := d.region(cluster)
	if err != nil {
		return "", nil, err
	}
	list := r.instances[service]
	if len(list) == 0 {
		return "", nil, fmt.Errorf("no service %q in %s", service, cluster)
	}
	n := req.Instances
	if n == 0 {
		n = max(1, len(list)-1)
	}
	if n < 0 || n > len(list) {
		return "", nil, fmt.Errorf("%s has %d instances", service, len(list))
	}
	if req.Errors > 0 {
		for _, i := range list {
			i.setErrors(req.Errors)
		}
		return fmt.Sprintf("%.0f%% of the requests to %s in %s fail", req.Errors*100, service, cluster), func(context.Context) error {
			for _, i := range list {
				i.setErrors(0)
			}
			return nil
		}, nil
	}
	for _, i := range list[:n] {
		i.stop()
	}
	return fmt.Sprintf("%d of %d instances of %s in %s are stopped", n, len(list), service, cluster), func(context.Context) error {
		for _, i := range list[:n] {
			if err := i.start(); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

func (d *Demo) breakCluster(req Request) (string, func(context.Context) error, error) {
	r, err := d.region(req.Target)
	if err != nil {
		return "", nil, err
	}
	switch req.How {
	case "", "cut":
		dark := func(on bool) {
			for _, other := range d.regions {
				if other != r {
					d.links(r.cluster, other.cluster, func(l wan.Link) wan.Link { l.Dark = on; return l })
				}
			}
		}
		dark(true)
		return r.cluster + " is silently cut off", func(context.Context) error { dark(false); return nil }, nil
	case "paused":
		if err := r.signalAll(syscall.SIGSTOP); err != nil {
			return "", nil, err
		}
		return "every process of " + r.cluster + " is paused", func(context.Context) error { return r.signalAll(syscall.SIGCONT) }, nil
	case "killed":
		return d.killCluster(r)
	default:
		return "", nil, fmt.Errorf("how %q; want cut, paused or killed", req.How)
	}
}

func (d *Demo) killCluster(r *region) (string, func(context.Context) error, error) {
	var wg sync.WaitGroup
	procs := r.processes()
	for _, p := range procs {
		wg.Go(p.kill)
	}
	var stopped []*instance
	for _, list := range r.instances {
		for _, i := range list {
			i.stop()
			stopped = append(stopped, i)
		}
	}
	wg.Wait()
	return fmt.Sprintf("all %d processes of %s are killed", len(procs), r.cluster), func(ctx context.Context) error {
		for _, i := range stopped {
			if err := i.start(); err != nil {
				return err
			}
		}
		if err := d.restart(ctx, r, r.controlPlane); err != nil {
			return err
		}
		errs := make(chan error, len(procs))
		for _, p := range procs {
			if p != r.controlPlane {
				go func() { errs <- d.restart(ctx, r, p) }()
			}
		}
		for range len(procs) - 1 {
			if err := <-errs; err != nil {
				return err
			}
		}
		return nil
	}, nil
}
