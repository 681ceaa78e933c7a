# The two commands: `make demo` shows a guest on a VHD, `make test` shows that everything works.
# Both install what they need (Debian packages as root, cargo-deny and promtool into target/tools).

CARGO ?= cargo
DENY_VERSION := 0.20.2
DENY := target/tools/bin/cargo-deny
PROMTOOL := target/tools/bin/promtool
PREFIX ?= /usr
DESTDIR ?=
TOOLS := xenio tap-ctl tap-img vhd-util cbt-util img2qcow qcow2raw qcow-create

.PHONY: all demo test test-full check fmt clippy deny unit loom fuzz soak doc xen bench bench-formats bench-xen deps release install install-files deb deb-files clean

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

unit: $(PROMTOOL)
	PATH="$(CURDIR)/target/tools/bin:$$PATH" $(CARGO) test --workspace --locked --quiet

# The one program, without the service that its package would start.
$(PROMTOOL): | deps
	mkdir -p target/tools/bin target/tools/prometheus
	cd target/tools/prometheus && { apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }; }
	dpkg --fsys-tarfile target/tools/prometheus/prometheus_*.deb | tar -xO ./usr/bin/promtool >$@.new
	chmod +x $@.new && mv $@.new $@
	rm -r target/tools/prometheus

# The ring's notification protocol under every interleaving; its own folder, because the flag rebuilds everything.
loom:
	RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom $(CARGO) test --locked --quiet -p blkif --test loom_notify --release

## soak: a thousand connections of ten guests and ten thousand changes of state; prints what xenio and tapdisk hold afterwards
soak:
	XENIO_SOAK=1 $(CARGO) test --locked --quiet -p integration --test end_to_end -- leaks --nocapture

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

## bench-formats: VHD and qcow2 against raw, a chain of 30, growing images against qemu-nbd, connections to NBD servers; into target/bench-formats.json
bench-formats: deps
	mkdir -p target
	$(CARGO) build --release --locked -p integration --bins
	$(CARGO) run --release --locked --quiet -p integration --bin bench -- --formats --file target/bench-formats.img --mib 4096 \
		--json target/bench-formats.json --rounds 3 $(BENCH_ARGS)

deps:
	integration/deps.sh

release:
	$(CARGO) build --release --locked --workspace --exclude integration --bins

## install: programs, service, manual pages, completions, defaults; DESTDIR and PREFIX as usual
install: release install-files

# BUILT is where cargo has put the programs. install strips them; STRIP= leaves that to others.
BUILT ?= $(or $(CARGO_TARGET_DIR),target)/release
STRIP ?= -s
sbindir = $(PREFIX)/sbin
install-files:
	install -D -m 755 $(STRIP) -t $(DESTDIR)$(sbindir) $(addprefix $(BUILT)/,$(TOOLS))
	install -D -m 755 $(STRIP) -t $(DESTDIR)$(PREFIX)/libexec/xenio $(BUILT)/tapdisk
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man1 dist/man/*.1
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man5 dist/man/*.5
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man8 dist/man/*.8
	for tool in tap-ctl tap-img vhd-util cbt-util; do \
		install -D -m 644 dist/completions/xenio.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/$$tool && \
		install -D -m 644 dist/completions/xenio.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/$$tool.fish || exit; \
	done
	install -D -m 644 dist/completions/xenio.zsh $(DESTDIR)$(PREFIX)/share/zsh/vendor-completions/_xenio
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/systemd/system dist/systemd/xenio-tapdisk.slice
	for unit in xenio xenio-metrics; do \
		sed 's,@sbindir@,$(sbindir),' dist/systemd/$$unit.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/$$unit.service || exit; \
	done
	install -D -m 644 dist/systemd/tapdisk-scope.conf \
		$(DESTDIR)$(PREFIX)/lib/systemd/system/tapdisk-.scope.d/10-xenio.conf
	install -D -m 644 dist/systemd/xenio.tmpfiles $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/xenio.conf
	install -D -m 644 dist/systemd/xenio.sysusers $(DESTDIR)$(PREFIX)/lib/sysusers.d/xenio.conf
	install -D -m 644 dist/xenio.default $(DESTDIR)/etc/default/xenio
	install -D -m 644 -t $(DESTDIR)/etc/xenio dist/disk-folders dist/image-folders
	install -D -m 755 -t $(DESTDIR)/etc/xen/scripts dist/hotplug/block-xenio
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/xenio/grafana dist/grafana/xenio-disks.json

## deb: the Debian package, for Debian 12 and 13, into target/deb
DEB_DIR ?= $(or $(CARGO_TARGET_DIR),target)/deb
deb: deps release deb-files
	lintian --fail-on error $(DEB_DIR)/xenio_*.deb

deb-files:
	mkdir -p $(DEB_DIR)
	BUILT=$(abspath $(BUILT)) DEB_DIR=$(abspath $(DEB_DIR)) debian/rules binary
	rm -rf debian/xenio debian/.debhelper debian/debhelper-build-stamp debian/files debian/*.debhelper debian/*.substvars

clean:
	$(CARGO) clean
