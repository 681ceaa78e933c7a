# about: a Debian guest boots to its own init from a VHD and runs a job
# limit: 180
cp "$SRV/debian.vhd" disk.vhd
start_xenio
debian_guest g1 pv "$(vhd xvda disk.vhd)"
create g1
wait_console g1 'GUEST DEBIAN 13.* on /dev/xvda ext4, init is /usr/sbin/init' 60
finish g1 120
assert_nothing_left
vhd-util check -n disk.vhd
raw_of disk.vhd disk.raw
mkdir mnt
mount -o loop,ro disk.raw mnt
[ -s mnt/root/sums ] || fail "what the job wrote is not on the disk"
umount mnt
