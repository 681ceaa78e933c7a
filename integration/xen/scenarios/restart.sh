# about: xenio is killed and started again while a guest writes; then a second disk is attached
# limit: 240
qemu-img convert -f raw -O vpc "$SRV/small.raw" first.vhd
qemu-img convert -f raw -O vpc "$SRV/small.raw" second.vhd
start_xenio
guest g1 pv "$(vhd xvda first.vhd)" <<'JOB'
set -e
mount -t ext4 /dev/xvda /mnt
n=0
while [ ! -b /dev/xvdb ]; do
    n=$((n + 1))
    dd if=/dev/urandom of=/tmp-data bs=256k count=1 2>/dev/null
    dd if=/tmp-data of=/mnt/tick bs=256k conv=fsync 2>/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    cmp /tmp-data /mnt/tick
    echo "GUEST TICK $n"
done
mkdir /second
mount -t ext4 -o ro /dev/xvdb /second
(cd /second && sha256sum -c SHA256SUMS >/dev/null)
umount /second
if dmesg | grep -i -E 'I/O error|xenbus.*error|EXT4-fs error'; then exit 1; fi
umount /mnt
JOB
ticks() {
    grep -a -c 'GUEST TICK' "$CONSOLES/guest-g1.log" || true
}
more_ticks() {
    [ "$(ticks)" -gt $((seen + 2)) ]
}
goes_on() {
    seen=$(ticks)
    within 30 "$1" more_ticks
    step "$1: the guest goes on"
}
create g1
wait_console g1 'GUEST TICK' 60
for signal in KILL TERM; do
    kill -$signal "$XENIO_PID"
    wait "$XENIO_PID" || true
    goes_on "without xenio (SIG$signal)"
    start_xenio
    goes_on "with a new xenio"
done
[ "$(pgrep -c -x tapdisk)" = 1 ] || fail "the tapdisk has not stayed: $(pgrep -a -x tapdisk)"
xl block-attach g1 "$(vhd xvdb second.vhd)"
finish g1 60
assert_nothing_left
vhd-util check -n first.vhd
