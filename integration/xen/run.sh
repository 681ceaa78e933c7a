#!/bin/bash
# The real-Xen testbed: boots Xen with a Debian dom0 in QEMU (plain emulation), runs scenarios there, reports each.
#
#   run.sh [--list] [--full] [--keep] [SCENARIO...] [PARAMETER=VALUE...]
#
# Without names all scenarios run, except those marked "extra"; with --full also those that are extra only because they
# take long ("extra: make test-full"). --keep leaves the machine's folder with the console and
# all logs in place when everything passed (it always stays when something failed). Parameters are variables for the
# scenarios.
#
# XENIO_TESTBED_CACHE  where images are kept (default: target/xen-testbed)
# XENIO_BIN_DIR        where the programs under test are (default: cargo's target/release)
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
TOP=$(cd "$HERE/../.." && pwd)
CACHE=${XENIO_TESTBED_CACHE:-$TOP/target/xen-testbed}
BIN=${XENIO_BIN_DIR:-${CARGO_TARGET_DIR:-$TOP/target}/release}
PROGRAMS=(xenio tapdisk tap-ctl vhd-util tap-img)
PARAMETERS=()
# Longest silence of dom0 outside of a scenario: the boot, on a loaded machine.
BOOT_LIMIT=240

# shellcheck source=integration/xen/images/build.sh
. "$HERE/images/build.sh"
# shellcheck source=integration/xen/machine.sh
. "$HERE/machine.sh"
# shellcheck source=integration/xen/profile/profile.sh
. "$HERE/profile/profile.sh"

# header NAME KEY: the value of "# KEY: value" in a scenario's file.
header() {
    sed -n "s/^# $2: //p" "$HERE/scenarios/$1.sh" | head -n 1
}

scenarios() {
    local file
    for file in "$HERE"/scenarios/*.sh; do
        basename "$file" .sh
    done
}

list() {
    local name
    for name in $(scenarios); do
        printf '%-16s %s%s\n' "$name" "$(header "$name" about)" "$([ -z "$(header "$name" extra)" ] || echo ' (extra)')"
    done
}

# choose FULL [NAME...]
choose() {
    local full=$1 name why
    shift
    if [ $# -gt 0 ]; then
        printf '%s\n' "$@"
        return
    fi
    for name in $(scenarios); do
        why=$(header "$name" extra)
        if [ -z "$why" ] || [ "$full$why" = '1make test-full' ]; then echo "$name"; fi
    done
}

usage() {
    echo "usage: run.sh [--list] [--full] [--keep] [SCENARIO...] [PARAMETER=VALUE...]" >&2
    exit 2
}

main() {
    local keep='' full='' names=()
    while [ $# -gt 0 ]; do
        case $1 in
        --list) list && exit ;;
        --full) full=1 ;;
        --keep) keep=1 ;;
        -*) usage ;;
        [A-Z]*=*) PARAMETERS+=("$1") ;;
        *)
            [ -f "$HERE/scenarios/$1.sh" ] || { echo "run.sh: there is no scenario '$1' (see --list)" >&2 && exit 2; }
            names+=("$1")
            ;;
        esac
        shift
    done
    mapfile -t names < <(choose "$full" "${names[@]}")
    if wants_libxl 4.17 "${names[@]}" || wants_libxl 4.20 "${names[@]}"; then
        "$HERE/deps.sh" "${LIBXL_PACKAGES[@]}"
    else
        "$HERE/deps.sh"
    fi
    lock_cache
    build_images "${names[@]}"
    prepare_machine "${names[@]}"
    run_machine "${names[@]}"
    [ ! -s "$LOGS/bench.rows" ] || perl "$HERE/bench/results.pl" "$LOGS/bench.rows" "$TOP/target/bench-xen.json"
    profile_tables
    report "$keep"
}

# One line, so that bash has read it all when the file changes during a run.
main "$@"; exit
