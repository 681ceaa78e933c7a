# about: pygrub takes kernel and initramfs from a partition of a VHD, which dom0 attaches for it; the guest then uses it
# limit: 240
. /testbed/dom0/disk-image.sh
modprobe xen-blkfront
start_xenio
# Without kernel= and ramdisk=, which pygrub finds, and with a word that only grub.cfg has.
booted_guest pv "$(vhd xvda disk.vhd)"
boot_tree
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
echo 'bootloader = "pygrub"' >>g1.cfg
echo 'bootloader_args = [ "--quiet" ]' >>g1.cfg

create g1
wait_console g1 'GUEST BOOTED WITH testbed-word=found' 60
[ -z "$(xenstore-list "$BACKEND/0" 2>/dev/null)" ] || fail "the disk is still attached to dom0"
finish_booted_guest 60 disk.vhd

step "a kernel that is not there: xl says so and nothing is left"
sed -i 's/boot\/vmlinuz/boot\/wmlinuz/' tree/boot/grub/grub.cfg
partitioned other.raw tree 160
tap-img convert -f raw -O vhd other.raw disk2.vhd
sed -e 's/"g1"/"g2"/' -e 's/disk\.vhd/disk2.vhd/' g1.cfg >g2.cfg
! timeout 60 xl create g2.cfg >g2-create.log 2>&1 || fail "a guest without a kernel was created"
assert_nothing_left
