# The straight path: a filesystem that qemu-img made a VHD becomes a guest's disk, is verified, and written to.
# shellcheck shell=bash

# vhd_guest TYPE
vhd_guest() {
    local new seen
    cp "$SRV/files.vhd" disk.vhd
    start_xenio
    guest g1 "$1" "$(vhd xvda disk.vhd)" <<'JOB'
set -e
mount -t ext4 /dev/xvda /mnt
cd /mnt
sha256sum -c SHA256SUMS >/tmp/sums || { grep -v ': OK$' /tmp/sums; exit 1; }
echo "GUEST VERIFIED $(grep -c ': OK$' /tmp/sums) files"
dd if=/dev/urandom of=new bs=1M count=64 2>/dev/null
sync
sum=$(sha256sum new)
echo "$sum" >>SHA256SUMS
sync
echo 3 >/proc/sys/vm/drop_caches
[ "$(sha256sum new)" = "$sum" ]
echo "GUEST WROTE $sum"
cd /
umount /mnt
JOB
    create g1
    wait_console g1 'GUEST VERIFIED 2500 files' 180
    wait_console g1 'GUEST WROTE' 120
    new=$(grep -a -o -m 1 'GUEST WROTE [0-9a-f]*' "$CONSOLES/guest-g1.log" | cut -d ' ' -f 3)
    finish g1 30
    assert_nothing_left
    vhd-util check -n disk.vhd
    raw_of disk.vhd disk.raw
    verify_files disk.raw
    mount -o loop,ro disk.raw mnt
    seen=$(sha256sum <mnt/new | cut -d ' ' -f 1)
    umount mnt
    [ "$seen" = "$new" ] || fail "QEMU reads another file than the guest wrote: $seen instead of $new"
    step "qemu-img reads what the guest wrote"
}
