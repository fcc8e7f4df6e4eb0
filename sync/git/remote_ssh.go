package git

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

// sshRemote speaks to git-upload-pack at the other end of an SSH session. No ssh program, agent or
// ssh_config takes part: what a source needs is in its Spec.
type sshRemote struct {
	loc    location
	config *ssh.ClientConfig
	limits Limits

	client  *ssh.Client
	session *ssh.Session
	stop    func() bool
	in      io.WriteCloser
	out     *pktReader
	reading *limitReader
	stderr  *tailBuffer
	advert  *advert
}

func openSSH(spec Spec, l location, limits Limits) (*sshRemote, error) {
	signer, err := parseKey(spec.Auth)
	if err != nil {
		return nil, err
	}
	check, err := hostKeys(spec.Auth.KnownHosts)
	if err != nil {
		return nil, err
	}
	addr := l.address()
	return &sshRemote{loc: l, limits: limits, config: &ssh.ClientConfig{
		User:              l.user,
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(signer)},
		ClientVersion:     "SSH-2.0-gitopsd",
		HostKeyAlgorithms: knownAlgorithms(check, addr),
		HostKeyCallback: func(host string, at net.Addr, key ssh.PublicKey) error {
			return hostKeyError(check(host, at, key), addr, key)
		},
	}}, nil
}

func (l location) address() string {
	port := l.port
	if port == "" {
		port = "22"
	}
	return net.JoinHostPort(l.host, port)
}

func parseKey(a Auth) (ssh.Signer, error) {
	if strings.TrimSpace(a.PrivateKey) == "" {
		return nil, fail(AuthFailed, "no private key is set, and SSH needs one", "make one with ssh-keygen -t ed25519, set it as the source's key, and add the .pub half at the server as a deploy key")
	}
	var signer ssh.Signer
	var err error
	if a.Passphrase != "" {
		signer, err = ssh.ParsePrivateKeyWithPassphrase([]byte(a.PrivateKey), []byte(a.Passphrase))
	} else {
		signer, err = ssh.ParsePrivateKey([]byte(a.PrivateKey))
	}
	var missing *ssh.PassphraseMissingError
	switch {
	case err == nil:
		return signer, nil
	case errors.As(err, &missing):
		return nil, fail(AuthFailed, "the private key is locked with a passphrase and none is set", "set the passphrase, or use a key without one")
	case a.Passphrase != "" && strings.Contains(err.Error(), "not an encrypted key"):
		return ssh.ParsePrivateKey([]byte(a.PrivateKey))
	case a.Passphrase != "":
		return nil, fail(AuthFailed, "the private key can't be opened with this passphrase", "check the passphrase, and that the key is in PEM or OpenSSH form")
	}
	return nil, fail(AuthFailed, "the private key can't be read", "give the whole file, from the BEGIN line to the END line; a .pub file is the other half")
}

// hostKeys reads known_hosts from text, or from the usual files when text is empty.
func hostKeys(text string) (ssh.HostKeyCallback, error) {
	var files []string
	if strings.TrimSpace(text) != "" {
		// The parser of the library reads files only.
		f, err := os.CreateTemp("", "gitopsd-known-hosts-")
		if err != nil {
			return nil, fail(StoreFailed, "a temporary file can't be made: "+err.Error(), "")
		}
		defer os.Remove(f.Name())
		_, err = f.WriteString(text + "\n")
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, fail(StoreFailed, "a temporary file can't be written: "+err.Error(), "")
		}
		files = []string{f.Name()}
	} else {
		candidates := []string{"/etc/ssh/ssh_known_hosts"}
		if home, err := os.UserHomeDir(); err == nil {
			candidates = append([]string{filepath.Join(home, ".ssh", "known_hosts")}, candidates...)
		}
		for _, f := range candidates {
			if st, err := os.Stat(f); err == nil && st.Mode().IsRegular() {
				files = append(files, f)
			}
		}
		if len(files) == 0 {
			return nil, fail(HostKeyUnknown, "there is no known_hosts file, so no SSH server can be told from an impostor",
				"set the source's known hosts, or fill "+strings.Join(candidates, " or "))
		}
	}
	check, err := knownhosts.New(files...)
	if err != nil {
		reason := err.Error()
		if text != "" {
			reason = strings.ReplaceAll(reason, files[0], "known hosts")
		}
		return nil, fail(InvalidSource, "known_hosts can't be read: "+printable(reason, 200), "each line is: host key-type key")
	}
	return check, nil
}

// probeKey asks a known_hosts callback which keys it has, by showing one that nobody has.
type probeKey struct{}

func (probeKey) Type() string                        { return "probe" }
func (probeKey) Marshal() []byte                     { return nil }
func (probeKey) Verify([]byte, *ssh.Signature) error { return errors.New("probe") }

// knownAlgorithms limits the negotiation to the kinds of key that known_hosts has for addr. Without it
// a server with several keys may show one that is not listed although another one is.
func knownAlgorithms(check ssh.HostKeyCallback, addr string) []string {
	var keyErr *knownhosts.KeyError
	if err := check(addr, &net.TCPAddr{IP: net.IPv4zero}, probeKey{}); !errors.As(err, &keyErr) || len(keyErr.Want) == 0 {
		return nil
	}
	var algos []string
	for _, k := range keyErr.Want {
		if t := k.Key.Type(); t == ssh.KeyAlgoRSA {
			algos = append(algos, ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256)
		} else {
			algos = append(algos, t)
		}
	}
	return algos
}

func hostKeyError(err error, addr string, key ssh.PublicKey) error {
	if err == nil {
		return nil
	}
	name := knownhosts.Normalize(addr)
	shown := key.Type() + " " + ssh.FingerprintSHA256(key)
	var revoked *knownhosts.RevokedError
	var keyErr *knownhosts.KeyError
	switch {
	case errors.As(err, &revoked):
		return fail(HostKeyMismatch, "the key that "+name+" shows ("+shown+") is marked as revoked in known_hosts", "ask whoever runs the server")
	case errors.As(err, &keyErr) && len(keyErr.Want) > 0:
		var known []string
		for _, k := range keyErr.Want {
			known = append(known, k.Key.Type()+" "+ssh.FingerprintSHA256(k.Key))
		}
		return fail(HostKeyMismatch, "the server "+name+" shows another host key ("+shown+") than known_hosts has ("+strings.Join(known, ", ")+"): someone may stand in between",
			"if the server's key was changed on purpose, put the new one in known_hosts")
	case errors.As(err, &keyErr):
		return fail(HostKeyUnknown, "known_hosts has no key for "+name+"; it shows "+shown,
			"compare that with what the server's owner says, then add the line: "+knownhosts.Line([]string{addr}, key))
	}
	return fail(HostKeyUnknown, "the server's host key can't be judged: "+printable(err.Error(), 200), "")
}

func (r *sshRemote) connect(ctx context.Context) error {
	d := net.Dialer{Timeout: 15 * time.Second}
	conn, err := d.DialContext(ctx, "tcp", r.loc.address())
	if err != nil {
		return httpError(err)
	}
	// Closing the connection is what ends a read that waits when the context ends.
	r.stop = context.AfterFunc(ctx, func() { conn.Close() })
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	c, chans, reqs, err := ssh.NewClientConn(conn, r.loc.address(), r.config)
	if err != nil {
		conn.Close()
		return r.sshError(ctx, err)
	}
	r.client = ssh.NewClient(c, chans, reqs)
	session, err := r.client.NewSession()
	if err != nil {
		return r.sshError(ctx, err)
	}
	r.session, r.stderr = session, &tailBuffer{}
	session.Stderr = r.stderr
	if r.in, err = session.StdinPipe(); err != nil {
		return r.sshError(ctx, err)
	}
	out, err := session.StdoutPipe()
	if err != nil {
		return r.sshError(ctx, err)
	}
	r.reading = limited(ctx, out, maxAdvert, "the list of refs")
	// badRemotePath refuses every character that a shell could read as its own, so the quotes can't be left.
	if err := session.Start("git-upload-pack '" + r.loc.path + "'"); err != nil {
		return r.sshError(ctx, err)
	}
	return nil
}

func (r *sshRemote) sshError(ctx context.Context, err error) error {
	var own *Error
	if errors.As(err, &own) {
		return own
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if strings.Contains(err.Error(), "unable to authenticate") {
		return fail(AuthFailed, "the server does not accept the key for user "+r.loc.user,
			"add the public half of the key at the server, with read access to the repository, and check the user's name in the URL")
	}
	return fail(Unreachable, "the SSH connection failed: "+printable(err.Error(), 200), "")
}

func (r *sshRemote) refs(ctx context.Context) (*advert, error) {
	if err := r.connect(ctx); err != nil {
		return nil, err
	}
	a, out, err := readAdvert(r.reading, false)
	if err != nil {
		return nil, r.readError(ctx, err)
	}
	r.advert, r.out = a, out
	return a, nil
}

// readError prefers what the server wrote to its error stream over an answer that just ends.
func (r *sshRemote) readError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		r.ended()
		if said := r.stderr.text(); said != "" {
			return serverSaid(said)
		}
	}
	return streamError(err)
}

// ended waits until the error stream has arrived as well: the two streams end in any order. A server
// that keeps the session open after its answer has ended is not waited for long.
func (r *sshRemote) ended() {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = r.session.Wait()
	}()
	patience := time.NewTimer(3 * time.Second)
	defer patience.Stop()
	select {
	case <-done:
	case <-patience.C:
	}
	r.client.Close()
	<-done
}

func (r *sshRemote) fetch(ctx context.Context, req fetchRequest, sink func(io.Reader) error) ([]string, error) {
	if r.advert == nil {
		if _, err := r.refs(ctx); err != nil {
			return nil, err
		}
	}
	body, err := req.encode(r.advert)
	if err != nil {
		return nil, err
	}
	r.reading.left, r.reading.max, r.reading.what = r.limits.Pack, r.limits.Pack, "the pack"
	if _, err := io.Copy(r.in, bytes.NewReader(body)); err != nil {
		return nil, r.readError(ctx, fmt.Errorf("send the request: %w", err))
	}
	shallow, err := readPack(r.out, r.advert, sink)
	if err != nil {
		return nil, r.readError(ctx, err)
	}
	return shallow, nil
}

func (r *sshRemote) close() {
	if r.stop != nil {
		r.stop()
	}
	if r.client != nil {
		if r.in != nil && r.advert != nil {
			_, _ = r.in.Write([]byte("0000")) // nothing more is wanted
			_ = r.in.Close()
		}
		r.client.Close()
	}
}

// tailBuffer keeps the first 4 KiB of a server's error stream.
type tailBuffer struct {
	mu  sync.Mutex
	buf []byte
}

func (t *tailBuffer) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if room := 4096 - len(t.buf); room > 0 {
		t.buf = append(t.buf, p[:min(room, len(p))]...)
	}
	return len(p), nil
}

func (t *tailBuffer) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.buf))
}
