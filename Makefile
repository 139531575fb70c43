# What people do with this project, one target each; `make` alone lists them.
# Two of them are enough to start: `make quickstart` and `make test`, as root, on a
# Debian 12 that has Rust. Both install the Debian packages they need.

CARGO ?= cargo

# The numbers that the long tests run with. A plain `make test` uses smaller ones: see
# "The tests' numbers" in CONTRIBUTING.md.
LONG_NUMBERS = REPLICA_CASES=500 REPLICA_KILLS=20 REPLICA_CONTINUES=1000 REPLICA_CUTS=200 \
	REPLICA_POWER_CUTS=10

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

.PHONY: packages
packages: ## install the Debian packages that the scripts and tests use
	scripts/packages

.PHONY: build
build: ## build the release binary, target/release/replica
	$(CARGO) build --release --package replica-agent

.PHONY: quickstart
quickstart: packages build ## the main job, on a loop device: protect, lose, restore, check
	scripts/quickstart.sh

.PHONY: test
test: packages ## all tests, documentation examples included; as root, on real devices
	scripts/test

.PHONY: test-long
test-long: packages ## all tests with the full numbers: 20 kills, 10 power cuts
	$(LONG_NUMBERS) scripts/test

.PHONY: lint
lint: ## format, clippy with warnings as errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) clippy --package libreplica --no-default-features -- -D warnings

.PHONY: docs
docs: ## the API documentation, warnings as errors
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps

.PHONY: bpf
bpf: ## compile the BPF program and record its hash (needs clang and llvm-strip)
	scripts/bpf build

.PHONY: bpf-check
bpf-check: ## compare the committed BPF object with its source and its hash
	scripts/bpf check

.PHONY: bench
bench: packages build ## the benches: each stage, then the whole beside dd and cp
	$(CARGO) bench --package replica-bench
