// Package names answers the node's tasks: DNS for service names, and a proxy for published ports on the host's IPv6 addresses.
//
// It runs in the keeper, apart from the agent, so that names and ports go on while the agent is down. The two share one file, the [Table]:
// the agent replaces it whole ([Encode], [WriteFile]), the keeper ([Serve]) notices within milliseconds. A file that cannot be read is
// reported and the last good table stays.
//
// A query comes in on a network's gateway address, port 53. What it is answered follows from who asks: the names of the networks its task is
// on, own stack first where two stacks of a shared network use one name. Names we know are answered here, and all below our search domain;
// other names go to the host's resolvers, except from a task that has only internal networks.
//
// The package stays small: the keeper is to take a few MB.
package names

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
)

// format of the file; a keeper that meets another one keeps what it has.
const format = 1

// Table is all that the keeper has to know.
type Table struct {
	Format    int       `json:"format"`
	Domain    string    `json:"domain"`              // search domain, as svc.internal
	Resolvers []string  `json:"resolvers,omitempty"` // upstream servers, host or host:port; empty = those of the host's resolv.conf
	Networks  []Network `json:"networks,omitempty"`
	Clients   []Client  `json:"clients,omitempty"`
	Ports     []Port    `json:"ports,omitempty"`
}

// Network is a bridge of the node and the names on it.
type Network struct {
	ID       string       `json:"id"`
	Gateway  netip.Addr   `json:"gateway"`
	Subnet   netip.Prefix `json:"subnet"`
	Internal bool         `json:"internal,omitzero"`
	Records  []Record     `json:"records,omitempty"`
}

// Record is a service, or a task, on a network: all its names lead to all its addresses.
type Record struct {
	Stack string   `json:"stack"`
	Names []string `json:"names"` // relative to the search domain; the first is the one that PTR answers
	// Addrs are those of the tasks that are to be reached now. A record without any is a name that exists and has no address.
	Addrs []netip.Addr `json:"addrs"`
}

// Client says more of a task than the network its query comes from: needed for a task on several networks, or with own resolvers, and to
// know its stack.
type Client struct {
	Addrs     []netip.Addr `json:"addrs"` // all of the task's addresses
	Stack     string       `json:"stack"`
	Networks  []string     `json:"networks"` // IDs; names are looked up in all of them
	Resolvers []string     `json:"resolvers,omitempty"`
}

// Port is a published port on IPv6 addresses of the host.
type Port struct {
	Address  netip.Addr       `json:"address"` // :: = all
	Port     uint16           `json:"port"`
	Protocol string           `json:"protocol"` // tcp or udp
	Backends []netip.AddrPort `json:"backends,omitempty"`
}

// ServiceNames are the names under which tasks reach a service, in the order in which a [Record] has them: web.shop, web,
// tasks.web, tasks.web.shop, then the aliases.
func ServiceNames(stack, service string, aliases ...string) []string {
	return append([]string{service + "." + stack, service, "tasks." + service, "tasks." + service + "." + stack}, aliases...)
}

// Encode gives the bytes of a table; equal tables have equal bytes.
func Encode(t Table) ([]byte, error) {
	t.Format = format
	data, err := json.Marshal(t)
	if err != nil {
		return nil, fmt.Errorf("encode the names table: %w", err)
	}
	return append(data, '\n'), nil
}

// Decode reads a table. It refuses what this version does not understand.
func Decode(data []byte) (Table, error) {
	var t Table
	if err := json.Unmarshal(data, &t); err != nil {
		return Table{}, fmt.Errorf("read the names table: %w", err)
	}
	if t.Format != format {
		return Table{}, fmt.Errorf("read the names table: it has format %d, this keeper reads %d; run keeper and agent of one version",
			t.Format, format)
	}
	for _, n := range t.Networks {
		if !n.Gateway.IsValid() || !n.Subnet.IsValid() {
			return Table{}, fmt.Errorf("read the names table: network %q has no gateway or no subnet", n.ID)
		}
	}
	for _, p := range t.Ports {
		if !p.Address.Is6() || p.Port == 0 || (p.Protocol != "tcp" && p.Protocol != "udp") {
			return Table{}, fmt.Errorf("read the names table: port %s %d/%s is not one the proxy can serve", p.Address, p.Port, p.Protocol)
		}
	}
	return t, nil
}

// WriteFile replaces the file in one step: a reader meets the old or the new table, never half of one.
func WriteFile(path string, data []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".names-*")
	if err != nil {
		return fmt.Errorf("write the names file: %w", err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(data)
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write the names file: %w", err)
	}
	return nil
}
