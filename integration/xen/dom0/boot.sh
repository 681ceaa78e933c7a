#!/bin/bash
# Process 1 of dom0, or a service of it: starts what a Xen host needs, runs the scenarios of /testbed/plan one after the
# other, powers off.
#
# Everything that the host has to know goes over the second serial port, one event a line:
#   ready | broken REASON | start NAME | say TEXT | pass NAME SECONDS | fail NAME SECONDS REASON | end
set -u
export PATH=/usr/sbin:/usr/bin LANG=C HOME=/root TERM=dumb

event() {
    echo "$*" >/dev/ttyS1
}

power_off() {
    sync
    echo o >/proc/sysrq-trigger
    sleep 60
}

# must WHAT COMMAND...: without it no scenario makes sense.
must() {
    local what=$1
    shift
    "$@" || {
        event "broken $what"
        power_off
    }
}

mount_all() {
    mount -t tmpfs -o mode=755 run /run
    mkdir -p /run/{xen,xenstored,lock} /dev/{shm,pts} /var/{lib,log}/xen /var/log/xen/console /var/lib/xen/dump
    mount -t tmpfs shm /dev/shm
    mount -t tmpfs tmp /tmp
    mount -t devpts devpts /dev/pts
    modprobe xenfs
    mount -t xenfs xenfs /proc/xen
    # Without udev nobody else makes these; the hotplug scripts' locking spins for ever without /dev/stdin.
    ln -s /proc/self/fd /dev/fd
    ln -s fd/0 /dev/stdin
    ln -s fd/1 /dev/stdout
    ln -s fd/2 /dev/stderr
    mount -o remount,rw /
    # Another /proc/mounts in /etc/mtab's place keeps libmount from warning.
    ln -sfn /proc/self/mounts /etc/mtab
    echo testbed >/proc/sys/kernel/hostname
}

# dom0 has one CPU, so that the other one is the guests'; a scenario that wants two brings the second one up.
one_cpu() {
    [ ! -e /sys/devices/system/cpu/cpu1 ] || echo 0 >/sys/devices/system/cpu/cpu1/online
}

start_toolstack() {
    local xen module
    xen=$(echo /usr/lib/xen-4.*/bin)
    for module in xen-evtchn xen-gntdev xen-gntalloc xen-privcmd loop ext4; do
        must "cannot load $module" modprobe "$module"
    done
    must "xenstored does not start" "$xen/xenstored" --pid-file /run/xen/xenstored.pid
    must "dom0 cannot be set up" "$xen/xen-init-dom0"
    must "xenconsoled does not start" "$xen/xenconsoled" --log=guest --log-dir=/var/log/xen/console --pid-file=/run/xen/xenconsoled.pid
}

# The binaries under test come from the host at every run, so that the disk's image need not be made anew.
install_binaries() {
    local program
    for program in /testbed/bin/*; do
        case ${program##*/} in
        tapdisk) install -D "$program" /usr/libexec/xenio/tapdisk ;;
        block-xenio) install "$program" /etc/xen/scripts/ ;;
        *) install "$program" /usr/sbin/ ;;
        esac
    done
}

# What systemd-sysusers does where it is, as in the scenario of the package; Debian 12's dom0 has none.
make_user() {
    local name
    name=$(awk '$1 == "u" { print $2 }' /testbed/sysusers)
    echo "$name:x:998:" >>/etc/group
    echo "$name:x:998:998::/:/usr/sbin/nologin" >>/etc/passwd
    (umask 077 && echo "$name:!*:::::::" >>/etc/shadow)
}

# run_scenario NAME LIMIT: in a session of its own, so that what it leaves behind can be found and ended.
run_scenario() {
    local name=$1 limit=$2 started=$SECONDS status=0 reason
    event "start $name"
    SCENARIO=$name timeout --kill-after=5 "$limit" bash /testbed/dom0/scenario.sh "$name" \
        </dev/null >"/tmp/$name.log" 2>&1 || status=$?
    case $status in
    0) reason= ;;
    124 | 137) reason="not done after $limit s" ;;
    *) reason=$(grep -a '^FAILED: ' "/tmp/$name.log" | head -n 1 | cut -c 9-200) ;;
    esac
    # The state that it leaves is evidence when it failed, and must be gone before the next one starts.
    if ! timeout --kill-after=5 90 bash /testbed/dom0/reset.sh "$status" >>"/tmp/$name.log" 2>&1; then
        [ "$status" != 0 ] || reason="the machine could not be cleaned afterwards"
        status=1
    fi
    cp "/tmp/$name.log" "/out/$name.log"
    if [ "$status" = 0 ]; then
        event "pass $name $((SECONDS - started))"
    else
        event "fail $name $((SECONDS - started)) ${reason:-status $status}"
    fi
}

# With "testbed.init=systemd" systemd is process 1, and this script a service of it.
service() {
    grep -q -w testbed.init=systemd /proc/cmdline
}

if service && [ $$ = 1 ]; then
    exec /usr/lib/systemd/systemd
fi
if service; then
    one_cpu
    modprobe loop
else
    mount_all
    one_cpu
    start_toolstack
    install_binaries
    make_user
fi
# As an administrator would: guests do not keep the tools and the backend waiting.
xl sched-credit2 --domain=Domain-0 --weight=2048
event ready
while read -r name limit; do
    run_scenario "$name" "$limit"
done </testbed/plan
cp /var/log/xen/*.log /out/ 2>/dev/null
event end
power_off
