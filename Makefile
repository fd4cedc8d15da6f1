# Two commands for a newcomer: `make demo` and `make test`. Both install, build
# and cache what they need (docs/operations.md says where), and run real guests
# on this machine where its CPU can, else in the nested bench.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help build images demo test lint bench deny clean

# CI clones afresh each time; its dependencies need not be built afresh.
ifdef CI
export CARGO_TARGET_DIR ?= $(cache)/target
endif
target = $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)/x86_64-unknown-linux-gnu/release
scripts := .ci/run $(shell grep -rlI '^\#!/bin/bash' images)
cache := $(or $(SOULBOX_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/soulbox)

help: ## What there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

build: ## Build every program
	cargo build --release --workspace $(build_targets)

images: build ## Build the guest's kernel and the template "base", or find them cached
	images/build template --guest-binary $(target)/soulbox-guest

demo: images ## Run real Python and Node in a sandbox, with exit codes and timings
	images/bench/run $(addprefix --file $(target)/,soulboxd soulbox soulbox-vmm) \
	    --file images/demo --file images/lib.sh \
	    --file "$$(realpath $(cache)/templates/current)" -- images/demo $(target)

# Beside a test, programs are built with the features of its own dependencies. Built so from
# the start, they are built once.
test: build_targets = --bins --test guest
test: lint images ## All checks and all tests; what CI runs
	images/setup bench test
	cargo test --workspace
	cargo test --release --workspace --test guest

lint: ## Formatting, clippy and shellcheck
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --test guest -- -D warnings
	images/setup lint
	shellcheck -x $(scripts)

bench: images ## The figures of docs/performance.md
	images/setup bench
	cargo run --release -p soulbox-benches -- cold-start --alive 1000 \
	    --svg $(target)/cold-start.svg --json $(target)/cold-start.json
	images/bench/run $(addprefix --file $(target)/,soulbox-benches soulboxd soulbox-vmm) \
	    --results $(target)/bench --timeout 3000 \
	    --file "$$(realpath $(cache)/templates/current)" -- $(target)/soulbox-benches \
	    cold-start --daemon $(target) --templates $(cache)/templates/current \
	    --svg $(target)/bench/cold-start.svg --json $(target)/bench/cold-start.json
	cargo run --release -p soulbox-benches -- net \
	    --svg $(target)/net.svg --json $(target)/net.json
	images/bench/run $(addprefix --file $(target)/,soulbox-benches soulboxd soulbox-vmm) \
	    --results $(target)/bench --timeout 3000 \
	    --file "$$(realpath $(cache)/templates/current)" -- $(target)/soulbox-benches \
	    net --daemon $(target) --templates $(cache)/templates/current \
	    --svg $(target)/bench/net.svg --json $(target)/bench/net.json
	images/bench/run $(addprefix --file $(target)/,soulbox-benches soulboxd soulbox soulbox-vmm) \
	    --results $(target)/bench --timeout 3000 \
	    --file "$$(realpath $(cache)/templates/current)" -- $(target)/soulbox-benches \
	    guest --daemon $(target) --templates $(cache)/templates/current \
	    --svg $(target)/bench/guest.svg --json $(target)/bench/guest.json
	images/bench/run $(addprefix --file $(target)/,soulbox-benches soulbox-vmm) \
	    --file "$$(realpath $(cache)/templates/current)" -- \
	    $(target)/soulbox-benches boot --template $(cache)/templates/current/base

deny: ## Licences, sources and duplicates of dependencies (needs cargo-deny)
	cargo deny --all-features check bans licenses sources

clean: ## Remove what was built here; the cache stays
	cargo clean
