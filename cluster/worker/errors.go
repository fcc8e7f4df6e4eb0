package worker

import "errors"

var (
	// ErrNotFound: the container or image is not on this node.
	ErrNotFound = errors.New("not found on this node")
	// ErrPermanent: trying again with the same spec gives the same failure (the command does not exist, the image has no such platform …).
	ErrPermanent = errors.New("will fail again")
	// ErrImageMissing: the registry has no such image or tag; somebody may still push it.
	ErrImageMissing = errors.New("the registry has no such image")
	// ErrImageDenied: the registry wants other credentials, or hides that it has no such image.
	ErrImageDenied = errors.New("the registry denies access")
	// ErrUnavailable: the runtime or a registry does not answer; worth another try.
	ErrUnavailable = errors.New("does not answer")
)
