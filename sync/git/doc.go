// Package git follows Git repositories and turns one commit of one of them into an immutable
// directory of plain files.
//
// The flow, in the order it happens:
//
//	Spec ──Watcher──> Tip ──Store.Fetch──> Checkout ──> whoever renders it
//
// A [Spec] says where a source's commits come from and how they are verified. A [Watcher] asks each
// repository once per interval what its refs point to (one ls-remote, whatever the number of sources
// that share it), is woken early by a [Webhook] or by a change in a local repository, and reports a
// new [Tip]. [Store.Fetch] brings that one commit, checks its signature, judges its tree, and writes
// the files below checkouts/<tree hash>. [Store.Relation] says whether a new tip follows the accepted
// one, goes back before it, or belongs to another history.
//
// Nothing here trusts the repository. There is no work tree, no hook, no filter, no submodule, no
// configuration read from the repository, and no program is started: the protocol is spoken in
// process, over HTTPS, over SSH, or by reading the objects of a repository on this machine. A pack is
// read under limits of size and time and is checked before any object of it is used. Trees are judged
// entry by entry: what could write outside the checkout (a name like "..", ".git" or one with a
// slash) refuses the whole commit, because no honest tool makes it; what a person may have meant (a
// symbolic link that leaves the tree, a submodule, a Git LFS pointer, a name that differs only by
// case) is a [Problem] that names the path, and the rest of the commit is used.
//
// Vocabulary: a tip is what a branch or tag points to now; a checkout is the files of one commit,
// addressed by the hash of its tree, so two commits with the same content share one; a problem is one
// entry of a commit that was not written, with the sentence that says why.
//
// Whoever reads a checkout may follow its links without leaving it, but must not walk a tree through
// them: two directories can link to each other.
//
// Errors are of type [*Error] and carry a [Reason] to branch on, a sentence, and the way out. They
// never hold a credential.
package git
