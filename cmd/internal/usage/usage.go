// Package usage has commands say what is wrong with their arguments and flags in one line, with the way out.
package usage

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gitopsd/gitopsd/cluster/api"
)

// Tell sets up a command and all below it. One that only holds others prints its help where nothing more is said.
func Tell(cmd *cobra.Command) {
	cmd.SetFlagErrorFunc(flagError)
	if cmd.HasSubCommands() && !cmd.Runnable() {
		cmd.Args = cobra.ArbitraryArgs
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return unknownCommand(cmd, args[0])
		}
	} else if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return fmt.Errorf("%s; usage: %s", arguments(cmd, args, err), cmd.UseLine())
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		Tell(sub)
	}
}

// arguments says what is wrong with the number of arguments. Cobra takes the first of a command that wants none for a command.
func arguments(cmd *cobra.Command, args []string, err error) string {
	if len(args) > 0 && cobra.NoArgs(cmd, args) != nil && cobra.NoArgs(cmd, args).Error() == err.Error() {
		return fmt.Sprintf("%s takes no argument, but there is %q", cmd.CommandPath(), args[0])
	}
	return err.Error()
}

func unknownCommand(cmd *cobra.Command, name string) error {
	var known []string
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() {
			known = append(known, sub.Name())
			known = append(known, sub.Aliases...)
		}
	}
	return fmt.Errorf("%s has no command %q; %ssee `%s --help`", cmd.CommandPath(), name, meant("", name, known), cmd.CommandPath())
}

func flagError(cmd *cobra.Command, err error) error {
	hint := ""
	var unknown *pflag.NotExistError
	var invalid *pflag.InvalidValueError
	switch {
	case errors.As(err, &unknown) && unknown.GetSpecifiedShortnames() == "":
		var known []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if !f.Hidden {
				known = append(known, f.Name)
			}
		})
		hint = meant("--", unknown.GetSpecifiedName(), known)
	case errors.As(err, &invalid):
		f := invalid.GetFlag()
		want := map[string]string{"duration": "a time, as 30s or 5m", "int": "a whole number", "bool": "true or false"}[f.Value.Type()]
		if want == "" {
			want = errors.Unwrap(invalid).Error()
		} else {
			want = "write " + want
		}
		err = fmt.Errorf("--%s %q: %s", f.Name, invalid.GetValue(), want)
	}
	return fmt.Errorf("%w; %ssee `%s --help`", err, hint, cmd.CommandPath())
}

// meant asks whether one of the names that are near was meant.
func meant(prefix, name string, known []string) string {
	near := api.Nearest(name, slices.Sorted(slices.Values(known)))
	if len(near) == 0 {
		return ""
	}
	return "did you mean " + prefix + strings.Join(near, " or "+prefix) + "? "
}
