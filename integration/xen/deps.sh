#!/bin/bash
# deps.sh [PACKAGE...]: installs the Debian packages that the testbed needs on the host, and those named, and nothing that is
# already there.
#
# QEMU is not among them: the testbed runs the one of the Debian release that it tests (see images/world.sh), so that
# emulated CPU features do not depend on the host's version, and no package of the host has to change.
set -euo pipefail

packages=(mmdebstrap debian-archive-keyring e2fsprogs cpio xz-utils zstd kmod busybox-static perl-base make debhelper "$@")

fail() {
    echo "deps.sh: $*" >&2
    exit 1
}

command -v apt-get >/dev/null && command -v dpkg-query >/dev/null ||
    fail "apt-get is missing: the testbed needs a Debian 12 or 13 machine"
[ "$(dpkg --print-architecture)" = amd64 ] || fail "the testbed needs an amd64 machine"

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) || status=
    [ "$status" = installed ] || missing+=("$package")
done
# The mirror for the images is looked up in apt's lists, so they have to be there even when no package is missing.
lists=$(apt-get indextargets --format '$(FILENAME)' 'Created-By: Packages' | head -n 1)

if [ ${#missing[@]} -gt 0 ] || [ ! -e "$lists" ]; then
    [ "$(id -u)" = 0 ] || fail "must run as root to install: ${missing[*]:-package lists}"
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    echo "installing: ${missing[*]:-package lists}"
    if ! { apt-get -qq update &&
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "${missing[@]}"; } >"$log" 2>&1
    then
        tail -n 20 "$log" >&2
        fail "apt-get could not install: ${missing[*]:-package lists}"
    fi
fi
[ "$(id -u)" = 0 ] || fail "must run as root: the images hold files that belong to root"
