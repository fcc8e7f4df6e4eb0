package main

import (
	"context"
	"embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.yaml.in/yaml/v4"
	"pgregory.net/rapid"

	"github.com/gitopsd/gitopsd/cluster/api"
)

var update = flag.Bool("update", false, "write what the commands print into the scripts; read the difference before you keep it")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"gitopsctl":     func() { scripted(false) },
		"gitopsctl-tty": func() { scripted(true) },
	})
}

// scripted is gitopsctl with a clock that stands, and with a terminal or without.
func scripted(tty bool) {
	env := system()
	env.now = func() time.Time { return scriptNow }
	env.inTTY, env.outTTY, env.errTTY = tty, tty, tty
	version = "v1.0.0"
	os.Exit(run(untilSignal(), os.Args[1:], env))
}

// TestScripts runs every script of testdata. In one, beside testscript's own commands:
//
//	world NAME|FILE…      start a daemon with that inside: of testdata/worlds, or a file of the script
//	restart               end the daemon when a feed of it waits for something to happen, and start it again
//	run CODE ARGUMENT…    run gitopsctl without a terminal; it must exit with CODE
//	tty CODE ARGUMENT…    the same at a terminal
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:           "testdata",
		UpdateScripts: *update,
		Setup: func(e *testscript.Env) error {
			e.Setenv("GITOPSCTL_SOCKET", filepath.Join(e.WorkDir, "socket"))
			e.Setenv("SUDO_USER", "ann")
			e.Setenv("TZ", "UTC")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"world":   startWorld,
			"restart": restartWorld,
			"run":     func(ts *testscript.TestScript, _ bool, args []string) { runCode(ts, "gitopsctl", args) },
			"tty":     func(ts *testscript.TestScript, _ bool, args []string) { runCode(ts, "gitopsctl-tty", args) },
		},
	})
}

//go:embed testdata/worlds
var worlds embed.FS

func runCode(ts *testscript.TestScript, program string, args []string) {
	if len(args) == 0 {
		ts.Fatalf("usage: run CODE [ARGUMENT…]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	err = ts.Exec(program, args[1:]...)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("gitopsctl %s: exit code %d, want %d", strings.Join(args[1:], " "), got, want)
	}
}

func startWorld(ts *testscript.TestScript, _ bool, args []string) {
	text := ""
	for _, name := range args {
		if b, err := worlds.ReadFile("testdata/worlds/" + name + ".txt"); err == nil {
			text += string(b)
		} else {
			text += ts.ReadFile(name)
		}
	}
	w, err := newWorld(text)
	ts.Check(err)
	daemon := &daemon{world: w}
	daemon.start(ts)
	daemons.Store(ts.Getenv("GITOPSCTL_SOCKET"), daemon)
	ts.Defer(func() { daemon.stop(ts) })
}

// daemons are those of all scripts, by socket.
var daemons sync.Map

// daemon is a world behind a socket.
type daemon struct {
	*world
	cancel context.CancelFunc
	ended  chan error
}

func (d *daemon) start(ts *testscript.TestScript) {
	socket := ts.Getenv("GITOPSCTL_SOCKET")
	srv := api.NewServer(api.Config{Socket: socket, Version: "v1.0.0", Node: "n1", Backend: d, Live: d, Planner: d})
	ctx, cancel := context.WithCancel(context.Background())
	d.cancel, d.ended = cancel, make(chan error, 1)
	go func() { d.ended <- srv.Run(ctx) }()
	client := api.NewClient(socket)
	defer client.Close()
	for {
		if _, err := client.Version(ctx); err == nil {
			return
		}
		select {
		case err := <-d.ended:
			d.ended <- err
			ts.Fatalf("the daemon ended: %v", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (d *daemon) stop(ts *testscript.TestScript) {
	d.cancel()
	if err := <-d.ended; err != nil {
		ts.Logf("the daemon: %v", err)
	}
}

func restartWorld(ts *testscript.TestScript, _ bool, _ []string) {
	found, ok := daemons.Load(ts.Getenv("GITOPSCTL_SOCKET"))
	if !ok {
		ts.Fatalf("no daemon runs")
	}
	d := found.(*daemon)
	for watched := false; !watched; time.Sleep(5 * time.Millisecond) {
		d.mu.Lock()
		watched = d.watched
		d.mu.Unlock()
	}
	d.stop(ts)
	ts.Check(d.apply(d.onStart))
	d.start(ts)
}

// TestEveryCommandHasAScriptAndHelp walks the commands, so that none is added without a script of its name and a long help with its exit
// codes.
func TestEveryCommandHasAScriptAndHelp(t *testing.T) {
	c := &cli{environment: environment{getenv: func(string) string { return "" }, now: time.Now, in: strings.NewReader(""), out: io.Discard, err: io.Discard}}
	for _, cmd := range c.root().Commands() {
		if cmd.Name() == "help" {
			continue
		}
		if found, _ := filepath.Glob(filepath.Join("testdata", cmd.Name()+"*.txtar")); len(found) == 0 {
			t.Errorf("no script testdata/%s*.txtar", cmd.Name())
		}
		leaves := cmd.Commands()
		if len(leaves) == 0 {
			leaves = append(leaves, cmd)
		}
		for _, leaf := range leaves {
			if !strings.Contains(leaf.Long, "Exit codes") {
				t.Errorf("the help of %q names no exit codes", leaf.CommandPath())
			}
		}
	}
}

// TestHelp pins the help of each command.
func TestHelp(t *testing.T) {
	c := &cli{environment: environment{getenv: func(string) string { return "" }}}
	paths := [][]string{nil}
	for _, cmd := range c.root().Commands() {
		if cmd.Name() == "help" {
			continue
		}
		paths = append(paths, []string{cmd.Name()})
		for _, sub := range cmd.Commands() {
			paths = append(paths, []string{cmd.Name(), sub.Name()})
		}
	}
	for _, p := range paths {
		name := strings.Join(append([]string{"gitopsctl"}, p...), "-")
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			env := environment{in: strings.NewReader(""), out: &out, err: &out, getenv: func(string) string { return "" }, now: time.Now}
			if code := run(t.Context(), append(p, "--help"), env); code != 0 {
				t.Fatalf("exit code %d: %s", code, out.String())
			}
			golden(t, filepath.Join("testdata", "help", name+".txt"), out.String())
		})
	}
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; go test -update writes it\ngot:\n%s\nwant:\n%s", file, got, want)
	}
}

// TestSignals: what a signal ends is silent, and has the exit code that a shell gives to a program that the signal killed.
func TestSignals(t *testing.T) {
	for number, want := range map[syscall.Signal]int{syscall.SIGINT: 130, syscall.SIGTERM: 143} {
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(signaled{number})
		var out strings.Builder
		env := environment{in: strings.NewReader(""), out: &out, err: &out, getenv: func(string) string { return "" }, now: time.Now}
		if code := run(ctx, []string{"logs", "-f", "shop"}, env); code != want || out.Len() > 0 {
			t.Errorf("%s: exit code %d, want %d; it says %q", number, code, want, out.String())
		}
	}
}

func TestCleanLine(t *testing.T) {
	for in, want := range map[string]string{
		"plain":                     "plain",
		"a\nb\tc":                   "a b c",
		"\x1b[31mred\x1b]0;x\a":     `\x1b[31mred\x1b]0;x\x07`,
		"c1 \u009b31m":              `c1 \x9b31m`,
		"evil\u202egnp.exe":         `evil\u202egnp.exe`,
		"bad \xff utf-8":            "bad ? utf-8",
		"ünïcödé stays 日本 as it is": "ünïcödé stays 日本 as it is",
	} {
		if got := cleanLine(in); got != want {
			t.Errorf("cleanLine(%q) = %q, want %q", in, got, want)
		}
	}
}

// TestYAMLSaysWhatJSONSays: every text reads as the same text, also those that look like a number, a time or nothing.
func TestYAMLSaysWhatJSONSays(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		odd := rapid.SampledFrom([]string{"12345678", "0x1f", "1e5", "true", "no", "null", "~", "", "2026-01-02", "a: b", "- x", "#x", " x ", "{", "a\nb", "\x1b[2J"})
		in := map[string]string{"v": rapid.OneOf(odd, rapid.String()).Draw(t, "text")}
		var b strings.Builder
		c := &cli{environment: environment{out: &b}, output: "yaml"}
		if err := c.printData(in); err != nil {
			t.Fatal(err)
		}
		var got map[string]any
		if err := yaml.Unmarshal([]byte(b.String()), &got); err != nil {
			t.Fatalf("%q: %v", b.String(), err)
		}
		if got["v"] != in["v"] {
			t.Fatalf("%q was written as %q, which reads as %#v", in["v"], b.String(), got["v"])
		}
		if strings.ContainsFunc(b.String(), func(r rune) bool { return r != '\n' && hostile(r) }) {
			t.Fatalf("%q was written as %q", in["v"], b.String())
		}
	})
}

func FuzzClean(f *testing.F) {
	f.Add("a\x1b[2J\u009b\u202e\xff")
	f.Fuzz(func(t *testing.T, s string) {
		for _, r := range cleanLine(s) {
			if hostile(r) {
				t.Fatalf("cleanLine(%q) lets %U pass", s, r)
			}
		}
	})
}

// FuzzMarkdown: nothing that a file or a commit says gets a meaning in a comment.
func FuzzMarkdown(f *testing.F) {
	f.Add("</code><script>alert(1)</script>")
	f.Add("[x](javascript:alert(1)) ![i](http://h/i.png) @all | `a` \n# b")
	f.Fuzz(func(t *testing.T, s string) {
		out := md(s)
		if i := strings.IndexAny(out, "<>[]()|`*_\\\n\"'@!~$"); i >= 0 {
			t.Fatalf("md(%q) = %q lets %q pass", s, out, out[i])
		}
		if strings.Contains(out, "://") {
			t.Fatalf("md(%q) = %q holds an address", s, out)
		}
	})
}

func Example_counts() {
	fmt.Println(counts(api.Summary{Create: 1, Remove: 2, Waiting: 1}))
	// Output: 1 to create, 2 to remove, 1 waiting for a person.
}
