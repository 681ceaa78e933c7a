# about: SeaBIOS and GRUB boot an HVM guest from a VHD through emulated AHCI; its kernel then takes the disk over by its ring
# extra: make test-full
# limit: 900
. /testbed/dom0/disk-image.sh
start_xenio
LOOK_EVERY=3
# SeaBIOS reads an IDE disk word by word: the kernel was not loaded after ten minutes.
GUEST_MEMORY=256 GUEST_CONFIG='hdtype = "ahci"'
booted_guest hvm "$(vhd hda disk.vhd)"
boot_tree
cp "$SRV/vmlinuz" g1.initrd tree/boot/
cat >tree/boot/grub/grub.cfg <<'END_OF_CFG'
serial --unit=0
terminal_output serial
linux /boot/vmlinuz console=ttyS0 quiet mitigations=off testbed-word=found
initrd /boot/g1.initrd
boot
END_OF_CFG
partitioned disk.raw tree 120
dd if="$SRV/grub.boot" of=disk.raw conv=notrunc status=none
dd if="$SRV/grub.core" of=disk.raw bs=512 seek=1 conv=notrunc status=none
tap-img convert -f raw -O vhd disk.raw disk.vhd
echo 'boot = "c"' >>g1.cfg

create g1
wait_console g1 'GUEST BOOTED WITH testbed-word=found' 600
expect "the state of the guest's ring" 4 frontend g1 hda state
finish_booted_guest 200 disk.vhd
