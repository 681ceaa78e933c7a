# about: a guest with two processors uses two rings of a disk, where dom0 has two processors as well
# limit: 240
. /testbed/dom0/fio.sh
echo 1 >/sys/devices/system/cpu/cpu1/online
truncate -s 64M disk.raw
xenio -D --max-queues 2 >>"$XENIO_LOG" 2>&1 &
with_fio
# One job for each half, on a processor of its own, so that both rings are busy.
GUEST_VCPUS=2 guest g1 pv "$(raw xvda "$WORK/disk.raw")" <<JOB
set -e
echo "GUEST RINGS \$(ls /sys/block/xvda/mq | wc -l)"
$(verified xvda 32 --numjobs=2 --offset_increment=32m --cpus_allowed=0-1 --cpus_allowed_policy=split)
echo "GUEST SUM \$(dd if=/dev/xvda bs=1M iflag=direct 2>/dev/null | sha256sum | cut -c 1-64)"
read -r go
JOB
create g1
wait_console g1 'GUEST RINGS 2' 120
wait_console g1 'GUEST SUM' 90
expect "rings" 2 frontend g1 xvda multi-queue-num-queues
[ -n "$(frontend g1 xvda queue-1/ring-ref)" ] || fail "the second ring has no page"
[ "$(sha256sum <disk.raw | cut -c 1-64)" = "$(said g1 'GUEST SUM' | cut -d ' ' -f 3)" ] ||
    fail "the guest reads another disk than dom0"
type_to g1 go
finish g1 30
assert_nothing_left
