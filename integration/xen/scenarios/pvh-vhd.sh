# about: the same as pv-vhd with a PVH guest
# limit: 300
. /testbed/dom0/vhd-guest.sh
vhd_guest pvh
