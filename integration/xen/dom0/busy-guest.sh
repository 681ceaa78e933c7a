# Guests that write and verify what they wrote, round after round, whatever is done to them meanwhile.
#
# Their data comes by head: a single read of /dev/urandom is cut short by whatever freezes the guest, as a migration does.
# shellcheck shell=bash

# until_second_disk: the job of a guest that goes on until xvdb, a disk with the test's files, is attached to it.
until_second_disk() {
    cat <<'JOB'
set -e
mount -t ext4 /dev/xvda /mnt
n=0
while [ ! -b /dev/xvdb ]; do
    n=$((n + 1))
    head -c 262144 /dev/urandom >/tmp-data
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
}

# busy_guest TYPE: creates g1, with a raw and a VHD disk. The numbers go to the disk too, so that a restored memory on an
# old disk, or the reverse, would be seen.
busy_guest() {
    cp "$SRV/small.raw" first.raw
    vhd-util create -n second.vhd -s 64
    start_xenio
    guest g1 "$1" "$(raw xvda "$WORK/first.raw")" "$(vhd xvdb second.vhd)" <<'JOB'
set -e
mount -t ext4 /dev/xvda /mnt
(read -r go </dev/console; touch /stop) &
n=0
while [ ! -e /stop ]; do
    n=$((n + 1))
    head -c 262144 /dev/urandom >/tmp-data
    dd if=/tmp-data of=/mnt/tick bs=256k conv=fsync 2>/dev/null
    dd if=/tmp-data of=/dev/xvdb bs=256k seek=$((n % 128)) oflag=direct 2>/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    cmp /tmp-data /mnt/tick
    dd if=/dev/xvdb of=/tmp-seen bs=256k skip=$((n % 128)) count=1 iflag=direct 2>/dev/null
    cmp /tmp-data /tmp-seen
    [ $n = 1 ] || [ "$(cat /mnt/number)" = $((n - 1)) ]
    echo $n >/mnt/number
    echo "GUEST TICK $n"
done
if dmesg | grep -i -E 'I/O error|xenbus.*error|EXT4-fs error'; then exit 1; fi
(cd /mnt && sha256sum -c SHA256SUMS >/dev/null)
umount /mnt
JOB
    create g1
    wait_console g1 'GUEST TICK' 90
}

ticks() {
    grep -a -c 'GUEST TICK' "$CONSOLES/guest-g1.log" || true
}
more_ticks() {
    ! says g1 "$GUEST_TROUBLE" || fail "guest g1: $(said g1 "$GUEST_TROUBLE")"
    [ "$(ticks)" -gt $((seen + 3)) ]
}
goes_on() {
    seen=$(ticks)
    within 60 "the guest to go on after $1" more_ticks
    step "after $1 the guest goes on"
}

# finish_busy_guest: it ends by itself, and all of its disks' content is right.
finish_busy_guest() {
    type_to g1 stop
    finish g1 60
    assert_nothing_left
    vhd-util check -n second.vhd
    e2fsck -f -n first.raw >/dev/null || fail "the first disk's filesystem is damaged"
    [ "$(verify_files first.raw)" = 'verified 200 files' ] || fail "the first disk's files are damaged"
}
