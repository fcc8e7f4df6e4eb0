package network

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/google/nftables/xt"
)

// Neighbours tells about other firewalls on the host.
type Neighbours struct {
	Opened []string // chains that our accept rules were put into now, as "ip filter DOCKER-USER"
	// Problems are sentences about what we cannot change, each with the way out.
	Problems []string
}

// EnsureForwarding lets our traffic through the firewalls of others: every base chain on the path has to accept a packet, so an accept in
// our own table does not help against a drop in theirs. Two rules, from and to our bridges, go to the top of
//   - ip filter DOCKER-USER, which Docker keeps for such rules and walks before its own, where that chain exists;
//   - else ip filter FORWARD (iptables, ufw), when it drops by policy or has rules;
//   - every other forward chain, of families ip and inet, that drops by policy, and firewalld's.
//
// Queries to the keeper's DNS come in through the input chains: there port 53 of our bridges is accepted in the same way. What may pass
// between networks and from outside is decided in our own table.
//
// It is idempotent, and must be repeated: a restart of dockerd, ufw or firewalld writes the chains anew. Our rules carry a comment, by which
// they are found and, in Teardown, removed.
func (m *Manager) EnsureForwarding(ctx context.Context) (Neighbours, error) {
	var out Neighbours
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return out, fmt.Errorf("open nftables: %w", err)
	}
	defer func() { _ = conn.CloseLasting() }()
	chains, err := m.foreignChains(conn)
	if err != nil {
		return out, err
	}
	for _, c := range chains {
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return out, fmt.Errorf("list rules of %s: %w", chainTitle(c), err)
		}
		wanted := m.openings(c, chains, slices.ContainsFunc(rules, func(r *nftables.Rule) bool { return !m.isOpening(r) }))
		missing := false
		for i := len(wanted) - 1; i >= 0; i-- { // each goes to the top
			if !slices.ContainsFunc(rules, func(r *nftables.Rule) bool { return comment(r) == wanted[i].text }) {
				conn.InsertRule(&nftables.Rule{Table: c.Table, Chain: c, Exprs: wanted[i].exprs,
					UserData: userdata.AppendString(nil, userdata.TypeComment, wanted[i].text)})
				missing = true
			}
		}
		if !missing {
			continue
		}
		if err := conn.Flush(); err != nil {
			out.Problems = append(out.Problems, fmt.Sprintf("the firewall chain %s may drop our traffic and takes no rule of ours (%v): "+
				"accept traffic from and to interfaces %s*", chainTitle(c), err, m.bridgePrefix()))
			continue
		}
		out.Opened = append(out.Opened, chainTitle(c))
	}
	if legacyFilter() {
		out.Problems = append(out.Problems, fmt.Sprintf("legacy iptables has a filter table, which only its own tool can change: if it drops forwarded "+
			"traffic, run: iptables-legacy -I FORWARD -i %[1]s+ -j ACCEPT; iptables-legacy -I FORWARD -o %[1]s+ -j ACCEPT", m.bridgePrefix()))
	}
	return out, nil
}

// closeForwarding takes our rules out of the chains of others.
func (m *Manager) closeForwarding() error {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	defer func() { _ = conn.CloseLasting() }()
	chains, err := m.foreignChains(conn)
	if err != nil {
		return err
	}
	for _, c := range chains {
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return fmt.Errorf("list rules of %s: %w", chainTitle(c), err)
		}
		n := 0
		for _, r := range rules {
			if !m.isOpening(r) {
				continue
			}
			r.Table, r.Chain = c.Table, c
			if err := conn.DelRule(r); err != nil {
				return fmt.Errorf("delete our rule in %s: %w", chainTitle(c), err)
			}
			n++
		}
		if n == 0 {
			continue
		}
		if err := conn.Flush(); err != nil {
			return fmt.Errorf("delete our rules in %s: %w", chainTitle(c), err)
		}
	}
	return nil
}

// foreignChains lists chains of others that may hold openings of ours: those on forward and input hooks, and Docker's.
func (m *Manager) foreignChains(conn *nftables.Conn) ([]*nftables.Chain, error) {
	var out []*nftables.Chain
	for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyINet} {
		chains, err := conn.ListChainsOfTableFamily(family)
		if err != nil {
			return nil, fmt.Errorf("list nftables chains: %w", err)
		}
		for _, c := range chains {
			c.Table.Family = family
			onHook := c.Type == nftables.ChainTypeFilter && c.Hooknum != nil &&
				(*c.Hooknum == *nftables.ChainHookForward || *c.Hooknum == *nftables.ChainHookInput)
			if isDockerUser(c) || (onHook && !(family == nftables.TableFamilyIPv4 && c.Table.Name == m.cfg.Name)) {
				out = append(out, c)
			}
		}
	}
	return out, nil
}

func isDockerUser(c *nftables.Chain) bool { return ofIptables(c) && c.Name == "DOCKER-USER" }

// ofIptables tells that iptables reads this table: rules there must have the shape that it knows.
func ofIptables(c *nftables.Chain) bool {
	return c.Table.Family == nftables.TableFamilyIPv4 && c.Table.Name == "filter"
}

// openings are the rules a chain of others needs to let us through.
func (m *Manager) openings(c *nftables.Chain, all []*nftables.Chain, hasRules bool) []ruleSpec {
	ours := m.bridgePrefix()
	tag := m.cfg.Name + ": "
	through := []ruleSpec{
		{text: tag + "from our networks", exprs: join(iif(ours), []expr.Any{&expr.Counter{}}, accept())},
		{text: tag + "to our networks", exprs: join(oif(ours), []expr.Any{&expr.Counter{}}, accept())},
	}
	if isDockerUser(c) {
		return through
	}
	if c.Hooknum == nil {
		return nil
	}
	drops := c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop
	needed := drops || (hasRules && (ofIptables(c) || c.Table.Name == "firewalld"))
	switch {
	case !needed:
		return nil
	case *c.Hooknum == *nftables.ChainHookForward:
		if ofIptables(c) && slices.ContainsFunc(all, isDockerUser) {
			return nil // walked from here
		}
		return through
	}
	var dns []ruleSpec
	for _, p := range []Protocol{UDP, TCP} {
		dns = append(dns, ruleSpec{text: tag + "names over " + string(p),
			exprs: join(iif(ours), dnsMatch(p, ofIptables(c)), []expr.Any{&expr.Counter{}}, accept())})
	}
	return dns
}

// dnsMatch matches destination port 53. iptables refuses to show a table that has native port matches, so it gets its own.
func dnsMatch(p Protocol, iptables bool) []expr.Any {
	if !iptables {
		return join([]expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, compare(expr.CmpOpEq, []byte{p.number()})}, dport(53))
	}
	proto := []expr.Any{payloadTo(field{uint32(expr.PayloadBaseNetworkHeader), 9, 1}, 1), compare(expr.CmpOpEq, []byte{p.number()})}
	anyPort, port := [2]uint16{0, 65535}, [2]uint16{53, 53}
	if p == UDP {
		info := xt.InfoAny(&xt.Udp{SrcPorts: anyPort, DstPorts: port})
		return append(proto, &expr.Match{Name: "udp", Info: info})
	}
	info := xt.InfoAny(&xt.Tcp{SrcPorts: anyPort, DstPorts: port})
	return append(proto, &expr.Match{Name: "tcp", Info: info})
}

func (m *Manager) isOpening(r *nftables.Rule) bool {
	return strings.HasPrefix(comment(r), m.cfg.Name+": ")
}

func chainTitle(c *nftables.Chain) string {
	family := "ip"
	if c.Table.Family == nftables.TableFamilyINet {
		family = "inet"
	}
	return family + " " + c.Table.Name + " " + c.Name
}

// legacyFilter tells that the old iptables, which nftables does not see, has a filter table.
func legacyFilter() bool {
	data, err := os.ReadFile("/proc/net/ip_tables_names")
	return err == nil && slices.Contains(strings.Fields(string(data)), "filter")
}
