# Whole disks made from folders, without mounting anything.
# shellcheck shell=bash

# Where the first partition begins; boot loaders live before it.
PARTITION_AT=$((1024 * 1024))

# little_endian BYTES NUMBER
little_endian() {
    local n
    for ((n = 0; n < $1; n++)); do
        printf "\\x$(printf %x $(($2 >> (8 * n) & 255)))"
    done
}

# partitioned FILE FOLDER MIB: a raw disk with one bootable partition: an ext4 filesystem with the folder's content.
partitioned() {
    local file=$1 folder=$2 bytes=$(($3 * 1024 * 1024))
    truncate -s "$((PARTITION_AT + bytes))" "$file"
    mke2fs -q -F -t ext4 -d "$folder" -m 0 -E offset=$PARTITION_AT "$file" "${3}M"
    # The partition's entry: bootable, no CHS addresses, Linux, first sector, sectors.
    {
        printf '\x80\xfe\xff\xff\x83\xfe\xff\xff'
        little_endian 4 $((PARTITION_AT / 512))
        little_endian 4 $((bytes / 512))
    } | dd of="$file" bs=1 seek=446 conv=notrunc status=none
    printf '\x55\xaa' | dd of="$file" bs=1 seek=510 conv=notrunc status=none
}
