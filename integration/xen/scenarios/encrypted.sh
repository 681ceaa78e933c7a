# about: a guest on an encrypted VHD, whose key the administrator gives to tap-ctl; the file shows nothing of its data
# limit: 200
head -c 64 /dev/urandom >'disk,aes-xts-plain,512.key'
vhd-util create -n disk.vhd -s 64
vhd-util key -s -n disk.vhd -k "$WORK/disk,aes-xts-plain,512.key"
start_xenio

# with_key: the disk is served before the guest comes; block-tap finds it.
with_key() {
    tap-ctl create -a "vhd:$WORK/disk.vhd" -E <'disk,aes-xts-plain,512.key' >/dev/null
}

! tap-ctl create -a "vhd:$WORK/disk.vhd" 2>no-key.log || fail "an encrypted image was opened without its key"
! head -c 64 /dev/urandom | tap-ctl create -a "vhd:$WORK/disk.vhd" -E 2>wrong-key.log || fail "any key opens the image"
assert_nothing_left

with_key
guest g1 pv "$(vhd xvda disk.vhd)" <<'JOB'
set -e
yes 'a line that must not be found in the image' | head -c 16777216 >/tmp/data
dd if=/tmp/data of=/dev/xvda bs=1M oflag=direct 2>/dev/null
dd if=/dev/urandom of=/dev/xvda bs=1M seek=32 count=8 oflag=direct 2>/dev/null
sync
echo "GUEST SUM $(dd if=/dev/xvda bs=1M iflag=direct 2>/dev/null | sha256sum | cut -c 1-64)"
JOB
create g1
finish g1 60
assert_nothing_left
! grep -a -q 'a line that must not be found' disk.vhd || fail "the guest's data is in the file as it is"
vhd-util check -n disk.vhd

with_key
guest g2 pv "$(vhd xvda disk.vhd)" <<'JOB'
set -e
dd if=/dev/xvda bs=1M count=16 iflag=direct 2>/dev/null | grep -c 'a line that must not' >/tmp/lines
echo "GUEST LINES $(cat /tmp/lines)"
echo "GUEST SUM $(dd if=/dev/xvda bs=1M iflag=direct 2>/dev/null | sha256sum | cut -c 1-64)"
JOB
create g2
finish g2 60
assert_nothing_left
expect "the sum that the second guest sees" "$(said g1 'GUEST SUM')" said g2 'GUEST SUM'
