package git

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"path"
	"strconv"
	"strings"
	"time"
)

// Spec says where a source's commits come from and how they are verified.
type Spec struct {
	// Name is the source's name, for messages only.
	Name string
	// URL is https://host/path, ssh://user@host:port/path, user@host:path, an absolute path on this
	// machine or file:///path. User and password in an https URL are taken as credentials and are
	// never shown. Plain http:// is for this machine's own addresses; beyond them it is accepted only
	// without credentials and with Verify on, because anyone on the way can replace what is fetched.
	URL string
	// Branch is a branch's name, or a full ref name that begins with refs/ (a pull request's head).
	// Without Branch and Tag, the branch that the remote's HEAD names is followed.
	Branch string
	// Tag is a tag's name. One of Branch and Tag at most.
	Tag string
	// Path is the directory that holds the stacks, relative to the root; "" is the root.
	Path string
	// Auth holds the credentials.
	Auth Auth
	// Verify says which signature a commit needs.
	Verify Verify
	// Interval is the time between two looks, give or take a tenth; 0 = the Watcher's. Of sources that read one repository the shortest counts.
	Interval time.Duration
}

// Auth holds a source's credentials. It never prints them: every form of formatting shows which are set.
type Auth struct {
	Username   string // https; "git" if empty, which the forges accept beside a token
	Token      string // https: an access token or a password
	CA         string // https: PEM certificates that are trusted beside the system's
	PrivateKey string // ssh: a private key in PEM form
	Passphrase string // ssh: opens PrivateKey
	// KnownHosts is the text of a known_hosts file. If empty, ~/.ssh/known_hosts and
	// /etc/ssh/ssh_known_hosts are used. A host that is in none of them is refused.
	KnownHosts string
}

// Mode is the kind of signature that a source requires.
type Mode string

// The modes of Verify. The empty Mode is VerifyNone.
const (
	VerifyNone Mode = "none"
	VerifySSH  Mode = "ssh"
	VerifyGPG  Mode = "gpg"
)

// Verify says who may sign. In the modes ssh and gpg a tip is accepted when its commit is signed by
// one of the signers; for a Tag source a signature of the annotated tag itself does as well, if the
// tag object carries the name it was found under (an old signed tag under a new name is refused).
// Only the tip is verified: whoever signs it vouches for what it contains and builds on.
type Verify struct {
	Mode Mode
	// AllowedSigners is the text of an OpenSSH allowed_signers file. The options namespaces=,
	// valid-after= and valid-before= are honoured, the dates against the commit's own date as git does.
	AllowedSigners string
	// Keyring is one or more armored OpenPGP public keys.
	Keyring string
}

// String shows which credentials are set, and none of them.
func (a Auth) String() string {
	var set []string
	for _, f := range []struct{ name, value string }{
		{"username", a.Username}, {"token", a.Token}, {"ca", a.CA},
		{"private key", a.PrivateKey}, {"passphrase", a.Passphrase}, {"known hosts", a.KnownHosts},
	} {
		if f.value != "" {
			set = append(set, f.name)
		}
	}
	if len(set) == 0 {
		return "no credentials"
	}
	return "credentials set: " + strings.Join(set, ", ")
}

// Format implements fmt.Formatter, so that no verb shows a field.
func (a Auth) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(a.String())) }

// LogValue implements slog.LogValuer.
func (a Auth) LogValue() slog.Value { return slog.StringValue(a.String()) }

// MarshalText makes JSON and other encodings show what String shows. An Auth can't be stored this way,
// which is meant: who stores credentials decides where and how.
func (a Auth) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// String names the source and the ref it follows, as in "shop@main".
func (s Spec) String() string {
	name := s.Name
	if name == "" {
		name = s.Location()
	}
	return printable(name, 200) + "@" + printable(s.refLabel(), 200)
}

// Format implements fmt.Formatter, so that no verb shows the URL's user and password.
func (s Spec) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(s.String())) }

// LogValue implements slog.LogValuer.
func (s Spec) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText makes JSON and other encodings show what String shows; a Spec can't be stored this way.
func (s Spec) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Location is the URL without user and password, fit to be shown.
func (s Spec) Location() string {
	l, err := parseURL(s.URL)
	if err != nil {
		// What can't be parsed can't be cut safely either.
		return "(invalid URL)"
	}
	return l.String()
}

// Check says whether the Spec is usable, in words and without touching the network or the disk.
// Resolve, Fetch and Test check it too.
func (s Spec) Check() error {
	_, err := s.location()
	return explainSpec(s, err)
}

func explainSpec(s Spec, err error) error {
	if err == nil {
		return nil
	}
	return explain(context.Background(), "source "+printable(s.Name, 200), InvalidSource, err, s.secrets())
}

// location checks everything of the Spec and returns the parsed URL.
func (s Spec) location() (location, error) {
	l, err := parseURL(s.URL)
	if err != nil {
		return location{}, err
	}
	if s.Branch != "" && s.Tag != "" {
		return l, fail(InvalidSource, "both a branch and a tag are set", "set one of them")
	}
	for kind, name := range map[string]string{"branch": s.Branch, "tag": s.Tag} {
		if name == "" {
			continue
		}
		if why := badRefName(name); why != "" {
			return l, fail(InvalidSource, fmt.Sprintf("%s name %q %s", kind, printable(name, 100), why),
				"give the name as git branch or git tag shows it")
		}
	}
	if why := badSubPath(s.Path); why != "" {
		return l, fail(InvalidSource, fmt.Sprintf("path %q %s", printable(s.Path, 100), why),
			"give a directory relative to the root of the repository, such as deploy/prod")
	}
	switch s.Verify.Mode {
	case "", VerifyNone:
	case VerifySSH:
		if _, err := parseAllowedSigners(s.Verify.AllowedSigners); err != nil {
			return l, err
		}
	case VerifyGPG:
		if _, err := readKeyring(s.Verify.Keyring); err != nil {
			return l, err
		}
	default:
		return l, fail(InvalidSource, fmt.Sprintf("verify mode %q is not known", printable(string(s.Verify.Mode), 40)),
			"use none, ssh or gpg")
	}
	token := s.Auth.Token != "" || l.password != ""
	verified := s.Verify.Mode == VerifySSH || s.Verify.Mode == VerifyGPG
	if l.scheme == schemeHTTP && !isLoopback(l.host) {
		if token {
			return l, fail(InvalidSource, "credentials would be sent over plain http, readable for anyone on the way", "use https")
		}
		if !verified {
			return l, fail(InvalidSource, "over plain http anyone on the way can replace the commits",
				"use https, or verify: ssh or gpg without credentials")
		}
	}
	return l, nil
}

func (s Spec) refLabel() string {
	switch {
	case s.Tag != "":
		return s.Tag
	case s.Branch != "":
		return s.Branch
	}
	return "HEAD"
}

// refName is the full name of what is followed; empty for the branch that the remote's HEAD names.
func (s Spec) refName() string {
	switch {
	case s.Tag != "":
		return "refs/tags/" + strings.TrimPrefix(s.Tag, "refs/tags/")
	case strings.HasPrefix(s.Branch, "refs/"):
		return s.Branch
	case s.Branch != "":
		return "refs/heads/" + s.Branch
	}
	return ""
}

// secrets lists every string that must not appear in a message.
func (s Spec) secrets() []string {
	var all []string
	add := func(v string) {
		if v != "" {
			all = append(all, v)
			if esc := url.QueryEscape(v); esc != v {
				all = append(all, esc)
			}
			if esc := url.PathEscape(v); esc != v {
				all = append(all, esc)
			}
		}
	}
	add(s.Auth.Token)
	add(s.Auth.Passphrase)
	for _, line := range strings.Split(s.Auth.PrivateKey, "\n") {
		if line = strings.TrimSpace(line); len(line) >= 16 && !strings.HasPrefix(line, "-----") {
			add(line)
		}
	}
	// The user and password of a URL, cut out by hand: the URL may be one that does not parse.
	if _, rest, ok := strings.Cut(s.URL, "://"); ok {
		if end := strings.IndexAny(rest, "/?#"); end >= 0 {
			rest = rest[:end]
		}
		if at := strings.LastIndexByte(rest, '@'); at >= 0 {
			user, pass, has := strings.Cut(rest[:at], ":")
			for _, raw := range []string{pass, user} {
				if raw == user && (!has && !strings.HasPrefix(s.URL, "http") || user == "git") {
					continue // ssh://git@host: a user's name, no secret
				}
				add(raw)
				if plain, err := url.PathUnescape(raw); err == nil {
					add(plain)
				}
			}
		}
	}
	return all
}

// repoKey is the same for Specs that read the same repository; the credentials do not count.
func (l location) repoKey() string {
	l.user, l.password = "", ""
	sum := sha256.Sum256([]byte(l.String()))
	return hex.EncodeToString(sum[:12])
}

// pollKey is the same for Specs that can share one ls-remote: same repository, same credentials.
func (s Spec) pollKey() string {
	h := sha256.New()
	for _, v := range []string{s.URL, s.Auth.Username, s.Auth.Token, s.Auth.CA, s.Auth.PrivateKey, s.Auth.Passphrase, s.Auth.KnownHosts} {
		fmt.Fprintf(h, "%d:%s,", len(v), v)
	}
	return hex.EncodeToString(h.Sum(nil))
}

type scheme string

const (
	schemeHTTPS scheme = "https"
	schemeHTTP  scheme = "http"
	schemeSSH   scheme = "ssh"
	schemeLocal scheme = "file"
)

// location is a checked URL.
type location struct {
	scheme         scheme
	user, password string
	host           string // without brackets
	port           string // "" = the scheme's own
	path           string // as the server wants it
	scp            bool   // written as host:path
}

// String is the location without credentials. The user of an SSH URL is part of the address.
func (l location) String() string {
	host := l.host
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if l.port != "" {
		host += ":" + l.port
	}
	switch {
	case l.scheme == schemeLocal:
		return l.path
	case l.scp:
		return l.user + "@" + host + ":" + l.path
	case l.scheme == schemeSSH:
		return "ssh://" + l.user + "@" + host + l.path
	}
	return (&url.URL{Scheme: string(l.scheme), Host: host, Path: l.path}).String()
}

const urlForms = "use https://host/path, ssh://user@host/path, user@host:path or an absolute path on this machine"

// parseURL accepts the forms that Spec.URL lists and refuses the rest in words. Its errors quote
// nothing of the URL, which may hold a password.
func parseURL(raw string) (location, error) {
	refuse := func(text, wayOut string) (location, error) { return location{}, fail(InvalidSource, text, wayOut) }
	switch {
	case raw == "":
		return refuse("no URL is set", urlForms)
	case len(raw) > 2048:
		return refuse("the URL is longer than 2048 bytes", urlForms)
	case strings.HasPrefix(raw, "-"):
		return refuse("the URL begins with a dash, which reads like an option", urlForms)
	case strings.IndexFunc(raw, func(r rune) bool { return r <= 0x20 || r == 0x7f || r == '\\' || r == 0xfffd }) >= 0:
		return refuse("the URL holds a space, a backslash or a control character", "write spaces in an https path as %20")
	}
	head, rest, isURL := strings.Cut(raw, "://")
	if helper, _, ok := strings.Cut(raw, "::"); ok && !strings.ContainsAny(helper, "/[@:") {
		return refuse("the URL names a remote helper ("+printable(helper, 20)+"::), and those run programs", urlForms)
	}
	if strings.HasPrefix(raw, "/") {
		return localLocation(raw)
	}
	if !isURL {
		return scpLocation(raw)
	}
	switch strings.ToLower(head) {
	case "file":
		host, p, _ := strings.Cut(rest, "/")
		if host != "" && host != "localhost" {
			return refuse("a file:// URL must not name a host", "write file:///absolute/path")
		}
		decoded, err := url.PathUnescape("/" + p)
		if err != nil {
			return refuse("the path of the file:// URL has a broken % escape", "write the absolute path without file://")
		}
		return localLocation(decoded)
	case "https", "http", "ssh":
	case "git":
		return refuse("git:// carries neither encryption nor proof of who answers", urlForms)
	default:
		return refuse("the URL's scheme "+printable(head, 20)+":// is not one that gitopsd speaks", urlForms)
	}
	u, err := url.Parse(raw)
	if err != nil {
		return refuse("the URL can't be parsed", urlForms)
	}
	if u.RawQuery != "" || u.Fragment != "" || u.ForceQuery {
		return refuse("the URL has a ? or # part, which Git does not know", "set branch, tag and path as their own fields")
	}
	l := location{scheme: scheme(strings.ToLower(u.Scheme)), host: u.Hostname(), port: u.Port(), path: u.Path}
	if u.User != nil {
		l.user = u.User.Username()
		l.password, _ = u.User.Password()
	}
	if why := badHost(l.host); why != "" {
		return refuse("the URL's host "+why, urlForms)
	}
	if l.port != "" {
		if n, err := strconv.Atoi(l.port); err != nil || n < 1 || n > 65535 {
			return refuse("the URL's port is not between 1 and 65535", "")
		}
	}
	if why := badRemotePath(l.path); why != "" {
		return refuse("the URL's path "+why, urlForms)
	}
	if l.scheme == schemeSSH {
		if l.password != "" {
			return refuse("the ssh:// URL holds a password", "set a private key instead, and add its public half at the server")
		}
		return sshUser(l)
	}
	l.path = strings.TrimSuffix(l.path, "/")
	return l, nil
}

func localLocation(p string) (location, error) {
	trimmed := strings.TrimSuffix(p, "/")
	if strings.IndexFunc(p, func(r rune) bool { return r < 0x20 || r == 0x7f || r == 0xfffd }) >= 0 {
		return location{}, fail(InvalidSource, "the path of the repository holds a control character", "")
	}
	if trimmed == "" || path.Clean(trimmed) != trimmed {
		return location{}, fail(InvalidSource, "the path of the repository is / or has .., . or // in it",
			"give the plain absolute path of the repository")
	}
	return location{scheme: schemeLocal, path: trimmed}, nil
}

// scpLocation parses user@host:path, the short form of SSH.
func scpLocation(raw string) (location, error) {
	refuse := func(text, wayOut string) (location, error) { return location{}, fail(InvalidSource, text, wayOut) }
	l := location{scheme: schemeSSH, scp: true}
	rest := raw
	if user, after, ok := strings.Cut(raw, "@"); ok {
		l.user, rest = user, after
		if strings.ContainsAny(user, ":/") {
			return refuse("the short form user@host:path has a : or / before the @", urlForms)
		}
	}
	if strings.HasPrefix(rest, "[") {
		end := strings.Index(rest, "]:")
		if end < 0 {
			return refuse("the address in brackets is not closed by ]:", urlForms)
		}
		l.host, l.path = rest[1:end], rest[end+2:]
	} else {
		host, p, ok := strings.Cut(rest, ":")
		if !ok {
			return refuse("this is neither a URL nor an absolute path", urlForms)
		}
		l.host, l.path = host, p
	}
	if why := badHost(l.host); why != "" {
		return refuse("the host "+why, urlForms)
	}
	if why := badRemotePath("/" + l.path); why != "" || l.path == "" || strings.HasPrefix(l.path, "-") {
		if why == "" {
			why = "is empty or begins with a dash, which reads like an option"
		}
		return refuse("the path after the colon "+why, urlForms)
	}
	return sshUser(l)
}

func sshUser(l location) (location, error) {
	if l.user == "" {
		l.user = "git"
	}
	for _, r := range l.user {
		if r != '-' && r != '_' && r != '.' && (r < '0' || r > '9') && (r|0x20 < 'a' || r|0x20 > 'z') {
			return l, fail(InvalidSource, "the user's name in the URL has characters other than letters, digits, dot, dash and underscore", urlForms)
		}
	}
	if strings.HasPrefix(l.user, "-") {
		return l, fail(InvalidSource, "the user's name in the URL begins with a dash, which reads like an option", urlForms)
	}
	return l, nil
}

func badHost(h string) string {
	switch {
	case h == "":
		return "is missing"
	case strings.HasPrefix(h, "-"):
		return "begins with a dash, which reads like an option"
	case net.ParseIP(strings.SplitN(h, "%", 2)[0]) != nil:
		return ""
	}
	for _, r := range h {
		if r != '-' && r != '.' && r != '_' && (r < '0' || r > '9') && (r|0x20 < 'a' || r|0x20 > 'z') {
			return "has characters other than letters, digits, dots and dashes"
		}
	}
	return ""
}

// badRemotePath judges a decoded path that a server will see; over SSH it passes a shell there.
func badRemotePath(p string) string {
	switch {
	case p == "" || p == "/":
		return "is empty"
	case strings.IndexFunc(p, func(r rune) bool { return r < 0x20 || r == 0x7f || r == 0xfffd }) >= 0:
		return "holds a control character"
	case strings.ContainsAny(p, "'\"!`$\\;|&<>*?(){}"):
		return "holds a character that means something to a shell"
	case strings.HasPrefix(p, "/-"):
		return "begins with a dash, which reads like an option"
	}
	for _, part := range strings.Split(p, "/") {
		if part == ".." {
			return "has .. in it"
		}
	}
	return ""
}

// badRefName judges a branch or tag by the rules of git check-ref-format, and refuses what reads like an option.
func badRefName(name string) string {
	switch {
	case len(name) > 250:
		return "is longer than 250 bytes"
	case strings.IndexFunc(name, func(r rune) bool { return r <= 0x20 || r == 0x7f || r == 0xfffd || strings.ContainsRune(`~^:?*[\`, r) }) >= 0:
		return "holds a space, a control character or one of ~ ^ : ? * [ \\"
	case strings.Contains(name, ".."):
		return "has .. in it"
	case strings.HasPrefix(name, "-"):
		return "begins with a dash, which reads like an option"
	case name == "@" || name == "HEAD" || strings.Contains(name, "@{"):
		return "is a name that Git keeps for itself"
	case strings.HasSuffix(name, "."):
		return "ends in a dot"
	}
	for _, part := range strings.Split(name, "/") {
		switch {
		case part == "":
			return "has an empty part (a slash at an end, or two in a row)"
		case strings.HasPrefix(part, "."), strings.HasSuffix(part, ".lock"):
			return "has a part that begins with a dot or ends in .lock"
		case strings.HasPrefix(part, "-"):
			return "has a part that begins with a dash, which reads like an option"
		}
	}
	return ""
}

func badSubPath(p string) string {
	if p == "" {
		return ""
	}
	if strings.HasPrefix(p, "/") {
		return "is absolute"
	}
	trimmed := strings.TrimSuffix(p, "/")
	for _, part := range strings.Split(trimmed, "/") {
		if part == ".." {
			return "has .. in it"
		}
		if part == "." && trimmed == "." {
			return "" // "." is the root
		}
		if kind, why := judgeName(part); kind != nameFine {
			return "has a part that " + why
		}
	}
	return ""
}

// cleanSubPath is a checked Spec.Path in the form that trees use.
func cleanSubPath(p string) string {
	p = strings.TrimSuffix(p, "/")
	if p == "." {
		return ""
	}
	return p
}

func isLoopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}
