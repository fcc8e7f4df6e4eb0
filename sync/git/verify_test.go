package git

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"
)

func newSigner(t *testing.T) ssh.Signer {
	t.Helper()
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func pubLine(s ssh.Signer) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(s.PublicKey())))
}

func sshArmor(t *testing.T, s ssh.Signer, namespace, payload string) string {
	t.Helper()
	sig, err := sshsig.Sign(strings.NewReader(payload), s, sshsig.HashSHA512, namespace)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(sshsig.Armor(sig)))
}

func gpgArmor(t *testing.T, e *openpgp.Entity, payload string) string {
	t.Helper()
	var b bytes.Buffer
	if err := openpgp.ArmoredDetachSign(&b, e, strings.NewReader(payload), nil); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(b.String())
}

// sigHeader is a signature as a header of a commit.
func sigHeader(armored string) string {
	return "gpgsig " + strings.ReplaceAll(armored, "\n", "\n ") + "\n"
}

func newEntity(t *testing.T, name string, conf *packet.Config) (*openpgp.Entity, string) {
	t.Helper()
	e, err := openpgp.NewEntity(name, "", strings.ToLower(name)+"@example.com", conf)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w, err := armor.Encode(&b, openpgp.PublicKeyType, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(e.Serialize(w), w.Close()); err != nil {
		t.Fatal(err)
	}
	return e, b.String()
}

func TestVerifyCommits(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	tree := b.tree(map[string]string{"a": "1"})
	head := "tree " + tree + "\nauthor Ann <ann@example.com> 1700000000 +0000\ncommitter Ann <ann@example.com> 1700000000 +0000\n"
	body := "\nsubject\n\nbody\n"
	plain := head + body
	ann, eve := newSigner(t), newSigner(t)
	annLine := "ann@example.com " + pubLine(ann)
	gpg, gpgRing := newEntity(t, "Gus", nil)
	stranger, strangerRing := newEntity(t, "Eve", nil)
	expired, expiredRing := newEntity(t, "Old", &packet.Config{KeyLifetimeSecs: 10, Time: func() time.Time { return time.Now().Add(-time.Hour) }})
	sshGood, sshEve := sshArmor(t, ann, "git", plain), sshArmor(t, eve, "git", plain)
	gpgGood := gpgArmor(t, gpg, plain)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaSigner, err := ssh.NewSignerFromKey(rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	var oldGPG bytes.Buffer
	if err := openpgp.ArmoredDetachSign(&oldGPG, expired, strings.NewReader(plain), &packet.Config{Time: func() time.Time { return time.Now().Add(-time.Hour) }}); err != nil {
		t.Fatal(err)
	}
	sshMode := func(signers string) Verify { return Verify{Mode: VerifySSH, AllowedSigners: signers} }
	gpgMode := func(ring string) Verify { return Verify{Mode: VerifyGPG, Keyring: ring} }
	signed := func(sigs ...string) string {
		s := head
		for _, a := range sigs {
			s += sigHeader(a)
		}
		return s + body
	}
	fpr := ssh.FingerprintSHA256(ann.PublicKey())
	for name, c := range map[string]struct {
		commit string
		verify Verify
		signer string // what Signer begins with
		reason Reason
		text   string
	}{
		"ssh":                {signed(sshGood), sshMode("# who\n\n" + annLine), "ann@example.com (" + fpr + ")", "", ""},
		"ssh rsa":            {signed(sshArmor(t, rsaSigner, "git", plain)), sshMode("r@x " + pubLine(rsaSigner)), "r@x (", "", ""},
		"ssh second line":    {signed(sshEve), sshMode(annLine + "\neve " + pubLine(eve)), "eve (", "", ""},
		"ssh options":        {signed(sshGood), sshMode(`"ann@example.com,a@b" namespaces="file,git",valid-after="20200101",valid-before=20300101Z ` + pubLine(ann)), "ann@example.com,a@b", "", ""},
		"none":               {plain, Verify{}, "", "", ""},
		"none, signed":       {signed(sshGood), Verify{Mode: VerifyNone}, "", "", ""},
		"unsigned":           {plain, sshMode(annLine), "", Unsigned, "is not signed, and this source requires a signature (ssh)"},
		"unsigned gpg":       {plain, gpgMode(gpgRing), "", Unsigned, "requires a signature (gpg)"},
		"unknown ssh":        {signed(sshEve), sshMode(annLine), "", UnknownSigner, "is signed by ssh-ed25519 " + ssh.FingerprintSHA256(eve.PublicKey()) + ", which is not among the allowed signers"},
		"changed":            {head + sigHeader(sshGood) + body + "more\n", sshMode(annLine), "", BadSignature, "that does not match its content"},
		"signature of other": {signed(sshArmor(t, ann, "git", "something else")), sshMode(annLine), "", BadSignature, "that does not match its content"},
		"namespace":          {signed(sshArmor(t, ann, "file", plain)), sshMode(annLine), "", BadSignature, `was made for "file", not for git`},
		"two signatures":     {signed(sshGood, sshGood), sshMode(annLine), "", BadSignature, "has more than one signature"},
		"ssh and gpg":        {signed(gpgGood, sshGood), sshMode(annLine), "", BadSignature, "has more than one signature"},
		"armor junk":         {signed("-----BEGIN SSH SIGNATURE-----\n!!!\n-----END SSH SIGNATURE-----"), sshMode(annLine), "", BadSignature, "can't be read"},
		"unknown kind":       {signed("-----BEGIN CERTIFICATE-----\nxx"), sshMode(annLine), "", BadSignature, "of a kind that gitopsd does not know"},
		"gpg for ssh":        {signed(gpgGood), sshMode(annLine), "", UnknownSigner, "has a GPG signature, and this source wants one of SSH"},
		"ssh for gpg":        {signed(sshGood), gpgMode(gpgRing), "", UnknownSigner, "has an SSH signature, and this source wants one of GPG"},
		"too early":          {signed(sshGood), sshMode(`a valid-after="20240101Z" ` + pubLine(ann)), "", UnknownSigner, "is valid only after 2024-01-01"},
		"too late":           {signed(sshGood), sshMode(`a valid-before="20200101Z" ` + pubLine(ann)), "", UnknownSigner, "was valid only before 2020-01-01"},
		"other namespace":    {signed(sshGood), sshMode(`a namespaces="file" ` + pubLine(ann)), "", UnknownSigner, "is not allowed for the namespace git"},
		"gpg":                {signed(gpgGood), gpgMode(gpgRing), "Gus <gus@example.com> (", "", ""},
		"gpg two rings":      {signed(gpgGood), gpgMode(strangerRing + "\n" + gpgRing), "Gus", "", ""},
		"unknown gpg":        {signed(gpgArmor(t, stranger, plain)), gpgMode(gpgRing), "", UnknownSigner, "that is not in the keyring"},
		"gpg changed":        {signed(gpgGood) + "more\n", gpgMode(gpgRing), "", BadSignature, "does not match its content"},
		"gpg expired":        {signed(oldGPG.String()), gpgMode(expiredRing), "", UnknownSigner, "whose key has expired"},
		"cert-authority":     {signed(sshGood), sshMode("* cert-authority " + pubLine(ann)), "", InvalidSource, "line 1 of allowed signers uses cert-authority"},
		"unknown option":     {signed(sshGood), sshMode("\n* sometimes " + pubLine(ann)), "", InvalidSource, `line 2 of allowed signers has the unknown option "sometimes"`},
		"bad date":           {signed(sshGood), sshMode("* valid-after=tomorrow " + pubLine(ann)), "", InvalidSource, `has the date "tomorrow"`},
		"bad key":            {signed(sshGood), sshMode("a@b ssh-ed25519 AAAA"), "", InvalidSource, "has no readable key"},
		"one field":          {signed(sshGood), sshMode("a@b"), "", InvalidSource, "has only one field"},
		"no signers":         {signed(sshGood), sshMode(" \n# none\n"), "", InvalidSource, "no allowed signer is set"},
		"no ring":            {signed(gpgGood), gpgMode(""), "", InvalidSource, "no keyring is set"},
		"junk ring":          {signed(gpgGood), gpgMode("xx"), "", InvalidSource, "holds no public key"},
		"unknown mode":       {plain, Verify{Mode: "x509"}, "", InvalidSource, `verify mode "x509" is not known`},
	} {
		t.Run(name, func(t *testing.T) {
			b.ref("refs/heads/main", b.rawObject("commit", c.commit))
			spec := b.spec()
			spec.Verify = c.verify
			s := newStore(t, Limits{})
			got, err := pull(t, s, spec)
			if c.reason == "" {
				if err != nil || !strings.HasPrefix(got.Signer, c.signer) || (c.signer == "") != (got.Signer == "") {
					t.Fatalf("signer %+v, %v; want %q", got, err, c.signer)
				}
				return
			}
			if !errors.Is(err, c.reason) || !strings.Contains(err.Error(), c.text) {
				t.Fatalf("got %v\nwant %s … %q", err, c.reason, c.text)
			}
			if left, _ := os.ReadDir(filepath.Join(s.dir, "checkouts")); len(left) != 0 {
				t.Error("a commit that was not verified was written")
			}
		})
	}
}

func TestVerifyTags(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	ann, eve := newSigner(t), newSigner(t)
	tree := b.tree(map[string]string{"a": "1"})
	commit := b.commitTree(tree)
	commitText := "tree " + tree + "\nauthor A <a@b> 1700000000 +0000\ncommitter A <a@b> 1700000000 +0000\n"
	signedCommit := b.rawObject("commit", commitText+sigHeader(sshArmor(t, ann, "git", commitText+"\nx\n"))+"\nx\n")
	tagObject := func(target, kind, name string, by ...ssh.Signer) string {
		text := fmt.Sprintf("object %s\ntype %s\ntag %s\ntagger A <a@b> 1700000000 +0000\n\nmessage\n", target, kind, name)
		all := text
		for _, s := range by {
			all += sshArmor(t, s, "git", text) + "\n"
		}
		return b.rawObject("tag", all)
	}
	verify := Verify{Mode: VerifySSH, AllowedSigners: "ann@example.com " + pubLine(ann)}
	inner := tagObject(commit, "commit", "inner", ann)
	for name, c := range map[string]struct {
		object string
		reason Reason
		text   string
	}{
		"signed tag":                 {tagObject(commit, "commit", "v1", ann), "", ""},
		"signed commit, plain tag":   {signedCommit, "", ""},
		"signed commit, unsigned":    {tagObject(signedCommit, "commit", "v1"), "", ""},
		"signed commit, tag of eve":  {tagObject(signedCommit, "commit", "v1", eve), "", ""},
		"unsigned tag":               {tagObject(commit, "commit", "v1"), Unsigned, "is not signed"},
		"plain tag":                  {commit, Unsigned, "is not signed"},
		"unknown signer":             {tagObject(commit, "commit", "v1", eve), UnknownSigner, "tag v1 is signed by"},
		"two signatures":             {tagObject(commit, "commit", "v1", eve, ann), BadSignature, "more than one signature"},
		"old tag under the new name": {tagObject(commit, "commit", "v0", ann), BadSignature, `a signed tag object whose name is "v0"`},
		"tag of a tag":               {tagObject(inner, "tag", "v1", ann), BadSignature, "does not name this commit itself"},
	} {
		b.ref("refs/tags/v1", c.object)
		spec := b.spec()
		spec.Tag, spec.Verify = "v1", verify
		got, err := pull(t, newStore(t, Limits{}), spec)
		if c.reason == "" {
			if err != nil || !strings.HasPrefix(got.Signer, "ann@example.com (") {
				t.Errorf("%s: %v %v", name, got, err)
			}
		} else if !errors.Is(err, c.reason) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: got %v\nwant %s … %q", name, err, c.reason, c.text)
		}
	}
	// A tip that pairs a signed tag with another commit than the one it names.
	spec := b.spec()
	spec.Tag, spec.Verify = "v1", verify
	if _, err := newStore(t, Limits{}).Fetch(testCtx(t), spec, Tip{Ref: "v1", Commit: b.commitTree(tree), Object: tagObject(commit, "commit", "v1", ann)}); err == nil {
		t.Error("a tip whose tag names another commit was taken")
	}
}

// What the git program signs is what we verify, and what the gpg program's format is: not only our own libraries.
func TestVerifyWhatGitSigns(t *testing.T) {
	t.Parallel()
	keygen, err := exec.LookPath("ssh-keygen")
	if err != nil {
		t.Skip("ssh-keygen is not installed")
	}
	b := newRepo(t)
	key := filepath.Join(t.TempDir(), "key")
	if out, err := exec.Command(keygen, "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	pub, err := os.ReadFile(key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	tree := b.tree(map[string]string{"a": "1"})
	commit := b.run("", "-c", "gpg.format=ssh", "-c", "user.signingKey="+key+".pub", "commit-tree", "-S", tree, "-m", "signed\n\nwith a body")
	b.ref("refs/heads/main", commit)
	b.run("", "-c", "gpg.format=ssh", "-c", "user.signingKey="+key+".pub", "tag", "-s", "-m", "a tag", "v1", b.commitTree(tree))
	verify := Verify{Mode: VerifySSH, AllowedSigners: `ann@example.com namespaces="git" ` + string(pub)}
	for _, spec := range []Spec{{Verify: verify}, {Tag: "v1", Verify: verify}} {
		spec.Name, spec.URL = "shop", b.Dir
		if c := mustPull(t, newStore(t, Limits{}), spec); !strings.HasPrefix(c.Signer, "ann@example.com (SHA256:") {
			t.Errorf("signer %q", c.Signer)
		}
	}
}

func FuzzAllowedSigners(f *testing.F) {
	f.Add("a@b namespaces=\"git,file\",valid-after=20200101 ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ+YJzZ5yA1Xp5Q5m0Ww8rN6Z5yA1Xp5Q5m0Ww8rN6Z5")
	f.Fuzz(func(t *testing.T, text string) {
		list, err := parseAllowedSigners(text)
		var e *Error
		if err != nil && (!errors.As(err, &e) || e.Reason != InvalidSource) {
			t.Errorf("error %v", err)
		}
		for _, s := range list {
			if s.key == nil {
				t.Error("a signer without a key")
			}
		}
	})
}
