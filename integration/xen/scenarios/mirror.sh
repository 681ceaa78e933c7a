# about: a mirrored disk: the second image gets everything, fails under load, and the guest goes on
# limit: 240
modprobe null_blk nr_devices=0
mount -t configfs configfs /sys/kernel/config 2>/dev/null || true
device=/sys/kernel/config/nullb/nullmirror
mkdir "$device"
echo 1 >"$device/memory_backed"
echo 48 >"$device/size"
echo 1 >"$device/power"
truncate -s 48M disk.raw
dd if=/dev/urandom of=disk.raw bs=1M count=16 conv=notrunc 2>/dev/null
start_xenio
guest g1 pv "$(raw xvda "$WORK/disk.raw")" <<'JOB'
set -e
echo "GUEST READY"
read -r go
dd if=/dev/urandom of=/dev/xvda bs=64k seek=200 count=200 oflag=direct conv=notrunc,fsync 2>/dev/null
echo "GUEST MIRRORED $(dd if=/dev/xvda bs=1M iflag=direct 2>/dev/null | sha256sum | cut -c 1-64)"
read -r go
n=0
while [ $n -lt 40 ]; do
    dd if=/dev/urandom of=/dev/xvda bs=64k seek=$((n * 16)) count=16 oflag=direct conv=notrunc 2>/dev/null
    n=$((n + 1))
    echo "GUEST ROUND $n"
done
dd if=/dev/zero of=/dev/xvda bs=4k count=1 oflag=direct conv=notrunc,fsync 2>/dev/null
echo "GUEST SUM $(dd if=/dev/xvda bs=1M iflag=direct 2>/dev/null | sha256sum | cut -c 1-64)"
JOB
create g1
wait_console g1 'GUEST READY' 60
locate
tap-ctl pause -p "$pid" -m "$minor"
tap-ctl unpause -p "$pid" -m "$minor" -2 aio:/dev/nullmirror
type_to g1 go
wait_console g1 'GUEST MIRRORED' 90
stats() { tap-ctl stats -p "$pid" -m "$minor" "$@"; }
copied() { stats --full | grep -q '"copied":50331648'; }
within 60 "the end of the copying" copied
stats | grep -q '"nbd_mirror_failed": 0' || fail "the mirror has failed: $(stats --full)"
# Paused, the second image is at rest.
tap-ctl pause -p "$pid" -m "$minor"
expect "the sum of the second image" "$(said g1 'GUEST MIRRORED' | cut -d ' ' -f 3)" \
    eval 'dd if=/dev/nullmirror bs=1M iflag=direct 2>/dev/null | sha256sum | cut -c 1-64'
tap-ctl unpause -p "$pid" -m "$minor"
type_to g1 go
wait_console g1 'GUEST ROUND 5' 60
echo "+0-98303" >"$device/badblocks"
broken() { stats | grep -q '"nbd_mirror_failed": 1'; }
within 60 "the failure of the second image" broken
step "the failure: $(stats --full | sed 's/.*"failed":"\([^"]*\)".*/\1/')"
finish g1 90
assert_nothing_left
expect "the sum of disk.raw" "$(said g1 'GUEST SUM' | cut -d ' ' -f 3)" eval 'sha256sum <disk.raw | cut -c 1-64'
