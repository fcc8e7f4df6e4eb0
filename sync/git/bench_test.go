package git

import (
	"fmt"
	"strings"
	"testing"
)

// importFiles makes a commit of many files on main with one call of git.
func (b *builder) importFiles(files map[string]string, message string) {
	b.t.Helper()
	b.tick++
	var in strings.Builder
	fmt.Fprintf(&in, "commit refs/heads/main\ncommitter Ann <ann@example.com> %d +0000\ndata %d\n%s\n", b.tick, len(message), message)
	if out := b.run("", "for-each-ref", "refs/heads/main"); out != "" {
		in.WriteString("from refs/heads/main^0\n")
	}
	for name, content := range files {
		fmt.Fprintf(&in, "M 100644 inline %s\ndata %d\n%s\n", name, len(content), content)
	}
	b.run(in.String(), "fast-import", "--quiet")
}

// BenchmarkPush is what a push costs that changes one file of 3,000 in 1,000 directories: the look, the
// fetch, the judgement of all trees and the new checkout.
func BenchmarkPush(b *testing.B) {
	r := newRepo(b)
	files := map[string]string{}
	for i := range 3000 {
		files[fmt.Sprintf("stack%d/file%d", i/3, i%3)] = strings.Repeat(fmt.Sprintf("line %d\n", i), 100)
	}
	r.importFiles(files, "first")
	s := newStore(b, Limits{})
	mustPull(b, s, r.spec())
	n := 0
	for b.Loop() {
		b.StopTimer()
		n++
		r.importFiles(map[string]string{"stack7/file1": fmt.Sprint(n)}, "next")
		b.StartTimer()
		mustPull(b, s, r.spec())
	}
}

// BenchmarkFirst is the first fetch of that repository.
func BenchmarkFirst(b *testing.B) {
	r := newRepo(b)
	files := map[string]string{}
	for i := range 3000 {
		files[fmt.Sprintf("stack%d/file%d", i/3, i%3)] = strings.Repeat(fmt.Sprintf("line %d\n", i), 100)
	}
	r.importFiles(files, "first")
	for b.Loop() {
		mustPull(b, newStore(b, Limits{}), r.spec())
	}
}
