package explain

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestEveryIDIsExplained reads the program for the ids that it gives as reasons and rules.
func TestEveryIDIsExplained(t *testing.T) {
	found := idsOf(t, os.DirFS("../../.."))
	if len(found) < 30 {
		t.Fatalf("only %d ids were found; is the test run in its folder?", len(found))
	}
	for id, where := range found {
		e, ok := Of(id)
		if !ok {
			t.Errorf("%s: the id %q has no paragraph in reasons.md", where, id)
		} else if e.Title == "" || len(strings.Fields(e.Text)) < 12 {
			t.Errorf("the paragraph of %q says too little", id)
		}
	}
	for _, e := range All() {
		if found[e.ID] == "" {
			t.Errorf("reasons.md explains %q, which nothing in the program gives", e.ID)
		}
	}
}

func TestEntriesAreUnique(t *testing.T) {
	all := All()
	for i := 1; i < len(all); i++ {
		if all[i].ID == all[i-1].ID {
			t.Errorf("%q is explained twice", all[i].ID)
		}
	}
	if _, ok := Of("no.such.id"); ok {
		t.Error("an id that there is not was found")
	}
}

// TestFinder checks that the reading of the program finds what it should in a small one.
func TestFinder(t *testing.T) {
	const src = `package x
const ReasonOne = "one.a"
const RuleTwo = "two"
const Other = "other"
func (s *scanner) add(sev int, rule string, pos int) {}
func f(s *scanner, id string) {
	s.add(1, "three", 2)
	s.add(1, id, 2)
	_ = state.Reason{ID: "four.b", Message: "m"}
	_ = manifest.Problem{Rule: "five", Message: "m"}
	g("six")
	rule := "seven"
	rule = "eight"
	_ = []state.Reason{{ID: "nine.c"}}
}`
	file, err := parser.ParseFile(token.NewFileSet(), "x.go", src, 0)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	idsIn([]*ast.File{file}, func(id string, _ token.Pos) { got = append(got, id) })
	slices.Sort(got)
	if want := "eight five four.b nine.c one.a seven three two"; strings.Join(got, " ") != want {
		t.Errorf("found %v, want %s", got, want)
	}
}

// idsOf maps each id to a place where it is given.
func idsOf(t *testing.T, tree fs.FS) map[string]string {
	t.Helper()
	found := map[string]string{}
	packages := map[string][]*ast.File{}
	fset := token.NewFileSet()
	err := fs.WalkDir(tree, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if base := d.Name(); name != "." && (strings.HasPrefix(base, ".") || base == "testdata" || base == "fixtures") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		data, err := fs.ReadFile(tree, name)
		if err != nil {
			return err
		}
		file, err := parser.ParseFile(fset, name, data, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		packages[filepath.Dir(name)] = append(packages[filepath.Dir(name)], file)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for dir, files := range packages {
		idsIn(files, func(id string, pos token.Pos) {
			// Rules of policy have ids set/name and come with their texts, but for those that the engine itself gives.
			if ofPolicy := dir == "policy" && !strings.HasPrefix(id, "policy/"); !ofPolicy {
				found[id] = fset.Position(pos).String()
			}
		})
	}
	return found
}

var id = regexp.MustCompile(`^[a-z][a-z0-9_]*([./-][a-z0-9_]+)*$`)

// idsIn walks a package for ids: constants Reason… and Rule…, fields ID of a Reason and Rule of anything, variables and arguments named rule.
func idsIn(files []*ast.File, report func(string, token.Pos)) {
	give := func(e ast.Expr) {
		lit, ok := e.(*ast.BasicLit)
		if !ok || lit.Kind != token.STRING {
			return
		}
		if s, err := strconv.Unquote(lit.Value); err == nil && id.MatchString(s) {
			report(s, lit.Pos())
		}
	}
	rulePlace := map[string]int{} // function -> which of its parameters is named rule
	for _, f := range files {
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			at := 0
			for _, p := range fn.Type.Params.List {
				for _, n := range p.Names {
					if n.Name == "rule" {
						rulePlace[fn.Name.Name] = at
					}
					at++
				}
			}
		}
	}
	for _, f := range files {
		reasons := map[*ast.CompositeLit]bool{} // literals without a type of their own, in a list of reasons
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ValueSpec:
				for i, name := range n.Names {
					if i < len(n.Values) && (strings.HasPrefix(name.Name, "Reason") || strings.HasPrefix(name.Name, "Rule") || strings.HasSuffix(name.Name, "Rule") || name.Name == "rule") {
						give(n.Values[i])
					}
				}
			case *ast.AssignStmt:
				for i, l := range n.Lhs {
					if v, ok := l.(*ast.Ident); ok && v.Name == "rule" && i < len(n.Rhs) && len(n.Lhs) == len(n.Rhs) {
						give(n.Rhs[i])
					}
				}
			case *ast.CallExpr:
				name := ""
				switch fn := n.Fun.(type) {
				case *ast.Ident:
					name = fn.Name
				case *ast.SelectorExpr:
					name = fn.Sel.Name
				}
				if at, ok := rulePlace[name]; ok && at < len(n.Args) {
					give(n.Args[at])
				}
			case *ast.CompositeLit:
				isReason := reasons[n] || typeName(n.Type) == "Reason"
				if list, ok := n.Type.(*ast.ArrayType); ok && typeName(list.Elt) == "Reason" {
					for _, e := range n.Elts {
						if l, ok := e.(*ast.CompositeLit); ok {
							reasons[l] = true
						}
					}
				}
				for _, e := range n.Elts {
					kv, ok := e.(*ast.KeyValueExpr)
					if !ok {
						continue
					}
					if k, ok := kv.Key.(*ast.Ident); ok && (k.Name == "Rule" || k.Name == "rule" || k.Name == "ID" && isReason) {
						give(kv.Value)
					}
				}
			}
			return true
		})
	}
}

func typeName(e ast.Expr) string {
	switch t := e.(type) {
	case *ast.Ident:
		return t.Name
	case *ast.SelectorExpr:
		return t.Sel.Name
	}
	return ""
}
