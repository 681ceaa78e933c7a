# The guests' disks, as a user would make them: filesystems turned into VHDs by qemu-img.
# shellcheck shell=bash

# files.vhd: 192 MiB, 2500 files and SHA256SUMS; small.raw: 48 MiB, 200 files and SHA256SUMS; debian.vhd: a Debian that
# boots to its own init.
build_fixtures() {
    local work=$1/work
    mkdir -p "$work"/{files,small,debian}
    "$HERE/images/make-files" "$work/files" 2500 files
    make_ext4 "$work/files" "$work/files.raw" 192M -b 4096
    world_run "$WORLD" qemu-img convert -f raw -O vpc "$work/files.raw" "$1/files.vhd"

    "$HERE/images/make-files" "$work/small" 200 small
    make_ext4 "$work/small" "$1/small.raw" 48M -b 4096

    cp -a "$GUESTWORLD/." "$work/debian/"
    install -m 644 "$HERE/images/debian-inittab" "$work/debian/etc/inittab"
    install -m 755 "$HERE/images/debian-job" "$work/debian/etc/testbed-job"
    make_ext4 "$work/debian" "$work/debian.raw" 384M -b 4096
    world_run "$WORLD" qemu-img convert -f raw -O vpc "$work/debian.raw" "$1/debian.vhd"
    rm -r "$work"
}
