# about: the testbed itself: whether the emulated CPU keeps programs' registers apart under load
# extra: only on request
# limit: 180
modprobe xen-blkback
for n in 1 2; do
    cp "$SRV/small.raw" disk$n.raw
    losetup --direct-io=on /dev/loop$n disk$n.raw
    guest g$n pv "format=raw,backendtype=phy,vdev=xvda,access=rw,target=/dev/loop$n" <<'JOB'
mount -t ext4 /dev/xvda /mnt
while true; do
    dd if=/dev/urandom of=/mnt/busy bs=64k count=64 conv=fsync 2>/dev/null
    a=$(sha256sum </mnt/busy)
    echo 3 >/proc/sys/vm/drop_caches
    [ "$a" = "$(sha256sum </mnt/busy)" ] || exit 1
done
JOB
    create g$n
done
head -c 4M /dev/urandom >/tmp/pattern
sum=$(sha256sum </tmp/pattern)
end=$((SECONDS + 60))
rounds=0
set +x
while [ $SECONDS -lt $end ]; do
    [ "$(sha256sum </tmp/pattern)" = "$sum" ] || fail "another hash of the same bytes after $rounds rounds"
    rm -f /tmp/copy
    cp /tmp/pattern /tmp/copy
    cmp /tmp/copy /tmp/pattern || fail "a copy differs after $rounds rounds"
    pgrep -x nothing || [ $? = 1 ] || fail "pgrep crashed"
    rounds=$((rounds + 1))
done
step "$rounds rounds"
! dmesg | grep segfault || fail "a program crashed"
! says g1 FAILED || fail g1
! says g2 FAILED || fail g2
