package containerd

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	securejoin "github.com/cyphar/filepath-securejoin"
	"github.com/moby/sys/user"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// userFiles are the user and group lists of an image, or of a running container.
type userFiles struct{ passwd, group []byte }

// maxUserFile bounds what is read of a list that somebody else made.
const maxUserFile = 1 << 20

// imageUsers reads both lists of an image that is mounted at root. Links are followed as a container would, absolute ones too; nothing
// changes below root meanwhile.
func imageUsers(root string) (*userFiles, error) {
	return readUserFiles(func(name string) (*os.File, error) {
		file, err := securejoin.SecureJoin(root, name)
		if err != nil {
			return nil, err
		}
		return os.OpenFile(file, userFileFlags, 0)
	})
}

// runningUsers reads both lists of a running container, which may change its files under our eyes: a link that leads out is not followed.
func runningUsers(pid int) (*userFiles, error) {
	root, err := os.OpenRoot(filepath.Join("/proc", strconv.Itoa(pid), "root"))
	if err != nil {
		return nil, err
	}
	defer root.Close()
	return readUserFiles(func(name string) (*os.File, error) { return root.OpenFile(name, userFileFlags, 0) })
}

// userFileFlags keep a named pipe at the place of a list from hanging us.
const userFileFlags = os.O_RDONLY | syscall.O_NONBLOCK

// readUserFiles reads what open finds. A list that is not there, or is no file, is empty.
func readUserFiles(open func(name string) (*os.File, error)) (*userFiles, error) {
	read := func(name string) ([]byte, error) {
		f, err := open(name)
		if err != nil {
			return nil, nil
		}
		defer f.Close()
		if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
			return nil, err
		}
		return io.ReadAll(io.LimitReader(f, maxUserFile))
	}
	passwd, err := read("etc/passwd")
	if err != nil {
		return nil, err
	}
	group, err := read("etc/group")
	return &userFiles{passwd, group}, err
}

// lookup turns USER and group_add into numbers: by name or number, with or without a group, as Docker does. Groups that the user is in
// come along where no group is named.
func (u *userFiles) lookup(name string, groups []string) (specs.User, error) {
	found, err := user.GetExecUser(name, &user.ExecUser{}, bytes.NewReader(u.passwd), bytes.NewReader(u.group))
	if err != nil {
		return specs.User{}, permanent("user %q: %v: the image's /etc/passwd and /etc/group do not have it", name, err)
	}
	out := specs.User{UID: uint32(found.Uid), GID: uint32(found.Gid)}
	extra, err := user.GetAdditionalGroups(groups, bytes.NewReader(u.group))
	if err != nil {
		return specs.User{}, permanent("group_add %q: %v: the image's /etc/group does not have it", groups, err)
	}
	seen := map[int]bool{}
	for _, gid := range append(append([]int{found.Gid}, found.Sgids...), extra...) {
		if !seen[gid] {
			seen[gid] = true
			out.AdditionalGids = append(out.AdditionalGids, uint32(gid))
		}
	}
	return out, nil
}
