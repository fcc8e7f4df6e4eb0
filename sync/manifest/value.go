package manifest

import (
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"
)

// Duration is a time span that reads and writes itself as 1m30s, so that plans and diffs show what people write.
type Duration time.Duration

// MarshalText writes the span as time.Duration does.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("read a duration: %w", err)
	}
	*d = Duration(v)
	return nil
}

func (d Duration) String() string { return time.Duration(d).String() }

// Std is the span as the standard library has it.
func (d Duration) Std() time.Duration { return time.Duration(d) }

// Bytes is an amount of memory or disk that writes itself in the largest binary unit that divides it.
type Bytes int64

var units = []struct {
	name string
	size int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}}

// MarshalText writes 64MiB, 1GiB or, where no unit divides, plain bytes: 1500.
func (b Bytes) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

func (b Bytes) String() string {
	for _, u := range units {
		if b != 0 && int64(b)%u.size == 0 {
			return strconv.FormatInt(int64(b)/u.size, 10) + u.name
		}
	}
	return strconv.FormatInt(int64(b), 10)
}

// UnmarshalText reads what MarshalText wrote.
func (b *Bytes) UnmarshalText(t []byte) error {
	s, size := string(t), int64(1)
	for _, u := range units {
		if n, ok := strings.CutSuffix(s, u.name); ok {
			s, size = n, u.size
			break
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return fmt.Errorf("read an amount of bytes: %w", err)
	}
	if n*size/size != n {
		return fmt.Errorf("read an amount of bytes: %s does not fit 64 bits", t)
	}
	*b = Bytes(n * size)
	return nil
}

// CPU is a share of processors in billionths: 1e9 is one core. It reads and writes itself as 0.5.
type CPU int64

// MarshalText writes cores with as many digits as it takes, up to nine.
func (c CPU) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

func (c CPU) String() string {
	sign := ""
	if c < 0 {
		sign, c = "-", -c
	}
	whole, frac := int64(c)/1e9, int64(c)%1e9
	if frac == 0 {
		return sign + strconv.FormatInt(whole, 10)
	}
	return sign + strings.TrimRight(fmt.Sprintf("%d.%09d", whole, frac), "0")
}

var errCPU = errors.New("want a number of cores such as 0.5, with at most nine digits after the point")

// UnmarshalText reads what MarshalText wrote.
func (c *CPU) UnmarshalText(t []byte) error {
	v, err := ParseCPU(string(t))
	*c = v
	return err
}

// ParseCPU reads a decimal number of cores without rounding.
func ParseCPU(s string) (CPU, error) {
	whole, frac, _ := strings.Cut(s, ".")
	neg := strings.HasPrefix(whole, "-")
	if whole == "" || whole == "-" {
		whole += "0"
	}
	w, err := strconv.ParseInt(whole, 10, 64)
	if err != nil || len(frac) > 9 || w > 1e9 || w < -1e9 {
		return 0, fmt.Errorf("read %q: %w", s, errCPU)
	}
	var f uint64
	if frac != "" {
		if f, err = strconv.ParseUint(frac+strings.Repeat("0", 9-len(frac)), 10, 32); err != nil {
			return 0, fmt.Errorf("read %q: %w", s, errCPU)
		}
	}
	if neg {
		return CPU(w*1e9 - int64(f)), nil
	}
	return CPU(w*1e9 + int64(f)), nil
}

// under says whether the clean absolute path p is root or lies below it.
func under(p, root string) bool {
	p = path.Clean(p)
	return p == root || strings.HasPrefix(p, strings.TrimSuffix(root, "/")+"/")
}

// socketPath says whether a host path is, by its name, a socket.
func socketPath(p string) bool {
	return strings.HasSuffix(p, ".sock") || strings.HasSuffix(p, ".socket")
}
