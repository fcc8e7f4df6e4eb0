package network

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	rawnetlink "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

func (m *Manager) table() *nftables.Table {
	return &nftables.Table{Name: m.cfg.Name, Family: nftables.TableFamilyIPv4}
}

// apply brings our table to what it should hold, in one transaction. Without a difference to what it is known to hold nothing is sent. When the
// transaction fails, what the table holds is read, others may have changed it, and the rest is tried once more.
func (m *Manager) apply() error {
	for try := 1; ; try++ {
		if m.have == nil {
			have, err := m.readTable()
			if err != nil {
				return err
			}
			m.have = have
		}
		err := m.send(m.spec())
		if err == nil {
			return nil
		}
		m.have = nil
		if try == 2 {
			return fmt.Errorf("change nftables table ip %s: %w", m.cfg.Name, err)
		}
	}
}

// send sends the difference and, when that went well, notes what the table holds now.
func (m *Manager) send(spec tableSpec) error {
	d := m.differ(spec)
	if d.empty() {
		return nil
	}
	conn, err := nftables.New(nftables.WithSockOptions(roomForTransaction))
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	table := conn.AddTable(m.table())
	for _, s := range d.newSets {
		set := s.set
		set.Table, set.Name = table, s.name
		if err := conn.AddSet(&set, nil); err != nil {
			return fmt.Errorf("add set %s: %w", s.name, err)
		}
	}
	for _, c := range d.newChains {
		chain := &nftables.Chain{Table: table, Name: c.name}
		if c.base != nil {
			chain.Hooknum, chain.Priority, chain.Type = c.base.Hooknum, c.base.Priority, c.base.Type
		}
		conn.AddChain(chain)
	}
	// Elements go before the chains they lead to, and come after.
	for _, e := range d.dropElements {
		for part := range slices.Chunk(e.elements, elementsPerMessage) {
			if err := conn.SetDeleteElements(named(table, e.spec), part); err != nil {
				return fmt.Errorf("delete elements of %s: %w", e.spec.name, err)
			}
		}
	}
	for _, c := range d.fill {
		chain := &nftables.Chain{Table: table, Name: c.name}
		conn.FlushChain(chain)
		for _, r := range c.rules {
			if err := addRule(conn, table, chain, r); err != nil {
				return fmt.Errorf("add to chain %s the rule %q: %w", c.name, r.text, err)
			}
		}
	}
	for _, e := range d.addElements {
		for part := range slices.Chunk(e.elements, elementsPerMessage) {
			if err := conn.SetAddElements(named(table, e.spec), part); err != nil {
				return fmt.Errorf("add elements to %s: %w", e.spec.name, err)
			}
		}
	}
	for _, name := range d.dropChains {
		chain := &nftables.Chain{Table: table, Name: name}
		conn.FlushChain(chain)
		conn.DelChain(chain)
	}
	for _, name := range d.dropSets {
		conn.DelSet(&nftables.Set{Table: table, Name: name})
	}
	if err := conn.Flush(); err != nil {
		return err
	}
	m.have = d.result
	return nil
}

// roomForTransaction lets the socket hold a transaction of some ten thousand ports, which goes to the kernel in one piece, and its
// answers. It is a limit and takes no memory. Without the right to raise it smaller ones still work.
func roomForTransaction(conn *rawnetlink.Conn) error {
	const bytes = 64 << 20
	return errors.Join(conn.SetWriteBuffer(bytes), conn.SetReadBuffer(bytes))
}

// elementsPerMessage keeps a list of elements below 64 KiB, what one netlink attribute can hold.
const elementsPerMessage = 200

func named(table *nftables.Table, s setSpec) *nftables.Set {
	set := s.set
	set.Table, set.Name = table, s.name
	return &set
}

func addRule(conn *nftables.Conn, table *nftables.Table, chain *nftables.Chain, r ruleSpec) error {
	exprs := slices.Clone(r.exprs)
	if r.spread != nil {
		set, elems := spreadMap(table, r.spread)
		if err := conn.AddSet(set, elems); err != nil {
			return err
		}
		for i, e := range exprs {
			if l, ok := e.(*expr.Lookup); ok && l.SetName == "" {
				l := *l
				l.SetName, l.SetID = set.Name, set.ID
				exprs[i] = &l
			}
		}
	}
	conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: exprs, UserData: userdata.AppendString(nil, userdata.TypeComment, r.text)})
	return nil
}

// difference is what has to be sent, and what the table holds then.
type difference struct {
	newSets                   []setSpec
	newChains, fill           []chainSpec
	dropElements, addElements []elementsOf
	dropChains, dropSets      []string
	result                    *contents
}

type elementsOf struct {
	spec     setSpec
	elements []nftables.SetElement
}

func (d *difference) empty() bool {
	return len(d.newSets)+len(d.newChains)+len(d.fill)+len(d.dropElements)+len(d.addElements)+len(d.dropChains)+len(d.dropSets) == 0
}

// differ compares what the table should hold with what it holds. Published ports are left as they are until SetPublished told of them:
// an agent that starts must not cut what runs.
func (m *Manager) differ(spec tableSpec) *difference {
	d := &difference{result: &contents{chains: map[string][]string{}, sets: map[string]map[string]bool{}}}
	for _, c := range spec.chains {
		texts := []string{}
		for _, r := range c.rules {
			texts = append(texts, r.text)
		}
		have, ok := m.have.chains[c.name]
		if !ok {
			d.newChains = append(d.newChains, c)
		}
		if !slices.Equal(have, texts) {
			d.fill = append(d.fill, c)
		}
		d.result.chains[c.name] = texts
	}
	for _, name := range sortedKeys(m.have.chains) {
		if _, ok := d.result.chains[name]; ok {
			continue
		}
		if isPortChain(name) && !m.known {
			d.result.chains[name] = m.have.chains[name]
			continue
		}
		d.dropChains = append(d.dropChains, name)
	}
	for _, s := range spec.sets {
		m.differSet(d, s)
	}
	for _, name := range sortedKeys(m.have.sets) {
		if _, ok := d.result.sets[name]; !ok {
			d.dropSets = append(d.dropSets, name)
		}
	}
	return d
}

func (m *Manager) differSet(d *difference, s setSpec) {
	have, ok := m.have.sets[s.name]
	if !ok {
		d.newSets = append(d.newSets, s)
	}
	if ok && isPortSet(s.name) && !m.known {
		d.result.sets[s.name] = have
		return
	}
	want := map[string]bool{}
	var add, del []nftables.SetElement
	for _, e := range s.elements {
		want[elementKey(e)] = true
		if !have[elementKey(e)] {
			add = append(add, e)
		}
	}
	for _, key := range sortedKeys(have) {
		if !want[key] {
			del = append(del, elementOf(key))
		}
	}
	if len(del) > 0 {
		d.dropElements = append(d.dropElements, elementsOf{s, del})
	}
	if len(add) > 0 {
		d.addElements = append(d.addElements, elementsOf{s, add})
	}
	d.result.sets[s.name] = want
}

// elementKey tells elements apart: by key, the end of an interval with "/" behind, and by what a map has for it after "=".
func elementKey(e nftables.SetElement) string {
	key := hex.EncodeToString(e.Key)
	if e.IntervalEnd {
		key += "/"
	}
	switch {
	case e.VerdictData != nil:
		key += "=" + e.VerdictData.Chain
	case len(e.Val) > 0:
		key += "=" + hex.EncodeToString(e.Val)
	}
	return key
}

// elementOf is what to delete: an element without its value.
func elementOf(key string) nftables.SetElement {
	key, _, _ = strings.Cut(key, "=")
	key, end := strings.CutSuffix(key, "/")
	b, _ := hex.DecodeString(key) // made by elementKey
	return nftables.SetElement{Key: b, IntervalEnd: end}
}

// readTable reads what our table holds; nothing when there is none.
func (m *Manager) readTable() (*contents, error) {
	out := &contents{chains: map[string][]string{}, sets: map[string]map[string]bool{}}
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	defer func() { _ = conn.CloseLasting() }()
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	exists := false
	for _, c := range chains {
		if c.Table.Name != m.cfg.Name {
			continue
		}
		exists = true
		c.Table = m.table()
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return nil, fmt.Errorf("list rules of nftables chain ip %s %s: %w", m.cfg.Name, c.Name, err)
		}
		texts := []string{}
		for _, r := range rules {
			texts = append(texts, comment(r))
		}
		out.chains[c.Name] = texts
	}
	if !exists {
		return out, nil
	}
	sets, err := conn.GetSets(m.table())
	if err != nil {
		return nil, fmt.Errorf("list sets of nftables table ip %s: %w", m.cfg.Name, err)
	}
	for _, s := range sets {
		if s.Anonymous {
			continue
		}
		elems, err := conn.GetSetElements(s)
		if err != nil {
			return nil, fmt.Errorf("list elements of nftables set ip %s %s: %w", m.cfg.Name, s.Name, err)
		}
		out.sets[s.Name] = map[string]bool{}
		for _, e := range elems {
			// The library leaves the attributes of a verdict as they are. A port is too short to be some.
			if chain := attributes(e.Val)[unix.NFTA_VERDICT_CHAIN]; len(chain) > 0 {
				e.VerdictData = verdict(expr.VerdictGoto, string(bytes.TrimRight(chain, "\x00")))
			}
			out.sets[s.Name][elementKey(e)] = true
		}
	}
	return out, nil
}

func comment(r *nftables.Rule) string {
	text, _ := userdata.GetString(r.UserData, userdata.TypeComment)
	return text
}

// deleteTable removes our table with all it holds.
func (m *Manager) deleteTable() error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	conn.DelTable(m.table())
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete nftables table ip %s: %w", m.cfg.Name, err)
	}
	return nil
}
