# about: instruction-counted IOPS of xenio, blkback and qdisk on a null block device
# extra: "make bench-xen"
# speaks: yes
# machine: counted
# limit: 600
modprobe xen-blkback
modprobe null_blk nr_devices=1 irqmode=0 queue_mode=2 bs=512
start_xenio

# fio and its libraries go into the guests' memory.
mkdir fio.root
/lib64/ld-linux-x86-64.so.2 --list /usr/bin/fio | grep -o '/[^ ]*' | sort -u | xargs cp -L --parents -t fio.root /usr/bin/fio
(cd fio.root && find . | busybox cpio -o -H newc 2>/dev/null) | cat "$SRV/guest.initrd" - >fio.initrd
rm -r fio.root
export GUEST_INITRD=$WORK/fio.initrd GUEST_MEMORY=600

# measure NAME DISK: a row of the table; fio computes from milliseconds, so every job takes a few hundred of them.
measure() {
    local row
    guest "$1" pv "$2" <<'JOB'
set -e
run() {
    name=$1
    shift
    fio --minimal --name=$name --filename=/dev/xvda --direct=1 --ioengine=libaio --thread --randseed=1 "$@" >/tmp/$name
    # Terse version 3: the eighth field is read IOPS, the forty-ninth write IOPS.
    echo "IOPS $name $(awk -F ';' '{ print $8 + $49 }' /tmp/$name)"
}
run read1 --rw=randread --bs=4k --iodepth=1 --size=1g --io_size=8m
run read32 --rw=randread --bs=4k --iodepth=32 --size=1g --io_size=32m
run write32 --rw=randwrite --bs=4k --iodepth=32 --size=1g --io_size=32m
run bigread --rw=read --bs=1m --iodepth=4 --size=1g --io_size=256m
run bigwrite --rw=write --bs=1m --iodepth=4 --size=1g --io_size=256m
JOB
    create "$1" >/dev/null
    finish "$1" 300 >/dev/null
    row=$(tr -d '\r' <"$CONSOLES/guest-$1.log" | awk '$1 == "IOPS" { printf " %10s", $3 }')
    printf '%-28s%s\n' "$3" "$row" | tell
}

printf '%-28s %10s %10s %10s %10s %10s\n' 'IOPS (1 instruction = 1 ns)' 'rr4k qd1' 'rr4k qd32' 'rw4k qd32' 'r1M qd4' 'w1M qd4' | tell
measure blkback "format=raw,backendtype=phy,vdev=xvda,access=rw,target=/dev/nullb0" 'blkback'
GUEST_CMDLINE=xen_blkfront.feature_persistent=0 \
    measure noncached "format=raw,backendtype=phy,vdev=xvda,access=rw,target=/dev/nullb0" 'blkback, no persistent'
measure xenio "$(raw xvda /dev/nullb0)" 'xenio'
measure qdisk "format=raw,backendtype=qdisk,vdev=xvda,access=rw,target=/dev/nullb0" 'qdisk'
