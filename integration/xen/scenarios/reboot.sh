# about: a guest is restarted on request, by itself and after a crash in the middle of writing; its disks come back each time
# limit: 300
cp "$SRV/small.raw" first.raw
vhd-util create -n second.vhd -s 64
start_xenio
# /mnt/boots tells the job which time it is. The kernel answers the toolstack's request by running /sbin/reboot.
guest g1 pv "$(raw xvda "$WORK/first.raw")" "$(vhd xvdb second.vhd)" <<'JOB'
set -e
rm -f /sbin/reboot
printf '#!/bin/busybox sh\n/bin/busybox reboot -f\n' >/sbin/reboot
chmod 755 /sbin/reboot
mount -t ext4 /dev/xvda /mnt
boot=$(cat /mnt/boots 2>/dev/null || echo 0)
if [ $boot -gt 0 ]; then
    # What was flushed before the end is there.
    [ "$(sha256sum </mnt/flushed)" = "$(cat /mnt/flushed-sum)" ]
    [ "$(dd if=/dev/xvdb bs=1M count=4 iflag=direct 2>/dev/null | sha256sum)" = "$(cat /mnt/flushed-sum)" ]
fi
dd if=/dev/urandom of=/tmp-data bs=1M count=4 2>/dev/null
cp /tmp-data /mnt/flushed
sha256sum </tmp-data >/mnt/flushed-sum
dd if=/tmp-data of=/dev/xvdb bs=1M oflag=direct 2>/dev/null
echo $((boot + 1)) >/mnt/boots
sync
[ $boot -lt 3 ] || exit 0
(while true; do dd if=/dev/urandom of=/mnt/busy bs=256k count=8 conv=fsync 2>/dev/null; done) &
(while true; do dd if=/dev/urandom of=/dev/xvdb bs=256k seek=16 count=100 oflag=direct 2>/dev/null; done) &
sleep 1
echo "GUEST BOOT $boot"
case $boot in
0) read -r go ;;
1) /bin/busybox reboot -f ;;
2) echo c >/proc/sysrq-trigger ;;
esac
JOB
sed -i -e '/^on_crash/d' g1.cfg
printf 'on_reboot = "restart"\non_crash = "restart"\n' >>g1.cfg
sed -i 's/cmdline = "/&panic=1 /' g1.cfg
# The kernel panics on purpose once: only what the job says is trouble.
GUEST_TROUBLE='GUEST FAILED'
create g1
wait_console g1 'GUEST BOOT 0' 60
timeout 30 xl reboot g1
for boot in 1 2; do
    wait_console g1 "GUEST BOOT $boot" 90
    step "boot $boot: domain $(domid g1)"
done
finish g1 90
assert_nothing_left
vhd-util check -n second.vhd
e2fsck -f -n first.raw >/dev/null || fail "the first disk's filesystem is damaged"
expect "the number of boots" 4 eval 'debugfs -R "cat boots" first.raw 2>/dev/null'
