# A boot loader for disks that firmware starts: Debian's GRUB for PCs.
# shellcheck shell=bash

# The first two only because every unpacked folder needs them.
GRUB_PACKAGES=(base-passwd mawk grub-pc-bin grub-common)

# grub.boot and grub.core: what firmware finds in the first sector of a disk, and a GRUB with all that it needs to read
# /boot/grub/grub.cfg on the first partition, to be written from the second sector on.
build_grub() {
    local world=$1/world modules=(biosdisk part_msdos ext2 normal linux serial terminal)
    unpack_debian "$world" "${GRUB_PACKAGES[@]}"
    world_run "$world" grub-mkimage -d "$world/usr/lib/grub/i386-pc" -O i386-pc -p '(hd0,msdos1)/boot/grub' \
        -o "$1/grub.core" "${modules[@]}"
    head -c 440 "$world/usr/lib/grub/i386-pc/boot.img" >"$1/grub.boot"
    rm -r "$world"
}
