# about: disks grow under a running guest: a raw file, and a VHD
# limit: 180
truncate -s 16M disk.raw
vhd-util create -n disk.vhd -s 16 -S 24
start_xenio
guest g1 pv "$(raw xvda "$WORK/disk.raw")" "$(vhd xvdb disk.vhd)" <<'JOB'
set -e
dd if=/dev/urandom of=/data bs=1M count=24 2>/dev/null
for disk in xvda xvdb; do
    [ "$(cat /sys/block/$disk/size)" = 32768 ]
    dd if=/data of=/dev/$disk bs=1M count=16 oflag=direct 2>/dev/null
    echo "GUEST WROTE $disk"
    while [ "$(cat /sys/block/$disk/size)" = 32768 ]; do usleep 50000; done
    echo "GUEST SEES $disk $(cat /sys/block/$disk/size)"
    dd if=/data of=/dev/$disk bs=1M skip=16 seek=16 count=8 oflag=direct conv=fsync 2>/dev/null
    [ "$(dd if=/dev/$disk bs=1M iflag=direct 2>/dev/null | sha256sum)" = "$(sha256sum </data)" ]
done
echo "GUEST SUM $(sha256sum </data | cut -c 1-64)"
JOB
create g1

# grow VDEV FILE [OPTION...]: tells the tapdisk of the file.
grow() {
    local pid minor vdev=$1 file=$2
    shift 2
    locate "/$file"
    tap-ctl resize -p "$pid" -m "$minor" "$@"
    wait_console g1 "GUEST SEES $vdev 49152" 30
}

wait_console g1 'GUEST WROTE xvda' 60
truncate -s 24M disk.raw
grow xvda disk.raw
wait_console g1 'GUEST WROTE xvdb' 60
grow xvdb disk.vhd -s 24
finish g1 60
assert_nothing_left
sum=$(said g1 'GUEST SUM' | cut -d ' ' -f 3)
expect "the sum of disk.raw" "$sum" eval 'sha256sum <disk.raw | cut -c 1-64'
vhd-util check -n disk.vhd
raw_of disk.vhd seen.raw
expect "the sum of disk.vhd" "$sum" eval 'head -c 24M seen.raw | sha256sum | cut -c 1-64'
