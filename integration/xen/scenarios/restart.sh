# about: xenio is killed and started again while a guest writes; then a second disk is attached
# limit: 240
. /testbed/dom0/busy-guest.sh
qemu-img convert -f raw -O vpc "$SRV/small.raw" first.vhd
qemu-img convert -f raw -O vpc "$SRV/small.raw" second.vhd
start_xenio
until_second_disk | guest g1 pv "$(vhd xvda first.vhd)"
create g1
wait_console g1 'GUEST TICK' 60
for signal in KILL TERM; do
    kill -$signal "$XENIO_PID"
    wait "$XENIO_PID" || true
    goes_on "SIG$signal to xenio"
    start_xenio
    goes_on "the start of a new xenio"
done
[ "$(pgrep -c -x tapdisk)" = 1 ] || fail "the tapdisk has not stayed: $(pgrep -a -x tapdisk)"
xl block-attach g1 "$(vhd xvdb second.vhd)"
finish g1 60
assert_nothing_left
vhd-util check -n first.vhd
