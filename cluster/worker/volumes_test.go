package worker

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// holder is a worker with a data root of the test's, and a file outside of that.
func holder(t *testing.T) (w *Worker, data, outside string) {
	dir := t.TempDir()
	data, outside = filepath.Join(dir, "data"), filepath.Join(dir, "outside")
	files(t, outside, "precious")
	return New(Config{Node: "n1", DataRoot: data}), data, outside
}

func files(t *testing.T, dir string, names ...string) {
	t.Helper()
	for _, name := range names {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func there(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// made makes a named volume as a task's start does, with files in it.
func made(t *testing.T, w *Worker, name string, names ...string) string {
	t.Helper()
	if err := w.makeVolume(name); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(w.cfg.DataRoot, volumesDir, name)
	files(t, dir, names...)
	return dir
}

// A volume goes with all that is in it and with nothing else: links in it are removed, not followed.
func TestAVolumeIsRemoved(t *testing.T) {
	w, data, outside := holder(t)
	dir := made(t, w, "shop_db", "a/b/c", ".hidden")
	beside := made(t, w, "shop_db2", "stays")
	for _, to := range []string{outside, "../shop_db2", filepath.Join(outside, "precious")} {
		if err := os.Symlink(to, filepath.Join(dir, "to"+strings.ReplaceAll(to, "/", "_"))); err != nil {
			t.Fatal(err)
		}
	}
	vol := state.Volume{Name: "shop_db", Kind: manifest.MountVolume, Stack: "shop"}
	for _, again := range []string{"", "again"} {
		if kept, err := w.removeData(vol); kept || err != nil {
			t.Fatalf("%s: kept %v, %v", again, kept, err)
		}
	}
	if there(dir) || there(filepath.Join(data, madeDir, "shop_db")) {
		t.Error("it is still there")
	}
	if !there(filepath.Join(outside, "precious")) || !there(filepath.Join(beside, "stays")) {
		t.Error("something else went with it")
	}
}

// Where the volume's own directory is a link, the link goes and what it leads to stays.
func TestAVolumeThatIsALink(t *testing.T) {
	w, data, outside := holder(t)
	link := made(t, w, "shop_db")
	if err := os.Remove(link); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, link); err != nil {
		t.Fatal(err)
	}
	if kept, err := w.removeData(state.Volume{Name: "shop_db", Kind: manifest.MountVolume, Stack: "shop"}); kept || err != nil || there(link) {
		t.Errorf("kept %v, %v, there %v", kept, err, there(link))
	}
	// A link in the way leads out: nothing is removed.
	if err := os.MkdirAll(filepath.Join(data, dataDir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(data, dataDir, "shop")); err != nil {
		t.Fatal(err)
	}
	if _, err := w.removeData(state.Volume{Name: "shop/precious", Kind: manifest.MountData, Stack: "shop"}); err == nil {
		t.Error("a link in the way was followed")
	}
	if !there(filepath.Join(outside, "precious")) {
		t.Error("what the links lead to is gone")
	}
}

// A directory that was there before is a person's.
func TestAVolumeThatWasThereIsKept(t *testing.T) {
	w, data, _ := holder(t)
	files(t, filepath.Join(data, volumesDir, "mine"), "file")
	if err := w.makeVolume("mine"); err != nil {
		t.Fatal(err)
	}
	kept, err := w.removeData(state.Volume{Name: "mine", Kind: manifest.MountVolume, Stack: "shop"})
	if !kept || err != nil || !there(filepath.Join(data, volumesDir, "mine", "file")) {
		t.Errorf("kept %v, %v", kept, err)
	}
}

// Names that lead elsewhere are refused, whatever the log says.
func TestNamesOfVolumesThatLeadElsewhere(t *testing.T) {
	w, data, outside := holder(t)
	files(t, filepath.Join(data, "data", "other"), "file")
	files(t, filepath.Join(data, "anonymous", "other", "web.1"), "file")
	for _, vol := range []state.Volume{
		{Kind: manifest.MountVolume, Name: "../outside"},
		{Kind: manifest.MountVolume, Name: ".."},
		{Kind: manifest.MountVolume, Name: "."},
		{Kind: manifest.MountVolume, Name: ""},
		{Kind: manifest.MountVolume, Name: outside},
		{Kind: manifest.MountVolume, Name: "a/b"},
		{Kind: manifest.MountData, Name: "shop/../other/file", Stack: "shop"},
		{Kind: manifest.MountData, Name: "shop/../../../outside", Stack: "shop"},
		{Kind: manifest.MountData, Name: "shop", Stack: "shop"},
		{Kind: manifest.MountData, Name: "shop/.", Stack: "shop"},
		{Kind: manifest.MountData, Name: "other/file", Stack: "shop"},
		{Kind: manifest.MountAnonymous, Name: "other/web.1/file", Stack: "shop"},
		{Kind: manifest.MountAnonymous, Name: "shop/../..", Stack: "shop"},
		{Kind: manifest.MountAnonymous, Name: "shop/web.1/..", Stack: "shop"},
		{Kind: manifest.MountAnonymous, Name: "shop/web.1", Stack: "shop"},
		{Kind: manifest.MountBind, Name: outside, Stack: "shop"},
	} {
		if _, err := w.removeData(vol); err == nil {
			t.Errorf("%s %q was taken", vol.Kind, vol.Name)
		}
	}
	for _, path := range []string{filepath.Join(outside, "precious"), filepath.Join(data, "data/other/file"), filepath.Join(data, "anonymous/other/web.1/file")} {
		if !there(path) {
			t.Errorf("%s is gone", path)
		}
	}
}

// Slots of stacks and services whose names run into each other have directories of their own, and what is removed of one leaves the others.
func TestAnonymousVolumesApart(t *testing.T) {
	names := []string{"a/b_c.1/x", "a_b/c.1/x", "a/b_c.1/x/y", "a/b_c.1/x_y", "a/b_c.1/x%2Fy", "a/b_c.11/x"}
	seen := map[string]string{}
	for _, name := range names {
		dir := anonymousDir(name)
		if other, twice := seen[dir]; twice {
			t.Errorf("%s and %s are both at %s", name, other, dir)
		}
		seen[dir] = name
	}
	w, data, _ := holder(t)
	for _, name := range names {
		files(t, filepath.Join(data, anonymousDir(name)), "file")
	}
	for i, name := range names {
		stack, _, _ := strings.Cut(name, "/")
		if _, err := w.removeData(state.Volume{Kind: manifest.MountAnonymous, Name: name, Stack: stack}); err != nil {
			t.Fatal(err)
		}
		for k, other := range names {
			if there(filepath.Join(data, anonymousDir(other), "file")) != (k > i) {
				t.Errorf("after %s was removed: %s", name, other)
			}
		}
	}
	if there(filepath.Join(data, "anonymous", "a")) {
		t.Error("the directory of the stack stays, empty")
	}
}

// What is mounted in a volume is no part of it.
func TestAVolumeWithAMountInIt(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts something")
	}
	w, _, outside := holder(t)
	dir := made(t, w, "shop_db", "sub dir/file", "own")
	at := filepath.Join(dir, "sub dir")
	if err := unix.Mount(outside, at, "", unix.MS_BIND, ""); err != nil {
		t.Skip("can't mount here: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	vol := state.Volume{Name: "shop_db", Kind: manifest.MountVolume, Stack: "shop"}
	if _, err := w.removeData(vol); err == nil || !strings.Contains(err.Error(), at) {
		t.Errorf("got %v, want an error that names %s", err, at)
	}
	if !there(filepath.Join(outside, "precious")) || !there(filepath.Join(dir, "own")) {
		t.Error("files are gone although something is mounted there")
	}
	if err := unix.Unmount(at, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := w.removeData(vol); err != nil || there(dir) || !there(filepath.Join(outside, "precious")) {
		t.Errorf("after it was unmounted: %v", err)
	}
}

// oneLog is a log of one node: what is reported goes in, unless it fails.
type oneLog struct {
	mu     sync.Mutex
	state  *state.State
	index  uint64
	fail   error
	events []state.Event
}

func (l *oneLog) View() *state.View {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state.View()
}
func (l *oneLog) Changed(uint64) <-chan struct{} { return nil }
func (l *oneLog) Settled() bool                  { return true }

func (l *oneLog) Report(_ context.Context, items []state.Item, events []state.Event) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		return l.fail
	}
	b, err := state.Encode(state.Command{Items: items})
	if err != nil {
		return err
	}
	l.index++
	res, err := l.state.Apply(l.index, 1, b)
	if err == nil && len(res.Refused) > 0 {
		err = errors.New("refused")
	}
	l.events = append(l.events, events...)
	return err
}

// What the log says is to go goes, the record last. An agent that could not tell the log, or was restarted before it could, begins again and says the same.
func TestTheLogIsToldOfARemoval(t *testing.T) {
	w, data, _ := holder(t)
	log := &oneLog{state: state.New()}
	w.cfg.Log = log
	dir := made(t, w, "shop_db", "file")
	key := state.VolumeKey("n1", manifest.MountVolume, "shop_db")
	vol := state.Volume{Name: "shop_db", Kind: manifest.MountVolume, Stack: "shop", Node: "n1", Own: true}
	put := func() {
		if err := log.Report(t.Context(), []state.Item{{state.Set(key, vol)}}, nil); err != nil {
			t.Fatal(err)
		}
	}
	pass := func(w *Worker) time.Time {
		var group sync.WaitGroup
		w.removeVolumes(t.Context(), &group, log.View(), time.Now())
		group.Wait()
		w.drain()
		return w.nextVolume()
	}
	put()
	if pass(w); !there(dir) {
		t.Fatal("a volume is gone that nobody wants removed")
	}
	vol.Removing = &state.Reason{ID: "person", Message: "by alice"}
	put()
	log.fail = errors.New("no quorum")
	if again := pass(w); there(dir) || again.IsZero() {
		t.Errorf("there %v, again at %s", there(dir), again)
	}
	log.fail = nil
	if again := pass(w); !again.IsZero() && log.View().Volumes.Len() == 0 {
		t.Errorf("it is tried again before its time")
	}
	w = New(Config{Node: "n1", DataRoot: data, Log: log}) // restarted
	if again := pass(w); !again.IsZero() || log.View().Volumes.Len() != 0 {
		t.Errorf("again at %s, %d records", again, log.View().Volumes.Len())
	}
	if n := len(log.events); n != 1 || log.events[0].Reason.ID != ReasonVolumeRemoved {
		t.Errorf("told: %+v", log.events)
	}
	// What can't be removed is told once, and the record stays.
	vol.Name = "../data"
	key = state.VolumeKey("n1", manifest.MountVolume, vol.Name)
	put()
	for range 2 {
		if again := pass(w); again.IsZero() {
			t.Error("it is not tried again")
		}
		clear(w.volumes.again)
		w.volumes.looked = 0
	}
	e, _ := log.View().Volumes.Get(key)
	if len(log.events) != 2 || e.Value.Stuck == nil || e.Value.Stuck.ID != ReasonVolumeStuck {
		t.Errorf("told: %+v, record %+v", log.events, e.Value)
	}
}
