# about: a guest on a snapshot of a snapshot; the parents keep their bytes, libvhdi agrees with the guest
# limit: 240
qemu-img convert -f raw -O vpc "$SRV/small.raw" base.vhd
vhd-util snapshot -n middle.vhd -p base.vhd
start_xenio

# use_chain NAME IMAGE: a guest verifies all there is, adds a file, overwrites part of an old one, shows the disk's hash.
use_chain() {
    guest "$1" pv "$(vhd xvda "$2")" <<'JOB'
set -e
mount -t ext4 /dev/xvda /mnt
cd /mnt
sha256sum -c SHA256SUMS >/dev/null
new=new-$(ls -d new-* | wc -l)
dd if=/dev/urandom of=$new bs=1M count=4 2>/dev/null
sha256sum $new >>SHA256SUMS
cat d00/f00000 d01/f00001 >d00/f00040
sed -i '/f00040$/d' SHA256SUMS
sha256sum d00/f00040 >>SHA256SUMS
cd /
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
echo "GUEST SEES $(sha256sum </dev/xvda)"
JOB
    create "$1"
    finish "$1" 90
    assert_nothing_left
}

use_chain g1 middle.vhd
vhd-util snapshot -n leaf.vhd -p middle.vhd
sha256sum base.vhd middle.vhd >parents
use_chain g2 leaf.vhd
sha256sum --check --quiet parents || fail "a parent image has changed"

read_chain leaf.raw leaf.vhd middle.vhd base.vhd
theirs=$(sha256sum <leaf.raw | cut -d ' ' -f 1)
says g2 "GUEST SEES $theirs" || fail "libvhdi reads another disk than the guest saw: $theirs"
verify_files leaf.raw
vhd-util check -n leaf.vhd
