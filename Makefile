# The two commands: `make demo` shows a guest on a VHD, `make test` shows that everything works.
# Both install what they need (Debian packages as root, cargo-deny into target/tools).

CARGO ?= cargo
DENY_VERSION := 0.20.2
DENY := target/tools/bin/cargo-deny
PREFIX ?= /usr
DESTDIR ?=
TOOLS := xenio tap-ctl tap-img vhd-util cbt-util

.PHONY: all demo test test-full check fmt clippy deny unit loom fuzz doc xen bench bench-formats bench-xen deps release install clean

all: release

## demo: boot real Xen in QEMU and watch a guest use a VHD through xenio
demo: release
	integration/xen/run.sh demo

## test: everything: check, then the scenarios on real Xen
test: check xen

## test-full: the same with the scenarios that take long: guests with emulated hardware
test-full: check release
	integration/xen/run.sh --full

## check: the part without QEMU
check: deps fmt clippy deny doc unit loom

fmt:
	$(CARGO) fmt --all --check

clippy:
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

deny: $(DENY)
	$(DENY) --log-level error check bans licenses sources

# Unoptimised: it is built once and runs for a second.
$(DENY):
	@echo "installing cargo-deny $(DENY_VERSION) (about a minute)"
	$(CARGO) install --quiet --locked --debug --root target/tools --version $(DENY_VERSION) cargo-deny

doc:
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked --quiet

unit:
	$(CARGO) test --workspace --locked --quiet

# The ring's notification protocol under every interleaving; its own folder, because the flag rebuilds everything.
loom:
	RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom $(CARGO) test --locked --quiet -p blkif --test loom_notify --release

## fuzz: malformed images and replies for a minute each (FUZZ_SECONDS); what fails names a SEED to run again
FUZZ_SECONDS ?= 60
fuzz:
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(CARGO) test --locked -p integration --test fuzz -- --nocapture --test-threads=1

## xen: the scenarios on real Xen, in QEMU
xen: release
	integration/xen/run.sh

## bench-xen: instruction-counted comparison with blkback and qdisk on real Xen (ROWS="blkback xenio-raw" for a few)
bench-xen: release
	integration/xen/run.sh bench $(if $(ROWS),"ROWS=$(ROWS)")

## bench: a simulated guest on the real programs against fio, on this machine; into target/bench.json
# BENCH_FILE is where the image lies (1 GiB of random data, made once): the file system under it is what is measured.
BENCH_FILE ?= target/bench.img
bench: deps
	mkdir -p target
	$(CARGO) build --release --locked -p integration --bins
	$(CARGO) run --release --locked --quiet -p integration --bin bench -- --file $(BENCH_FILE) $(BENCH_ARGS)

## bench-formats: VHD and qcow2 against raw, a chain of 30, growing images against qemu-nbd; into target/bench-formats.json
bench-formats: deps
	mkdir -p target
	$(CARGO) build --release --locked -p integration --bins
	$(CARGO) run --release --locked --quiet -p integration --bin bench -- --formats --file target/bench-formats.img --mib 4096 \
		--json target/bench-formats.json --rounds 3 $(BENCH_ARGS)

deps:
	integration/deps.sh

release:
	$(CARGO) build --release --locked --workspace --exclude integration --bins

install: release
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/sbin $(addprefix target/release/,$(TOOLS))
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/libexec/xenio target/release/tapdisk

clean:
	$(CARGO) clean
