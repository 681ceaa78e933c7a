# about: a disk whose file system becomes full under its guest goes on in the image that stands by
# limit: 240
mkdir small
mount -t tmpfs -o size=20M small small
vhd-util create -n small/disk.vhd -s 64
vhd-util snapshot -n standby.vhd -p small/disk.vhd
start_xenio
# The disk is served before the guest comes; block-tap finds it.
tap-ctl create -a "vhd:$WORK/small/disk.vhd" -2 "vhd:$WORK/standby.vhd" -s >/dev/null
guest g1 pv "$(vhd xvda small/disk.vhd)" <<'JOB'
set -e
dd if=/dev/urandom of=/data bs=1M count=16 2>/dev/null
dd if=/data of=/dev/xvda bs=64k oflag=direct conv=fsync 2>/dev/null
echo "GUEST READY"
read -r go
# Over what the first image has, and behind it.
dd if=/data of=/dev/xvda bs=64k seek=192 oflag=direct conv=notrunc,fsync 2>/dev/null
dd if=/data of=/dev/xvda bs=64k seek=640 count=100 oflag=direct conv=notrunc,fsync 2>/dev/null
echo "GUEST SUM $(dd if=/dev/xvda bs=1M iflag=direct 2>/dev/null | sha256sum | cut -c 1-64)"
JOB
create g1
wait_console g1 'GUEST READY' 60
locate
stats() { tap-ctl stats -p "$pid" -m "$minor" "$@"; }
stats --full | grep -q '"serving":false' || fail "the standby image does not wait: $(stats --full)"
type_to g1 go
wait_console g1 'GUEST SUM' 90
stats --full | grep -q '"serving":true' || fail "the standby image has not taken over: $(stats --full)"
stats | grep -q '"FIXME_enospc_redirect_count": 0,' && fail "nothing was written to the standby image"
finish g1 60
assert_nothing_left
# The standby image is a child of the full one: it is the disk.
vhd-util check -n standby.vhd
read_chain seen.raw standby.vhd small/disk.vhd
expect "the sum of the standby image" "$(said g1 'GUEST SUM' | cut -d ' ' -f 3)" eval 'sha256sum <seen.raw | cut -c 1-64'
umount small
