# A domain that serves disks to others: xenio, tapdisk and xl's device daemon in a guest of their own.
# shellcheck shell=bash

DRIVER_MODULES=(xen-evtchn xen-gntdev xen-privcmd xenfs)
DRIVER_PROGRAMS=(xenio tap-ctl xenstore-read xenstore-write xenstore-list xenstore-ls xenstore-exists xenstore-rm
    xenstore-chmod flock stat logger)

# with_driver_tools: guests written from now on have what such a domain needs.
with_driver_tools() {
    local programs=() program modules
    for program in "${DRIVER_PROGRAMS[@]}"; do
        programs+=("$(command -v "$program")")
    done
    modprobe --show-depends --all "${DRIVER_MODULES[@]}" | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$WORK/driver-modules"
    mapfile -t modules <"$WORK/driver-modules"
    with_files "${modules[@]}" "${programs[@]}" /usr/bin/bash /usr/libexec/xenio/tapdisk /usr/lib/xen-4.20/bin/xl \
        /etc/xen/scripts /etc/xen/xl.conf /etc/passwd /etc/group "$WORK/driver-modules"
}

# driver_domain NAME DISK: writes a domain that mounts the ext4 on its disk on /srv and serves images from there. It ends
# when a line is typed to it, and has failed when anything of its guests is left then. Its console has all of its logs.
driver_domain() {
    GUEST_MEMORY=300 GUEST_CONFIG='driver_domain = 1' guest "$1" pv "$2" <<JOB
set -e
while read -r module; do insmod "\$module"; done <$WORK/driver-modules
mount -t xenfs xenfs /proc/xen
mkdir -p /run/xen /run/lock /var/lib/xen /var/log/xen /dev/shm /srv
ln -s /run /var/run
ln -s /run/lock /var/lock
ln -s /usr/bin/bash /bin/bash
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
mount -t tmpfs shm /dev/shm
mount -t ext4 /dev/xvda /srv
xenio -D >/xenio.log 2>&1 &
/usr/lib/xen-4.20/bin/xl devd -F >/devd.log 2>&1 &
tail -q -n +1 -F /xenio.log /devd.log /var/log/xen/xen-hotplug.log /var/log/xen/tapdisk.log 2>/dev/null &
echo "GUEST SERVES AS DOMAIN \$(xenstore-read domid)"
read -r go
left=\$(xenstore-ls -f backend 2>/dev/null | grep '/state = ' || true)
left="\$left \$(pidof tapdisk) \$(find /run/blktap-control -mindepth 1 ! -type d)"
[ "\$left" = '  ' ] || { echo "GUEST FAILED: left behind: \$left" && exit 1; }
kill \$(pidof xl) \$(pidof xenio) \$(pidof tail)
umount /srv
JOB
}
