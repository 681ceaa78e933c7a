# about: tapdisks that may open files in one folder only: a chain, a snapshot, an upgrade and a crash there go well, images elsewhere are refused
# limit: 240
. /testbed/dom0/busy-guest.sh
cleanup() {
    rm -f /etc/xenio/disk-folders
}
trap cleanup EXIT
mkdir -p /etc/xenio images
echo "$WORK/images" >/etc/xenio/disk-folders
qemu-img convert -f raw -O vpc "$SRV/small.raw" images/parent.vhd
vhd-util snapshot -n images/disk.vhd -p images/parent.vhd
cp "$SRV/small.raw" images/second.raw
cp "$SRV/small.raw" elsewhere.raw
start_xenio
until_second_disk | guest g1 pv "$(vhd xvda images/disk.vhd)"
create g1
wait_console g1 'GUEST TICK' 60

! tap-ctl create -a "aio:$WORK/elsewhere.raw" 2>refused.log || fail "an image elsewhere was opened"
step "$(cat refused.log)"
grep -q 'Permission denied.*disk-folders' refused.log || fail "the reason is not told"
locate /disk.vhd
! tap-ctl snapshot -p "$pid" -m "$minor" -a "vhd:$WORK/elsewhere.vhd" 2>refused.log || fail "a snapshot was made elsewhere"
step "$(cat refused.log)"
goes_on "a snapshot that was refused"
tap-ctl snapshot -p "$pid" -m "$minor" -a "vhd:$WORK/images/child.vhd"
goes_on "a snapshot"
tap-ctl upgrade --all
goes_on "an upgrade"
kill -KILL "$(pgrep -x tapdisk)"
goes_on "a crash"

xl block-attach g1 "$(raw xvdb "$WORK/images/second.raw")"
finish g1 60
assert_nothing_left
vhd-util check -n images/child.vhd
