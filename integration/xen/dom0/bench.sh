# What the counted scenarios share: the guest that has fio, its jobs, and the disks of the rows.
# shellcheck shell=bash

# fio_guests: guests made from now on have fio and its libraries in their memory.
fio_guests() {
    mkdir fio.root
    /lib64/ld-linux-x86-64.so.2 --list /usr/bin/fio | grep -o '/[^ ]*' | sort -u |
        xargs cp -L --parents -t fio.root /usr/bin/fio
    [ $# = 0 ] || cp --parents "$@" fio.root
    (cd fio.root && find . | busybox cpio -o -H newc 2>/dev/null) | cat "$SRV/guest.initrd" - >fio.initrd
    rm -r fio.root
    export GUEST_INITRD=$WORK/fio.initrd GUEST_MEMORY=600
}

# finish_quietly NAME SECONDS: as "finish", without looking several times a second, which would count as work.
finish_quietly() {
    local console=$CONSOLES/guest-$1.log
    timeout "$2" grep -a -q -m 1 -E "GUEST DONE|$GUEST_TROUBLE" < <(exec timeout "$2" tail -n +1 -f "$console") || true
    finish "$1" 5
}
