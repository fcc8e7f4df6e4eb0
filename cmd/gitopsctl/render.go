package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"

	"github.com/gitopsd/gitopsd/sync/compose"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// renderOptions say which directory to read, as the daemon would read a commit of it.
type renderOptions struct {
	path     string
	source   string
	vars     []string
	varFiles []string
	cluster  string
	profiles []string
}

func (o *renderOptions) flags(f *pflag.FlagSet) {
	f.StringArrayVar(&o.vars, "var", nil, "set a variable, as `KEY=VALUE`; may be given again")
	f.StringArrayVar(&o.varFiles, "var-file", nil, "read variables from this `file` of KEY=VALUE lines; may be given again")
	f.StringVar(&o.cluster, "cluster", "", "take the settings of this `name` under clusters: in gitops.yaml")
	f.StringSliceVar(&o.profiles, "profile", nil, "switch this `profile` on; may be given again")
}

// load renders the directory or file that the path names.
func (o *renderOptions) load(ctx context.Context) (*manifest.Bundle, error) {
	vars, err := o.variables()
	if err != nil {
		return nil, err
	}
	root, rel, isDir, err := o.tree()
	if err != nil {
		return nil, err
	}
	opts := compose.Options{Root: root, Source: o.source, Cluster: o.cluster, Vars: vars, Profiles: o.profiles}
	if opts.Source == "" {
		opts.Source = filepath.Base(root)
	}
	if isDir {
		opts.Path = rel
	} else {
		opts.Files = []string{filepath.ToSlash(rel)}
	}
	b, err := compose.Load(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", o.path, err)
	}
	return b, nil
}

// tree finds the root of the repository that the path lies in, since that is what its files may name; the directory itself where there is
// none.
func (o *renderOptions) tree() (root, rel string, isDir bool, err error) {
	abs, err := filepath.Abs(o.path)
	if err != nil {
		return "", "", false, err
	}
	if abs, err = filepath.EvalSymlinks(abs); err != nil {
		return "", "", false, plainPathError("read", o.path, err)
	}
	info, err := os.Stat(abs)
	if err != nil {
		return "", "", false, plainPathError("read", o.path, err)
	}
	dir := abs
	if !info.IsDir() {
		dir = filepath.Dir(abs)
	}
	root = dir
	for up := dir; ; up = filepath.Dir(up) {
		if _, err := os.Lstat(filepath.Join(up, ".git")); err == nil {
			root = up
			break
		}
		if up == filepath.Dir(up) {
			break
		}
	}
	rel, err = filepath.Rel(root, abs)
	if rel == "." {
		rel = ""
	}
	return root, rel, info.IsDir(), err
}

// plainPathError says what the system said of a file, without the system's own words around it.
func plainPathError(what, path string, err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return fmt.Errorf("%s %s: %w", what, path, err)
}

const maxVarFile = 1 << 20

// variables gathers --var-file and then --var, which wins.
func (o *renderOptions) variables() (map[string]string, error) {
	vars := map[string]string{}
	for _, file := range o.varFiles {
		b, err := readFile(file, maxVarFile)
		if err != nil {
			return nil, err
		}
		sc := bufio.NewScanner(bytes.NewReader(b))
		sc.Buffer(nil, maxVarFile)
		for n := 1; sc.Scan(); n++ {
			line := strings.TrimSpace(sc.Text())
			if line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			k, v, ok := strings.Cut(strings.TrimPrefix(line, "export "), "=")
			if k = strings.TrimSpace(k); !ok || k == "" {
				return nil, fmt.Errorf("%s:%d: want KEY=VALUE", file, n)
			}
			vars[k] = unquote(strings.TrimSpace(v))
		}
	}
	for _, kv := range o.vars {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("--var %s: want KEY=VALUE", k)
		}
		vars[k] = v
	}
	return vars, nil
}

// unquote takes one pair of quotes off.
func unquote(s string) string {
	if n := len(s); n >= 2 && (s[0] == '"' || s[0] == '\'') && s[n-1] == s[0] {
		return s[1 : n-1]
	}
	return s
}

// readFile reads a file of a person's, up to a size.
func readFile(path string, limit int64) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, plainPathError("read", path, err)
	}
	if info.Size() > limit {
		return nil, fmt.Errorf("read %s: it is larger than %d bytes", path, limit)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, plainPathError("read", path, err)
	}
	return b, nil
}
