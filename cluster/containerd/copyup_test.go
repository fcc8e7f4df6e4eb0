package containerd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to change owners")
	}
}

func TestCopyUpKeepsEverythingAboutFiles(t *testing.T) {
	needRoot(t)
	image, volume := t.TempDir(), t.TempDir()
	data := filepath.Join(image, "data")
	old := time.Date(2020, 2, 3, 4, 5, 6, 789, time.UTC)
	err := errors.Join(
		os.MkdirAll(filepath.Join(data, "sub"), 0o755),
		os.WriteFile(filepath.Join(data, "sub/a"), []byte("content"), 0o644),
		os.Chown(filepath.Join(data, "sub/a"), 12, 34),
		os.Chmod(filepath.Join(data, "sub/a"), 0o640|os.ModeSetgid),
		unix.Setxattr(filepath.Join(data, "sub/a"), "user.note", []byte("n"), 0),
		os.Link(filepath.Join(data, "sub/a"), filepath.Join(data, "b")),
		os.Symlink("../../../../etc/passwd", filepath.Join(data, "link")),
		os.Lchown(filepath.Join(data, "link"), 56, 78),
		unix.Mkfifo(filepath.Join(data, "pipe"), 0o600),
		unix.Mknod(filepath.Join(data, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		os.Chtimes(filepath.Join(data, "sub/a"), old, old),
		os.Chtimes(filepath.Join(data, "sub"), old, old),
		os.Chown(data, 9, 9), os.Chmod(data, 0o700), os.Chtimes(data, old, old),
	)
	if err != nil {
		t.Fatal(err)
	}
	if err := copyUp(image, "/data", volume); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".", "sub", "sub/a", "b", "link", "pipe", "null"} {
		if got, want := describe(t, filepath.Join(volume, name)), describe(t, filepath.Join(data, name)); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	note := make([]byte, 8)
	if n, err := unix.Getxattr(filepath.Join(volume, "sub/a"), "user.note", note); err != nil || string(note[:n]) != "n" {
		t.Errorf("attribute %q, %v", note[:n], err)
	}
	if again, err := needsCopy(volume); again || err != nil {
		t.Errorf("a filled volume needs a copy: %v, %v", again, err)
	}
}

func describe(t *testing.T, file string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(file, &st); err != nil {
		t.Fatal(err)
	}
	to, _ := os.Readlink(file)
	var content []byte
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		content, _ = os.ReadFile(file)
	}
	mtime := fmt.Sprint(st.Mtim)
	links := uint64(st.Nlink) //nolint:unconvert // 32 bits wide on arm64
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		mtime = "" // cannot be set through os.Root
	}
	return fmt.Sprintf("%o %d:%d %d %s %q %q %d", st.Mode, st.Uid, st.Gid, st.Rdev, mtime, to, content, links)
}

func TestCopyUpStaysInside(t *testing.T) {
	needRoot(t)
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("s"), 0o600); err != nil {
		t.Fatal(err)
	}
	image := t.TempDir()
	err := errors.Join(os.Symlink(outside, filepath.Join(image, "absolute")),
		os.Symlink("../../../../../../../../"+outside, filepath.Join(image, "relative")),
		os.MkdirAll(filepath.Join(image, "real/dir"), 0o755), os.WriteFile(filepath.Join(image, "real/dir/f"), nil, 0o600),
		os.Symlink("/real", filepath.Join(image, "inside")), os.WriteFile(filepath.Join(image, "file"), nil, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	for target, want := range map[string]int{
		"/absolute": 0, "/relative": 0, "/none": 0, "/file": 0, "/file/below": 0, "/inside/dir": 1, "/../../real/dir": 1,
	} {
		volume := t.TempDir()
		if err := copyUp(image, target, volume); err != nil {
			t.Errorf("%s: %v", target, err)
		}
		if names, _ := os.ReadDir(volume); len(names) != want {
			t.Errorf("%s: copied %v", target, names)
		}
	}
}

func TestHalfFilledVolumeIsFilledAgain(t *testing.T) {
	needRoot(t)
	image, volume := t.TempDir(), t.TempDir()
	err := errors.Join(os.Mkdir(filepath.Join(image, "d"), 0o755), os.WriteFile(filepath.Join(image, "d/whole"), []byte("whole"), 0o600),
		os.WriteFile(filepath.Join(volume, copyMark), nil, 0o600), os.WriteFile(filepath.Join(volume, "whole"), []byte("wh"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	if again, err := needsCopy(volume); !again || err != nil {
		t.Fatalf("not seen: %v", err)
	}
	if err := copyUp(image, "/d", volume); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(volume, "whole")); string(b) != "whole" {
		t.Errorf("content %q, %v", b, err)
	}
	if names, _ := os.ReadDir(volume); len(names) != 1 {
		t.Errorf("left: %v", names)
	}
}
