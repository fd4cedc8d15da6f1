# Two commands for a newcomer: `make demo` and `make test`. Both install, build
# and cache what they need (docs/operations.md says where), and run real guests
# on this machine where its CPU can, else in the nested bench.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help build images demo test check lint native-test guest-test bench deny clean

target := target/x86_64-unknown-linux-gnu/release
cache := $(or $(SOULBOX_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/soulbox)

help: ## What there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

build: ## Build every program
	cargo build --release --workspace

images: build ## Build the guest's kernel and the template "base", or find them cached
	images/build template --guest-binary $(target)/soulbox-guest

demo: images ## Run real Python and Node in a sandbox, with exit codes and timings
	images/bench/run $(addprefix --file $(target)/,soulboxd soulbox soulbox-vmm) \
	    --file "$$(realpath $(cache)/templates/current)" -- images/demo $(target)

test: lint native-test guest-test ## All checks and all tests; what CI runs

check: lint

lint: ## Formatting, clippy and shellcheck
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	images/setup lint
	shellcheck -x images/build images/setup images/demo images/lib.sh images/bench/run images/bench/init images/*/recipe .ci/run

native-test: build ## Tests that need no Linux guest
	cargo test --release --workspace

guest-test: images ## Tests with real Linux guests
	cargo test --release -p soulbox-host --test guest --features guest-tests

bench: images ## The figures of docs/performance.md
	cargo run --release -p soulbox-benches -- vmm
	images/bench/run $(addprefix --file $(target)/,soulbox-benches soulbox-vmm) \
	    --file "$$(realpath $(cache)/templates/current)" -- \
	    $(target)/soulbox-benches boot --template $(cache)/templates/current/base

deny: ## Licences, sources and duplicates of dependencies (needs cargo-deny)
	cargo deny --all-features check bans licenses sources

clean: ## Remove what was built here; the cache stays
	cargo clean
