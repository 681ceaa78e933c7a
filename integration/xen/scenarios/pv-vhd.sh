# about: a PV guest verifies 2500 files on a VHD and writes 64 MiB, which qemu-img then reads
# limit: 400
. /testbed/dom0/vhd-guest.sh
vhd_guest pv
