# about: guests on a qcow2, and on a chain of a raw image, a VHD and a qcow2; qemu-img and tap-img read what they wrote
# limit: 300
. /testbed/dom0/typed-disks.sh
typed_disks
start_xenio

# use_disk NAME IMAGE FILES: a guest verifies its files, adds one and overwrites some.
use_disk() {
    guest "$1" pv "$(raw xvda "$WORK/$2")" <<JOB
set -e
mount -t ext4 /dev/xvda /mnt
cd /mnt
sha256sum -c SHA256SUMS >/tmp/sums || { grep -v ': OK\$' /tmp/sums; exit 1; }
echo "GUEST VERIFIED \$(grep -c ': OK\$' /tmp/sums) files"
dd if=/dev/urandom of=new bs=1M count=8 2>/dev/null
sha256sum new >>SHA256SUMS
cat d00/f00000 d01/f00001 >d00/f00040
sed -i '/f00040\$/d' SHA256SUMS
sha256sum d00/f00040 >>SHA256SUMS
fstrim -v /mnt || true
cd /
umount /mnt
JOB
    create "$1"
    wait_console "$1" "GUEST VERIFIED" 90
    finish "$1" 60
    assert_nothing_left
}

qemu-img convert -f raw -O qcow2 "$SRV/small.raw" disk.qcow2
use_disk g1 disk.qcow2
qemu-img check -f qcow2 disk.qcow2
qemu-img convert -f qcow2 -O raw disk.qcow2 disk.raw
verify_files disk.raw

cp "$SRV/small.raw" base.img
vhd-util snapshot -n middle.vhd -p base.img -m
# -u: QEMU does not look at the VHD, whose parent it would not read.
qemu-img create -q -u -f qcow2 -b middle.vhd -F vpc leaf.qcow2 "$(stat -c %s base.img)"
sha256sum base.img middle.vhd >parents
use_disk g2 leaf.qcow2
sha256sum --check --quiet parents || fail "a parent image has changed"
qemu-img check -f qcow2 leaf.qcow2
tap-img convert -f qcow2 -O raw leaf.qcow2 leaf.raw
verify_files leaf.raw
