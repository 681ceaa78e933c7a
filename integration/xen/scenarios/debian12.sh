# about: Debian 12: its Xen 4.17, kernel and dom0, with patched libxl: pv-vhd, hotplug and patched-libxl once more
# extra: make test-full
# machine: debian12
# libxl: 4.17
# limit: 900
expect "the release of Xen" 4.17 sh -c "xl info | sed -n 's/^xen_version *: \([0-9]*\.[0-9]*\).*/\1/p'"

step "Debian's libxl knows no backendtype=tap"
cp "$SRV/small.raw" disk.raw
true | guest g1 pv "$(raw xvda "$WORK/disk.raw")"
! timeout 60 xl create g1.cfg >refused.log 2>&1 || fail "the libxl of Debian takes backendtype=tap"
cat refused.log
grep -q 'no suitable backend for disk xvda' refused.log
within 20 "end of guest g1" gone g1

# Each empties this folder, and finds the machine as when it runs alone.
as_alone() {
    step "scenario $1"
    cd /
    bash /testbed/dom0/scenario.sh "$1"
    bash /testbed/dom0/reset.sh 0
}
LD_LIBRARY_PATH=/testbed/libxl as_alone pv-vhd
LD_LIBRARY_PATH=/testbed/libxl as_alone hotplug
# This one shows the difference, and chooses the library itself.
as_alone patched-libxl
