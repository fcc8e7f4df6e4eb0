package network

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const forwardKey = "net.ipv4.ip_forward"

// earlier is what was set before us, on one boot of the machine: after another boot the kernel starts anew and the record means nothing.
type earlier struct {
	Boot    string            `json:"boot"`
	Sysctls map[string]string `json:"sysctls"`
}

func (m *Manager) earlierFile() string {
	return filepath.Join(m.cfg.StateDir, "network-"+m.cfg.Name+".json")
}

// enableForwarding turns on IPv4 forwarding and notes the earlier value first.
func (m *Manager) enableForwarding() error {
	value, err := readSysctl(forwardKey)
	if err != nil {
		return err
	}
	if value == "1" {
		return nil
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(m.cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("make the network's state directory: %w", err)
	}
	data, err := json.Marshal(earlier{Boot: boot, Sysctls: map[string]string{forwardKey: value}})
	if err != nil {
		return fmt.Errorf("note earlier sysctls: %w", err)
	}
	tmp := m.earlierFile() + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return fmt.Errorf("note earlier sysctls: %w", err)
	}
	if err := os.Rename(tmp, m.earlierFile()); err != nil {
		return fmt.Errorf("note earlier sysctls: %w", err)
	}
	return writeSysctl(forwardKey, "1")
}

// restoreSysctls sets back what enableForwarding changed on this boot.
func (m *Manager) restoreSysctls() error {
	data, err := os.ReadFile(m.earlierFile())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read earlier sysctls: %w", err)
	}
	var e earlier
	if err := json.Unmarshal(data, &e); err != nil {
		return fmt.Errorf("read earlier sysctls in %s: %w", m.earlierFile(), err)
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	if e.Boot == boot {
		for _, k := range sortedKeys(e.Sysctls) {
			if err := writeSysctl(k, e.Sysctls[k]); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(m.earlierFile()); err != nil {
		return fmt.Errorf("remove the note of earlier sysctls: %w", err)
	}
	return nil
}

func bootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

// sysctlPath turns net.ipv4.ip_forward into a path. As sysctl(8) has it, a name that contains slashes uses them as separators, so that
// interface names with dots can be given.
func sysctlPath(key string) string {
	if !strings.Contains(key, "/") {
		key = strings.ReplaceAll(key, ".", "/")
	}
	return filepath.Join("/proc/sys", filepath.Join("/", key))
}

func readSysctl(key string) (string, error) {
	data, err := os.ReadFile(sysctlPath(key))
	if err != nil {
		return "", fmt.Errorf("read sysctl %s: %w", key, err)
	}
	return strings.TrimSpace(string(data)), nil
}

// writeSysctl sets a value in the network namespace of the calling thread.
func writeSysctl(key, value string) error {
	f, err := os.OpenFile(sysctlPath(key), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("set sysctl %s: %w", key, err)
	}
	_, err = f.WriteString(value)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("set sysctl %s to %q: %w", key, value, err)
	}
	return nil
}

func isNoDevice(err error) bool { return errors.Is(err, unix.ENODEV) }

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
