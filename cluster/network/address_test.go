package network

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func prefixes(ss ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range ss {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestPickBlock(t *testing.T) {
	for _, c := range []struct {
		name        string
		pool, taken []netip.Prefix
		bits        int
		want        string // a prefix, or words of the error
	}{
		{"the first", prefixes("10.210.0.0/15"), nil, 16, "10.210.0.0/16"},
		{"the next", prefixes("10.210.0.0/15"), prefixes("10.210.4.0/24"), 16, "10.211.0.0/16"},
		{"a route that covers the pool", prefixes("10.210.0.0/15", "100.64.0.0/10"), prefixes("10.0.0.0/8"), 16, "100.64.0.0/16"},
		{"a pool in the midst of Docker's", prefixes("172.16.0.0/12"), nil, 16, "172.16.0.0/16"},
		{"only Docker's", prefixes("172.20.0.0/14", "192.168.0.0/16"), nil, 24, "no free /24"},
		{"nothing left", prefixes("10.210.0.0/16"), prefixes("10.210.255.0/24"), 16, "no free /16"},
		{"a pool smaller than the block", prefixes("10.210.0.0/24"), nil, 16, "no free /16"},
		{"the end of all addresses", prefixes("255.255.0.0/16"), prefixes("255.255.0.0/16"), 24, "no free /24"},
		{"IPv6", prefixes("fd00::/8"), nil, 16, "not an IPv4 network"},
		{"a size that is none", prefixes("10.0.0.0/8"), nil, 33, "between /1 and /30"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := PickBlock(c.pool, c.taken, c.bits)
			if err == nil && got.String() != c.want || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %s, %v; want %s", got, err, c.want)
			}
		})
	}
}

// A block that is picked lies in the pool and overlaps nothing; when none is, there is none.
func TestPickBlockIsFreeAndComplete(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		part := rapid.Custom(func(t *rapid.T) netip.Prefix {
			a := netip.AddrFrom4([4]byte{10, byte(rapid.IntRange(0, 1).Draw(t, "b")), rapid.Byte().Draw(t, "c"), rapid.Byte().Draw(t, "d")})
			return netip.PrefixFrom(a, rapid.IntRange(9, 32).Draw(t, "bits")).Masked()
		})
		taken := rapid.SliceOfN(part, 0, 12).Draw(t, "taken")
		block := netip.MustParsePrefix("10.0.0.0/16")
		bits := rapid.IntRange(16, 24).Draw(t, "size")
		got, err := PickBlock([]netip.Prefix{block}, taken, bits)
		free := func(p netip.Prefix) bool { return !slices.ContainsFunc(taken, p.Overlaps) }
		if err == nil {
			if !block.Contains(got.Addr()) || got.Bits() != bits || got.Masked() != got || !free(got) {
				t.Fatalf("picked %s", got)
			}
			return
		}
		for i := range 1 << (bits - 16) {
			if p := netip.PrefixFrom(address(number(block.Addr())+uint32(i)<<(32-bits)), bits); free(p) {
				t.Fatalf("%v, but %s is free", err, p)
			}
		}
	})
}
