# build_images: makes what is missing in $CACHE and sets $WORLD, $BOOT, $DOM0, $SERVICEDOM0, $BOOT12, $DEBIAN12DOM0 and
# LIBXL to the folders with the results.
# shellcheck shell=bash

# shellcheck source=integration/xen/images/lib.sh
. "$HERE/images/lib.sh"
# shellcheck source=integration/xen/images/world.sh
. "$HERE/images/world.sh"
# shellcheck source=integration/xen/images/boot.sh
. "$HERE/images/boot.sh"
# shellcheck source=integration/xen/images/fixtures.sh
. "$HERE/images/fixtures.sh"
# shellcheck source=integration/xen/images/grub.sh
. "$HERE/images/grub.sh"
# shellcheck source=integration/xen/images/dom0.sh
. "$HERE/images/dom0.sh"
# shellcheck source=integration/xen/images/service.sh
. "$HERE/images/service.sh"
# shellcheck source=integration/xen/images/libxl.sh
. "$HERE/images/libxl.sh"
LIBXL=()

# build_images SCENARIO...: the disk of a Debian in full, Debian 12 and a patched libxl only if one of them wants it.
build_images() {
    local in=$HERE/images
    mkdir -p "$CACHE"
    artefact world build_world "$in/world.sh"
    WORLD=$artefact
    artefact guestworld build_guestworld "$in/world.sh"
    GUESTWORLD=$artefact
    artefact boot build_boot "$WORLD" "$in/boot.sh" "$in/lib.sh" "$in/dom0-init" "$in/guest-init"
    BOOT=$artefact
    artefact fixtures build_fixtures "$WORLD" "$GUESTWORLD" "$in/fixtures.sh" "$in/lib.sh" \
        "$in/make-files" "$in/debian-inittab" "$in/debian-job"
    FIXTURES=$artefact
    artefact grub build_grub "$in/grub.sh" "$in/world.sh"
    GRUB=$artefact
    artefact dom0 build_dom0 "$WORLD" "$BOOT" "$FIXTURES" "$GRUB" "$in/dom0.sh" "$in/lib.sh"
    DOM0=$artefact
    patched_libxl "$@"
    [ -z "$(of_kind debian12 "$@")" ] || build_debian12 "$@"
    [ -n "$(of_kind service "$@")" ] || return 0
    artefact servicedom0 build_servicedom0 "$WORLD" "$BOOT" "$FIXTURES" "$in/service.sh" "$in/testbed.service" "$in/lib.sh"
    SERVICEDOM0=$artefact
}

# build_debian12 SCENARIO...: the same scripts with another release. The emulator and the guests' disks stay those of the
# newer one.
build_debian12() {
    local in=$HERE/images SUITE=bookworm XEN=4.17 WORLD BOOT
    artefact debian12world build_world "$in/world.sh" "$SUITE"
    WORLD=$artefact
    artefact debian12boot build_boot "$WORLD" "$in/boot.sh" "$in/lib.sh" "$in/dom0-init" "$in/guest-init"
    BOOT=$artefact
    BOOT12=$artefact
    artefact debian12dom0 build_dom0 "$WORLD" "$BOOT" "$FIXTURES" "$GRUB" "$in/dom0.sh" "$in/lib.sh"
    DEBIAN12DOM0=$artefact
    patched_libxl "$@"
}
