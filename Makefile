# Run `make` to see what there is to make.

# Debian's own Go may come first, all the more as sudo makes its own PATH: then the one of /usr/local/go is meant.
export PATH := $(if $(shell .ci/check-tools 2>&1),/usr/local/go/bin:)$(PATH)
GO        ?= go
VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS   := -s -w -X main.version=$(VERSION)
TESTFLAGS ?=
SIM_SEEDS ?= 50

folders   := $(wildcard cmd sync reconcile cluster policy fixtures)
# What needs root and containerd, and takes its time.
lab       := $(wildcard fixtures/lab cluster/containerd cluster/network)
sim       := $(wildcard fixtures/sim)
# What runs the built programs: go test can't see that they changed, so its cache must not answer.
whole     := /fixtures/(lab|demo/tour)$$
as-tree    = $(patsubst %,./%/...,$(1))

.DEFAULT_GOAL := help
.PHONY: help check race-check build deps test lab sim race lint fmt cover bench demo demo-stop vm ci clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

check:
	@.ci/check-tools

race-check:
	@.ci/check-tools race

build: check ## build gitopsd, gitopsctl and gitops-keeper into ./bin
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

deps: check ## install containerd, runc and nftables where they are missing
	@.ci/deps

test: check ## run all tests; those with containers too, when root
	@.ci/deps --optional
	$(GO) test -vet=off -timeout 9m $(TESTFLAGS) $$($(GO) list ./... | grep -v -E '$(whole)')
	$(GO) test -vet=off -count=1 -timeout 9m $(TESTFLAGS) $$($(GO) list ./... | grep -E '$(whole)')

lab: check deps ## run the tests against real containerd only, every time anew
	$(GO) test -vet=off -count=1 -timeout 20m $(TESTFLAGS) $(call as-tree,$(lab))

sim: check ## run SIM_SEEDS seeds of the simulation
	SIM_SEEDS=$(SIM_SEEDS) $(GO) test -vet=off -count=1 -timeout 30m $(TESTFLAGS) $(call as-tree,$(sim))

race: race-check ## run the tests with the race detector, without the slow ones
	CGO_ENABLED=1 $(GO) test -vet=off -race -short -timeout 15m $(TESTFLAGS) $$($(GO) list ./... | grep -v -e /fixtures/lab -e /fixtures/sim)

lint: check ## check formatting, vet and lint
	@.ci/lint

fmt: check ## format all Go files
	gofmt -w $(folders)

cover: check ## write cover.out and print the coverage of each package
	$(GO) test -vet=off -short -timeout 9m -coverprofile=cover.out $(TESTFLAGS) ./...
	$(GO) tool cover -func=cover.out | tail -n 1

bench: check deps ## measure speed and memory against their targets
	$(GO) run ./fixtures/bench

# As the programs are built, so that nothing is compiled twice.
demo demo-stop: export CGO_ENABLED = 0

demo: deps build ## show everything on this machine, and leave it running
	@$(GO) run -trimpath -buildvcs=false ./fixtures/demo/tour up

demo-stop: build ## remove every trace of the demo
	@$(GO) run -trimpath -buildvcs=false ./fixtures/demo/tour stop

vm: check ## go through the demo, the service, a reboot and the lab in a fresh Debian 12 of its own, under qemu
	@.ci/vm

ci: ## run what must pass before a change is taken
	@.ci/run

clean: ## remove what make built
	rm -rf bin cover.out
