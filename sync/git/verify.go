package git

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	pgperrors "github.com/ProtonMail/go-crypto/openpgp/errors"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/storer"
	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"
)

// sshNamespace is the purpose that git writes into its SSH signatures; one made for another purpose does not count.
const sshNamespace = "git"

// signed is something that carries a signature: a commit or an annotated tag.
type signed struct {
	what       string // "commit 2f6c…", "tag v1.2"
	signatures []string
	payload    []byte
	when       time.Time
}

// verifyTip checks that the tip is signed as spec wants, and returns who signed.
func verifyTip(objects storer.EncodedObjectStorer, spec Spec, tip Tip, c *commit) (signer string, err error) {
	mode := spec.Verify.Mode
	if mode == "" || mode == VerifyNone {
		return "", nil
	}
	check, err := spec.Verify.checker()
	if err != nil {
		return "", err
	}
	onCommit := signed{what: "commit " + tip.Commit, signatures: c.signatures, payload: c.payload, when: c.when}
	if tip.Object == tip.Commit || spec.Tag == "" {
		return verifySigned(onCommit, mode, check)
	}
	t, err := readTag(objects, plumbing.NewHash(tip.Object))
	if err != nil {
		return "", err
	}
	if len(t.signatures) == 0 {
		return verifySigned(onCommit, mode, check)
	}
	// The name inside is what was signed. Without this check the tag object of an old release could be
	// pushed again under the name of a new one.
	short := strings.TrimPrefix(spec.Tag, "refs/tags/")
	if t.name != short {
		return "", fail(BadSignature, fmt.Sprintf("the tag %s holds a signed tag object whose name is %q", printable(short, 100), printable(t.name, 100)),
			"sign a tag of this name, or find out who moved it")
	}
	if t.kind != "commit" || t.object.String() != tip.Commit {
		return "", fail(BadSignature, "the signed tag "+printable(short, 100)+" does not name this commit itself", "sign a tag that names the commit")
	}
	who, err := verifySigned(signed{what: "tag " + printable(short, 100), signatures: t.signatures, payload: t.payload, when: t.when}, mode, check)
	if err != nil && len(c.signatures) > 0 {
		if who, commitErr := verifySigned(onCommit, mode, check); commitErr == nil {
			return who, nil
		}
	}
	return who, err
}

// checker judges one armored signature of a payload.
type checker func(s signed, armored string) (signer string, err error)

func (v Verify) checker() (checker, error) {
	if v.Mode == VerifySSH {
		allowed, err := parseAllowedSigners(v.AllowedSigners)
		if err != nil {
			return nil, err
		}
		return func(s signed, armored string) (string, error) { return checkSSH(s, armored, allowed) }, nil
	}
	ring, err := readKeyring(v.Keyring)
	if err != nil {
		return nil, err
	}
	return func(s signed, armored string) (string, error) { return checkGPG(s, armored, ring) }, nil
}

func verifySigned(s signed, mode Mode, check checker) (string, error) {
	switch len(s.signatures) {
	case 0:
		return "", fail(Unsigned, s.what+" is not signed, and this source requires a signature ("+string(mode)+")", "sign it (git commit --amend -S) and push, or set verify: none")
	case 1:
	default:
		return "", fail(BadSignature, s.what+" has more than one signature, so programs can disagree about who signed", "sign it again with one key")
	}
	armored := s.signatures[0]
	isSSH := strings.HasPrefix(armored, "-----BEGIN SSH SIGNATURE-----")
	isPGP := strings.HasPrefix(armored, "-----BEGIN PGP SIGNATURE-----")
	switch {
	case mode == VerifySSH && isSSH, mode == VerifyGPG && isPGP:
	case isSSH:
		return "", fail(UnknownSigner, s.what+" has an SSH signature, and this source wants one of GPG", "sign it with GPG, or set verify: ssh")
	case isPGP:
		return "", fail(UnknownSigner, s.what+" has a GPG signature, and this source wants one of SSH", "sign it with an SSH key (git config gpg.format ssh), or set verify: gpg")
	default:
		return "", fail(BadSignature, s.what+" has a signature of a kind that gitopsd does not know", "sign it with SSH or GPG")
	}
	return check(s, armored)
}

func checkSSH(s signed, armored string, allowed []allowedSigner) (string, error) {
	sig, err := sshsig.Unarmor([]byte(strings.TrimSpace(armored) + "\n"))
	if err != nil {
		return "", fail(BadSignature, s.what+" has an SSH signature that can't be read: "+printable(err.Error(), 100), "sign it again")
	}
	shown := sig.PublicKey.Type() + " " + ssh.FingerprintSHA256(sig.PublicKey)
	if format := sig.Signature.Format; format == ssh.KeyAlgoRSA || format == "ssh-dss" {
		return "", fail(BadSignature, s.what+" is signed with "+format+", which rests on SHA-1", "sign it with rsa-sha2 or, better, an Ed25519 key")
	}
	if err := sshsig.Verify(bytes.NewReader(s.payload), sig, sig.PublicKey, sig.HashAlgorithm, sshNamespace); err != nil {
		if errors.Is(err, sshsig.ErrNamespaceMismatch) {
			return "", fail(BadSignature, fmt.Sprintf("%s has a signature that was made for %q, not for git", s.what, printable(sig.Namespace, 40)), "sign it with git commit -S")
		}
		return "", fail(BadSignature, s.what+" has a signature of "+shown+" that does not match its content", "somebody changed it after it was signed; find out who pushed it")
	}
	refusal := ""
	want := sig.PublicKey.Marshal()
	for _, a := range allowed {
		if !bytes.Equal(a.key.Marshal(), want) {
			continue
		}
		why := a.refuses(s.when)
		if why == "" {
			return a.name(), nil
		}
		refusal = a.name() + " " + why
	}
	if refusal != "" {
		return "", fail(UnknownSigner, s.what+" is dated "+s.when.Format(time.RFC3339)+" and the key of "+refusal, "sign it with a key that is valid, or change the line in allowed signers")
	}
	return "", fail(UnknownSigner, s.what+" is signed by "+shown+", which is not among the allowed signers", "add the key to allowed signers, if its owner may deploy")
}

func readKeyring(text string) (openpgp.EntityList, error) {
	if strings.TrimSpace(text) == "" {
		return nil, fail(InvalidSource, "verify is gpg, but no keyring is set", "set the output of gpg --export --armor of the keys that may sign")
	}
	var ring openpgp.EntityList
	// People paste several exports below each other; the armor reader takes one block at a time.
	const begin = "-----BEGIN PGP PUBLIC KEY BLOCK-----"
	blocks := strings.Split(text, begin)
	for _, block := range blocks[1:] {
		list, err := openpgp.ReadArmoredKeyRing(strings.NewReader(begin + block))
		if err != nil {
			return nil, fail(InvalidSource, "the keyring can't be read: "+printable(err.Error(), 200), "set the output of gpg --export --armor")
		}
		ring = append(ring, list...)
	}
	if len(ring) == 0 {
		return nil, fail(InvalidSource, "the keyring holds no public key", "set the output of gpg --export --armor of the keys that may sign")
	}
	return ring, nil
}

func checkGPG(s signed, armored string, ring openpgp.EntityList) (string, error) {
	entity, err := openpgp.CheckArmoredDetachedSignature(ring, bytes.NewReader(s.payload), strings.NewReader(armored), nil)
	switch {
	case err == nil:
		return pgpName(entity), nil
	case errors.Is(err, pgperrors.ErrUnknownIssuer):
		return "", fail(UnknownSigner, s.what+" is signed by a GPG key that is not in the keyring", "add the key to the keyring, if its owner may deploy")
	case errors.Is(err, pgperrors.ErrKeyExpired):
		return "", fail(UnknownSigner, s.what+" is signed by "+pgpName(entity)+", whose key has expired", "sign it with a valid key, or put the renewed key in the keyring")
	case errors.Is(err, pgperrors.ErrKeyRevoked):
		return "", fail(UnknownSigner, s.what+" is signed by "+pgpName(entity)+", whose key is revoked", "sign it with a valid key")
	case errors.Is(err, pgperrors.ErrSignatureExpired):
		return "", fail(BadSignature, s.what+" has a signature that has expired", "sign it again")
	}
	return "", fail(BadSignature, s.what+" has a GPG signature that does not match its content: "+printable(err.Error(), 100), "somebody changed it after it was signed; find out who pushed it")
}

func pgpName(e *openpgp.Entity) string {
	if e == nil {
		return "a key of the keyring"
	}
	name := "unnamed key"
	if id := e.PrimaryIdentity(); id != nil {
		name = printable(id.Name, 100)
	}
	return name + " (" + strings.ToUpper(hex.EncodeToString(e.PrimaryKey.Fingerprint)) + ")"
}
