# about: format=raw on a file and on a block device, with xenio as a daemon
# limit: 180
cp "$SRV/small.raw" file.raw
cp "$SRV/small.raw" device.raw
loop=$(losetup -f --show --direct-io=on device.raw)
xenio -p /run/xenio.pid
guest g1 pv "$(raw xvda "$WORK/file.raw")" "$(raw xvdb "$loop")" <<'JOB'
set -e
for disk in xvda xvdb; do
    mount -t ext4 /dev/$disk /mnt
    cd /mnt
    sha256sum -c SHA256SUMS >/dev/null
    dd if=/dev/urandom of=$disk bs=1M count=8 2>/dev/null
    sha256sum $disk >>SHA256SUMS
    cd /
    umount /mnt
    echo "GUEST USED $disk"
done
JOB
create g1
wait_console g1 'GUEST USED xvda' 60
finish g1 60
assert_nothing_left
for image in file.raw device.raw; do
    verify_files $image
done
grep -q xvda <(debugfs -R 'ls -l /' file.raw 2>/dev/null) || fail "file.raw does not hold what the guest wrote"
grep -q xvdb <(debugfs -R 'ls -l /' device.raw 2>/dev/null) || fail "the device does not hold what the guest wrote"
losetup -d "$loop"
kill "$(cat /run/xenio.pid)"
within 10 "end of the daemon" test ! -e /run/xenio.pid
