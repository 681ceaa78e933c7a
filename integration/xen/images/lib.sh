# Helpers of the image builder. An artefact is a folder $CACHE/NAME-KEY, where KEY is a hash of everything it is made
# from; it appears in one rename when it is complete, and older ones of the same name go away.
# shellcheck shell=bash

SECONDS=0

say() {
    printf '[%4ds] %s\n' "$SECONDS" "$*" >&2
}

die() {
    say "error: $*"
    exit 1
}

# artefact NAME BUILDER INPUT...: sets $artefact to the folder of NAME, built by "BUILDER FOLDER" if it is not there yet.
# An INPUT that is a file counts with its content, any other as a string (keys of other artefacts).
artefact() {
    local name=$1 builder=$2 key input started
    shift 2
    key=$(for input in "$@"; do
        if [ -f "$input" ]; then cat "$input"; else echo "$input"; fi
    done | sha256sum | cut -c 1-16)
    artefact=$CACHE/$name-$key
    if [ -d "$artefact" ]; then
        return
    fi
    say "building $name ..."
    started=$SECONDS
    rm -rf "$CACHE/$name"-*
    mkdir -p "$artefact.part"
    "$builder" "$artefact.part"
    mv "$artefact.part" "$artefact"
    say "building $name: done in $((SECONDS - started)) s, $(du -sh "$artefact" | cut -f 1)"
}

# quiet LOG COMMAND...: the command's output goes to LOG, and to the terminal only if it fails.
quiet() {
    local log=$1
    shift
    if ! "$@" >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        die "failed: $1 (see $log)"
    fi
}

# unpack_modules WORLD FOLDER MODULE...: FOLDER gets the modules and what they depend on, uncompressed, and the file
# "order" that lists them so that each can be loaded after the one before it.
unpack_modules() {
    local world=$1 folder=$2 version path name
    shift 2
    version=$(kernel_version "$world")
    mkdir -p "$folder"
    modprobe --dirname "$world" --set-version "$version" --show-depends --all "$@" |
        awk '$1 == "insmod" && !seen[$2]++ { print $2 }' |
        while read -r path; do
            name=$(basename "$path" .xz)
            # Debian 12 does not compress them.
            case $path in
            *.xz) xz -dc "$path" >"$folder/$name" ;;
            *) cp "$path" "$folder/$name" ;;
            esac
            echo "$name"
        done >"$folder/order"
}

kernel_version() {
    basename "$1"/boot/vmlinuz-* | sed 's/^vmlinuz-//'
}

# pack_initramfs FOLDER FILE: uncompressed, because the emulated CPU would be the one to unpack it.
pack_initramfs() {
    (cd "$1" && find . -print0 | LC_ALL=C sort -z | cpio --quiet --null -o -H newc -R 0:0) >"$2"
}

# make_ext4 FOLDER FILE SIZE [OPTION...]: an ext4 image with the folder's content, the same for the same content.
make_ext4() {
    local folder=$1 file=$2 size=$3
    shift 3
    truncate -s "$size" "$file"
    E2FSPROGS_FAKE_TIME=1700000000 mke2fs -q -F -t ext4 -d "$folder" -E hash_seed=6f8ee2a8-1c65-4d9e-8d8c-6b4f2ad0f3a1 \
        -U 3c7b4d2e-0f8f-4a57-9f6e-1d2c3b4a5968 -m 0 "$@" "$file"
}

# world_run WORLD PROGRAM ARGUMENT...: a program of the Debian release under test, on the host.
world_run() {
    local world=$1 program=$2
    shift 2
    "$world/usr/lib64/ld-linux-x86-64.so.2" --library-path "$world/usr/lib/x86_64-linux-gnu" \
        "$world/usr/bin/$program" "$@"
}
