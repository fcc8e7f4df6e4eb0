// Package seal keeps secret values unreadable in the log, on disk and on the wire.
//
// The flow: each node has a [Key] and tells its public half. [Seal] encrypts a value with a data key of its own and seals the data key to each node that
// may read it: that is the state.Secret that goes into the log. On the node that runs the task, [Key.Open] gives the value back, into memory. When other
// nodes need it, whoever can open it calls [Key.Rewrap]: the value's own encryption stays as it is.
//
// Whether two values are equal is answered by their references, which a [Hasher] makes with a key that only the cluster's servers have: who reads the log
// can't try out short passwords against them. That key is itself a secret of the log, by the name [HashKeyName].
//
// The value: a format byte, a nonce, and XChaCha20-Poly1305 over it with the secret's name as associated data, so that no secret passes for another.
// The data keys: age files to X25519 recipients (age-encryption.org/v1).
package seal

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"filippo.io/age"
	"golang.org/x/crypto/chacha20poly1305"

	"github.com/gitopsd/gitopsd/reconcile/state"
)

// Errors that callers branch on. No error of this package holds a value or a key.
var (
	// ErrNotForNode says that the secret is not sealed to the node: a node that can open it must rewrap it.
	ErrNotForNode = errors.New("the secret is not sealed to this node")
	// ErrUnreadable says that what is sealed was changed, belongs to another name, or is sealed to another key than the node's.
	ErrUnreadable = errors.New("the secret does not open: it was changed, or it was sealed for another name or key; set it again")
	// ErrKeyFile says that a node's key file makes no sense.
	ErrKeyFile = errors.New("the key file is damaged: put it back from a copy; without it, secrets must be set again")
)

const format = 1

// MaxValue is the largest value that may be sealed, in bytes: sealed to a hundred nodes it fits an entry of the log.
const MaxValue = 64 << 10

// Key is a node's private key.
type Key struct{ identity *age.X25519Identity }

// NewKey makes a key that is on no disk.
func NewKey() (*Key, error) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, fmt.Errorf("make a node key: %w", err)
	}
	return &Key{id}, nil
}

// LoadKey reads the node's key from a file, or makes one and writes it there, readable by its owner only, where there is no file.
func LoadKey(path string) (*Key, error) {
	k, err := loadKey(path)
	if err != nil {
		return nil, fmt.Errorf("load the node key %s: %w", path, err)
	}
	return k, nil
}

func loadKey(path string) (*Key, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return makeKey(path)
	}
	if err != nil {
		return nil, err
	}
	defer clear(b)
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("others may read it (mode %04o): if nobody did, run chmod 600", info.Mode().Perm())
	}
	id, err := age.ParseX25519Identity(strings.TrimSpace(string(b)))
	if err != nil {
		return nil, ErrKeyFile // age's error may quote the file
	}
	return &Key{id}, nil
}

func makeKey(path string) (*Key, error) {
	k, err := NewKey()
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".key-*") // mode 0600
	if err != nil {
		return nil, err
	}
	_, err = f.WriteString(k.identity.String() + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Link(f.Name(), path) // never over a key that another process made meanwhile
	}
	err = errors.Join(err, os.Remove(f.Name()))
	if errors.Is(err, fs.ErrExist) {
		return loadKey(path)
	}
	if err != nil {
		return nil, err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	return k, errors.Join(d.Sync(), d.Close())
}

// Public is the half of the key that others seal to: state.Node.SealKey.
func (k *Key) Public() string { return k.identity.Recipient().String() }

// String hides the key.
func (k *Key) String() string { return "the private key of " + k.Public() }

// GoString hides the key.
func (k *Key) GoString() string { return k.String() }

// Seal encrypts a value for nodes, given as node id -> public key. The secret has no Ref yet: see Hasher.
func Seal(name string, value []byte, nodes map[string]string) (state.Secret, error) {
	s, err := sealTo(name, value, nodes)
	if err != nil {
		return state.Secret{}, fmt.Errorf("seal secret %q: %w", name, err)
	}
	return s, nil
}

func sealTo(name string, value []byte, nodes map[string]string) (state.Secret, error) {
	if name == "" {
		return state.Secret{}, errors.New("it has no name")
	}
	if len(value) > MaxValue {
		return state.Secret{}, fmt.Errorf("its value has %d bytes, more than %d", len(value), MaxValue)
	}
	dataKey := make([]byte, chacha20poly1305.KeySize)
	defer clear(dataKey)
	rand.Read(dataKey)
	aead, err := chacha20poly1305.NewX(dataKey)
	if err != nil {
		return state.Secret{}, err
	}
	sealed := make([]byte, 1+aead.NonceSize(), 1+aead.NonceSize()+len(value)+aead.Overhead())
	sealed[0] = format
	rand.Read(sealed[1:])
	sealed = aead.Seal(sealed, sealed[1:], value, associated(name))
	keys, err := wrap(dataKey, nodes)
	if err != nil {
		return state.Secret{}, err
	}
	return state.Secret{Name: name, Sealed: sealed, Keys: keys}, nil
}

// associated is what a value's encryption is bound to.
func associated(name string) []byte {
	return append([]byte{'s', 'e', 'c', 'r', 'e', 't', format}, name...)
}

// wrap seals a data key to each node.
func wrap(dataKey []byte, nodes map[string]string) (map[string][]byte, error) {
	if len(nodes) == 0 {
		return nil, errors.New("no node is to open it")
	}
	keys := make(map[string][]byte, len(nodes))
	for _, id := range slices.Sorted(maps.Keys(nodes)) {
		to, err := age.ParseX25519Recipient(nodes[id])
		if err != nil {
			return nil, fmt.Errorf("the public key of node %s is not valid: %w", id, err)
		}
		var b bytes.Buffer
		w, err := age.Encrypt(&b, to)
		if err == nil {
			_, err = w.Write(dataKey)
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			return nil, fmt.Errorf("seal the data key to node %s: %w", id, err)
		}
		keys[id] = b.Bytes()
	}
	return keys, nil
}

// Open gives back the value of a secret that is sealed to the node, whose key this is. The caller clears it when done.
func (k *Key) Open(s state.Secret, node string) ([]byte, error) {
	value, dataKey, err := k.open(s, node)
	clear(dataKey)
	if err != nil {
		return nil, fmt.Errorf("open secret %q on node %s: %w", s.Name, node, err)
	}
	return value, nil
}

func (k *Key) open(s state.Secret, node string) (value, dataKey []byte, err error) {
	wrapped, ok := s.Keys[node]
	if !ok {
		return nil, nil, ErrNotForNode
	}
	r, err := age.Decrypt(bytes.NewReader(wrapped), k.identity)
	if err != nil {
		return nil, nil, ErrUnreadable
	}
	dataKey, err = io.ReadAll(io.LimitReader(r, chacha20poly1305.KeySize+1))
	if err != nil || len(dataKey) != chacha20poly1305.KeySize {
		return nil, dataKey, ErrUnreadable
	}
	aead, err := chacha20poly1305.NewX(dataKey)
	if err != nil {
		return nil, dataKey, ErrUnreadable
	}
	head := 1 + aead.NonceSize()
	if len(s.Sealed) < head {
		return nil, dataKey, ErrUnreadable
	}
	if s.Sealed[0] != format {
		return nil, dataKey, fmt.Errorf("it has the format %d, this build reads %d: upgrade gitopsd on this node", s.Sealed[0], format)
	}
	value, err = aead.Open(nil, s.Sealed[1:head], s.Sealed[head:], associated(s.Name))
	if err != nil {
		return nil, dataKey, ErrUnreadable
	}
	return value, dataKey, nil
}

// Rewrap makes the secret readable for the nodes given, as node id -> public key, and for no others. This key must be able to open it as the node. It does
// not take a value back from a node that could read it: for that the value itself must change.
func (k *Key) Rewrap(s state.Secret, node string, nodes map[string]string) (state.Secret, error) {
	value, dataKey, err := k.open(s, node)
	defer clear(dataKey)
	clear(value)
	var keys map[string][]byte
	if err == nil {
		keys, err = wrap(dataKey, nodes)
	}
	if err != nil {
		return state.Secret{}, fmt.Errorf("rewrap secret %q on node %s: %w", s.Name, node, err)
	}
	s.Keys = keys
	return s, nil
}

// HashKeyName is the name under which the key of references is kept. No stack has a name with a dot in front, so that no STACK/KEY is like it.
const HashKeyName = ".cluster/hash-key"

// Hasher makes references to values.
type Hasher struct{ key []byte }

// NewHasher makes one with a new key, for a new cluster.
func NewHasher() *Hasher {
	key := make([]byte, sha256.Size)
	rand.Read(key)
	return &Hasher{key}
}

// OpenHasher gives back the one whose key was sealed with Secret.
func OpenHasher(s state.Secret, k *Key, node string) (*Hasher, error) {
	if s.Name != HashKeyName {
		return nil, fmt.Errorf("open the hash key: the secret %q is another one", s.Name)
	}
	key, err := k.Open(s, node)
	if err != nil {
		return nil, err
	}
	if len(key) != sha256.Size {
		return nil, fmt.Errorf("open the hash key: %w", ErrUnreadable)
	}
	return &Hasher{key}, nil
}

// Secret seals the key for nodes.
func (h *Hasher) Secret(nodes map[string]string) (state.Secret, error) {
	return Seal(HashKeyName, h.key, nodes)
}

// Ref is the reference of a value under a name: equal for equal values of that name, and saying nothing else to whoever lacks the key.
func (h *Hasher) Ref(name string, value []byte) string {
	m := hmac.New(sha256.New, h.key)
	m.Write(binary.BigEndian.AppendUint64(nil, uint64(len(name))))
	m.Write([]byte(name))
	m.Write(value)
	return "hmac-sha256:" + hex.EncodeToString(m.Sum(nil))
}

// String hides the key.
func (h *Hasher) String() string { return "the hash key of the cluster" }

// GoString hides the key.
func (h *Hasher) GoString() string { return h.String() }
