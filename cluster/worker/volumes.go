package worker

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// This file makes and removes the directories of volumes. What is to be removed the log says, in the volume's record; when it is done the record goes. So an agent that
// is restarted in between goes on where it was. Only directories are removed that this node made, and only what is in them: links are removed, not followed, and where
// something is mounted nothing is.

// Reasons that the removal of a volume gives.
const (
	ReasonVolumeRemoved = "volume.removed"
	ReasonVolumeKept    = "volume.kept"
	ReasonVolumeStuck   = "volume.stuck"
)

// volumeRetry is the pause before the removal of a volume is tried again.
const volumeRetry = 30 * time.Second

// Directories below the data root. In madeDir there is a file for each named volume whose directory this node made: what was there before is a person's.
const (
	volumesDir = "volumes"
	madeDir    = "made"
	dataDir    = "data"
)

// volumes is what the loop knows of the removal of volumes.
type volumes struct {
	looked uint64               // index up to which the records were seen
	going  map[string]bool      // under way, by key
	again  map[string]time.Time // when to try those again that could not be removed
	found  []state.Volume       // volumes of images that are not in the log yet
}

// volumeName says whether a name is that of one directory: nothing that leads to another place.
func volumeName(name string) bool {
	return filepath.IsLocal(name) && filepath.Base(name) == name && name != "."
}

// anonymousDir is where an anonymous volume is, below the data root: one directory for its stack, its slot and its target, whatever they are called.
func anonymousDir(name string) string {
	stack, rest, _ := strings.Cut(name, "/")
	slot, target, _ := strings.Cut(rest, "/")
	return filepath.Join("anonymous", stack, slot, url.PathEscape(target))
}

// makeVolume makes the directory of a named volume where there is none, and notes that it did.
func (w *Worker) makeVolume(name string) error {
	dir := filepath.Join(w.cfg.DataRoot, volumesDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	err := os.Mkdir(filepath.Join(dir, name), 0o755)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err == nil {
		err = os.MkdirAll(filepath.Join(w.cfg.DataRoot, madeDir), 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(w.cfg.DataRoot, madeDir, name), nil, 0o600)
	}
	return err
}

// note has the log told of the volumes of images that it does not know.
func (w *Worker) note(found []state.Volume) {
	view := w.cfg.Log.View()
	for _, vol := range found {
		if e, known := view.Volumes.Get(state.VolumeKey(vol.Node, vol.Kind, vol.Name)); !known || e.Value.Orphan {
			w.volumes.found = append(w.volumes.found, vol)
		}
	}
}

// removeVolumes starts the removal of those volumes of this node that the log says are to go. It returns when to come again.
func (w *Worker) removeVolumes(ctx context.Context, group *sync.WaitGroup, view *state.View, now time.Time) time.Time {
	changed, complete := view.Since(w.volumes.looked, "volumes")
	due := slices.ContainsFunc(slices.Collect(maps.Values(w.volumes.again)), func(at time.Time) bool { return !now.Before(at) })
	if w.volumes.looked > 0 && complete && len(changed) == 0 && !due || !w.cfg.Log.Settled() {
		return w.nextVolume()
	}
	w.volumes.looked = view.Index
	for key, e := range view.Volumes.Below(w.cfg.Node + "/") {
		if e.Value.Removing == nil || w.volumes.going[key] || now.Before(w.volumes.again[key]) {
			continue
		}
		w.volumes.going[key] = true
		delete(w.volumes.again, key)
		group.Go(func() {
			err := w.removeVolume(ctx, key, e)
			w.post(ctx, func() {
				delete(w.volumes.going, key)
				if err != nil {
					w.volumes.again[key] = time.Now().Add(volumeRetry)
					w.log.Warn("remove a volume; trying again", "stack", e.Value.Stack, "volume", e.Value.Name, "err", err)
				}
			})
		})
	}
	for key := range w.volumes.again {
		if e, _ := view.Volumes.Get(key); e.Value.Removing == nil { // forgotten
			delete(w.volumes.again, key)
		}
	}
	return w.nextVolume()
}

// nextVolume is when the first of the removals that failed is to be tried again; zero = there is none.
func (w *Worker) nextVolume() time.Time {
	var next time.Time
	for _, at := range w.volumes.again {
		if next.IsZero() || at.Before(next) {
			next = at
		}
	}
	return next
}

// removeVolume removes a volume and tells the log what became of it.
func (w *Worker) removeVolume(ctx context.Context, key string, e state.Entry[state.Volume]) error {
	if _, tasks := reconcile.VolumeUsers(w.cfg.Log.View(), key); len(tasks) > 0 { // nobody should have let that happen; the data matter more than the order
		return fmt.Errorf("%s uses it", tasks[0])
	}
	vol := e.Value
	told := func(id, format string, args ...any) state.Event {
		return state.Event{Kind: "remove", Stack: vol.Stack, Service: vol.Service, Reason: state.Reason{ID: id, Message: fmt.Sprintf(format, args...)}}
	}
	kept, err := w.removeData(vol)
	if err != nil {
		why := state.Reason{ID: ReasonVolumeStuck, Message: fmt.Sprintf("%s could not be removed: %v; it is tried again", vol.Name, err)}
		if vol.Stuck == nil || *vol.Stuck != why {
			vol.Stuck = &why
			err = errors.Join(err, w.cfg.Log.Report(ctx, []state.Item{{state.Put(key, e.Version, vol)}}, []state.Event{told(why.ID, "%s", why.Message)}))
		}
		return err
	}
	event := told(ReasonVolumeRemoved, "volume %s is removed with its data", vol.Name)
	if kept {
		event = told(ReasonVolumeKept, "the directory of volume %s was there before gitopsd used it: it is kept, and not known any more", vol.Name)
	}
	return w.cfg.Log.Report(ctx, []state.Item{{state.Delete[state.Volume](key, e.Version)}}, []state.Event{event})
}

// removeData removes a volume's directory. That it is not there is no error. kept says that it was not made by this node, so that it stays.
func (w *Worker) removeData(vol state.Volume) (kept bool, err error) {
	base := w.cfg.DataRoot
	var rel string
	switch vol.Kind {
	case manifest.MountVolume:
		base, rel = filepath.Join(base, volumesDir), vol.Name
		if !volumeName(rel) {
			return false, fmt.Errorf("%q is not the name of a directory of a volume", vol.Name)
		}
		if _, err := os.Lstat(filepath.Join(w.cfg.DataRoot, madeDir, rel)); errors.Is(err, fs.ErrNotExist) {
			_, err := os.Lstat(filepath.Join(base, rel))
			return err == nil, nil // it is gone already: the log could not be told
		}
	case manifest.MountAnonymous:
		rel = anonymousDir(vol.Name)
		if strings.Count(rel, "/") != 3 || !strings.HasPrefix(vol.Name, vol.Stack+"/") {
			return false, fmt.Errorf("%q is not the name of a volume of a slot", vol.Name)
		}
	case manifest.MountData, manifest.MountContent:
		base = filepath.Join(base, dataDir)
		if rel = filepath.Clean(vol.Name); !strings.HasPrefix(rel, vol.Stack+"/") {
			return false, fmt.Errorf("%q is not a path below the data of stack %s", vol.Name, vol.Stack)
		}
	default:
		return false, fmt.Errorf("a %s is not removed", vol.Kind)
	}
	if err := removeTree(base, rel); err != nil {
		return false, err
	}
	switch vol.Kind {
	case manifest.MountVolume:
		err = os.Remove(filepath.Join(w.cfg.DataRoot, madeDir, rel))
	case manifest.MountAnonymous: // the slot's directory and the stack's, where this was the last in it
		slot := filepath.Dir(filepath.Join(base, rel))
		if unix.Rmdir(slot) == nil {
			_ = unix.Rmdir(filepath.Dir(slot))
		}
	}
	return false, err
}

// removeTree removes a file or directory below base with all that is in it. Links in the way to it may not lead out of base; those in it are removed, not followed.
func removeTree(base, rel string) error {
	root, err := os.OpenRoot(base)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	real, err := filepath.EvalSymlinks(filepath.Dir(filepath.Join(base, rel)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	mounted, err := mountsBelow(filepath.Join(real, filepath.Base(rel)))
	if err != nil {
		return err
	}
	if len(mounted) > 0 {
		return fmt.Errorf("something is mounted at %s: unmount it, or `gitopsctl volume forget` leaves all of it as it is", mounted[0])
	}
	return root.RemoveAll(rel)
}

// mountsBelow lists the places at or below a directory where this machine has something mounted.
func mountsBelow(dir string) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var out []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 4 {
			if at := unescape.Replace(fields[4]); at == dir || strings.HasPrefix(at, dir+"/") {
				out = append(out, at)
			}
		}
	}
	return out, lines.Err()
}
