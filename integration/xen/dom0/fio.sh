# Jobs for guests with fio (with_fio), which check what they read.
# shellcheck shell=bash

# verified DISK MIB [OPTION...]: a line for a guest's job: writes, reads, flushes of 512 bytes to 1 MiB, several at a
# time, all over the disk; every block that was written is read again and has the right checksum.
verified() {
    local disk=$1 mib=$2
    shift 2
    echo "fio --minimal --name=verified --filename=/dev/$disk --direct=1 --ioengine=libaio --thread --iodepth=16" \
        "--rw=randrw --bsrange=512-1m --size=${mib}m --fsync=32 --verify=crc32c --verify_fatal=1 --randseed=$RANDOM" \
        "$* >/tmp/verified || { cat /tmp/verified; exit 1; }"
}
