package containerd

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sys/unix"
)

// copyMark is in a volume while it is filled. A volume that has it was left half full by a crash and is filled again.
const copyMark = ".gitopsd-copy-up"

// needsCopy says whether a volume is empty, or was left half full.
func needsCopy(volume string) (bool, error) {
	f, err := os.Open(volume)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if _, err := f.Readdirnames(1); errors.Is(err, io.EOF) {
		return true, nil
	} else if err != nil {
		return false, err
	}
	_, err = os.Lstat(path.Join(volume, copyMark))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// copyUp fills a volume with what the image has at target: content, owners, modes, times and, where the file systems have them, extended
// attributes. Links in the way to target are followed inside the image; links in the content are copied as they are. Both sides are
// held by os.Root, so nothing is read or written outside of them.
func copyUp(image, target, volume string) error {
	from, err := securejoin.SecureJoin(image, target)
	if err != nil {
		return fmt.Errorf("fill volume %s: %w", volume, err)
	}
	info, err := os.Lstat(from)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || err == nil && !info.IsDir() {
		return nil // the image has nothing there
	}
	if err != nil {
		return fmt.Errorf("fill volume %s: %w", volume, err)
	}
	src, err := os.OpenRoot(from)
	if err != nil {
		return fmt.Errorf("fill volume %s: %w", volume, err)
	}
	defer src.Close()
	dst, err := os.OpenRoot(volume)
	if err != nil {
		return fmt.Errorf("fill volume %s: %w", volume, err)
	}
	defer dst.Close()
	if err := fill(src, dst); err != nil {
		return errors.Join(fmt.Errorf("fill volume %s from the image's %s: %w", volume, target, err), empty(dst))
	}
	return nil
}

func fill(src, dst *os.Root) error {
	if err := empty(dst); err != nil {
		return err
	}
	if err := dst.WriteFile(copyMark, nil, 0o600); err != nil {
		return err
	}
	c := copier{src: src, dst: dst, links: map[fileID]string{}}
	if err := c.dir("."); err != nil {
		return err
	}
	if err := dst.Remove(copyMark); err != nil {
		return err
	}
	// Removing the mark changed the directory's time.
	info, err := src.Stat(".")
	if err != nil {
		return err
	}
	return dst.Chtimes(".", time.Time{}, info.ModTime())
}

func empty(dst *os.Root) error {
	entries, err := readDir(dst, ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := dst.RemoveAll(e.Name()); err != nil {
			return err
		}
	}
	return nil
}

func readDir(r *os.Root, dir string) ([]fs.DirEntry, error) {
	f, err := r.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.ReadDir(-1)
}

type fileID struct{ dev, ino uint64 }

type copier struct {
	src, dst *os.Root
	links    map[fileID]string // files with several names: where the first copy is
}

// dir copies a directory that exists on both sides, then gives the copy its owner, mode and time.
func (c *copier) dir(name string) error {
	entries, err := readDir(c.src, name)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := c.entry(path.Join(name, e.Name())); err != nil {
			return err
		}
	}
	info, err := c.src.Stat(name)
	if err != nil {
		return err
	}
	return c.attributes(name, info)
}

func (c *copier) entry(name string) error {
	info, err := c.src.Lstat(name)
	if err != nil {
		return err
	}
	st := info.Sys().(*syscall.Stat_t)
	if !info.IsDir() && st.Nlink > 1 {
		id := fileID{st.Dev, st.Ino}
		if first, ok := c.links[id]; ok {
			return c.dst.Link(first, name)
		}
		c.links[id] = name
	}
	switch info.Mode().Type() {
	case fs.ModeDir:
		if err := c.dst.Mkdir(name, 0o700); err != nil {
			return err
		}
		return c.dir(name)
	case fs.ModeSymlink:
		to, err := c.src.Readlink(name)
		if err != nil {
			return err
		}
		if err := c.dst.Symlink(to, name); err != nil {
			return err
		}
		return c.dst.Lchown(name, int(st.Uid), int(st.Gid))
	case 0:
		if err := c.file(name); err != nil {
			return err
		}
	case fs.ModeSocket:
		return nil // a socket without its process is of no use
	default:
		if err := c.node(name, st); err != nil {
			return err
		}
	}
	return c.attributes(name, info)
}

func (c *copier) file(name string) (err error) {
	in, err := c.src.Open(name)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := c.dst.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err == nil {
		copyXattrs(in, out)
	}
	if closed := out.Close(); err == nil {
		err = closed
	}
	return err
}

// node makes a device node or a named pipe.
func (c *copier) node(name string, st *syscall.Stat_t) error {
	dir, err := c.dst.Open(path.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.Mknodat(int(dir.Fd()), path.Base(name), st.Mode, int(st.Rdev))
}

// attributes gives a copy the owner, mode and time of the original; the owner first, because changing it clears the setuid bit.
func (c *copier) attributes(name string, info fs.FileInfo) error {
	st := info.Sys().(*syscall.Stat_t)
	if err := c.dst.Lchown(name, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := c.dst.Chmod(name, info.Mode()&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)); err != nil {
		return err
	}
	return c.dst.Chtimes(name, time.Time{}, info.ModTime())
}

// copyXattrs copies what extended attributes it can: file capabilities, ACLs, the user's own. A file system without them is fine.
func copyXattrs(in, out *os.File) {
	buf := make([]byte, 64<<10)
	n, err := unix.Flistxattr(int(in.Fd()), buf)
	if err != nil || n == 0 {
		return
	}
	value := make([]byte, 64<<10)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if strings.HasPrefix(name, "trusted.overlay.") {
			continue // the storage driver's own notes
		}
		if n, err := unix.Fgetxattr(int(in.Fd()), name, value); err == nil {
			_ = unix.Fsetxattr(int(out.Fd()), name, value[:n], 0)
		}
	}
}
