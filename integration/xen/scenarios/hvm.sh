# about: an HVM guest reaches its disks by emulated IDE (the device model, by NBD) and by its ring; each sees the other's writes
# extra: make test-full
# limit: 900
qemu-img convert -f raw -O vpc "$SRV/small.raw" disk.vhd
truncate -s 16M disk.img
start_xenio
LOOK_EVERY=3
# Both ways at once, which guests usually give up: the kernel is told not to unplug the emulated disks. Then it takes only
# those for its own that are called xvd.
GUEST_INITRD=$SRV/hvm.initrd GUEST_MEMORY=256 GUEST_CMDLINE='xen_emul_unplug=unnecessary'
# libxl lets the device model open a raw file itself, beside us, unless a script is named.
guest g1 hvm "$(vhd xvda disk.vhd)" "script=block-tap,$(raw xvdb "$WORK/disk.img")" <<'JOB'
set -e
for disk in sda sdb xvda xvdb; do
    while [ ! -b /dev/$disk ]; do usleep 50000; done
done
echo "GUEST HAS $(cd /dev && echo sd? xvd?)"
# The kernel names emulated disks in the order in which its threads find them: it is the size that tells which is which.
emulated() {
    for disk in sda sdb; do
        [ "$(cat /sys/block/$disk/size)" != "$(cat /sys/block/$1/size)" ] || echo $disk
    done
}
ide_a=$(emulated xvda)
ide_b=$(emulated xvdb)
# sum DISK BLOCK: of 8 MiB.
sum() {
    dd if=/dev/$1 bs=256k skip=$2 count=32 iflag=direct 2>/dev/null | sha256sum
}
# across FROM TO BLOCK: what one way writes the other reads, at once.
across() {
    head -c 262144 /dev/urandom >/tmp/data
    dd if=/tmp/data of=/dev/$1 bs=256k seek=$3 oflag=direct 2>/dev/null
    dd if=/dev/$2 of=/tmp/seen bs=256k skip=$3 count=1 iflag=direct 2>/dev/null
    cmp /tmp/data /tmp/seen
}
mount -t ext4 -o ro /dev/$ide_a /mnt
(cd /mnt && sha256sum -c SHA256SUMS >/dev/null)
umount /mnt
echo "GUEST VERIFIED FILES THROUGH IDE"
for n in 0 1 2 3; do
    across xvda $ide_a $((160 + n))
    across $ide_a xvda $((160 + n))
    across xvdb $ide_b $n
    across $ide_b xvdb $n
done
[ "$(sum $ide_a 160)" = "$(sum xvda 160)" ]
[ "$(sum $ide_b 0)" = "$(sum xvdb 0)" ]
dd if=/dev/urandom of=/dev/$ide_a bs=4k seek=10752 count=1 conv=fsync 2>/dev/null
echo "GUEST SUM $(sum xvda 160 | cut -c 1-64)"
JOB
create g1
[ "$(pgrep -c -x tapdisk)" = 2 ] || fail "not two tapdisks for two disks: $(pgrep -a -x tapdisk)"
used=$(tr '\0' '\n' <"/proc/$(pgrep -f -o xen-qemu-system)/cmdline" | grep -c 'file=nbd+unix:') || true
expect "the number of disks that the device model reaches by NBD" 2 echo "$used"
wait_console g1 'GUEST HAS sda sdb xvda xvdb' 300
wait_console g1 'GUEST VERIFIED FILES THROUGH IDE' 300
finish g1 300
assert_nothing_left
vhd-util check -n disk.vhd
raw_of disk.vhd seen.raw
expect "the sum of what both ways wrote" "$(said g1 'GUEST SUM')" \
    eval 'echo "GUEST SUM $(dd if=seen.raw bs=256k skip=160 count=32 status=none | sha256sum | cut -c 1-64)"'

step "a raw disk without the script: the lock keeps the device model out"
guest g2 hvm "$(raw hda "$WORK/disk.img")" <<<'exit 1'
! timeout 120 xl create g2.cfg >g2-create.log 2>&1 || fail "the device model opened an image that is in use"
grep -i 'lock' /var/log/xen/qemu-dm-g2.log || fail "the device model does not say that the image is locked"
assert_nothing_left
