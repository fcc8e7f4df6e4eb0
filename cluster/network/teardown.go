package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
)

// Teardown removes every trace: our rules, in our table and in the chains of others, pinned namespaces, links, the names file, and
// sets the sysctls as they were. Tasks should have ended. It goes on after an error and returns all of them.
func (m *Manager) Teardown(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	note := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	pinned, err := m.listPins()
	note(err)
	for _, task := range pinned {
		note(m.unpin(task))
	}
	note(m.deleteAllLinks())
	note(m.Sync(ctx))
	note(m.closeForwarding())
	note(m.deleteTable())
	note(m.restoreSysctls())
	if err := os.Remove(m.NamesFile()); err != nil && !errors.Is(err, os.ErrNotExist) {
		note(fmt.Errorf("remove the names file: %w", err))
	}
	if err := os.RemoveAll(m.pins()); err != nil {
		note(fmt.Errorf("remove pinned network namespaces: %w", err))
	}
	m.networks, m.veths, m.services, m.known, m.have = map[string]bridge{}, map[string][]string{}, nil, false, nil
	m.names, m.named, m.written = Names{}, false, nil
	return errors.Join(errs...)
}

// deleteAllLinks deletes the host's ends of all endpoints, also of those that were being deleted, then the bridges.
func (m *Manager) deleteAllLinks() error {
	links, err := whole(netlink.LinkList)
	if err != nil {
		return fmt.Errorf("list the host's links: %w", err)
	}
	var errs []error
	var veths []string
	for _, l := range links {
		name, named := l.Attrs().Name, l.Attrs().Alias
		ours := named == "" || strings.HasPrefix(named, m.cfg.Name+" ") // without alias: we were stopped at making it
		if l.Type() == "veth" && ours && strings.HasPrefix(name, m.cfg.Name+"-v") {
			veths = append(veths, name)
		} else if l.Type() == "bridge" && ours && strings.HasPrefix(name, m.bridgePrefix()) {
			if err := netlink.LinkDel(l); err != nil && !gone(err) {
				errs = append(errs, fmt.Errorf("delete bridge %s: %w", name, err))
			}
		}
	}
	return errors.Join(append(errs, awaitOrDelete(veths, linkGrace))...)
}
