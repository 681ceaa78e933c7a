# about: xenstored is replaced while it runs (live update): the guest goes on, and disks come and go as before
# limit: 300
. /testbed/dom0/busy-guest.sh
busy_guest pv
cp "$SRV/small.raw" third.raw

daemon=$(cat /run/xen/xenstored.pid)
image() {
    readlink "/proc/$daemon/exe"
}
cp /usr/lib/xen-4.20/bin/xenstored /usr/lib/xen-4.20/bin/xenstored-next
for next in xenstored-next xenstored; do
    timeout 60 xenstore-control live-update -s "/usr/lib/xen-4.20/bin/$next"
    expect "the program of xenstored" "/usr/lib/xen-4.20/bin/$next" image
    goes_on "the update to $next"
    timeout 60 xl block-attach g1 "$(raw xvdc "$WORK/third.raw")"
    connected() { [ "$(backend g1 xvdc state)" = 4 ]; }
    within 30 "the third disk" connected
    timeout 60 xl block-detach g1 xvdc
    goes_on "a disk that came and went"
done
kill -0 "$XENIO_PID" || fail "xenio has ended"
finish_busy_guest
