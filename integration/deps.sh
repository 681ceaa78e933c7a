#!/usr/bin/env bash
# Installs the Debian packages that `make check` and `make bench` use beside the Rust toolchain; those that are there already cost nothing.
#   gcc, make    linking
#   xz-utils     unpacks the golden VHD images
#   qemu-utils, python3-libvhdi   independent readers and writers of images
#   libnbd-bin, nbdkit   independent NBD clients and servers
#   openssl      makes the certificates of a test
#   libxen-dev   Xen's public headers, against which layouts and numbers are checked
#   fio          what the bench compares with
#   valgrind, strace   count instructions and system calls in the bench
#   debhelper, lintian   build and examine the Debian package
#   groff-base   reads the manual pages in a test
#   fish, zsh    complete command lines in a test
set -euo pipefail
wanted=(gcc make xz-utils qemu-utils python3-libvhdi libnbd-bin nbdkit openssl libxen-dev fio valgrind strace debhelper lintian groff-base fish zsh)
missing=()
for package in "${wanted[@]}"; do
    if ! dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed'; then
        missing+=("$package")
    fi
done
if [ ${#missing[@]} -eq 0 ]; then
    exit 0
fi
echo "installing ${missing[*]}"
if [ "$(id -u)" -ne 0 ]; then
    echo "deps.sh: these Debian packages are missing and only root can install them: ${missing[*]}" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
