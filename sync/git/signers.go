package git

import (
	"fmt"
	"path"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// allowedSigner is one line of an allowed_signers file; the format is that of ssh-keygen(1), ALLOWED SIGNERS.
type allowedSigner struct {
	principals  string
	key         ssh.PublicKey
	namespaces  []string // empty: any
	after       time.Time
	before      time.Time
	fingerprint string
}

// name is how a signer is shown.
func (a allowedSigner) name() string {
	return printable(a.principals, 100) + " (" + a.fingerprint + ")"
}

// parseAllowedSigners reads the text of an allowed_signers file. Every line must be understood: a line
// that is skipped in silence is a key that somebody thinks is bounded, or allowed.
func parseAllowedSigners(text string) ([]allowedSigner, error) {
	var all []allowedSigner
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		s, err := parseSignerLine(line)
		if err != nil {
			return nil, fail(InvalidSource, fmt.Sprintf("line %d of allowed signers %s", i+1, err.Error()),
				"each line is: principal[,principal…] [options] key-type key [comment]")
		}
		all = append(all, s)
	}
	if len(all) == 0 {
		return nil, fail(InvalidSource, "verify is ssh, but no allowed signer is set", "set at least one line: mail@example.com ssh-ed25519 AAAA…")
	}
	return all, nil
}

func parseSignerLine(line string) (allowedSigner, error) {
	principals, rest, ok := cutField(line)
	if !ok {
		return allowedSigner{}, fmt.Errorf("has only one field")
	}
	s := allowedSigner{principals: principals}
	field, after, _ := cutField(rest)
	if !isKeyType(field) {
		if err := s.options(field); err != nil {
			return s, err
		}
		rest = after
		field, _, _ = cutField(rest)
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(rest))
	if err != nil || !isKeyType(field) {
		return s, fmt.Errorf("has no readable key")
	}
	if _, ok := key.(*ssh.Certificate); ok {
		return s, fmt.Errorf("has a certificate where a key belongs")
	}
	if t := key.Type(); t == "ssh-dss" {
		return s, fmt.Errorf("has a DSA key, which is too weak")
	}
	s.key, s.fingerprint = key, ssh.FingerprintSHA256(key)
	return s, nil
}

func isKeyType(s string) bool {
	return strings.HasPrefix(s, "ssh-") || strings.HasPrefix(s, "ecdsa-") || strings.HasPrefix(s, "sk-")
}

// cutField takes the first blank-separated field; blanks inside double quotes belong to it.
func cutField(s string) (field, rest string, more bool) {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			quoted = !quoted
		case (c == ' ' || c == '\t') && !quoted:
			return strings.ReplaceAll(s[:i], `"`, ""), strings.TrimLeft(s[i:], " \t"), true
		}
	}
	return strings.ReplaceAll(s, `"`, ""), "", false
}

func (s *allowedSigner) options(list string) error {
	// Namespaces are themselves a comma-separated list, so a part without = goes on with the one before.
	var current string
	for _, part := range strings.Split(list, ",") {
		key, value, ok := strings.Cut(part, "=")
		if !ok && current == "namespaces" {
			s.namespaces = append(s.namespaces, part)
			continue
		}
		current = strings.ToLower(key)
		var err error
		switch current {
		case "namespaces":
			s.namespaces = append(s.namespaces, value)
		case "valid-after":
			s.after, err = parseSignerTime(value)
		case "valid-before":
			s.before, err = parseSignerTime(value)
		case "cert-authority":
			return fmt.Errorf("uses cert-authority, which gitopsd does not support: list the keys themselves")
		default:
			return fmt.Errorf("has the unknown option %q", printable(key, 40))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// parseSignerTime reads YYYYMMDD or YYYYMMDDHHMM[SS], in UTC with a Z behind it, else in local time.
func parseSignerTime(v string) (time.Time, error) {
	loc := time.Local
	digits, utc := strings.CutSuffix(strings.ToUpper(v), "Z")
	if utc {
		loc = time.UTC
	}
	layout, ok := map[int]string{8: "20060102", 12: "200601021504", 14: "20060102150405"}[len(digits)]
	if ok {
		if t, err := time.ParseInLocation(layout, digits, loc); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("has the date %q, which is not of the form YYYYMMDD or YYYYMMDDHHMM[SS], with Z for UTC", printable(v, 40))
}

// refuses says why a signature by this signer's key does not count; "" means that it does.
func (a allowedSigner) refuses(when time.Time) string {
	if len(a.namespaces) > 0 {
		found := false
		for _, n := range a.namespaces {
			if ok, err := path.Match(n, sshNamespace); err == nil && ok {
				found = true
			}
		}
		if !found {
			return "is not allowed for the namespace git"
		}
	}
	switch day := "2006-01-02"; {
	case (!a.after.IsZero() || !a.before.IsZero()) && when.IsZero():
		return "is bounded in time, and the commit has no readable date"
	case !a.after.IsZero() && when.Before(a.after):
		return "is valid only after " + a.after.Format(day)
	case !a.before.IsZero() && !when.Before(a.before):
		return "was valid only before " + a.before.Format(day)
	}
	return ""
}
