# about: pygrub takes kernel and initramfs from a partition of a VHD, which dom0 attaches for it; the guest then uses it
# limit: 240
. /testbed/dom0/disk-image.sh
modprobe xen-blkfront
start_xenio
# Without kernel= and ramdisk=, which pygrub finds, and with a word that only grub.cfg has.
guest g1 pv "$(vhd xvda disk.vhd)" <<'JOB'
set -e
grep -o 'testbed-word=[a-z]*' /proc/cmdline >/tmp/word
echo "GUEST BOOTED WITH $(cat /tmp/word)"
mount -t ext4 /dev/xvda1 /mnt
(cd /mnt/files && sha256sum -c SHA256SUMS >/dev/null)
dd if=/dev/urandom of=/mnt/files/new bs=1M count=8 2>/dev/null
(cd /mnt/files && sha256sum new >>SHA256SUMS)
umount /mnt
JOB
mkdir -p tree/boot/grub mnt
mount -o loop,ro "$SRV/small.raw" mnt
cp -r mnt tree/files
umount mnt
cp "$SRV/vmlinux" tree/boot/vmlinuz
cp g1.initrd tree/boot/initrd.img
cat >tree/boot/grub/grub.cfg <<'END_OF_CFG'
set timeout=1
menuentry 'Testbed' {
    linux /boot/vmlinuz console=hvc0 quiet mitigations=off testbed-word=found
    initrd /boot/initrd.img
}
END_OF_CFG
partitioned disk.raw tree 160
tap-img convert -f raw -O vhd disk.raw disk.vhd
sed -i -e '/^kernel = /d' -e '/^ramdisk = /d' -e '/^cmdline = /d' g1.cfg
echo 'bootloader = "pygrub"' >>g1.cfg
echo 'bootloader_args = [ "--quiet" ]' >>g1.cfg

create g1
wait_console g1 'GUEST BOOTED WITH testbed-word=found' 60
[ -z "$(xenstore-list "$BACKEND/0" 2>/dev/null)" ] || fail "the disk is still attached to dom0"
finish g1 60
assert_nothing_left
vhd-util check -n disk.vhd
raw_of disk.vhd seen.raw
mount -o "loop,ro,offset=$PARTITION_AT" seen.raw mnt
(cd mnt/files && sha256sum --quiet --check SHA256SUMS)
umount mnt

step "a kernel that is not there: xl says so and nothing is left"
sed -i 's/boot\/vmlinuz/boot\/wmlinuz/' tree/boot/grub/grub.cfg
partitioned other.raw tree 160
tap-img convert -f raw -O vhd other.raw disk2.vhd
sed -e 's/"g1"/"g2"/' -e 's/disk\.vhd/disk2.vhd/' g1.cfg >g2.cfg
! timeout 60 xl create g2.cfg >g2-create.log 2>&1 || fail "a guest without a kernel was created"
assert_nothing_left
