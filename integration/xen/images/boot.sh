# What is loaded before any disk is there: Xen, the kernel, the initramfs of dom0 and of the guests.
# shellcheck shell=bash

DOM0_BOOT_MODULES=(virtio_pci virtio_blk ext4 9pnet_virtio 9p)
GUEST_MODULES=(xen-blkfront ext4)
# HVM guests also see the disks that the device model emulates.
HVM_MODULES=(ata_piix sd_mod "${GUEST_MODULES[@]}")

# extract_vmlinux BZIMAGE FILE: the ELF kernel inside a bzImage, so that neither Xen nor libxl has to decompress it with
# an emulated CPU. Offsets are those of the x86 boot protocol: setup_sects at 0x1f1, payload_offset at 0x248 and
# payload_length at 0x24c (the last four bytes of the payload are its uncompressed size).
extract_vmlinux() {
    local sects offset length
    sects=$(od -An -tu1 -j 0x1f1 -N 1 "$1")
    offset=$(od -An -tu4 -j 0x248 -N 4 "$1")
    length=$(od -An -tu4 -j 0x24c -N 4 "$1")
    tail -c +$(((sects + 1) * 512 + offset + 1)) "$1" | head -c $((length - 4)) >"$2.packed" || true
    case $(od -An -tx1 -N 4 "$2.packed" | tr -d ' ') in
    28b52ffd) zstd -dqc "$2.packed" >"$2" ;;
    fd377a58) xz -dc "$2.packed" >"$2" ;;
    1f8b*) gzip -dc "$2.packed" >"$2" ;;
    *) die "the kernel is compressed in a way that the testbed does not know" ;;
    esac
    rm "$2.packed"
}

# initramfs WORLD INIT FILE MODULE...: busybox, an init script and modules that it loads in order.
initramfs() {
    local world=$1 init=$2 file=$3 root
    shift 3
    root=$file.root
    mkdir -p "$root"/{bin,dev,proc,sys,mnt,run}
    cp "$world/usr/bin/busybox" "$root/bin/busybox"
    cp "$init" "$root/init"
    chmod 755 "$root/init"
    unpack_modules "$world" "$root/modules" "$@"
    pack_initramfs "$root" "$file"
    rm -r "$root"
}

build_boot() {
    gzip -dc "$WORLD/boot/xen-$XEN-amd64.gz" >"$1/xen"
    extract_vmlinux "$WORLD"/boot/vmlinuz-* "$1/vmlinux"
    initramfs "$WORLD" "$HERE/images/dom0-init" "$1/dom0.initrd" "${DOM0_BOOT_MODULES[@]}"
    initramfs "$WORLD" "$HERE/images/guest-init" "$1/guest.initrd" "${GUEST_MODULES[@]}"
    initramfs "$WORLD" "$HERE/images/guest-init" "$1/hvm.initrd" "${HVM_MODULES[@]}"
    # GRUB takes a kernel in its original form only.
    cp "$WORLD"/boot/vmlinuz-* "$1/vmlinuz"
}
