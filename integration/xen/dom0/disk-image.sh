# Whole disks made from folders, and guests that are booted from them.
# shellcheck shell=bash

# Where the first partition begins; boot loaders live before it.
PARTITION_AT=$((1024 * 1024))

# little_endian BYTES NUMBER
little_endian() {
    local n
    for ((n = 0; n < $1; n++)); do
        printf "\\x$(printf %x $(($2 >> (8 * n) & 255)))"
    done
}

# partitioned FILE FOLDER MIB: a raw disk with one bootable partition: an ext4 filesystem with the folder's content.
partitioned() {
    local file=$1 folder=$2 bytes=$(($3 * 1024 * 1024))
    truncate -s "$((PARTITION_AT + bytes))" "$file"
    mke2fs -q -F -t ext4 -d "$folder" -m 0 -E offset=$PARTITION_AT "$file" "${3}M"
    # The partition's entry: bootable, no CHS addresses, Linux, first sector, sectors.
    {
        printf '\x80\xfe\xff\xff\x83\xfe\xff\xff'
        little_endian 4 $((PARTITION_AT / 512))
        little_endian 4 $((bytes / 512))
    } | dd of="$file" bs=1 seek=446 conv=notrunc status=none
    printf '\x55\xaa' | dd of="$file" bs=1 seek=510 conv=notrunc status=none
}

# booted_guest TYPE DISK: configures g1, whose kernel is on the disk; its job checks the files there and adds one.
booted_guest() {
    guest g1 "$@" <<'JOB'
set -e
grep -o 'testbed-word=[a-z]*' /proc/cmdline >/tmp/word
while [ ! -b /dev/xvda1 ]; do usleep 50000; done
echo "GUEST BOOTED WITH $(cat /tmp/word)"
mount -t ext4 /dev/xvda1 /mnt
(cd /mnt/files && sha256sum -c SHA256SUMS >/dev/null)
dd if=/dev/urandom of=/mnt/files/new bs=1M count=8 2>/dev/null
(cd /mnt/files && sha256sum new >>SHA256SUMS)
umount /mnt
echo "GUEST WROTE"
JOB
    sed -i -e '/^kernel = /d' -e '/^ramdisk = /d' -e '/^cmdline = /d' g1.cfg
}

# boot_tree: the folder "tree", with the test's files, where a kernel and its boot loader's configuration are wanted.
boot_tree() {
    mkdir -p tree/boot/grub mnt
    mount -o loop,ro "$SRV/small.raw" mnt
    cp -r mnt tree/files
    umount mnt
}

# finish_booted_guest SECONDS VHD: it ends by itself, and leaves what it wrote.
finish_booted_guest() {
    finish g1 "$1"
    assert_nothing_left
    vhd-util check -n "$2"
    raw_of "$2" seen.raw
    mount -o "loop,ro,offset=$PARTITION_AT" seen.raw mnt
    (cd mnt/files && sha256sum --quiet --check SHA256SUMS)
    umount mnt
}
