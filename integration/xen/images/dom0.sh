# dom0's disk: the unpacked packages less what no scenario uses, the guests' kernel and disks under /srv/testbed.
# shellcheck shell=bash

DOM0_MODULES=(xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs xen-blkback xen-blkfront loop null_blk brd
    ext4 dm-mod)

build_dom0() {
    local root=$1/root version drop
    version=$(kernel_version "$WORLD")
    mkdir -p "$root"
    cp -a "$WORLD/." "$root/"
    drop=(boot usr/lib/modules usr/bin/qemu-system-x86_64 usr/bin/qemu-system-i386 usr/lib/systemd usr/lib/udev
        usr/share/locale usr/share/man usr/share/info usr/share/zoneinfo usr/share/iso-codes usr/share/xml)
    (cd "$root" && rm -rf "${drop[@]}")
    copy_modules "$root" "$version"
    mkdir -p "$root"/{testbed,out,srv/testbed,usr/libexec/xenio,etc/xen,boot}
    cp "$BOOT"/{vmlinux,vmlinuz,guest.initrd,hvm.initrd} "$GRUB"/grub.* "$FIXTURES"/*.* "$root/srv/testbed/"
    echo 'testbed' >"$root/etc/hostname"
    make_ext4 "$root" "$1/disk.img" 3G -O '^has_journal'
    rm -r "$root"
}

# copy_modules ROOT VERSION: the modules that dom0 loads later, uncompressed, with an index of just these.
copy_modules() {
    local to=$1/usr/lib/modules/$2
    unpack_modules "$WORLD" "$to/testbed" "${DOM0_MODULES[@]}"
    rm "$to/testbed/order"
    cp "$WORLD/usr/lib/modules/$2"/modules.{builtin,order} "$to/"
    quiet "$CACHE/depmod-dom0.log" depmod --basedir "$1" "$2"
}
