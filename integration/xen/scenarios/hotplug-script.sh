# about: our own hotplug script: names with blanks and colons, types that libxl does not know, who uses an image
# limit: 180
vhd_file='a disk: the first.vhd'
qcow2_file='second, with "quotes".qcow2'
qemu-img convert -f raw -O vpc "$SRV/small.raw" "./$vhd_file"
qemu-img convert -f raw -O qcow2 "$SRV/small.raw" "./$qcow2_file"
start_xenio
ours() {
    echo "script=block-xenio,backendtype=tap,$1"
}
job() {
    cat <<'JOB'
set -e
for disk in xvda xvdb; do
    mkdir /$disk
    mount -t ext4 $([ $disk = xvda ] || echo -o ro,noload) /dev/$disk /$disk
    (cd /$disk && sha256sum -c SHA256SUMS >/dev/null)
done
! dd if=/dev/zero of=/dev/xvdb bs=4k count=1 conv=fsync 2>/dev/null
echo "GUEST VERIFIED"
read -r word
umount /xvda /xvdb
JOB
}
first=$(ours "format=vhd,vdev=xvda,access=rw,target=$WORK/$vhd_file")
second=$(ours "format=raw,vdev=xvdb,access=ro,target=qcow2:$WORK/$qcow2_file")
job | guest g1 pv "$first" "$second"
create g1
wait_console g1 'GUEST VERIFIED' 60
# Whatever the guest does: the image of a read-only disk is not open for writing. Of the flags, octal, 2 is O_RDWR.
found=
for descriptor in $(pgrep -x tapdisk | sed 's,.*,/proc/&/fd/*,'); do
    [ "$(readlink "$descriptor")" = "$WORK/$qcow2_file" ] || continue
    found=yes
    flags=$(awk '$1 == "flags:" { print $2 }' "${descriptor/fd/fdinfo}")
    [ $((0$flags & 3)) = 0 ] || fail "a read-only disk's image is open with the flags $flags"
done
[ "$found" ] || fail "nobody has the read-only disk's image open"

guest g2 pv "$first" </dev/null
! timeout 60 xl create g2.cfg >g2.log 2>&1 || fail "two guests have one image"
cat g2.log
grep -q "$vhd_file.*it is xvda of guest g1" g2.log || fail "the message does not say who uses the image"
within 20 "end of guest g2" gone g2
! xl block-attach g1 "$(ours 'format=raw,vdev=xvdc,access=rw,target=nonsense')" >target.log 2>&1
grep -q 'neither an absolute path nor TYPE:PATH' target.log || fail "the message does not say what is wrong"
[ "$(pgrep -c -x tapdisk)" = 2 ] || fail "not two tapdisks for two disks: $(pgrep -a -x tapdisk)"

type_to g1 end
finish g1 60
assert_nothing_left
vhd-util check -n "./$vhd_file"
qemu-img check -f qcow2 "./$qcow2_file"
