# about: SeaBIOS and GRUB boot an HVM guest from a VHD through emulated AHCI; its kernel then takes the disk over by its ring
# extra: make test-full
# limit: 900
. /testbed/dom0/disk-image.sh
start_xenio
LOOK_EVERY=3
# SeaBIOS reads an IDE disk word by word: the kernel was not loaded after ten minutes.
GUEST_MEMORY=256 GUEST_CONFIG='hdtype = "ahci"'
guest g1 hvm "$(vhd hda disk.vhd)" <<'JOB'
set -e
grep -o 'testbed-word=[a-z]*' /proc/cmdline >/tmp/word
while [ ! -b /dev/xvda1 ]; do usleep 50000; done
echo "GUEST BOOTED WITH $(cat /tmp/word)"
mount -t ext4 /dev/xvda1 /mnt
(cd /mnt/files && sha256sum -c SHA256SUMS >/dev/null)
dd if=/dev/urandom of=/mnt/files/new bs=1M count=8 2>/dev/null
(cd /mnt/files && sha256sum new >>SHA256SUMS)
umount /mnt
echo "GUEST WROTE"
JOB
mkdir -p tree/boot/grub mnt
mount -o loop,ro "$SRV/small.raw" mnt
cp -r mnt tree/files
umount mnt
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
sed -i -e '/^kernel = /d' -e '/^ramdisk = /d' -e '/^cmdline = /d' g1.cfg
echo 'boot = "c"' >>g1.cfg

create g1
wait_console g1 'GUEST BOOTED WITH testbed-word=found' 600
expect "the state of the guest's ring" 4 frontend g1 hda state
finish g1 200
assert_nothing_left
vhd-util check -n disk.vhd
raw_of disk.vhd seen.raw
mount -o "loop,ro,offset=$PARTITION_AT" seen.raw mnt
(cd mnt/files && sha256sum --quiet --check SHA256SUMS)
umount mnt
