# What scenarios are written with. A scenario ends with status 0 or has failed; "fail" says why.
# shellcheck shell=bash

export WORK=/srv/work
export SRV=/srv/testbed
export CONSOLES=/var/log/xen/console
export HOTPLUG_LOG=/var/log/xen/xen-hotplug.log
BACKEND=/local/domain/0/backend/vbd3
XENIO_LOG=$WORK/xenio.log

step() {
    printf '[%3ds] %s\n' "$SECONDS" "$*"
}

# tell: shows its input live to whoever started the run.
tell() {
    local line
    while IFS= read -r line; do
        echo "$line"
        echo "say $line" >/dev/ttyS1
    done
}

fail() {
    echo "FAILED: $*"
    exit 1
}

# within SECONDS WHAT COMMAND...: waits until the command succeeds.
within() {
    local limit=$1 what=$2 end
    shift 2
    end=$((SECONDS + limit))
    until "$@"; do
        [ $SECONDS -lt $end ] || fail "$what: not within $limit s"
        read -r -t 0.1 <> <(:) || true
    done
}

# --- the backend ---

# start_xenio: in the foreground of its own job, with its debug messages in a file. Sets XENIO_PID.
start_xenio() {
    xenio -D >>"$XENIO_LOG" 2>&1 &
    XENIO_PID=$!
}

stop_xenio() {
    kill "$XENIO_PID"
    wait "$XENIO_PID" || true
}

# What a disk that is gone must not leave behind.
leftovers() {
    pgrep -a -x tapdisk || true
    pgrep -a -x tapdisk-porter || true
    find /run/blktap-control -mindepth 1 ! -type d 2>/dev/null || true
    find /dev/shm -name 'td3-*' || true
    xenstore-ls -f "$BACKEND" 2>/dev/null | grep '/state = ' || true
}

nothing_left() {
    [ -z "$(leftovers)" ]
}

assert_nothing_left() {
    within 5 "left behind: $(leftovers | tr '\n' ' ')" nothing_left
}

# event_channels: the domain of each event channel device that tapdisks have open; each must be restricted to one.
event_channels() {
    # shellcheck disable=SC2046
    python3 /testbed/dom0/event-channels.py $(pgrep -x tapdisk)
}

# --- disks: what goes into "disk = [...]" ---

# vhd VDEV FILE-IN-WORK [ro]
vhd() {
    echo "backendtype=tap,format=vhd,vdev=$1,access=${3:-rw},target=$WORK/$2"
}

# raw VDEV PATH [ro]
raw() {
    echo "backendtype=tap,format=raw,vdev=$1,access=${3:-rw},target=$2"
}

# --- guests ---

# GUEST_CMDLINE, GUEST_MEMORY (MiB), GUEST_INITRD, GUEST_VCPUS and GUEST_CPUS (the CPUs that they may
# use) and GUEST_CONFIG (more lines) change the guests that are written after them.

# guest NAME TYPE DISK... <<JOB: writes NAME.cfg for a guest (pv, pvh or hvm) that runs the job, a shell script, and powers off.
guest() {
    local name=$1 type=$2 disk disks='' root
    shift 2
    root=$WORK/$name.root
    mkdir "$root"
    cat >"$root/job.sh"
    pack_guest "$name"
    for disk in "$@"; do
        disks+="'$disk', "
    done
    write_config "$name" "$type" "[ ${disks%, } ]"
}

# locate [IMAGE]: pid and minor are those of the disk whose image has a name that ends so; of the only one without.
locate() {
    local line
    line=$(tap-ctl list | grep -- "${1-}\$") || fail "no disk has the image '${1-}': $(tap-ctl list)"
    [ "$(wc -l <<<"$line")" = 1 ] || fail "not one disk: $line"
    [[ $line =~ ^pid=([0-9]+)\ minor=([0-9]+)\  ]] || fail "what is this: $line"
    pid=${BASH_REMATCH[1]} minor=${BASH_REMATCH[2]}
}

# debian_guest NAME TYPE DISK: the guest boots the Debian on its first disk.
debian_guest() {
    mkdir "$WORK/$1.root"
    echo /dev/xvda >"$WORK/$1.root/root-disk"
    pack_guest "$1"
    write_config "$1" "$2" "[ '$3' ]"
}

# with_files FILE...: guests written from now on have these files and folders of dom0 in their memory, with the libraries
# of those that are programs.
with_files() {
    local file root=$WORK/more.root
    mkdir "$root"
    for file in "$@"; do
        { /lib64/ld-linux-x86-64.so.2 --list "$file" 2>/dev/null || true; } | { grep -o '/[^ ]*' || true; }
    done | sort -u | xargs -r cp -L --parents -t "$root"
    cp -rL --parents -t "$root" "$@"
    (cd "$root" && find . | busybox cpio -o -H newc 2>/dev/null) |
        cat "${GUEST_INITRD:-$SRV/guest.initrd}" - >"$WORK/more.initrd"
    rm -r "$root"
    export GUEST_INITRD=$WORK/more.initrd
}

# with_fio [FILE...]: guests written from now on have fio, and the files.
with_fio() {
    with_files /usr/bin/fio "$@"
    export GUEST_MEMORY=600
}

# The kernel unpacks archives that follow one another as one.
pack_guest() {
    (cd "$WORK/$1.root" && find . -type f | busybox cpio -o -H newc 2>/dev/null) |
        cat "${GUEST_INITRD:-$SRV/guest.initrd}" - >"$WORK/$1.initrd"
}

# A guest with emulated hardware says on its serial port what others say on Xen's console.
emulated() {
    cat <<END
serial = "file:$CONSOLES/guest-$1.log"
vnc = 0
vga = "none"
END
}

write_config() {
    local console=hvc0 kernel=vmlinux more=${GUEST_CONFIG-}
    if [ "$2" = hvm ]; then
        console=ttyS0
        # The device model loads a kernel in its original form only.
        kernel=vmlinuz
        more+=$'\n'$(emulated "$1")
    fi
    cat >"$WORK/$1.cfg" <<END
name = "$1"
type = "$2"
memory = ${GUEST_MEMORY:-160}
vcpus = ${GUEST_VCPUS:-1}
$more
cpus = "${GUEST_CPUS:-all}"
kernel = "$SRV/$kernel"
ramdisk = "$WORK/$1.initrd"
cmdline = "console=$console quiet mitigations=off ${GUEST_CMDLINE-}"
disk = $3
on_poweroff = "destroy"
on_crash = "destroy"
END
}

create() {
    step "xl create $1"
    timeout 90 xl create "$WORK/$1.cfg" >"$WORK/$1-create.log" 2>&1 || {
        cat "$WORK/$1-create.log"
        fail "xl create $1"
    }
}

domid() {
    xl domid "$1" 2>/dev/null
}

says() {
    grep -a -q -E "$2" "$CONSOLES/guest-$1.log" 2>/dev/null
}

said() {
    grep -a -m 1 -E "$2" "$CONSOLES/guest-$1.log" | tr -d '\r'
}

# type_to NAME LINE: what the guest's job reads from its console.
type_to() {
    echo "$2" >"$(xenstore-read "/local/domain/$(domid "$1")/console/tty")"
}

# frontend NAME VDEV KEY: what the guest's driver wrote, or nothing. The disks' numbers in XenStore.
declare -A VDEV=([hda]=768 [xvda]=51712 [xvdb]=51728 [xvdc]=51744)
frontend() {
    xenstore-read "/local/domain/$(domid "$1")/device/vbd/${VDEV[$2]}/$3" 2>/dev/null || true
}

# backend NAME VDEV KEY: what xenio wrote.
backend() {
    xenstore-read "$BACKEND/$(domid "$1")/${VDEV[$2]}/$3" 2>/dev/null || true
}

# expect WHAT VALUE COMMAND...: the command's output is the value.
expect() {
    local what=$1 value=$2 seen
    shift 2
    seen=$("$@")
    [ "$seen" = "$value" ] || fail "$what is '$seen' instead of '$value'"
}

GUEST_TROUBLE='GUEST FAILED|Kernel panic'

# wait_console NAME REGEX SECONDS: looks every LOOK_EVERY seconds. Each look keeps dom0's CPU busy for some 50 ms, which a
# device model would need.
wait_console() {
    local ends
    ends=$((SECONDS + $3))
    until says "$1" "$2"; do
        # A guest may say both between two looks.
        ! says "$1" "$GUEST_TROUBLE" || says "$1" "$2" || fail "guest $1: $(said "$1" "$GUEST_TROUBLE")"
        [ $SECONDS -lt $ends ] || fail "guest $1 did not say '$2' within $3 s"
        read -r -t "${LOOK_EVERY:-0.3}" <> <(:) || true
    done
    step "guest $1 said: $(said "$1" "$2")"
}

gone() {
    ! domid "$1" >/dev/null
}

# finish NAME SECONDS: the guest's job succeeds and the guest goes away.
finish() {
    wait_console "$1" 'GUEST DONE' "$2"
    within 40 "end of guest $1" gone "$1"
}

# --- images ---

# raw_of VHD RAW: the content as independent readers see it: QEMU for a single image, libvhdi for a chain.
raw_of() {
    qemu-img convert -f vpc -O raw "$1" "$2"
}

# read_chain RAW LEAF PARENT...
read_chain() {
    python3 /testbed/dom0/read-chain.py "$@"
}

# verify_files RAW: every file of the filesystem has the hash that SHA256SUMS says.
verify_files() {
    mkdir -p "$WORK/mnt"
    mount -o loop,ro "$1" "$WORK/mnt"
    (cd "$WORK/mnt" && sha256sum --quiet --check SHA256SUMS && echo "verified $(wc -l <SHA256SUMS) files")
    umount "$WORK/mnt"
}
