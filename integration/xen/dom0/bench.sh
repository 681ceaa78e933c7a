# What the counted scenarios share: a guest with fio, the disks to compare, and waiting that costs nothing.
# shellcheck shell=bash

NULL=/dev/nullb0
RAM=/dev/ram0
# What the RAM-backed disks hold; every disk's jobs use this much of it.
DISK_MIB=256

# bench_setup [FILE...]: the null device, the backend, and guests with fio, its libraries and the files in their memory.
bench_setup() {
    modprobe xen-blkback
    modprobe null_blk nr_devices=1 irqmode=0 queue_mode=2 bs=512
    start_xenio
    with_fio "$@"
    # QEMU's TSC is not invariant, so that Xen would emulate every rdtsc of a guest: a third of all instructions, for
    # every backend alike, that a machine of today does not execute.
    GUEST_CONFIG=${GUEST_CONFIG:-tsc_mode = \"native\"}
}

# fio_job NAME: fio's options.
fio_job() {
    case $1 in
    rr4k_qd1) echo "--rw=randread --bs=4k --iodepth=1" ;;
    rr4k_qd32) echo "--rw=randread --bs=4k --iodepth=32" ;;
    rw4k_qd32) echo "--rw=randwrite --bs=4k --iodepth=32" ;;
    sr1m_qd4) echo "--rw=read --bs=1m --iodepth=4" ;;
    sw1m_qd4) echo "--rw=write --bs=1m --iodepth=4" ;;
    *) fail "there is no job '$1'" ;;
    esac
}

# fio_command: what every job starts with.
fio_command() {
    echo "fio --minimal --name=job --filename=/dev/xvda --direct=1 --ioengine=libaio --thread --randseed=1 --size=${DISK_MIB}m"
}

# A device of RAM with SIZE bytes, without content.
ram_device() {
    ! grep -q '^brd ' /proc/modules || rmmod brd
    modprobe brd rd_nr=1 max_part=0 rd_size=$(($1 / 1024))
}

# The content of the disks on RAM: written everywhere, so that nothing is answered without a look at it.
pattern() {
    [ -s pattern ] || yes 'a disk of the comparison' | head -c $((DISK_MIB << 20)) >pattern || true
}

# Directly on the RAM device: raw or a VHD with all its blocks.
ram_raw() {
    pattern
    ram_device $((DISK_MIB << 20))
    dd if=pattern of=$RAM bs=1M conv=fsync status=none
}

ram_vhd() {
    local size
    pattern
    [ -s full.vhd ] || qemu-img convert -f raw -O vpc -o force_size=on pattern full.vhd
    size=$(stat -c %s full.vhd)
    ram_device $(((size + 1023) / 1024 * 1024))
    # The footer belongs at the end, which the device has at whole KiB.
    dd if=full.vhd of=$RAM bs=1M conv=fsync status=none
    tail -c 512 full.vhd | dd of=$RAM bs=512 seek=$(($(blockdev --getsz $RAM) - 1)) conv=fsync status=none
}

# In files on a filesystem on the RAM device.
ram_files() {
    pattern
    [ -s full.vhd ] || qemu-img convert -f raw -O vpc -o force_size=on pattern full.vhd
    ram_device $(((DISK_MIB + 64) << 20))
    mkfs.ext4 -q -O '^has_journal' $RAM
    mkdir -p ram
    mount $RAM ram
    cp "$1" ram/
}

# row NAME: prepares the disk of the row and sets $disk (for the guest's configuration), $type and $options (of the
# guest's frontend).
row() {
    type=pv
    options=
    case $1 in
    blkback*) disk="format=raw,backendtype=phy,vdev=xvda,access=rw,target=$NULL" ;;
    qdisk) disk="format=raw,backendtype=qdisk,vdev=xvda,access=rw,target=$NULL" ;;
    xenio-raw | xenio-copy | xenio-pvh) disk=$(raw xvda $NULL) ;;
    xenio-raw-ram)
        ram_raw
        disk=$(raw xvda $RAM)
        ;;
    xenio-vhd)
        ram_vhd
        disk="backendtype=tap,format=vhd,vdev=xvda,access=rw,target=$RAM"
        ;;
    xenio-raw-file)
        ram_files pattern
        disk=$(raw xvda "$WORK/ram/pattern")
        ;;
    qdisk-raw-file)
        ram_files pattern
        disk="format=raw,backendtype=qdisk,vdev=xvda,access=rw,target=$WORK/ram/pattern"
        ;;
    xenio-vhd-file)
        ram_files full.vhd
        disk=$(vhd xvda ram/full.vhd)
        ;;
    qdisk-vhd-file)
        ram_files full.vhd
        disk="format=vhd,backendtype=qdisk,vdev=xvda,access=rw,target=$WORK/ram/full.vhd"
        ;;
    *) fail "there is no row '$1'" ;;
    esac
    case $1 in
    *-copy) options=xen_blkfront.feature_persistent=0 ;;
    *-pvh) type=pvh ;;
    esac
}

# What row made.
row_done() {
    ! mountpoint -q ram || umount ram
    ! grep -q '^brd ' /proc/modules || rmmod brd
}

# finish_quietly NAME SECONDS: as "finish", without looking several times a second, which would count as work.
finish_quietly() {
    local console=$CONSOLES/guest-$1.log
    timeout "$2" grep -a -q -m 1 -E "GUEST DONE|$GUEST_TROUBLE" < <(exec timeout "$2" tail -n +1 -f "$console") || true
    finish "$1" 5
}
