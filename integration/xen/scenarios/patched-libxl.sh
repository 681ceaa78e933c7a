# about: libxl with the patches of libxl-patch: format=qcow2 for backendtype=tap, and no tapdisk stays behind where xenio is gone
# extra: make test-full
# libxl: 4.20
# limit: 300
qemu-img convert -f raw -O qcow2 "$SRV/small.raw" disk.qcow2
qemu-img convert -f raw -O vpc "$SRV/small.raw" disk.vhd
start_xenio
job() {
    cat <<'JOB'
set -e
mount -t ext4 /dev/xvda /mnt
cd /mnt
sha256sum -c SHA256SUMS >/dev/null
echo "GUEST VERIFIED"
dd if=/dev/urandom of=new bs=1M count=4 2>/dev/null
sha256sum new >>SHA256SUMS
cd /
umount /mnt
read -r word
JOB
}
job | guest g1 pv "backendtype=tap,format=qcow2,vdev=xvda,access=rw,target=$WORK/disk.qcow2"

step "Debian's libxl refuses the format"
! timeout 60 xl create g1.cfg >refused.log 2>&1 || fail "the libxl of Debian takes format=qcow2 for backendtype=tap"
cat refused.log
within 20 "end of guest g1" gone g1

step "the patched libxl"
export LD_LIBRARY_PATH=/testbed/libxl
create g1
wait_console g1 'GUEST VERIFIED' 60
grep -q ' /testbed/libxl/libxenlight.so' "/proc/$(pgrep -f '^/usr/lib/xen-4[.0-9]*/bin/xl create')/maps" ||
    fail "xl does not use the patched libxl"
tap-ctl list
expect "the disk's type" qcow2 sh -c "tap-ctl list | sed -n 's/.* args=\([a-z0-9]*\):.*/\1/p'"
type_to g1 end
finish g1 60
assert_nothing_left
qemu-img check -f qcow2 disk.qcow2
qemu-img convert -f qcow2 -O raw disk.qcow2 disk.raw
verify_files disk.raw

step "a guest is destroyed while there is no xenio"
job | guest g2 pv "$(vhd xvda disk.vhd)"
create g2
wait_console g2 'GUEST VERIFIED' 60
stop_xenio
pgrep -x tapdisk >/dev/null || fail "the tapdisk did not outlive xenio"
timeout 90 xl destroy g2
within 20 "end of guest g2" gone g2
assert_nothing_left
vhd-util check -n disk.vhd
