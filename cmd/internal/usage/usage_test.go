package usage

import (
	"io"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

func TestTell(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ args, want string }{
		{"", ""},
		{"run", ""},
		{"keys", ""},
		{"keys add x", ""},
		{"rum", "tool has no command \"rum\"; did you mean run? see `tool --help`"},
		{"keys ad", "tool keys has no command \"ad\"; did you mean add? see `tool keys --help`"},
		{"keys zzzzzz", "tool keys has no command \"zzzzzz\"; see `tool keys --help`"},
		{"run it", "tool run takes no argument, but there is \"it\"; usage: tool run [flags]"},
		{"keys add", "accepts 1 arg(s), received 0; usage: tool keys add NAME [flags]"},
		{"run --evry 3s", "unknown flag: --evry; did you mean --every? see `tool run --help`"},
		{"run --hiden", "unknown flag: --hiden; see `tool run --help`"},
		{"run -x", "unknown shorthand flag: 'x' in -x; see `tool run --help`"},
		{"run --every 3", "--every \"3\": write a time, as 30s or 5m; see `tool run --help`"},
		{"run --times many", "--times \"many\": write a whole number; see `tool run --help`"},
		{"run --loud=perhaps", "--loud \"perhaps\": write true or false; see `tool run --help`"},
		{"run --every", "flag needs an argument: --every; see `tool run --help`"},
	} {
		ran := false
		do := func(*cobra.Command, []string) error { ran = true; return nil }
		root := &cobra.Command{Use: "tool", SilenceErrors: true, SilenceUsage: true}
		run := &cobra.Command{Use: "run", Args: cobra.NoArgs, RunE: do}
		run.Flags().Duration("every", time.Second, "")
		run.Flags().Int("times", 1, "")
		run.Flags().Bool("loud", false, "")
		run.Flags().Bool("hidden", false, "")
		if err := run.Flags().MarkHidden("hidden"); err != nil {
			t.Fatal(err)
		}
		keys := &cobra.Command{Use: "keys"}
		keys.AddCommand(&cobra.Command{Use: "add NAME", Args: cobra.ExactArgs(1), RunE: do})
		root.AddCommand(run, keys)
		Tell(root)
		root.SetArgs(strings.Fields(c.args))
		root.SetOut(io.Discard)
		got := ""
		if err := root.Execute(); err != nil {
			got = err.Error()
		}
		if got != c.want || ran && got != "" {
			t.Errorf("tool %s: %q, want %q", c.args, got, c.want)
		}
	}
}
