# about: a second disk is attached and detached while the first is busy
# limit: 180
cp "$SRV/small.raw" first.raw
qemu-img convert -f raw -O vpc "$SRV/small.raw" second.vhd
start_xenio
guest g1 pv "$(raw xvda "$WORK/first.raw")" <<'JOB'
set -e
mount -t ext4 /dev/xvda /mnt
(while [ ! -e /stop ]; do
    dd if=/dev/urandom of=/mnt/busy bs=64k count=64 conv=fsync 2>/dev/null || touch /failed
    echo >>/rounds
done) &
echo "GUEST BUSY"
while [ ! -b /dev/xvdb ]; do usleep 50000; done
mkdir /second
mount -t ext4 /dev/xvdb /second
(cd /second && sha256sum -c SHA256SUMS >/dev/null)
dd if=/dev/urandom of=/second/new bs=1M count=4 2>/dev/null
(cd /second && sha256sum new >>SHA256SUMS)
umount /second
echo "GUEST USED THE SECOND DISK"
while [ -b /dev/xvdb ]; do usleep 50000; done
echo "GUEST LOST THE SECOND DISK"
before=$(wc -l </rounds)
while [ "$(wc -l </rounds)" = "$before" ]; do usleep 50000; done
touch /stop
wait
[ ! -e /failed ]
umount /mnt
JOB
create g1
wait_console g1 'GUEST BUSY' 60
xl block-attach g1 "$(vhd xvdb second.vhd)"
wait_console g1 'GUEST USED THE SECOND DISK' 60
[ "$(pgrep -c -x tapdisk)" = 2 ] || fail "not two tapdisks for two disks: $(pgrep -a -x tapdisk)"
xl block-detach g1 xvdb
wait_console g1 'GUEST LOST THE SECOND DISK' 30
one_tapdisk() {
    [ "$(pgrep -c -x tapdisk)" = 1 ] && [ "$(find /run/blktap-control/tapdisk -type f | wc -l)" = 1 ]
}
within 10 "end of the second disk's tapdisk and marker" one_tapdisk
finish g1 60
assert_nothing_left
vhd-util check -n second.vhd
raw_of second.vhd second.raw
verify_files second.raw
e2fsck -f -n first.raw >/dev/null || fail "the first disk's filesystem is damaged"
