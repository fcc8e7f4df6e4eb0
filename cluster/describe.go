package cluster

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/gitopsd/gitopsd/policy"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// This file holds what policy is told of images. An image that was never pulled could not be judged by its configuration, and so never be pulled: its registry is asked.

const (
	// askTime is how long all registries that a revision needs have to answer: its other stacks wait as long.
	askTime = 10 * time.Second
	// askEvery is the pause before registries that did not answer are asked again, where nobody asks for it earlier.
	askEvery = time.Minute
	// askAtOnce is how many images are asked for at a time.
	askAtOnce = 8
)

// described is what a registry said of an image, or else why nothing was said.
type described struct{ digest, user, trouble string }

// imageAsk is an image that policy wants to know the user of.
type imageAsk struct{ ref, platform string }

// imageUsers are the users that the images of a stack name, as the registry said or else as the node has them, and why others are not known. Open are those that a
// registry could still tell of. It asks no registry.
func (n *Node) imageUsers(ctx context.Context, engine *policy.Engine, st *manifest.Stack, said map[string]described) (users, troubles map[string]string, open []imageAsk) {
	if !engine.ReadsImages(st) {
		return nil, nil, nil
	}
	users, troubles = map[string]string{}, map[string]string{}
	for i := range st.Services {
		for k := range st.Services[i].Containers {
			c := &st.Services[i].Containers[k]
			if c.User != "" {
				continue
			}
			d, answered := said[c.Image]
			if answered && d.trouble == "" {
				users[c.Image] = d.user
				continue
			}
			if img, err := n.images.Local(ctx, c.Image, c.Platform); err == nil {
				users[c.Image] = img.Config.User
				continue
			}
			if answered {
				troubles[c.Image] = d.trouble
			}
			if c.PullPolicy != "never" {
				open = append(open, imageAsk{c.Image, c.Platform})
			}
		}
	}
	return users, troubles, open
}

// describe asks registries about the images that policy wants to know of, each once. What they said of a stack is kept as long as the stack stays the same and
// may run: an image that was denied may be repaired under its tag. It takes a while, so it must not be called in the leader's loop.
func (n *Node) describe(ctx context.Context, engine *policy.Engine, in, before *intake) {
	in.said, in.asked = map[string]map[string]described{}, n.cfg.Now()
	stacks := map[imageAsk][]string{} // that want to know
	for i := range in.loaded.Bundle.Stacks {
		st := &in.loaded.Bundle.Stacks[i]
		in.said[st.Name] = map[string]described{}
		if before != nil && before.hashes[st.Name] == in.hashes[st.Name] && !before.reviews[st.Name].Deny {
			maps.Copy(in.said[st.Name], before.said[st.Name])
		}
		_, _, open := n.imageUsers(ctx, engine, st, in.said[st.Name])
		for _, ask := range open {
			stacks[ask] = append(stacks[ask], st.Name)
		}
	}
	limited, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(askAtOnce)
	for ask, names := range stacks {
		g.Go(func() error {
			img, err := n.images.Describe(limited, ask.ref, ask.platform)
			d := described{digest: img.Digest, user: img.Config.User}
			switch {
			case err != nil && limited.Err() != nil:
				d.trouble = fmt.Sprintf("look up image %s: no answer from its registry within %s", ask.ref, askTime)
			case err != nil:
				d.trouble = err.Error()
			}
			mu.Lock()
			defer mu.Unlock()
			for _, name := range names {
				in.said[name][ask.ref] = d
			}
			return nil
		})
	}
	_ = g.Wait() // what went wrong is in the answers
}

// judgedImages have the tasks of a revision run the very images that policy judged by the word of a registry, wherever their tags point to when they are pulled.
func judgedImages(v *state.View, in reconcile.Intake, said map[string]map[string]described) []state.Item {
	var items []state.Item
	for i := range in.Bundle.Stacks {
		st := &in.Bundle.Stacks[i]
		if in.Reviews[st.Name].Deny {
			continue
		}
		for k := range st.Services {
			svc := &st.Services[k]
			for _, c := range svc.Containers {
				d, answered := said[st.Name][c.Image]
				if !answered || d.trouble != "" || c.User != "" {
					continue
				}
				key := manifest.Hash(svc) + "/" + c.Name
				if _, known := v.Images.Get(key); !known {
					items = append(items, state.Item{state.Put(key, 0, state.Image{Ref: c.Image, Digest: d.digest})})
				}
			}
		}
	}
	return items
}
