# about: a flush fails: the guest never learns that its data is safe, and the device says why
# limit: 180
modprobe null_blk nr_devices=0
mount -t configfs configfs /sys/kernel/config 2>/dev/null || true
device=/sys/kernel/config/nullb/nullbad
mkdir "$device"
echo 1 >"$device/memory_backed"
echo 32 >"$device/size"
echo 1 >"$device/power"
# Writes go to the page cache of the loop device and succeed; only a flush finds out what the device makes of them.
loop=$(losetup -f --show --direct-io=off /dev/nullbad)
start_xenio
guest g1 pv "$(raw xvda "$loop")" <<'JOB'
set -e
dd if=/dev/urandom of=/dev/xvda bs=4k count=16 conv=fsync 2>/dev/null
echo "GUEST FLUSHED"
read -r go
(dd if=/dev/urandom of=/dev/xvda bs=4k count=16 conv=fsync && echo "GUEST BELIEVES THAT ITS DATA IS SAFE") 2>/dev/null &
wait
echo "GUEST HAD AN ERROR"
read -r go
JOB
create g1
wait_console g1 'GUEST FLUSHED' 60
echo "+0-65535" >"$device/badblocks"
type_to g1 go
closing() { [ "$(backend g1 xvda state)" -ge 5 ]; }
within 60 "the device's end" closing
reason=$(xenstore-read "/local/domain/0/error/backend/vbd3/$(domid g1)/51712/error")
step "error node: $reason"
[ -n "$reason" ] || fail "there is no error node"
! says g1 BELIEVES || fail "the guest was told that its data is safe"
xl destroy g1
assert_nothing_left
losetup -d "$loop"
