# about: a guest with sectors of 512 bytes on a device with sectors of 4096, through io_uring and through threads
# limit: 240
. /testbed/dom0/fio.sh
truncate -s 48M disk.raw
loop=$(losetup -f --show -b 4096 --direct-io=on disk.raw)
[ "$(blockdev --getss "$loop")" = 4096 ] || fail "$loop has other sectors"
start_xenio
with_fio
{
    echo 'set -e; grep . /sys/block/xvda/queue/*_block_size'
    echo '[ "$(cat /sys/block/xvda/queue/logical_block_size)" = 512 ]'
    # Neighbours within one physical sector, all at the same time.
    verified xvda 4 --bsrange=512-2k --iodepth=32
    verified xvda 48
    echo 'echo "GUEST SUM $(dd if=/dev/xvda bs=1M iflag=direct 2>/dev/null | sha256sum | cut -c 1-64)"'
} >job
# Without io_uring a tapdisk works with threads.
for engine in uring pool; do
    [ $engine = uring ] || echo 2 >/proc/sys/kernel/io_uring_disabled
    guest $engine pv "$(raw xvda "$loop")" <job
    create $engine
    wait_console $engine 'GUEST SUM' 90
    expect "physical-sector-size" 4096 backend $engine xvda physical-sector-size
    finish $engine 30
    assert_nothing_left
    # Past the page cache of the loop device.
    blockdev --flushbufs "$loop"
    [ "$(sha256sum <disk.raw | cut -c 1-64)" = "$(said $engine 'GUEST SUM' | cut -d ' ' -f 3)" ] ||
        fail "the guest reads another disk than dom0 with $engine"
done
losetup -d "$loop"
