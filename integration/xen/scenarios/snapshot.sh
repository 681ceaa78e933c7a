# about: a snapshot of a VHD and of a raw disk, taken while the guest writes to them
# limit: 300
vhd-util create -n disk.vhd -s 24
truncate -s 24M disk.raw
start_xenio
guest g1 pv "$(vhd xvda disk.vhd)" "$(raw xvdb "$WORK/disk.raw")" <<'JOB'
set -e
dd if=/dev/urandom of=/data bs=1M count=16 2>/dev/null
echo "GUEST DATA $(sha256sum </data | cut -c 1-64)"
for disk in xvda xvdb; do
    dd if=/data of=/dev/$disk bs=1M oflag=direct conv=fsync 2>/dev/null
done
echo "GUEST READY"
# The last third is written again and again, each time with something else.
round=0
while [ $round -lt 10 ]; do
    round=$((round + 1))
    for disk in xvda xvdb; do
        dd if=/data of=/dev/$disk bs=64k skip=$round seek=256 count=16 oflag=direct 2>/dev/null
        [ "$(dd if=/dev/$disk bs=64k skip=256 count=16 iflag=direct 2>/dev/null | sha256sum)" = \
            "$(dd if=/data bs=64k skip=$round count=16 2>/dev/null | sha256sum)" ]
    done
    echo "GUEST ROUND $round"
done
for disk in xvda xvdb; do
    echo "GUEST SUM $disk $(dd if=/dev/$disk bs=1M iflag=direct 2>/dev/null | sha256sum | cut -c 1-64)"
done
JOB
create g1

# snapshot FILE CHILD: tells the tapdisk of the file.
snapshot() {
    local pid minor
    locate "/$1"
    tap-ctl snapshot -p "$pid" -m "$minor" -a "vhd:$WORK/$2"
    expect "the image of minor $minor" "vhd:$WORK/$2" eval "tap-ctl list -p $pid | sed 's/.*args=//'"
}

wait_console g1 'GUEST READY' 90
wait_console g1 'GUEST ROUND 2' 60
snapshot disk.vhd child-of-vhd.vhd
snapshot disk.raw child-of-raw.vhd
frozen=$(cat disk.vhd disk.raw | sha256sum)
finish g1 120
assert_nothing_left
expect "the parents since the snapshot" "$frozen" eval 'cat disk.vhd disk.raw | sha256sum'
data=$(said g1 'GUEST DATA' | cut -d ' ' -f 3)
raw_of disk.vhd parent.raw
expect "the parent's first part" "$data" eval 'head -c 16M parent.raw | sha256sum | cut -c 1-64'
expect "the raw parent's first part" "$data" eval 'head -c 16M disk.raw | sha256sum | cut -c 1-64'
for child in child-of-vhd child-of-raw; do
    vhd-util check -n $child.vhd
done
sum=$(said g1 'GUEST SUM xvda' | cut -d ' ' -f 4)
read_chain seen.raw child-of-vhd.vhd disk.vhd
expect "the sum of the chain" "$sum" eval 'head -c 24M seen.raw | sha256sum | cut -c 1-64'

# What libvhdi cannot read, because the parent is no VHD, another tapdisk can.
guest g2 pv "$(vhd xvda child-of-raw.vhd)" <<'JOB'
echo "GUEST SUM xvda $(dd if=/dev/xvda bs=1M iflag=direct 2>/dev/null | sha256sum | cut -c 1-64)"
JOB
create g2
finish g2 60
sum=$(said g1 'GUEST SUM xvdb' | cut -d ' ' -f 4)
expect "the sum of the child of a raw disk" "$sum" eval "said g2 'GUEST SUM' | cut -d ' ' -f 4"
assert_nothing_left
