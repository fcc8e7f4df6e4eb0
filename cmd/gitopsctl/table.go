package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
)

// cell is a field of a table.
type cell struct {
	text  string
	style style
}

// word is a cell with a status word, in its colour.
func word(s string) cell { return cell{dash(s), styleOf(s)} }

// text is a cell as it is.
func text(s string) cell { return cell{text: dash(s)} }

// table has the same columns for all rows. Columns of wide are shown with -o wide only.
type table struct {
	columns []string
	wide    []string
	rows    [][]cell // columns, then wide
	names   []string // of the rows, for -o name
}

// add appends a row; name is what -o name prints of it.
func (t *table) add(name string, cells ...cell) {
	t.rows = append(t.rows, cells)
	t.names = append(t.names, name)
}

// print writes the table as -o says; data is the same for programs.
func (c *cli) print(t *table, data any) error {
	switch c.output {
	case "json", "yaml":
		return c.printData(data)
	case "name":
		for _, n := range t.names {
			fmt.Fprintln(c.out, cleanLine(n))
		}
		return nil
	}
	c.writeTable(c.out, t, "")
	return nil
}

// writeTable aligns the columns with two spaces between them.
func (c *cli) writeTable(w io.Writer, t *table, indent string) {
	head := t.columns
	if c.output == "wide" {
		head = append(head[:len(head):len(head)], t.wide...)
	}
	width := make([]int, len(head))
	rows := make([][]cell, 0, len(t.rows)+1)
	first := make([]cell, len(head))
	for i, h := range head {
		first[i] = cell{h, bold}
	}
	rows = append(rows, first)
	for _, r := range t.rows {
		row := make([]cell, len(head))
		for i := range head {
			row[i] = cell{cleanLine(r[i].text), r[i].style}
		}
		rows = append(rows, row)
	}
	for _, r := range rows {
		for i, f := range r {
			width[i] = max(width[i], utf8.RuneCountInString(f.text))
		}
	}
	for _, r := range rows {
		var b strings.Builder
		for i, f := range r {
			b.WriteString(c.paint(f.style, f.text))
			if i < len(r)-1 {
				b.WriteString(strings.Repeat(" ", width[i]-utf8.RuneCountInString(f.text)+2))
			}
		}
		fmt.Fprintln(w, indent+strings.TrimRight(b.String(), " "))
	}
}

// watchable makes a command that shows something, and with --watch again and again.
func (c *cli) watchable(cmd *cobra.Command, show func(ctx context.Context, args []string) error) *cobra.Command {
	watch := false
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if watch {
			return c.watch(cmd.Context(), func(ctx context.Context) error { return show(ctx, args) })
		}
		return show(cmd.Context(), args)
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show it again whenever something changes")
	return cmd
}

// watch shows something again whenever the facts move. A terminal is cleared first; elsewhere an empty line comes between.
func (c *cli) watch(ctx context.Context, show func(context.Context) error) error {
	ctx, cancel := c.limit(ctx, 0)
	defer cancel()
	first := true
	err := c.patient(ctx, func() error {
		return c.daemon().WatchChanges(ctx, func(api.Change) error {
			switch {
			case c.outTTY:
				fmt.Fprint(c.out, "\x1b[H\x1b[2J")
			case !first && !c.structured():
				fmt.Fprintln(c.out)
			}
			first = false
			var quiet exitCode
			if err := show(ctx); err != nil && (!errors.As(err, &quiet) || quiet.err != nil) {
				return err
			}
			return c.flush()
		})
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return nil // --timeout says how long to watch
	}
	return err
}
