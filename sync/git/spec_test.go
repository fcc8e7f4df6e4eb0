package git

import (
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestURLs(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"https://example.com/a/b.git":       "https://example.com/a/b.git",
		"https://example.com:8443/a/":       "https://example.com:8443/a",
		"https://user:pw@example.com/a%20b": "https://example.com/a%20b",
		"HTTPS://example.com/a":             "https://example.com/a",
		"http://127.0.0.1:3000/a":           "http://127.0.0.1:3000/a",
		"http://[::1]/a":                    "http://[::1]/a",
		"ssh://example.com/a":               "ssh://git@example.com/a",
		"ssh://bob@example.com:2222/~/a":    "ssh://bob@example.com:2222/~/a",
		"git@example.com:team/a.git":        "git@example.com:team/a.git",
		"example.com:team/a.git":            "git@example.com:team/a.git",
		"git@[::1]:a":                       "git@[::1]:a",
		"/srv/git/a.git/":                   "/srv/git/a.git",
		"file:///srv/git/a%20b":             "/srv/git/a b",
		"file://localhost/srv/a":            "/srv/a",
	} {
		if l, err := parseURL(in); err != nil || l.String() != want {
			t.Errorf("%s: %s %v, want %s", in, l, err, want)
		}
	}
}

// Everything here is refused before any network or disk is touched.
func TestRefusedSpecs(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		spec Spec
		text string
	}{
		{Spec{}, "no URL is set"},
		{Spec{URL: "--upload-pack=touch /tmp/x"}, "begins with a dash"},
		{Spec{URL: "-oProxyCommand=x:y"}, "begins with a dash"},
		{Spec{URL: "ext::sh -c x"}, "holds a space"},
		{Spec{URL: "ext::sh"}, "names a remote helper (ext::), and those run programs"},
		{Spec{URL: "fd::17"}, "names a remote helper (fd::)"},
		{Spec{URL: "ssh://-oProxyCommand=x/y"}, "begins with a dash"},
		{Spec{URL: "-oProxyCommand=x@host:y"}, "begins with a dash"},
		{Spec{URL: "git@-oProxyCommand=x:y"}, "host begins with a dash"},
		{Spec{URL: "ssh://-x@example.com/y"}, "name in the URL begins with a dash"},
		{Spec{URL: "git@example.com:-x"}, "begins with a dash"},
		{Spec{URL: "ssh://example.com/-x"}, "begins with a dash"},
		{Spec{URL: "git@example.com:a';touch${IFS}x;'"}, "means something to a shell"},
		{Spec{URL: "ssh://example.com/a$(id)"}, "means something to a shell"},
		{Spec{URL: "ssh://example.com/a%27b"}, "means something to a shell"},
		{Spec{URL: "ssh://example.com/a%0ab"}, "holds a control character"},
		{Spec{URL: "https://example.com/a\nb"}, "control character"},
		{Spec{URL: "https://example.com/a%00b"}, "control character"},
		{Spec{URL: "https://example.com/../b"}, "has .. in it"},
		{Spec{URL: "https://example.com/%2e%2e/b"}, "has .. in it"},
		{Spec{URL: "https://example.com"}, "path is empty"},
		{Spec{URL: "https:///a"}, "host is missing"},
		{Spec{URL: "https://exa$mple.com/a"}, "host has characters"},
		{Spec{URL: "https://example.com:0/a"}, "port is not between"},
		{Spec{URL: "https://example.com/a?x=y"}, "has a ? or # part"},
		{Spec{URL: "https://example.com/a#x"}, "has a ? or # part"},
		{Spec{URL: "ssh://git:" + canary + "@example.com/a"}, "holds a password"},
		{Spec{URL: "git://example.com/a"}, "neither encryption nor proof"},
		{Spec{URL: "ftp://example.com/a"}, "scheme ftp:// is not one"},
		{Spec{URL: "javascript://example.com/a"}, "is not one that gitopsd speaks"},
		{Spec{URL: "http://example.com/a"}, "anyone on the way can replace the commits"},
		{Spec{URL: "http://10.0.0.1/a"}, "anyone on the way can replace the commits"},
		{Spec{URL: "http://u:" + canary + "@example.com/a"}, "readable for anyone on the way"},
		{Spec{URL: "file://host/a"}, "must not name a host"},
		{Spec{URL: "/srv/../etc"}, "has .., . or // in it"},
		{Spec{URL: "/"}, "is / or has"},
		{Spec{URL: "relative/path"}, "neither a URL nor an absolute path"},
		{Spec{URL: "https://example.com/" + strings.Repeat("a", 3000)}, "longer than 2048 bytes"},
		{Spec{URL: "https://u:" + canary + "%zz@example.com/a"}, "can't be parsed"},
		{Spec{Branch: "a", Tag: "b"}, "both a branch and a tag"},
		{Spec{Branch: "../../x"}, "has .. in it"},
		{Spec{Branch: "refs/heads/-x"}, "part that begins with a dash"},
		{Spec{Branch: "--upload-pack=x"}, "begins with a dash"},
		{Spec{Branch: "a b"}, "holds a space"},
		{Spec{Branch: "a\x1b[31m"}, "control character"},
		{Spec{Branch: "a:b"}, "one of ~ ^ :"},
		{Spec{Branch: "a^"}, "one of ~ ^ :"},
		{Spec{Branch: "a\\b"}, "one of ~ ^ :"},
		{Spec{Branch: "HEAD"}, "keeps for itself"},
		{Spec{Branch: "a@{1}"}, "keeps for itself"},
		{Spec{Branch: "/a"}, "has an empty part"},
		{Spec{Branch: "a//b"}, "has an empty part"},
		{Spec{Branch: "a/.b"}, "begins with a dot"},
		{Spec{Branch: "a.lock"}, "ends in .lock"},
		{Spec{Branch: "a."}, "ends in a dot"},
		{Spec{Tag: "-d"}, "begins with a dash"},
		{Spec{Tag: strings.Repeat("a", 300)}, "longer than 250 bytes"},
		{Spec{Path: "/etc"}, "is absolute"},
		{Spec{Path: "../x"}, "has .. in it"},
		{Spec{Path: "a/../../x"}, "has .. in it"},
		{Spec{Path: "a//b"}, "has a part that is empty"},
		{Spec{Path: ".git"}, "read as .git"},
		{Spec{Path: "a\\b"}, "has a backslash"},
	} {
		if c.spec.URL == "" && c.text != "no URL is set" {
			c.spec.URL = "https://example.com/a"
		}
		c.spec.Name = "shop"
		err := c.spec.Check()
		if !errors.Is(err, InvalidSource) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%+q: got %v, want %q", []string{c.spec.URL, c.spec.Branch, c.spec.Tag, c.spec.Path}, err, c.text)
		}
		if err != nil && strings.Contains(err.Error(), canary) {
			t.Errorf("the error holds the password: %v", err)
		}
		if _, err := newStore(t, Limits{}).Resolve(testCtx(t), c.spec); !errors.Is(err, InvalidSource) {
			t.Errorf("Resolve: %v", err)
		}
	}
}

func TestPlainHTTPWithVerifyAndWithoutCredentials(t *testing.T) {
	t.Parallel()
	spec := Spec{Name: "x", URL: "http://example.com/a", Verify: Verify{Mode: VerifySSH, AllowedSigners: "a " + pubLine(newSigner(t))}}
	if err := spec.Check(); err != nil {
		t.Error(err)
	}
	spec.Auth.Token = canary
	if err := spec.Check(); err == nil || !strings.Contains(err.Error(), "use https") && !strings.Contains(err.Error(), "Use https") {
		t.Error(err)
	}
}

// A ref name that is accepted can be used as a path below a directory without leaving it.
func TestAcceptedRefNamesStayInside(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.StringOf(rapid.RuneFrom([]rune("ab./-@{~^:?*[\\ \x00\n"))).Draw(t, "name")
		if name == "" || badRefName(name) != "" {
			return
		}
		for _, part := range strings.Split(name, "/") {
			if part == "" || part == "." || part == ".." || part[0] == '-' {
				t.Fatalf("accepted %q", name)
			}
		}
	})
}

func FuzzSpec(f *testing.F) {
	for _, s := range []string{"https://a:b@c/d", "git@h:p", "/a/b", "file:///a", "ext::x", "ssh://[::1]:22/x"} {
		f.Add(s, "main", "a/b")
	}
	f.Fuzz(func(t *testing.T, url, branch, path string) {
		spec := Spec{Name: "x", URL: url, Branch: branch, Path: path}
		if spec.Check() != nil {
			return
		}
		l, err := parseURL(url)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseURL(l.String())
		if err != nil || again.repoKey() != l.repoKey() {
			t.Errorf("%q is shown as %q, which is %v", url, l.String(), err)
		}
		if l.scheme == schemeSSH && strings.ContainsAny(l.path+l.host+l.user, "'\"`$;|&<>\n\\") {
			t.Errorf("%q reaches a shell", l.path)
		}
	})
}
