# about: fio checks what it writes, reads, flushes and discards: raw and VHD disks of a PVH guest
# limit: 240
. /testbed/dom0/fio.sh
truncate -s 48M disk.raw
vhd-util create -n disk.vhd -s 48
start_xenio
with_fio
# Every other 4 KiB of the first 8 MiB is discarded in writes between; what is discarded in a file reads as zeros.
guest g1 pvh "$(raw xvda "$WORK/disk.raw")" "$(vhd xvdb disk.vhd)" <<JOB
set -e
$(verified xvda 48)
echo "GUEST CHECKED xvda"
$(verified xvdb 48)
echo "GUEST CHECKED xvdb"
for disk in xvda xvdb; do
    limit=\$(cat /sys/block/\$disk/queue/discard_max_bytes)
    echo "GUEST DISCARDS \$disk \$limit"
    [ \$limit -gt 0 ] || continue
    fio --minimal --name=trim --filename=/dev/\$disk --direct=1 --ioengine=libaio --thread --iodepth=16 --rw=randtrimwrite \
        --bs=64k --size=48m --io_size=16m >/tmp/trim || { cat /tmp/trim; exit 1; }
    dd if=/dev/urandom of=/dev/\$disk bs=1M count=8 oflag=direct 2>/dev/null
    blkdiscard -o 2097152 -l 4194304 /dev/\$disk
    dd if=/dev/\$disk bs=1M skip=2 count=4 iflag=direct 2>/dev/null | tr -d '\0' | wc -c >/tmp/left
    echo "GUEST LEFT \$disk \$(cat /tmp/left)"
    echo "GUEST SUM \$disk \$(dd if=/dev/\$disk bs=1M iflag=direct 2>/dev/null | sha256sum | cut -c 1-64)"
done
JOB
create g1
wait_console g1 'GUEST CHECKED xvda' 90
wait_console g1 'GUEST CHECKED xvdb' 90
finish g1 90
assert_nothing_left
says g1 'GUEST LEFT xvda 0' || fail "the raw file still has what was discarded: $(said g1 'GUEST (LEFT|DISCARDS) xvda')"
expect "the sum of disk.raw" "$(said g1 'GUEST SUM xvda' | cut -d ' ' -f 4)" eval 'sha256sum <disk.raw | cut -c 1-64'
vhd-util check -n disk.vhd
raw_of disk.vhd seen.raw
if says g1 'GUEST SUM xvdb'; then
    truncate -s 48M seen.raw
    expect "the sum of disk.vhd" "$(said g1 'GUEST SUM xvdb' | cut -d ' ' -f 4)" eval 'sha256sum <seen.raw | cut -c 1-64'
fi
