# about: the Debian package on a dom0 with systemd: installed, upgraded and watched under a guest, not removed under it
# extra: make test-full
# machine: service
# limit: 600
. /testbed/dom0/busy-guest.sh
show() {
    systemctl show --value --property "$1" xenio
}
another_main() {
    [ "$(show ActiveState)" = active ] && [ "$(show MainPID)" != "$main" ]
}
has_scope() {
    grep -q "/xenio.slice/xenio-tapdisk.slice/tapdisk-$tapdisk.scope$" "/proc/$tapdisk/cgroup" ||
        fail "the tapdisk has no scope of its own: $(cat "/proc/$tapdisk/cgroup")"
}
# The tapdisk has its own user and no rights, also where the service has started it.
has_no_rights() {
    expect "the tapdisk's user" "$(id -u xenio-tapdisk)" awk '$1 == "Uid:" { print $2 }' "/proc/$tapdisk/status"
    expect "the tapdisk's rights" 0000000000000000 awk '$1 == "CapEff:" { print $2 }' "/proc/$tapdisk/status"
    pgrep -x tapdisk-porter -P "$tapdisk" >/dev/null || fail "the tapdisk has no porter"
}
# Nothing is asked, and there is no terminal to show progress on. To look for questions costs as much as the rest.
rm -f /etc/apt/apt.conf.d/70debconf
mkdir -p /etc/apt/sources.list.d
touch /etc/apt/sources.list
apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Use-Pty=0 "$@"
}

step "install"
apt install /testbed/deb/xenio_*.deb
expect "the service's state" active show ActiveState
expect "what the service says" "serving disks" show StatusText
systemd-analyze verify --man=no xenio.service xenio-metrics.service xenio-tapdisk.slice
expect "whether the statistics are served" disabled sh -c 'systemctl is-enabled xenio-metrics || true'

qemu-img convert -f raw -O vpc "$SRV/small.raw" first.vhd
qemu-img convert -f raw -O vpc "$SRV/small.raw" "./second: a disk.vhd"
until_second_disk | guest g1 pv "$(vhd xvda first.vhd)"
create g1
wait_console g1 'GUEST TICK' 60
tapdisk=$(pgrep -x tapdisk)
has_scope
has_no_rights
systemctl show --value --property Before "tapdisk-$tapdisk.scope" | grep -q xendomains.service ||
    fail "at shutdown nothing keeps the disk until its guest has ended"

step "statistics"
systemctl start xenio-metrics
metrics() {
    perl -MIO::Socket::UNIX -e '$s = IO::Socket::UNIX->new("/run/xenio-metrics/socket") or exit 1;
        print $s "GET /metrics HTTP/1.0\r\n\r\n"; print while <$s>' >metrics.txt && grep -q '^xenio_disk_info{.*first.vhd"} 1$' metrics.txt
}
within 20 "the disk in the statistics" metrics
grep '^xenio_disk_requests_total' metrics.txt

step "upgrade"
main=$(show MainPID)
metrics_pid=$(systemctl show --value --property MainPID xenio-metrics)
apt install /testbed/deb/next.deb | tee upgrade.log
grep -q 'the 1 disk(s) in use are served by the new version' upgrade.log
another_main || fail "the service was not restarted"
[ "$(pgrep -x tapdisk)" != "$tapdisk" ] || fail "the old tapdisk has stayed"
tapdisk=$(pgrep -x tapdisk)
[ "$(stat -L -c %i "/proc/$tapdisk/exe")" = "$(stat -c %i /usr/libexec/xenio/tapdisk)" ] ||
    fail "the disk is served by a program that is not the one installed"
has_scope
[ "$(systemctl show --value --property MainPID xenio-metrics)" != "$metrics_pid" ] || fail "the old program still serves the statistics"
within 20 "the disk in the statistics of the new version" metrics
goes_on "the upgrade"

step "a xenio that hangs"
main=$(show MainPID)
mkdir -p /run/systemd/system/xenio.service.d
printf '[Service]\nWatchdogSec=4s\n' >/run/systemd/system/xenio.service.d/soon.conf
systemctl daemon-reload
systemctl restart xenio
main=$(show MainPID)
kill -STOP "$main"
within 40 "a new xenio in the place of one that hangs" another_main
goes_on "a new xenio in the place of one that hung"

step "a tapdisk that dies"
kill -KILL "$tapdisk"
goes_on "the death of its tapdisk"
[ "$(pgrep -x tapdisk)" != "$tapdisk" ] || fail "the old tapdisk lives"
tapdisk=$(pgrep -x tapdisk)
has_no_rights

step "removal is refused"
! apt remove xenio >remove.log 2>&1 || fail "xenio was removed under a guest"
cat remove.log
grep -q 'these disks are in use' remove.log
grep -q 'first.vhd' remove.log
expect "the service's state" active show ActiveState
[ "$(pgrep -x tapdisk)" = "$tapdisk" ] || fail "the tapdisk has not stayed: $(pgrep -a -x tapdisk)"

xl block-attach g1 "script=block-xenio,$(vhd xvdb 'second: a disk.vhd')"
finish g1 60
assert_nothing_left
vhd-util check -n first.vhd

step "remove"
apt remove xenio
! pgrep -x xenio || fail "xenio has stayed"
! pgrep -x tap-ctl || fail "the statistics have stayed"
[ ! -e /usr/sbin/xenio ]
id xenio-tapdisk
