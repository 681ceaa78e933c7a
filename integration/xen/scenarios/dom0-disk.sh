# about: dom0 uses disks itself (xl block-attach 0): VHD, qcow2 and raw are mounted, written, and read by other tools
# limit: 150
. /testbed/dom0/typed-disks.sh
typed_disks
modprobe xen-blkfront
qemu-img convert -f raw -O vpc "$SRV/small.raw" disk.vhd
qemu-img convert -f raw -O qcow2 "$SRV/small.raw" disk.qcow2
cp "$SRV/small.raw" disk.img
start_xenio
mkdir mnt

# use VDEV DISK: verifies the files on the disk, adds one, and takes the disk away again.
use() {
    step "xl block-attach 0 $2"
    timeout 60 xl block-attach 0 "$2"
    within 20 "/dev/$1" test -b "/dev/$1"
    mount -t ext4 "/dev/$1" mnt
    (cd mnt && sha256sum --quiet --check SHA256SUMS)
    dd if=/dev/urandom of=mnt/new bs=1M count=8 conv=fsync status=none
    (cd mnt && sha256sum new >>SHA256SUMS)
    umount mnt
    timeout 60 xl block-detach 0 "$1"
    within 10 "/dev/$1 to go" test ! -e "/dev/$1"
    assert_nothing_left
    [ -z "$(xenstore-ls -f device/vbd 2>/dev/null | grep /state)" ] || fail "the frontend's directory is left"
}
use xvdz "$(vhd xvdz disk.vhd)"
use xvdy "$(raw xvdy "$WORK/disk.qcow2")"
use xvdz "$(raw xvdz "$WORK/disk.img")"

vhd-util check -n disk.vhd
raw_of disk.vhd vhd.raw
qemu-img check -q -f qcow2 disk.qcow2
qemu-img convert -f qcow2 -O raw disk.qcow2 qcow2.raw
for image in vhd.raw qcow2.raw disk.img; do
    [ "$(verify_files "$image")" = 'verified 201 files' ] || fail "$image does not have what was written"
done

step "read-only"
timeout 60 xl block-attach 0 "$(vhd xvdz disk.vhd ro)"
within 20 "/dev/xvdz" test -b /dev/xvdz
expect "/dev/xvdz: read-only" 1 cat /sys/block/xvdz/ro
sum=$(sha256sum <disk.vhd)
! dd if=/dev/zero of=/dev/xvdz bs=4k count=1 oflag=direct 2>/dev/null || fail "a read-only disk was written"
mount -t ext4 -o ro /dev/xvdz mnt
(cd mnt && sha256sum --quiet --check SHA256SUMS)
umount mnt
timeout 60 xl block-detach 0 xvdz
assert_nothing_left
expect "the sum of a disk used read-only" "$sum" eval 'sha256sum <disk.vhd'
