// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/strait-mesh/strait/controlplane/controlpb"
)

const (
	minReconnect = 50 * time.Millisecond
	maxReconnect = 5 * time.Second
	// maxAnswers bounds the answers that wait to be sent. A server keeps far fewer responses in flight; one that does not is
	// not read further.
	maxAnswers = 1024
	// maxReason bounds the text of a NACK, in bytes.
	maxReason = 1024
	// morePart is the system version of a response that is not the last part of an answer.
	morePart = "more"
)

type deltaStream = grpc.BidiStreamingClient[controlpb.DeltaDiscoveryRequest, controlpb.DeltaDiscoveryResponse]

// inbound is one response and where its answer goes.
type inbound struct {
	response *controlpb.DeltaDiscoveryResponse
	answer   func(*controlpb.DeltaDiscoveryRequest)
}

// streamLoop keeps one discovery stream open. It alone reconnects.
func (c *Client) streamLoop(ctx context.Context, in chan<- inbound) {
	delay := minReconnect
	for ctx.Err() == nil {
		served, err := c.stream(ctx, in)
		if ctx.Err() != nil {
			break
		}
		if served {
			delay = minReconnect
		}
		if c.health.disconnected(c.cfg.Now(), err) {
			c.log.Info("control plane lost", "err", err)
		}
		sleep(ctx, delay/2+rand.N(delay/2)) // jittered, so that a thousand proxies do not return together
		delay = min(2*delay, maxReconnect)
	}
	c.health.disconnected(c.cfg.Now(), nil)
}

// stream runs one discovery stream to its end. served says that the server has answered on it.
func (c *Client) stream(ctx context.Context, in chan<- inbound) (served bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s, err := controlpb.StreamDelta(ctx, c.conn, grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return false, err
	}
	out := &sender{store: c.store, stream: s, node: c.node(), wake: make(chan struct{}, 1), fail: cancel}
	var wg sync.WaitGroup
	wg.Go(func() { out.run(ctx) })
	defer wg.Wait()
	defer cancel(nil)
	for {
		r, err := s.Recv()
		if err != nil {
			if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
				err = cause
			}
			return served, err
		}
		if !served {
			served = true
			c.health.connected(c.cfg.Now())
			c.log.Info("control plane connected")
		}
		select {
		case in <- inbound{r, out.answer}:
		case <-ctx.Done():
			return served, ctx.Err()
		}
	}
}

func (c *Client) node() *controlpb.Node {
	info := c.Info()
	return &controlpb.Node{Id: info.Name, Cluster: string(info.Cluster), UserAgentName: strings.TrimSuffix("strait-proxy/"+c.cfg.Version, "/")}
}

// applyLoop is the one goroutine that changes resources and calls watchers.
func (c *Client) applyLoop(ctx context.Context, in <-chan inbound) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.store.applyKick:
			c.store.deliver(c.log)
		case m := <-in:
			c.store.deliver(c.log)
			m.answer(c.handle(m.response))
		}
	}
}

// handle puts one response in force and returns the answer to it.
func (c *Client) handle(r *controlpb.DeltaDiscoveryResponse) *controlpb.DeltaDiscoveryRequest {
	refused := map[string]error{}
	updates := make([]update, 0, len(r.GetResources())+len(r.GetRemovedResources()))
	for _, res := range r.GetResources() {
		msg, err := decode(r.GetTypeUrl(), res)
		if err != nil {
			refused[res.GetName()] = err
			continue
		}
		updates = append(updates, update{name: res.GetName(), version: res.GetVersion(), msg: msg})
	}
	for _, name := range r.GetRemovedResources() {
		updates = append(updates, update{name: name})
	}
	maps.Copy(refused, c.store.apply(r.GetTypeUrl(), updates, r.GetSystemVersionInfo() != morePart))

	answer := &controlpb.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()}
	if len(refused) == 0 {
		return answer
	}
	names := slices.Sorted(maps.Keys(refused))
	var reasons []string
	for _, name := range names {
		c.log.Warn("resource refused", "type", r.GetTypeUrl(), "name", name, "err", refused[name])
		reasons = append(reasons, fmt.Sprintf("%s: %v", name, refused[name]))
	}
	text := strings.Join(reasons, "; ")
	answer.ErrorDetail = &controlpb.RpcStatus{Code: int32(codes.InvalidArgument), Message: text[:min(len(text), maxReason)]}
	if detail, err := anypb.New(&controlpb.Rejected{Names: names}); err == nil {
		answer.ErrorDetail.Details = []*anypb.Any{detail}
	}
	answer.ErrorDetail.Message = strings.ToValidUTF8(answer.ErrorDetail.Message, "")
	return answer
}

func decode(typeURL string, r *controlpb.Resource) (proto.Message, error) {
	switch {
	case r.GetName() == "":
		return nil, errors.New("resource without a name")
	case r.GetResource().GetTypeUrl() != typeURL:
		return nil, fmt.Errorf("resource of type %.100q in a response of another", r.GetResource().GetTypeUrl())
	}
	return unmarshal(typeURL, r.GetResource().GetValue())
}

func unmarshal(typeURL string, body []byte) (proto.Message, error) {
	mt, err := protoregistry.GlobalTypes.FindMessageByURL(typeURL)
	if err != nil {
		return nil, fmt.Errorf("type %.100q: %w", typeURL, err)
	}
	msg := mt.New().Interface()
	if err := proto.Unmarshal(body, msg); err != nil {
		return nil, err
	}
	return msg, nil
}

// sender owns the sending half of one stream: it asks for what the store wants and passes answers on. The receiving half never
// waits for it, so that two ends that both have much to say do not wait for each other.
type sender struct {
	store  *store
	stream deltaStream
	node   *controlpb.Node
	wake   chan struct{}
	fail   context.CancelCauseFunc
	asked  map[string]subscriptions

	mu      sync.Mutex
	answers []*controlpb.DeltaDiscoveryRequest
}

// answer queues one answer.
func (s *sender) answer(r *controlpb.DeltaDiscoveryRequest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.answers) >= maxAnswers {
		s.fail(errors.New("discovery stream: the control plane sends without reading answers"))
		return
	}
	s.answers = append(s.answers, r)
	kick(s.wake)
}

func (s *sender) run(ctx context.Context) {
	if err := s.first(); err != nil {
		return // the receiving half learns the stream's status
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-s.store.streamKick:
		}
		s.mu.Lock()
		requests := s.answers
		s.answers = nil
		s.mu.Unlock()
		for _, r := range append(requests, s.difference()...) {
			if err := s.send(r); err != nil {
				return
			}
		}
	}
}

func (s *sender) send(r *controlpb.DeltaDiscoveryRequest) error {
	r.Node, s.node = s.node, nil // only the first request of a stream says who we are
	return s.stream.Send(r)
}

// first asks for everything wanted, with the versions held, so that what has not changed is not sent again.
func (s *sender) first() error {
	wanted, held := s.store.versions()
	s.asked = wanted
	for _, t := range slices.Sorted(maps.Keys(wanted)) {
		if len(wanted[t]) == 0 {
			continue
		}
		err := s.send(&controlpb.DeltaDiscoveryRequest{
			TypeUrl: t, ResourceNamesSubscribe: slices.Sorted(maps.Keys(wanted[t])), InitialResourceVersions: held[t],
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// difference returns the requests that lead from what was asked for to what is wanted now.
func (s *sender) difference() []*controlpb.DeltaDiscoveryRequest {
	wanted, _ := s.store.versions()
	asked := s.asked
	s.asked = wanted
	var requests []*controlpb.DeltaDiscoveryRequest
	for _, t := range slices.Sorted(maps.Keys(wanted)) {
		r := &controlpb.DeltaDiscoveryRequest{TypeUrl: t}
		for _, name := range slices.Sorted(maps.Keys(wanted[t])) {
			if asked[t][name] != wanted[t][name] { // new, or left and asked for again: it is then answered again
				r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, name)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(asked[t])) {
			if _, still := wanted[t][name]; !still {
				r.ResourceNamesUnsubscribe = append(r.ResourceNamesUnsubscribe, name)
			}
		}
		if len(r.ResourceNamesSubscribe)+len(r.ResourceNamesUnsubscribe) > 0 {
			requests = append(requests, r)
		}
	}
	return requests
}

// sleep waits for d or for ctx's end.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
