#!/bin/bash
# reset.sh STATUS: shows what a failed scenario (STATUS not 0) left to look at, then brings dom0 back to how it booted.
set -u
. /testbed/dom0/lib.sh

show_evidence() {
    local file
    echo "=== xl list, processes, XenStore"
    xl list
    ps -eo pid,ppid,stat,wchan:20,args | grep -v ' \[.*\]$'
    xenstore-ls -f /local/domain/0/backend
    find /run/blktap-control -ls 2>/dev/null
    dmesg | tail -n 60
    for file in "$HOTPLUG_LOG" "$WORK"/*.cfg "$WORK"/*.log /var/log/xen/{xenio,tapdisk}.log "$CONSOLES"/guest-*.log \
        /var/log/xen/{xl,qemu-dm}-*.log; do
        [ ! -s "$file" ] || { echo "=== $file"; tail -n 60 "$file"; }
    done
}

# Before the backend is ended: without one xl would wait for each.
detach_from_dom0() {
    local device
    umount "$WORK"/mnt* 2>/dev/null
    for device in $(xenstore-list /local/domain/0/device/vbd 2>/dev/null); do
        timeout 30 xl block-detach 0 "$device" force
    done
}

destroy_all() {
    local name
    # A guest without a name is one that libxl is still taking away.
    for name in $(xl list | awk 'NR > 1 && $1 != "Domain-0" { print $2 }'); do
        timeout 30 xl destroy "$name"
    done
    for name in xenio tapdisk tapdisk-porter; do
        pkill -KILL -x "$name" || true
    done
    pkill -f '^xl create' || true
}

[ "$1" = 0 ] || show_evidence
{
    detach_from_dom0
    destroy_all
} >/tmp/destroy.log 2>&1
rm -rf /run/blktap-control /dev/shm/td3-* /run/xenio* "$WORK" /var/log/xen/{xenio,tapdisk}.log
rm -f "$CONSOLES"/guest-*.log /var/log/xen/{xl,qemu-dm}-*.log*
: >"$HOTPLUG_LOG"
# What is suspended would keep everything that waits for it.
export DM_DISABLE_UDEV=1
for device in $(dmsetup info -c --noheadings -o name 2>/dev/null | grep -v '^No devices'); do
    dmsetup resume "$device" && dmsetup remove "$device"
done
losetup -D
for device in /sys/kernel/config/nullb/*/; do
    [ ! -d "$device" ] || rmdir "$device"
done
# Linux 6.1 has no such switch.
[ ! -e /proc/sys/kernel/io_uring_disabled ] || echo 0 >/proc/sys/kernel/io_uring_disabled
[ "$(cat /sys/devices/system/cpu/cpu1/online 2>/dev/null || echo 0)" = 0 ] || echo 0 >/sys/devices/system/cpu/cpu1/online
xenstore-rm /local/domain/0/backend/vbd3 2>/dev/null
xenstore-rm /local/domain/0/error 2>/dev/null
left=$(xl list | awk 'NR > 1 && $1 != "Domain-0"')
if [ -n "$left" ]; then
    echo "still there: $left"
    cat /tmp/destroy.log
    exit 1
fi
